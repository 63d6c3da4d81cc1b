"""fisher: second-order loss of the model, 1/2 dW^T F dW, with the gradients of its own outputs.

g_t [out] = d(nats of all tokens)/dy_t of a label drawn from the model, x_t [in], dW = Q - W:
sequence: 1/2 E_windows[(sum_t g_t . dW x_t)^2], the Fisher information of a window;
token: 1/2 sum_t (g_t . dW x_t)^2, without the terms between tokens (ModelOpt's AutoQuantize
scores the same, by element); row: 1/2 sum_j E[g_j^2] dW_j H dW_j^T, as if g and x were independent.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from aptq.engine.backward import Labels
from aptq.engine.layer import Layer
from aptq.engine.local import Local
from aptq.engine.measure import Subject, row_damage
from aptq.engine.stage import methods
from aptq.engine.stat import Stat
from aptq.stats.gradient import Gradient, gradient
from aptq.stats.hessian import Hessian
from aptq.stats.perturbation import Perturbation


@methods.register("fisher")
@dataclass(frozen=True, kw_only=True)
class Fisher(Local):
    """Divergence of the model's output, nats per token, to second order."""

    unit: ClassVar[Literal["nats", "relative"]] = "nats"
    backward: ClassVar[bool] = True
    outer: ClassVar[bool] = True  # by rows, whatever the form

    form: Literal["token", "sequence", "row"] = "token"  # row: one pass over the data less
    # of the loss: drawn from the model (the Fisher information), or the text's next tokens
    labels: Literal["sampled", "data"] = "sampled"

    @property
    def loss(self) -> Labels:
        """The loss's labels."""
        return self.labels

    @property
    def twice(self) -> bool:
        """The sums over tokens or windows need the candidates' errors first."""
        return self.form != "row"

    def needs(self) -> tuple[Stat, ...]:
        """Gradients by position for the profiles and by row, and for these the inputs."""
        return (Gradient(),) if self.twice else (Gradient(), Hessian())

    def profile(self, layer: Layer) -> Tensor | None:
        """Mean squared gradient by position, [bins]."""
        return gradient(layer).profile()

    def watch(self, changes: Sequence[Tensor]) -> Perturbation:
        """Sums over tokens or windows."""
        assert self.form != "row"
        return Perturbation(form=self.form, changes=tuple(changes))

    def score(self, subject: Subject, layer: Layer, changes: Iterator[Tensor]) -> Tensor:
        """Half the sum of squares."""
        if self.form != "row":
            return 0.5 * layer.stats[Perturbation(form=self.form)].tensors()["damage"]
        # both halves with one H: gradients are what is noisy, and a product for each costs time
        hessian, seen = layer.stats[Hessian()], gradient(layer)
        assert isinstance(hessian, Hessian), type(hessian)
        if not seen.sums:  # an expert without tokens
            return torch.zeros(2, len(subject.targets), dtype=torch.float64)
        H, rows = hessian.matrix(), torch.stack([seen.total(half) for half in (0, 1)])
        return 0.5 * torch.stack([rows @ row_damage(dW, H) for dW in changes], dim=1)
