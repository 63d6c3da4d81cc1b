"""From a recipe to a plan: which candidates there are, what is kept, and what the budget allows."""

import fnmatch
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

from aptq.core.budget import Budget
from aptq.core.grid import Grid
from aptq.core.kquants import KQUANTS
from aptq.core.plan import Candidate, Plan, Shapes, Target, target_of
from aptq.core.scores import Scores
from aptq.core.search import Room
from aptq.core.units import TILES, Wishes, coupled
from aptq.engine.candidate import exact
from aptq.engine.data import Data
from aptq.engine.tape import tape_bytes
from aptq.footprint import weight_bytes, weight_limit
from aptq.model.model import Model
from aptq.planner import CANDIDATES, Choice, Planner, uniform
from aptq.recipe import Recipe
from aptq.store.checkpoint import predict

MEASURED = 16_384  # tokens that a measure looks at: 32 windows of 512

# llama.cpp's Q4_0 Q4_1 Q5_0 Q5_1 Q8_0
GGUF = tuple(map(Grid.parse, ("int4-g32", "int4-g32-fz", "int5-g32", "int5-g32-fz", "int8-g32")))
GGUF += tuple(map(Grid, ("iq4_nl", *KQUANTS)))  # the latter for rows of a multiple of 256
# compressed-tensors as vLLM's Marlin kernels run it: zeros with 4 bits alone
VLLM = tuple(
    Grid.parse(f"int{bits}-{group}{zero}")
    for bits, zero in ((4, ""), (4, "-z"), (8, ""))
    for group in ("row", "g128", "g64", "g32")
)


def wants_scores(recipe: Recipe, given: Plan | None) -> bool:
    """Does a run by this recipe choose between grids layer by layer?"""
    choice = len(recipe.grids) != 1 and bool(recipe.budget)
    return given is None and recipe.allocate is not None and choice


def wants_profiles(recipe: Recipe) -> bool:
    """Does a stage weight rows by output gradients?"""
    return any(stage.weighted for stage in recipe.stages)


def moving(recipe: Recipe) -> int:
    """Streams through the blocks: that of the original too where stages see it.

    Where blocks are tuned together, the newest of them has streams of its own.
    """
    together = max(stage.window[0] for stage in recipe.stages) > 1
    return (1 + any(stage.original for stage in recipe.stages)) * (1 + together)


def streams(recipe: Recipe) -> int:
    """Copies of the hidden states of all windows: those that move, and targets."""
    return moving(recipe) + max(stage.targets for stage in recipe.stages)


def kept_tokens(recipe: Recipe) -> int:
    """Most tokens of which hidden states are kept at a time, every copy counted.

    In the walk those of the text; behind it also those that the model wrote, with their targets.
    """
    behind = 2 * recipe.data.total if any(stage.whole for stage in recipe.stages) else 0
    return max(streams(recipe) * recipe.data.needed, behind)


