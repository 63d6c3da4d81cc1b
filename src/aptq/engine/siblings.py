"""Experts that no calibration token reached: they borrow what their siblings have seen."""

from collections.abc import Iterable, Mapping, Sequence

from aptq.core.units import EXPERT
from aptq.engine.layer import Layer


def lend(groups: Iterable[Sequence[Layer]]) -> None:
    """Give idle experts the sums of their siblings' statistics, and count it.

    groups: layers that share an input.  Of experts `counts` has "tokens", the rows that reached
    them; siblings are experts of one module whose layers have the same names.
    """
    families: dict[tuple[str, ...], list[Sequence[Layer]]] = {}
    for layers in groups:
        if layers and "tokens" in layers[0].counts:
            key = tuple(EXPERT.sub(r"\g<all>.", layer.name) for layer in layers)
            families.setdefault(key, []).append(layers)
    for family in families.values():
        busy = [layers for layers in family if layers[0].counts["tokens"]]
        for layers in family:
            if busy and not layers[0].counts["tokens"]:
                _borrow(layers, busy)


def lent(table: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, ...]]:
    """A table of scores in which experts that no token reached have their siblings' mean.

    Their own is 0 for every candidate, as if nothing could harm them.
    """
    found = {name: tuple(row) for name, row in table.items()}
    families: dict[str, list[tuple[float, ...]]] = {}
    for name, row in found.items():
        if EXPERT.match(name) and any(row):
            families.setdefault(EXPERT.sub(r"\g<all>.", name), []).append(row)
    for name, row in found.items():
        rows = families.get(EXPERT.sub(r"\g<all>.", name), [])
        if rows and not any(row):
            found[name] = tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))
    return found


def _borrow(layers: Sequence[Layer], busy: Sequence[Sequence[Layer]]) -> None:
    """Add up the sums of `busy` siblings; layers of a group may share one statistic."""
    filled: set[int] = set()
    for number, layer in enumerate(layers):
        for need, stat in layer.stats.items():
            if id(stat) in filled:
                continue
            filled.add(id(stat))
            for others in busy:
                stat.merge(others[number].stats[need])
        for name in ("idle", "fallbacks"):
            layer.counts[name] = layer.counts.get(name, 0.0) + 1
