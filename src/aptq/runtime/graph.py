"""Decoding with a cache of fixed size: one step is one CUDA graph, launched as a whole.

A step of a small batch is hundreds of launches that each take less time than Python needs for
them; a graph has them all ready.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from aptq.model.normalise import Experts
from aptq.runtime.attention import attending
from aptq.runtime.stack import stack, watched

LEAST = 8  # tokens to write: capturing costs about as much as a few steps without a graph
WIDEST = 64  # windows at once: wider steps keep a GPU busy, and their caches should grow instead
EVEN = 16  # lengths of masks that attention on a GPU reads as they are; others it copies first


class Static:
    """Logits of the next token [batch, rows] after ids [batch, n]: first a prompt, then tokens.

    The first token after the prompt runs as it is, which also prepares kernels; from the second on
    a CUDA device replays the graph of a step.  What is returned is overwritten by the next call.
    Layers of the model that the prompt shows to read the same tensor are stacked, for good.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch: int,
        length: int,
        *,
        compiled: bool = False,
        apart: bool = False,
    ) -> None:
        """compiled: torch.compile what runs for a token, which takes its time at the first one.

        apart: stack nothing that is not stacked already.
        """
        on = {"device": model.device, "dtype": torch.int64}
        room = -(-length // EVEN) * EVEN
        self.model, self.length, self.seen, self.apart = model, length, 0, apart
        self.forward = torch.compile(model, dynamic=False) if compiled else model
        with torch.inference_mode(False):  # or only inference mode could change them
            self.cache = StaticCache(config=model.config, max_cache_len=room)
            self.token, self.position = torch.zeros(batch, 1, **on), torch.zeros(1, 1, **on)
            self.places = torch.arange(room, **on)
        self.least = torch.finfo(model.dtype).min
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits = torch.empty(0)
        self.captures = model.device.type == "cuda"
        self.read: list[Tensor] = []  # what the graph reads stays, whatever becomes of the model

    # inference mode counts no versions of tensors, by which stacked layers know their input again
    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """ids int64 [batch, n] on the model's device."""
        self.seen += ids.shape[1]
        assert self.seen <= self.length, f"{self.seen} tokens, room for {self.length}"
        if self.seen == ids.shape[1]:
            return self._prompt(ids)
        warm = self.logits.numel() > 0
        self.token.copy_(ids)
        if self.graph is None and self.captures and warm:
            self._capture()
        if self.graph is None:
            self.logits = self._step()
        else:
            self.graph.replay()
        return self.logits

    def _prompt(self, ids: Tensor) -> Tensor:
        self.position.fill_(ids.shape[1])
        with watched(self.model) as found:
            out = self.model(
                input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )
        if not self.apart:
            stack(found)
        return out.logits[:, -1]

    def _step(self) -> Tensor:
        """One token further; all that changes lies in tensors that stay where they are."""
        # made here, not by transformers, whose ways to leave masks out look at values
        hidden = (self.places > self.position).to(self.model.dtype) * self.least
        try:
            with attending(self.model):
                out = self.forward(
                    input_ids=self.token,
                    position_ids=self.position.expand_as(self.token),
                    attention_mask=hidden.expand(len(self.token), 1, 1, -1),
                    past_key_values=self.cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
        except torch._dynamo.exc.TorchDynamoException as error:
            cause = " ".join(str(error).partition("\n\n")[0].split())  # then come torch's own hints
            raise ValueError(
                f"torch cannot compile a step of this model here\n{cause or type(error).__name__}\n"
                "leave compiling out, or see to what is missing: it needs a C compiler"
            ) from error
        self.position.add_(1)
        return out.logits[:, -1]

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self.model.device), torch.cuda.graph(graph):
                self.logits = self._step()
            self.graph = graph
            self.read = [*self.model.parameters(), *self.model.buffers()]
        except RuntimeError:  # a module that looks at values on the host: steps run one by one
            self.captures = False
            torch.cuda.synchronize(self.model.device)


def applies(model: PreTrainedModel, batch: int, count: int) -> bool:
    """Is a step of this model a graph that pays?"""
    return hindrance(model, batch, count) is None


def hindrance(model: PreTrainedModel, batch: int, count: int) -> str | None:
    """Why `count` steps of `batch` windows do not become a graph; None where they do."""
    if model.device.type != "cuda":
        return f"the model is on {model.device.type}, not on a CUDA device"
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return "the model lies on several devices"
    if batch > WIDEST:
        return f"{batch} windows at once, {WIDEST} at most"
    if count < LEAST:
        return f"{count} tokens to write, {LEAST} at least"
    if not holds(model):
        return f"{model.config.model_type} has caches, masks or experts that no graph holds"
    return None


def holds(model: PreTrainedModel) -> bool:
    """Can Static run the model: masks as numbers, plain caches, nothing routed on the host?"""
    layers = StaticCache(config=model.config, max_cache_len=1).layers
    return (
        model._can_compile_fullgraph
        and model.config._attn_implementation in ("sdpa", "eager")
        and all(type(layer) is StaticLayer for layer in layers)
        and not any(isinstance(module, Experts) for module in model.modules())
    )
