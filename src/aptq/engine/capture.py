"""Capture: the gradients of a batch as one CUDA graph.

A block of a small model takes several hundred kernels a step, each a few microseconds long: their
launches take longer than they do.  Recorded once, all of them are launched together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

WARM = 2  # steps before the recording, in which libraries make their plans and workspaces


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
        self.parameters = [p for p in parameters if p.requires_grad]
        self.windows = windows.to(device)
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARM):
                self._forget()
                gradients(self.windows)
        torch.cuda.current_stream(device).wait_stream(side)
        self._forget()  # gradients that are made during the recording live in the graph's memory
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.loss = gradients(self.windows)
        self.grads = [p.grad for p in self.parameters]

    def _forget(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def __call__(self, windows: Tensor) -> Tensor:
        """Set .grad of the parameters for these windows; the loss."""
        self.windows.copy_(windows)
        self.graph.replay()
        for parameter, grad in zip(self.parameters, self.grads, strict=True):
            parameter.grad = grad
        return self.loss.clone()
