"""AdaRound's variable: the code of a weight is the one below it or the one above (2004.10568).

W_q = s (lower + h - z), h = clamp(1.2 sigmoid(v) - 0.1, 0, 1) in [0, 1] (eqs. 22 and 23); h reaches
0 and 1, where its gradient is 0, so that what is decided stays decided.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aptq.core.parts import Quantized
from aptq.core.rounding import code_offset
from aptq.core.soft import LEAN, spread

STRETCH, SHIFT = 1.2, -0.1  # zeta - gamma and gamma of the paper
TIE = 0.5 - 2.0**-19  # as near to the middle as a fraction comes: float32 keeps its side


def rectified(logits: Tensor) -> Tensor:
    """h in [0, 1] of any logits, infinite ones included."""
    return (logits.sigmoid() * STRETCH + SHIFT).clamp(0, 1)


def logits_of(fraction: Tensor) -> Tensor:
    """The inverse of `rectified` for fractions in [0, 1]; finite."""
    return ((fraction - SHIFT) / STRETCH).logit()


def between(part: Quantized, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(lower codes uint8 [out, in], fractions float32 [out, in]) where `weight` [out, in] lies.

    lower + (fraction >= 0.5) is the part's code.  lower + fraction is W / s + z clipped to the grid
    where that code is the nearest one; where it is another (error compensation), the fraction leans
    by LEAN towards the weight: going back is the first alternative, but not one gradient away.
    """
    codes, (scale, zero) = part.unpacked().float(), part.scales()
    wide = None if zero is None else spread(zero.float(), part.shape[1], part.grid)
    exact = weight / spread(scale.float(), part.shape[1], part.grid)
    lean = exact - (codes - code_offset(wide, part.grid))
    near = lean.abs() <= 0.5
    lean = torch.where(near, lean.clamp(-TIE, TIE), lean.sign() * LEAN)
    below = lean < 0
    lower, fraction = codes - below.float(), lean + below.float()
    top = part.grid.levels - 2  # the last code that has one above
    fraction = fraction.masked_fill(lower < 0, 0).masked_fill(lower > top, 1)
    return lower.clamp(0, top).to(torch.uint8), fraction


def undecided(h: Tensor, beta: float) -> Tensor:
    """Mean of 1 - |2 h - 1|^beta: 0 where every h is 0 or 1, at most 1 (eq. 24; beta >= 2)."""
    return (1 - (2 * h - 1).abs().pow(beta)).mean()


def annealed(step: int, steps: int, warm: float = 0.2) -> float | None:
    """beta at step 0..steps-1: None while nothing is asked, then 20 falling linearly to 2.

    Source: AdaRound's experiments and BRECQ's code.
    """
    first = warm * steps
    return None if step < first else 20.0 - 18.0 * (step - first) / max(steps - first, 1)
