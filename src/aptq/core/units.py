"""From layers, scores and wishes to the units that an allocator decides about."""

import fnmatch
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from aptq.core.plan import Shapes, Target
from aptq.core.problem import Option, Unit, code_bits, significant
from aptq.core.scores import Scores
from aptq.registry import closest

# What vLLM loads as one matrix, by role in the group of linears that read one input.
FUSED = (("q", "k", "v"), ("gate", "up"))
# What an engine's kernels need (out, in) to be multiples of
TILES = {"vllm": (64, 128), "gguf": (1, 32)}
EXPERT = re.compile(r"(?P<all>.*\.\w*experts)\.\d+\.")  # they are stacked in one tensor


def coupled(profile: str, groups: Iterable[Mapping[str, str]]) -> list[tuple[str, ...]]:
    """Layers that must share a choice under `profile`; groups: role -> layer of ResolvedGroups."""
    together: dict[str, list[str]] = {}
    for number, roles in enumerate(groups if profile == "vllm" else ()):
        for role, layer in roles.items():
            expert = EXPERT.match(layer)
            fused = next((" ".join(some) for some in FUSED if role in some), role)
            key = expert["all"] if expert else f"{number} {fused}"
            together.setdefault(key, []).append(layer)
    return [tuple(layers) for layers in together.values() if len(layers) > 1]


def matching(pattern: str, names: Collection[str], groups: Iterable[Sequence[str]]) -> set[str]:
    """Names that match a glob pattern.

    Raises ValueError if there are none, or if they are a part of layers that must be alike.
    """
    found = set(fnmatch.filter(names, pattern))
    if not found:
        raise ValueError(
            f"pattern {pattern!r} matches no layer\namong {len(names)} layers\n"
            f"{closest(pattern, list(names))}"
        )
    for group in groups:
        inside = found & set(group)
        if inside and len(inside) < len(group):
            raise ValueError(
                f"pattern {pattern!r} matches a part of layers that must be alike\n"
                f"{', '.join(sorted(inside)[:3])} of {', '.join(group[:6])}\n"
                "match all of them, or choose another profile"
            )
    return found


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What may become of which layer."""

    shapes: Shapes  # linears inside the blocks
    outer: Shapes  # embedding and untied head: kept unless they were scored
    candidates: tuple[Target, ...]
    keep: tuple[str, ...] = ()  # name patterns of layers that stay as they are
    minimum: Mapping[str, float] | None = None  # name pattern -> least code bits
    groups: Sequence[tuple[str, ...]] = ()  # layers that share a choice
    itemsize: int = 2  # bytes of a kept weight's element
    # 0: estimates of a layer share their tokens, so their differences are surer than themselves
    significance: float = 0.0  # see core.problem.significant
    # can a weight of this shape be held so, by storage and by the engine?
    holds: Callable[[Target, tuple[int, int]], bool] = Target.fits

    def kept(self, scores: Scores) -> dict[str, str]:
        """Layers without a choice and why.  Raises ValueError for a bad pattern."""
        names = [*self.shapes, *self.outer]
        found = {name: "was not measured" for name in self.outer if name not in scores.losses}
        for pattern in self.keep:
            wanted = matching(pattern, names, self.groups)
            found |= {name: f"keep pattern {pattern!r}" for name in names if name in wanted}
        return found

    def units(self, scores: Scores) -> list[Unit]:
        """All units, kept layers too, with costs (bytes, bytes inside the blocks).

        Raises ValueError for layers or candidates without a score, and for patterns that match
        nothing or a part of a group.
        """
        scores.check([*self.shapes, *self.outer])
        kept, least = self.kept(scores), self._least()
        owner = {name: group for group in self.groups for name in group}
        units: dict[tuple[str, ...], Unit] = {}
        for name in [*self.shapes, *self.outer]:
            layers = (name,) if name in kept else owner.get(name, (name,))
            if layers not in units:
                targets = (Target(),) if name in kept else self._allowed(layers, least)
                units[layers] = self._unit(layers, targets, scores)
        return list(units.values())

    def _least(self) -> dict[str, float]:
        """Least code bits of every layer that a pattern of minimum matches."""
        found: dict[str, float] = {}
        for pattern, bits in (self.minimum or {}).items():
            for name in matching(pattern, [*self.shapes, *self.outer], self.groups):
                found[name] = max(bits, found.get(name, 0))
        return found

    def _allowed(self, layers: Sequence[str], least: Mapping[str, float]) -> tuple[Target, ...]:
        bits = least.get(layers[0], 0)
        shapes = [self.outer.get(name) or self.shapes[name] for name in layers]
        wide = (t for t in self.candidates if code_bits(t) >= bits)
        return tuple(t for t in wide if all(self.holds(t, x) for x in shapes)) or (Target(),)

    def _unit(self, layers: tuple[str, ...], targets: Sequence[Target], scores: Scores) -> Unit:
        shapes = [self.outer.get(name) or self.shapes[name] for name in layers]
        outside = layers[0] in self.outer
        options = []
        for target in targets:
            pairs = [(0.0, 0.0) if target.kept else scores.of(name, target) for name in layers]
            nbytes = sum(target.nbytes(shape, self.itemsize) for shape in shapes)
            loss = math.fsum(loss for loss, _ in pairs)
            noise = math.hypot(*(noise for _, noise in pairs))
            options.append(Option(target, (nbytes, 0 if outside else nbytes), loss, noise))
        weights = sum(math.prod(shape) for shape in shapes)
        return Unit(layers, significant(options, self.significance), weights, outside)
