"""Tokens a second of transformers models side by side: prefill, decoding by batch, memory held.

Models take turns, case by case, and ratios are taken within a turn: what else the machine does at
that moment hits both.  Medians are of the turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[int, int], None]  # (measurements done, in all)
GROUPS = (128, 64, 32)  # of torch's int4, the widest that divides a layer first


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of every model."""

    batches: tuple[int, ...] = (1, 8, 32)  # one reader, a few, many
    prompt: int = 512  # tokens of the prefill, at batch 1
    context: int = 16  # tokens before the first decoded one: decoding is measured, not attention
    tokens: int = 32  # decoded in one measurement; the median step counts
    turns: int = 5  # an odd number has a median that was measured
    seed: int = 0  # of the random prompts


@dataclass(frozen=True)
class Row:
    """One model in one case: tokens/s of every turn, and what they are of the reference's."""

    model: str
    case: str  # "prefill" or "decode"
    batch: int
    rates: tuple[float, ...]
    ratios: tuple[float, ...]

    @property
    def rate(self) -> float:
        """Median tokens/s."""
        return statistics.median(self.rates)

    @property
    def ratio(self) -> float:
        """Median of the ratios to the reference in the same turn."""
        return statistics.median(self.ratios)

    def to_json(self) -> dict[str, Any]:
        """Everything, with the medians."""
        return {**asdict(self), "rate": self.rate, "ratio": self.ratio}


def compare(
    models: Mapping[str, PreTrainedModel],
    reference: str,
    load: Load = Load(),
    report: Progress = lambda _done, _total: None,
) -> list[Row]:
    """Measure all models, which are in memory together, in turns; ratios are to `reference`."""
    cases = [("prefill", 1), *(("decode", batch) for batch in load.batches)]
    rates: dict[tuple[str, str, int], list[float]] = {}
    for model in models.values():  # compiles, repacks and allocates
        prefill(model, load)
        decode(model, 1, load)
    total = load.turns * len(cases) * len(models)
    report(0, total)
    for turn in range(load.turns):
        # every second turn backwards: nobody always follows the same one
        names = list(models)[:: 1 if turn % 2 == 0 else -1]
        for case, batch in cases:
            for name in names:
                model = models[name]
                rate = prefill(model, load) if case == "prefill" else decode(model, batch, load)
                rates.setdefault((name, case, batch), []).append(rate)
                report(sum(map(len, rates.values())), total)
    return [
        Row(name, case, batch, tuple(own), tuple(a / b for a, b in zip(own, base, strict=True)))
        for case, batch in cases
        for name in models
        for own, base in [(rates[name, case, batch], rates[reference, case, batch])]
    ]


@torch.inference_mode()
def prefill(model: PreTrainedModel, load: Load) -> float:
    """Tokens/s of one forward pass over a prompt."""
    ids = _prompt(model, 1, load.prompt, load.seed)
    start = _now(model)
    model(input_ids=ids, use_cache=True, logits_to_keep=1)
    return load.prompt / (_now(model) - start)


@torch.inference_mode()
def decode(model: PreTrainedModel, batch: int, load: Load) -> float:
    """Tokens/s of greedy decoding: batch over the median step, the prompt not counted."""
    step, past, seconds = _prompt(model, batch, load.context, load.seed), None, []
    for _ in range(load.tokens + 1):
        start = _now(model)
        out = model(input_ids=step, past_key_values=past, use_cache=True, logits_to_keep=1)
        past, step = out.past_key_values, out.logits[:, -1].argmax(-1)[:, None]
        seconds.append(_now(model) - start)
    return batch / statistics.median(seconds[1:])


def resident(model: nn.Module) -> int:
    """Bytes of all distinct storages of parameters and buffers: tied tensors count once."""
    tensors = [*model.parameters(), *model.buffers()]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(held.values())


class TorchInt4(nn.Module):
    """torch's own int4 product, with weights rounded to nearest: a peer's speed, not quality.

    w = (code - 8) * scale + shift in groups.  Raises ValueError for a layer that it cannot hold.
    """

    packed: Tensor
    affine: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        out, columns = weight.shape
        self.group = next((group for group in GROUPS if columns % group == 0), 0)
        on_cpu = weight.device.type == "cpu"
        if not self.group or out % 16 or (not on_cpu and columns % 128):
            raise ValueError(
                f"torch's int4 cannot hold this layer\nits weight is {out} x {columns}\n"
                "leave it as it is"
            )
        groups = weight.view(out, -1, self.group)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale = ((high - low) / 15).clamp_min(1e-8)
        codes = ((groups - low) / scale).round().clamp(0, 15).int().view(out, columns)
        affine = torch.cat([scale, low + 8 * scale], -1).transpose(0, 1).bfloat16().contiguous()
        if on_cpu:
            packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
        else:
            pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8)
            packed = torch._convert_weight_to_int4pack(pairs, 8)
        self.register_buffer("packed", packed, persistent=False)
        self.register_buffer("affine", affine, persistent=False)
        self.bias, self.out_features = linear.bias, out

    def forward(self, x: Tensor) -> Tensor:
        """x bfloat16 [..., in] -> [..., out]."""
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if x.is_cpu:
            y = torch._weight_int4pack_mm_for_cpu(rows, self.packed, self.group, self.affine)
        else:
            y = torch._weight_int4pack_mm(rows, self.packed, self.group, self.affine)
        y = y.view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def with_torch_int4(model: PreTrainedModel) -> int:
    """Put torch's int4 in place of the linears of `model` but the head; how many it can hold."""
    head, done = model.get_output_embeddings(), 0
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            try:
                model.set_submodule(name, TorchInt4(module))
            except ValueError:
                continue
            done += 1
    return done


def _prompt(model: PreTrainedModel, batch: int, length: int, seed: int) -> Tensor:
    rows = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, rows, (batch, length), generator=generator).to(model.device)


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
