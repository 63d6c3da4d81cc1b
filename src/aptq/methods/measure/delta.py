"""delta: first-order loss with absolute values, sum |G * dW| per window, as AutoRound's AutoScheme.

G = d(nats of a window)/dW = sum_t g_t x_t^T [out, in], dW = Q - W; AutoScheme takes the gradient of
the rounded model, this one that of the original.  Nothing cancels in the sum, so large tensors look
bad.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from aptq.engine.backward import Labels
from aptq.engine.layer import Layer
from aptq.engine.local import Local
from aptq.engine.measure import Subject
from aptq.engine.stage import methods
from aptq.engine.stat import Stat
from aptq.stats.gradient import Gradient, gradient
from aptq.stats.perturbation import Perturbation


@methods.register("delta")
@dataclass(frozen=True, kw_only=True)
class Delta(Local):
    """Sum of absolute first-order changes of the loss, nats per token."""

    unit: ClassVar[Literal["nats", "relative"]] = "nats"
    backward: ClassVar[bool] = True

    # of the loss: the text's next tokens, as AutoScheme, or drawn from the model
    labels: Literal["sampled", "data"] = "data"

    @property
    def loss(self) -> Labels:
        """The loss's labels."""
        return self.labels

    @property
    def twice(self) -> bool:
        """The sums need the candidates' errors first."""
        return True

    def needs(self) -> tuple[Stat, ...]:
        """Gradients by position, for the profiles."""
        return (Gradient(),)

    def profile(self, layer: Layer) -> Tensor | None:
        """Mean squared gradient by position, [bins]."""
        return gradient(layer).profile()

    def watch(self, changes: Sequence[Tensor]) -> Perturbation:
        """Sums over windows."""
        return Perturbation(form="absolute", changes=tuple(changes))

    def score(self, subject: Subject, layer: Layer, changes: Iterator[Tensor]) -> Tensor:
        """What the second pass found; the errors are not made again."""
        return layer.stats[Perturbation(form="absolute")].tensors()["damage"]
