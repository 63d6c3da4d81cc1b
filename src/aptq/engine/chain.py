"""Chain: a whole compressed model under training; exact gradients, in the memory there is.

The forward keeps every block's input; the backward visits the blocks from the last to the first,
runs each again with gradients and hands on the gradient of its input.  Where the blocks do not
fit on the device together each is brought there for its turn, and parameters stay on the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from aptq.engine.capture import CapturedHalves, steady
from aptq.engine.compressed import Compressed
from aptq.engine.knobs import Knobs
from aptq.engine.stream import Stream, free_bytes
from aptq.engine.tail import logits, pieces

ROOM = 1 << 31  # bytes of logits and what they need at a time on a GPU; small ones are slow there
SPARE = 0.5  # of the free memory is for the blocks; the rest for states, logits, one block's graph


class Chain:
    """Blocks with knobs, the inputs of the first and the original's last hidden states."""

    def __init__(
        self, compressed: Compressed, knobs: Sequence[Knobs], stream: Stream, wanted: Stream
    ) -> None:
        """stream: what enters block 0; wanted: the last states of the original."""
        self.compressed, self.knobs, self.stream = compressed, knobs, stream
        self.model, self.device = compressed.model, compressed.device
        self.wanted, self.ids = wanted, compressed.ids.to(self.device)
        self.captured: CapturedHalves | None = None
        held = sum(_bytes(own) for own in knobs)
        # gradients, two moments and a copy of the best come on top of what is there
        trained = sum(p.nbytes for own in knobs for p in own.parameters())
        self.parked = self.device.type == "cuda" and 4 * trained > SPARE * free_bytes(self.device)
        self.parked = self.parked or held > SPARE * (free_bytes(self.device) + held)
        if self.parked and self.device.type == "cuda":
            for own in knobs:
                _move(own, torch.device("cpu"))
        self.model.load_outer(self.device)

    def close(self) -> None:
        """Free what the tail needs."""
        self.model.unload_outer()

    @contextmanager
    def _here(self, own: Knobs) -> Iterator[None]:
        if self.parked:
            _move(own, self.device)
        yield
        if self.parked:
            _move(own, torch.device("cpu"))

    def _run(self, own: Knobs, x: Tensor) -> Tensor:
        values, module = own.tensors(), own.block.module
        call = self.stream.calls[own.block.index][len(x)].at(x)
        return call.run(lambda *a, **k: functional_call(module, values, a, k))

    def gradients(self, windows: Tensor) -> Tensor:
        """The mean KL of a batch in nats per token, with its gradients in the knobs' parameters.

        They had none.  On a GPU where all steps are alike the blocks' part is recorded.
        """
        if self.parked or not steady(self.knobs, [self.stream.hidden, self.wanted.hidden]):
            states = self._forward(windows)
            loss, grad = self._tail(states[-1], windows)
            self._backward(states, grad)
            return loss
        if self.captured is None:
            found = [p for own in self.knobs for p in own.parameters()]
            work = (self._forward, self._tail, self._backward)
            self.captured = CapturedHalves(*work, found, windows, self.device)
        return self.captured(windows)

    def _forward(self, windows: Tensor) -> list[Tensor]:
        """What enters each block, and what leaves the last."""
        states = [self._inputs(windows)]
        with torch.no_grad():
            for own in self.knobs:
                with self._here(own):
                    states.append(self._run(own, states[-1]))
        return states

    def _backward(self, states: Sequence[Tensor], grad: Tensor) -> None:
        """From the gradient of what leaves the last block to those of the parameters."""
        for own, entered in reversed(list(zip(self.knobs, states[:-1], strict=True))):
            x = entered.detach().requires_grad_()
            with self._here(own), torch.enable_grad():
                torch.autograd.backward([self._run(own, x)], [grad])
            assert x.grad is not None
            grad = x.grad

    @torch.no_grad()
    def measure(self, windows: Tensor, size: int) -> float:
        """Mean KL in nats per token of windows with what would be stored."""
        total = 0.0
        for part in torch.split(windows, size):
            x = self._inputs(part)
            for own in self.knobs:
                own.eval()
                with self._here(own):
                    x = self._run(own, x)
                own.train()
            total += float(self._tail(x, part, backward=False)[0]) * len(part)
        return total / len(windows)

    def _inputs(self, windows: Tensor) -> Tensor:
        hidden = self.stream.hidden
        return hidden[windows.to(hidden.device)].to(self.device)

    def _tail(self, x: Tensor, windows: Tensor, *, backward: bool = True) -> tuple[Tensor, Tensor]:
        """(mean KL(original || ours), its gradient for x [batch, length, width] or zeros)."""
        ids = self.ids[windows.to(self.device)]
        wanted = self.wanted.hidden[windows.to(self.wanted.hidden.device)]
        vocabulary: int = self.model.config.get_text_config().vocab_size
        tokens, total = ids.numel(), torch.zeros((), device=self.device)
        grad = torch.zeros_like(x) if backward else x
        room = ROOM if self.device.type == "cuda" else None
        for piece in pieces((ids.shape[0], ids.shape[1]), vocabulary, room):
            some = ids[piece]
            with torch.no_grad():
                theirs = logits(self.model, wanted[piece].to(self.device), some)
                theirs = theirs.float().log_softmax(-1)
            hidden = x[piece].detach().requires_grad_(backward)
            with torch.set_grad_enabled(backward):
                ours = logits(self.model, hidden, some).float().log_softmax(-1)
                loss = F.kl_div(ours, theirs, reduction="sum", log_target=True) / tokens
            total += loss.detach()
            if backward:
                (grad[piece],) = torch.autograd.grad(loss, hidden)
        return total, grad


def _bytes(own: Knobs) -> int:
    own_tensors = [*own.parameters(), *own.buffers(), *own.block.module.parameters()]
    return sum(tensor.nbytes for tensor in own_tensors)


def _move(own: Knobs, device: torch.device) -> None:
    """Knobs and the module they stand for; gradients move along."""
    own.to(device)
    own.block.module.to(device)
