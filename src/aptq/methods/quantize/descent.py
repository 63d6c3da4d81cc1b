"""Descent: move single codes, and refit scales, as long as it lowers the layer's error.

Minimises tr((Q - W) H (Q - W)^T) over codes and scales of Q on the layer's grid, from where an
earlier stage stopped (QuantEase, arXiv:2309.01885; CDQuant, arXiv:2406.17542).  After `gptq`, which
never looks back, codes and scales together are worth 10 to 17 % at 4 to 2 bits (random layers with
correlated inputs, searched ranges); from nearest rounding it ends above `gptq` + descent.
"""

from dataclasses import dataclass

from aptq.core.descent import Mode, Quadratic, descend
from aptq.core.parts import Quantized
from aptq.engine.stage import methods
from aptq.stats.refine import Refine


@methods.register("descent")
@dataclass(frozen=True, kw_only=True)
class Descent(Refine):
    """Coordinate descent on codes; the scales of each row are solved for jointly in between."""

    # one column after the other, all rows at once (QuantEase), or each row's best move (CDQuant):
    # as good at a third of the time, as few moves are left after `gptq`
    mode: Mode = "greedy"
    pairs: bool = False  # at the end moves of two codes at once; slow, and worth about 1 %
    sweeps: int = 20  # over all codes at most; it ends when one gains less than 1e-4
    rounds: int = 3  # of scales and codes after the first sweeps; the gain of more is small

    def __post_init__(self) -> None:
        """Raise ValueError for counts that are none."""
        super().__post_init__()
        if self.sweeps < 1 or self.rounds < 0:
            raise ValueError(
                "descent: an option is out of range\n"
                f"sweeps = {self.sweeps} >= 1, rounds = {self.rounds} >= 0\n"
                "correct it in the recipe"
            )

    def refine(self, problem: Quadratic, part: Quantized) -> Quantized:
        """Better codes and scales."""
        codes, scales, _, _ = descend(
            problem,
            part.unpacked(),
            part.scales(),
            mode=self.mode,
            pairs=self.pairs,
            sweeps=self.sweeps,
            rounds=self.rounds,
        )
        return Quantized.make(codes, scales, part.grid)