def measuring_data(data: Data) -> Data:
    """The first windows, so many that measuring stays cheap beside compressing."""
    most = max(2, MEASURED // data.length)  # two, so that their difference tells the noise
    return replace(data, samples=min(data.samples, most), written=0)


def measuring_bytes(model: Model, recipe: Recipe, scoring: bool) -> int:
    """Most bytes that measuring keeps on the disk: for profiles a walk's tape, and if `scoring` the
    layers of all candidates where the recipe's measure walks them.
    """
    tape = tape_bytes(model, measuring_data(recipe.data).needed)
    if not scoring or recipe.measure is None or not recipe.measure.tuned:
        return tape
    kept, lossy = kept_names(model, recipe), [t for t in candidates(recipe) if not exact(t)]
    shapes = [shape for name, shape in model.shapes.items() if name not in kept]
    return tape + sum(target.nbytes(shape) for target in lossy for shape in shapes)


def grids(recipe: Recipe) -> tuple[Candidate, ...]:
    """The candidate grids that the recipe's engine runs.  Raises ValueError if there is none."""
    runs = {"gguf": GGUF, "vllm": VLLM}.get(recipe.profile)
    if runs is None:
        return recipe.grids or CANDIDATES
    runs = (*runs, Grid("bf16"))
    found = tuple(grid for grid in recipe.grids or runs if grid in runs)
    if not found:
        raise ValueError(
            f"{recipe.profile} runs none of the candidate grids\n"
            f"{', '.join(map(str, recipe.grids))}; it runs {', '.join(map(str, runs))}\n"
            "add one of those to grids, or choose another profile"
        )
    return found


def held_by(profile: str, target: Target, shape: tuple[int, int]) -> bool:
    """Does the engine load a weight of this shape (out, in) so?  What its exporter would refuse."""
    grid = target.grid
    if grid is None or grid.dense:
        return True
    whole = shape[1] % (grid.group or 1) == 0
    tiles = TILES.get(profile, (1, 1))
    fit = all(size % tile == 0 for size, tile in zip(shape, tiles, strict=True))
    return target.fits(shape) and (profile != "vllm" or whole) and fit


def candidates(recipe: Recipe) -> tuple[Target, ...]:
    """What a layer may become."""
    return tuple(map(target_of, grids(recipe)))


def ragged(plan: Plan, shapes: Shapes) -> list[str]:
    """A line on layers whose columns no whole number of groups fills; [] where there are none."""
    odd = [
        f"{name} ({shapes[name][1]} columns, {target.grid})"
        for name, target in plan.targets.items()
        if target.grid is not None and shapes[name][1] % (target.grid.group or 1)
    ]
    more = f", first {', '.join(odd[:5])}"
    text = f"note: {len(odd)} layers have a smaller last group, which not every engine runs{more}"
    return [text] if odd else []


def choosable(model: Model, recipe: Recipe) -> Shapes:
    """Shapes of all layers that the recipe lets a plan choose for."""
    return {**model.shapes, **(model.outer_shapes if recipe.outer else {})}


def kept_names(model: Model, recipe: Recipe) -> dict[str, str]:
    """Layers that the recipe keeps -> the pattern that says so."""
    return {
        name: pattern
        for pattern in reversed(recipe.keep)
        for name in fnmatch.filter(choosable(model, recipe), pattern)
    }


Size = Callable[[Plan], int]  # bytes of all files of a plan's checkpoint


def sizer(model: Model) -> Size:
    """The exact size of any plan; those that were asked for are remembered."""
    known: dict[tuple[Target | None, ...], int] = {}

    def size(plan: Plan) -> int:
        key = tuple(plan.targets.get(name) for name in (*model.shapes, *model.outer_shapes))
        if key not in known:
            known[key] = predict(model, plan).total
        return known[key]

    return size


def choose(
    model: Model,
    recipe: Recipe,
    given: Plan | None = None,
    scores: Scores | None = None,
    size: Size | None = None,
) -> Choice:
    """The plan for the single budget of `recipe`, or the `given` one, with its exact size.

    By scores where the recipe allocates, else one grid for all layers.  Raises Infeasible if
    nothing fits the budget, ValueError for a plan of other layers.
    """
    itemsize, size = model.dtype.itemsize, size or sizer(model)
    if given is not None:
        model.check(given)
        bits = given.bits(model.shapes, itemsize, model.outer_shapes)
        return _expecting(Choice(given, None, bits, size(given)), scores)
    if scores is not None and wants_scores(recipe, given):
        return planner(model, recipe, scores, size).choose(recipe.budget)
    choice = uniform(
        model.shapes,
        grids(recipe),
        recipe.budget,
        keep=recipe.keep,
        itemsize=itemsize,
        size=size,
        device=_device(model, recipe),
    )
    return _expecting(choice, scores)


def blank(model: Model, recipe: Recipe) -> Scores:
    """Scores as the recipe will measure them, all zero: they tell which budgets can be reached."""
    assert recipe.measure is not None, "nothing will be measured"
    unit: Literal["nats", "relative"] = "nats" if recipe.nats else recipe.measure.unit
    texts = tuple(map(str, candidates(recipe)))
    zeros = dict.fromkeys(choosable(model, recipe), (0.0,) * len(texts))
    return Scores("blank", unit, texts, zeros, zeros)


def planner(model: Model, recipe: Recipe, scores: Scores, size: Size) -> Planner:
    """What chooses by `scores` with the recipe's allocator; it sees what the recipe allows."""
    assert recipe.allocate is not None, "the recipe does not allocate"
    groups = (g.layers for index in range(model.blocks) for g in model.groups(index))
    measured = set(scores.candidates)  # a table may have been made for fewer grids
    hidden = model.outer_shapes.keys() - choosable(model, recipe).keys()
    losses, noise = (
        {name: row for name, row in table.items() if name not in hidden}
        for table in (scores.losses, scores.noise)
    )
    wishes = Wishes(
        shapes=model.shapes,
        outer=model.outer_shapes if recipe.outer else {},
        candidates=tuple(t for t in candidates(recipe) if str(t) in measured),
        keep=recipe.keep,
        minimum={pattern: float(bits) for pattern, bits in recipe.minimums.items()},
        groups=coupled(recipe.profile, groups),
        itemsize=model.dtype.itemsize,
        holds=partial(held_by, recipe.profile),
    )
    return Planner(
        wishes=wishes,
        scores=replace(scores, losses=losses, noise=noise),
        allocator=recipe.allocate,
        size=size,
        device=_device(model, recipe),
    )


def _device(model: Model, recipe: Recipe) -> Callable[[Budget], Room]:
    """What "fits 8GiB @ 8192x1" leaves for weights."""

    def room(budget: Budget) -> Room:
        assert budget.device_bytes is not None, budget
        every, shape = candidates(recipe), (budget.context, budget.batch)
        limit = weight_limit(model, every, budget.device_bytes, *shape)
        return Room(limit, lambda plan: weight_bytes(model, plan))

    return room


def _expecting(choice: Choice, scores: Scores | None) -> Choice:
    """The choice with its expected loss, where the scores know all of its plan."""
    measured = scores is not None and all(
        target.kept or (name in scores.losses and str(target) in scores.candidates)
        for name, target in choice.plan.targets.items()
    )
    found = scores.nats(choice.plan) if scores is not None and measured else None
    return choice if found is None else replace(choice, loss=found[0], noise=found[1])
