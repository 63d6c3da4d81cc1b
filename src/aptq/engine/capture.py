"""Capture: the gradients of a batch as CUDA graphs.

A block of a small model takes several hundred kernels a step, each a few microseconds long: their
launches take longer than they do.  Recorded once, all of them are launched together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from aptq.engine.knobs import Knobs
from aptq.model.normalise import Experts

WARM = 2  # steps before the recording, in which libraries make their plans and workspaces


def steady(knobs: Sequence[Knobs], held: Sequence[Tensor]) -> bool:
    """Does every step of these blocks do the same, on tensors of a GPU that are all `held`?"""
    routed = any(isinstance(m, Experts) for own in knobs for m in own.block.module.modules())
    alike = all(own.steady for own in knobs) and not routed
    return alike and all(tensor.device.type == "cuda" for tensor in held)


class Captured:
    """Replays `gradients`: every call must do the same operations on the same tensors.

    Parameters may change their values between calls, not their memory.
    """

    def __init__(
        self,
        gradients: Callable[[Tensor], Tensor],
        parameters: Sequence[nn.Parameter],
        windows: Tensor,
        device: torch.device,
    ) -> None:
        """gradients: adds to .grad and gives the loss, for window numbers like `windows`."""
        self.grads, self.windows = _Grads(parameters), windows.to(device)
        _warm(lambda: gradients(self.windows), self.grads, device)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = gradients(self.windows)
        self.grads.take()

    def __call__(self, windows: Tensor) -> Tensor:
        """Set .grad of the parameters for these windows; the loss."""
        self.windows.copy_(windows)
        self.graph.replay()
        self.grads.give()
        return self.loss.clone()


class CapturedHalves:
    """As Captured, in two graphs: between forward and backward comes what cannot be recorded."""

    def __init__(
        self,
        forward: Callable[[Tensor], list[Tensor]],
        middle: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
        backward: Callable[[Sequence[Tensor], Tensor], None],
        parameters: Sequence[nn.Parameter],
        windows: Tensor,
        device: torch.device,
    ) -> None:
        """forward: windows -> states; middle: (last state, windows) -> (loss, its gradient for that
        state); backward: (states, this gradient) -> adds to .grad.
        """
        self.grads, self.windows, self.middle = _Grads(parameters), windows.to(device), middle

        def step() -> None:
            states = forward(self.windows)
            backward(states, middle(states[-1], self.windows)[1])

        _warm(step, self.grads, device)
        self.first, self.second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.first):
            self.states = forward(self.windows)
        self.grad = torch.zeros_like(self.states[-1])
        with torch.cuda.graph(self.second, pool=self.first.pool()):
            backward(self.states, self.grad)
        self.grads.take()

    def __call__(self, windows: Tensor) -> Tensor:
        """Set .grad of the parameters for these windows; the loss."""
        self.windows.copy_(windows)
        self.first.replay()
        loss, grad = self.middle(self.states[-1], self.windows)
        self.grad.copy_(grad)
        self.second.replay()
        self.grads.give()
        return loss


class _Grads:
    """Gradients that live in a graph's memory: each replay writes them anew."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self.held: list[Tensor | None] = []

    def forget(self) -> None:
        """The next gradients are made and not added to."""
        for parameter in self.parameters:
            parameter.grad = None

    def take(self) -> None:
        """Keep what the recording made."""
        self.held = [p.grad for p in self.parameters]

    def give(self) -> None:
        """Set .grad, which an optimizer forgets."""
        for parameter, grad in zip(self.parameters, self.held, strict=True):
            parameter.grad = grad


def _warm(step: Callable[[], object], grads: _Grads, device: torch.device) -> None:
    """Do steps on a stream of their own, as recording asks for, and forget their gradients."""
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        for _ in range(WARM):
            grads.forget()
            step()
    torch.cuda.current_stream(device).wait_stream(side)
    grads.forget()
