"""Allocators: one file each; all solve the same problem, and the same one always alike."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from aptq.core.problem import Problem, Solution
from aptq.registry import Registry


@dataclass(frozen=True, kw_only=True)
class Allocator(ABC):
    """Fields are options, as in a stage."""

    @property
    def reads_codes(self) -> bool:
        """True if bits per weight of a budget mean code bits (Problem.code_bits), not bytes."""
        return False

    @property
    def ranks(self) -> bool:
        """True if losses only rank layers: then no option is left out for gaining too little."""
        return False

    @abstractmethod
    def solve(self, problem: Problem) -> Solution:
        """The choice.  Raises Infeasible if there is none, ValueError for what it cannot solve."""


allocators: Registry[Allocator] = Registry("aptq.allocate")
