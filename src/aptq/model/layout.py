"""From an Arch to the layers of one concrete block: groups, shapes and what they cover."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from aptq.failures import Infeasible
from aptq.model.archs import Arch, Group, Kind

# More than this share of a block's matrix weights outside every group: the family is not known.
_UNCOVERED = 0.05


@dataclass(frozen=True, slots=True)
class ResolvedGroup:
    """A Group of one block; `layers`: role -> full name of the linear."""

    kind: Kind
    layers: dict[str, str]
    source: str | None


@dataclass(frozen=True, slots=True)
class Coverage:
    """Parameter counts: of linears in groups, of all else in the blocks, outside the blocks."""

    grouped: int
    kept: int
    outer: int

    @property
    def total(self) -> int:
        """All parameters of the model; tied ones count once."""
        return self.grouped + self.kept + self.outer


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """Path -> nn.Linear of a normalised block, in definition order.

    Subclasses are left out: they may compute something else than x @ weight.T + bias.
    """
    return {name: m for name, m in block.named_modules() if type(m) is nn.Linear}


def expand(groups: Sequence[Group], block: nn.Module) -> tuple[Group, ...]:
    """The groups that a normalised block has; "*" becomes one group for every expert.

    Roles and groups whose linear the block does not hold are left out (mixed families).
    """
    present = linears(block)
    found = []
    for group in groups:
        patterns = [path for path in group.linears.values() if "*" in path]
        for star in _matches(patterns[0], present) if patterns else [""]:
            roles = {role: path.replace("*", star) for role, path in group.linears.items()}
            roles = {role: path for role, path in roles.items() if path in present}
            source = None if group.source is None else group.source.replace("*", star)
            if roles:
                found.append(Group(group.kind, roles, source))
    return tuple(found)


def _matches(pattern: str, present: dict[str, nn.Linear]) -> list[str]:
    """What "*" stands for, in numeric order."""
    compiled = re.compile(re.escape(pattern).replace(r"\*", r"(\d+)"))
    hits = (compiled.fullmatch(path) for path in present)
    return sorted((hit[1] for hit in hits if hit), key=int)


def resolve(groups: Sequence[Group], prefix: str) -> list[ResolvedGroup]:
    """Expanded groups with full names below `prefix` ("model.layers.3")."""
    return [
        ResolvedGroup(
            group.kind,
            {role: f"{prefix}.{path}" for role, path in group.linears.items()},
            None if group.source is None else f"{prefix}.{group.source}",
        )
        for group in groups
    ]


def uncovered(
    arch: Arch, groups: Sequence[Group], block: nn.Module, *, partial: bool = False
) -> dict[str, int]:
    """Matrix parameters (2-D and more) of a normalised block that no group and no `ignore` names.

    Raises Infeasible where they are more than 5 % of the block's, unless `partial` allows it.
    """
    covered = {f"{path}.weight" for group in groups for path in group.linears.values()}
    sizes = {name: p.numel() for name, p in block.named_parameters() if p.dim() >= 2}
    missed = {
        name: size
        for name, size in sizes.items()
        if name not in covered
        and not any(fnmatchcase(name, f"{pattern}.*") for pattern in arch.ignore)
    }
    share = sum(missed.values()) / max(1, sum(sizes.values()))
    if share > _UNCOVERED and not partial:
        largest = sorted(missed, key=lambda name: -missed[name])[:5]
        raise Infeasible(
            f"the weights of class {type(block).__name__} are not all known linears\n"
            f"{share:.0%} of a block's parameters are outside: {', '.join(largest)}\n"
            "add --allow-partial to keep them as they are, or describe the family in "
            "aptq/model/archs.py"
        )
    return missed
