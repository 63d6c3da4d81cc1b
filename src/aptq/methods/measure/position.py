"""position: by the type of a layer, then by its distance to the nearer end; a control without data.

The rule of ExLlamaV3 (conversion/allocation.py), made a table: loss = weights * 4^(worth - bits).
"""

from dataclasses import dataclass

from aptq.engine.rule import Rule
from aptq.engine.stage import methods

# Mean of the extra bits that ExLlamaV3's permutations give: q k v o 0000 0010 0020 0111 0121 1221,
# and gate up down 000 001 011 111.
WORTH = {"q": 1 / 6, "k": 2 / 3, "v": 4 / 3, "o": 1 / 2, "gate": 1 / 4, "up": 1 / 2, "down": 3 / 4}
OTHER = 1 / 2  # roles outside that list, such as a fused qkv


@methods.register("position")
@dataclass(frozen=True, kw_only=True)
class Position(Rule):
    """v and down first, q and gate last; among equals the ends of the stack first."""

    ends: float = 0.08  # bits that the end blocks get more; less than unequal types differ by

    def worth(self, role: str, block: int, blocks: int) -> float:
        """Type, then place."""
        nearest, most = min(block, blocks - 1 - block), max(1, (blocks - 1) // 2)
        return WORTH.get(role, OTHER) + self.ends * (1 - nearest / most)
