"""The one attention seam: softmax attention in numbers, and what a module calls it with.

While `heard` is open, a module that goes through transformers' AttentionInterface runs on
Attention.attend: differentiable, and never holding more than `chunk` attention probabilities.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedConfig

NAME = "aptq"  # of our function in the AttentionInterface
CHUNK = 1 << 24  # attention probabilities held at once: 64 MiB in float32
# tensors that models hand to attention functions: sinks, and what changes nothing here
_KNOWN = ("s_aux", "position_ids", "cache_position", "position_embeddings", "attention_mask")


@dataclass(frozen=True, eq=False)
class Attention:
    """What one attention function was called with, q and k after rotary and q/k-norm.

    Query head h reads KV head h // (heads // kv).  Without a mask, `causal` says whether later
    keys are hidden; `window` (None: all) hides keys that many tokens back.
    """

    q: Tensor  # [batch, heads, T, e]
    k: Tensor  # [batch, kv, T, e]
    v: Tensor  # [batch, kv, T, f]
    scaling: float
    mask: Tensor | None = None  # [batch | 1, heads | 1, T, T]: bool, True = seen; else added
    causal: bool = True
    window: int | None = None
    softcap: float | None = None  # scores become softcap * tanh(scores / softcap)
    sinks: Tensor | None = None  # [heads]: scores of a key without a value
    chunk: int = CHUNK

    @property
    def kv(self) -> int:
        """Number of KV heads."""
        return self.k.shape[1]

    def detached(self) -> "Attention":
        """The same numbers without their graph."""
        return replace(self, q=self.q.detach(), k=self.k.detach(), v=self.v.detach())

    def heads(self, group: int) -> slice:
        """The query heads that read KV head `group`."""
        size = self.q.shape[1] // self.kv
        return slice(group * size, (group + 1) * size)

    def chunks(self, width: int = 0) -> Iterator[slice]:
        """Slices of queries, so that [batch, heads of a group, queries, T | width] fits."""
        batch, heads, length, _ = self.q.shape
        step = max(1, self.chunk // (batch * (heads // self.kv) * max(length, width)))
        for start in range(0, length, step):
            yield slice(start, min(start + step, length))

    def rows(self, group: int, queries: slice) -> tuple[Tensor, Tensor]:
        """Probabilities a [batch, heads of the group, queries, T], and a with the slope of softcap.

        In float32 or wider.  d a_s = tilt_s ds_s - a_s sum_r tilt_r ds_r for raw scores s.
        """
        wide = torch.promote_types(self.q.dtype, torch.float32)
        q, k = self.q[:, self.heads(group), queries].to(wide), self.k[:, group, None].to(wide)
        scores = (q @ k.mT) * self.scaling
        slope = None
        if self.softcap is not None:
            scores = (scores / self.softcap).tanh()
            slope = 1 - scores.square()
            scores = scores * self.softcap
        scores = self._masked(scores, group, queries)
        if self.sinks is not None:
            sinks = self.sinks[self.heads(group)].to(wide).view(1, -1, 1, 1)
            scores = torch.cat([scores, sinks.expand(*scores.shape[:3], 1)], -1)
        a = scores.softmax(-1)[..., : k.shape[2]]
        return a, a if slope is None else a * slope

    def _masked(self, scores: Tensor, group: int, queries: slice) -> Tensor:
        if self.mask is None:
            t = torch.arange(queries.start, queries.stop, device=scores.device)[:, None]
            s = torch.arange(scores.shape[-1], device=scores.device)
            seen = (s <= t) | (not self.causal)
            if self.window is not None:
                seen &= t - s < self.window
            return scores.masked_fill(~seen, -torch.inf)
        heads = self.heads(group) if self.mask.shape[1] > 1 else slice(None)
        mask = self.mask[:, heads, queries, : scores.shape[-1]]
        if mask.dtype == torch.bool:
            return scores.masked_fill(~mask, -torch.inf)
        return scores + mask

    def attend(self) -> Tensor:
        """The heads' outputs [batch, T, heads, f]; rows are computed again for the backward."""

        def part(group: int, queries: slice) -> Tensor:
            a, _ = self.rows(group, queries)
            return a @ self.v[:, group, None].to(a.dtype)

        again = partial(checkpoint, part, use_reentrant=False, preserve_rng_state=False)
        found = [
            torch.cat([again(group, queries) for queries in self.chunks()], dim=2)
            for group in range(self.kv)
        ]
        return torch.cat(found, 1).to(self.v.dtype).transpose(1, 2)


def _closed(*_: object, **__: object) -> tuple[Tensor, None]:
    raise AssertionError("the attention seam is closed")


@contextmanager
def heard(
    module: nn.Module, hear: Callable[[Attention, Tensor], None], chunk: int
) -> Iterator[None]:
    """Run the attention inside `module` on Attention.attend; `hear` gets every call and output.

    Masks are made before a block runs, so they are what the model's own implementation takes:
    None (hidden by causality, except in eager attention), bool, or numbers to add.  Raises
    ValueError where the attention function is given a tensor that it does not know.
    """
    configs = {
        id(config): config
        for child in module.modules()
        if isinstance(config := vars(child).get("config"), PreTrainedConfig)
    }
    before = {key: config._attn_implementation for key, config in configs.items()}

    def function(
        caller: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **given: Any
    ) -> tuple[Tensor, None]:
        _refuse_unknown(caller, given)
        own, causal = before[id(vars(caller)["config"])], given.get("is_causal")
        causal = vars(caller).get("is_causal", True) if causal is None else causal
        scaling = q.shape[-1] ** -0.5 if given.get("scaling") is None else given["scaling"]
        window, softcap, sinks = map(given.get, ("sliding_window", "softcap", "s_aux"))
        causal = causal and own != "eager"
        call = Attention(q, k, v, scaling, mask, causal, window, softcap, sinks, chunk)
        output = call.attend()
        hear(call, output)
        return output, None

    AttentionInterface.register(NAME, function)
    try:
        for config in configs.values():
            config._attn_implementation = NAME
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]
        AttentionInterface.register(NAME, _closed)


def _refuse_unknown(caller: nn.Module, given: dict[str, Any]) -> None:
    unknown = [n for n, x in given.items() if isinstance(x, Tensor) and n not in _KNOWN]
    if unknown:
        raise ValueError(
            "an attention is not understood well enough to see through it\n"
            f"{type(caller).__name__} calls its attention function with {', '.join(unknown)}\n"
            "use a recipe without attention statistics for this model"
        )
