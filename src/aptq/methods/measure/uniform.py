"""uniform: loss = weights * 4^-bits, all layers alike: a control without data."""

from dataclasses import dataclass

from aptq.engine.rule import Rule
from aptq.engine.stage import methods


@methods.register("uniform")
@dataclass(frozen=True, kw_only=True)
class Uniform(Rule):
    """No layer matters more than another of its size."""
