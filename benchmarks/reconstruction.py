"""Tables of the reconstruction: aptq-max, each stage alone, what its steps add, and aptq-fast.

usage: python reconstruction.py MODEL --device cuda --gpus 4 --scratch FOLDER [--only max alone]
Rows are run as rows.py says.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rows import Job, Table, arguments, behind, run, scores, shipped, written

SIZES = {"4.3125": (0,), "3.296875": (0, 1, 2), "2.5": (0,), "2.28125": (0, 1, 2)}  # bpw: seeds
GRIDS = ("int4-g64-z", "int3-g64-z", "int2-g64-z")
PASSES = 1600  # windows that go through a block: AutoRound's 200 steps of 8
EPOCHS = 12.0  # of tuning the whole model on the text alone: 130 steps of 8 windows
# EfficientQAT: 4,096 windows twice; AutoRound's recipe for its best quality: 1,000 steps of 8
OWN = {"efficientqat": 1024, "autoround": 1000}
FEW = ["int2-g64-z", "int2-g32-z", "int3-g64-z", "int3-g32-z", "int4-g64-z", "int6-g64-z"]
LAYERWISE = ("descent", "adaquant")  # they see Hessians: no window passes
TUNING = ("autoround", "omniquant", "affinequant", "cbq", "tesseraq", "efficientqat")
TUNING += ("norm_tweaking", "bias_tuning", "e2e_qp")  # the last two: passes of all blocks together


def largest(scratch: Path) -> Iterator[Job]:
    """aptq-max as shipped, and on the windows of the text alone."""
    recipes = {"aptq-max": ["--recipe", "aptq-max"]}
    recipes["aptq-max, text only"] = written(scratch, "max text", text_only(shipped("aptq-max")))
    for name, recipe in recipes.items():
        for size, seeds in SIZES.items():
            for seed in seeds:
                yield f"{name} {size}", [*recipe, "--budget", f"{size}bpw", "--seed", str(seed)]


def tuning(name: str) -> Table:
    """The stage with its own defaults, but so many steps that PASSES windows pass each block."""
    batch = 1 if name == "norm_tweaking" else 8  # the paper's step is a window
    blocks = 2 if name == "cbq" else 1  # a block is in so many windows of blocks
    table: Table = {"use": name, "steps": PASSES // (batch * blocks), "batch": batch}
    return table | ({"blocks": blocks} if blocks > 1 else {})


def alone(scratch: Path) -> Iterator[Job]:
    """Every stage from nearest rounding, and behind the gptq of the default recipe."""
    gptq = shipped("aptq")["stage"][0]
    found: dict[str, list[Table]] = {"rtn": [{"use": "rtn"}], "gptq": [{"use": "gptq"}]}
    found["gptq of aptq"] = [gptq]
    for name in (*LAYERWISE, *TUNING):
        local = name in LAYERWISE
        found[f"{name}, from nearest"] = [{"use": name} if local else tuning(name)]
        found[f"{name}, behind gptq"] = [gptq, behind(gptq, name) if local else tuning(name)]
    for grid in GRIDS[1:]:
        for name, stages in found.items():
            recipe = written(scratch, f"alone {name}", {"stage": stages})
            yield f"{grid[:4]} {name}", [*recipe, "--grid", grid]


def text_only(recipe: Table) -> Table:
    """No windows that the model writes, and so many epochs that it learns the text's by heart."""
    epochs = {"epochs": EPOCHS}
    stages = [stage | (epochs if "epochs" in stage else {}) for stage in recipe["stage"]]
    return recipe | {"data": recipe["data"] | {"written": 0}, "stage": stages}


def steps(scratch: Path, measured: Path) -> Iterator[Job]:
    """What the stages of aptq-max add on the text alone; all of them are rows of `largest`."""
    recipe = text_only(shipped("aptq-max"))
    gptq, blocks, whole = recipe["stage"]
    chosen = [[gptq], [gptq, blocks], [gptq, whole], [gptq, behind(gptq, "descent"), blocks, whole]]
    for size in SIZES:
        for stages in chosen:
            name, table = " + ".join(x["use"] for x in stages), recipe | {"stage": stages}
            words = written(scratch, f"steps {name}", table)
            yield (
                f"steps {size}: {name}",
                [*words, "--budget", f"{size}bpw", "--scores", str(measured)],
            )


def own(scratch: Path) -> Iterator[Job]:
    """The two best alone at the effort of their papers, in windows that pass a block."""
    for name, count in OWN.items():
        stages = [tuning(name) | {"steps": count}]
        recipe = written(scratch, f"own {name}", {"stage": stages})
        for grid in GRIDS[1:]:
            yield f"{grid[:4]} {name}, {count} steps", [*recipe, "--grid", grid]


def again(scratch: Path) -> Iterator[Job]:
    """Does it pay to choose bits by the errors that reconstruction leaves?"""
    recipe = text_only(shipped("aptq-max")) | {"grids": FEW}
    for tuned in (False, True):
        table = recipe | {"measure": recipe["measure"] | {"tuned": tuned}}
        words = written(scratch, f"again {int(tuned)}", table)
        name = "after reconstruction" if tuned else "before it"
        yield f"plan by errors {name} 2.5", [*words, "--budget", "2.5bpw"]


def fast() -> Iterator[Job]:
    for recipe in ("aptq-fast", "fast"):
        for grid in GRIDS:
            yield f"{recipe} {grid}", ["--recipe", recipe, "--grid", grid]


def main() -> None:
    options = arguments(__doc__, ("max", "alone", "steps", "own", "again", "fast"))
    scratch, measured = options.scratch, options.scratch / "scores-aptq-max.json"
    made = {"max": largest(scratch), "alone": alone(scratch), "fast": fast()}
    made |= {"steps": steps(scratch, measured), "own": own(scratch), "again": again(scratch)}
    run(options, made, [scores(options, measured, "--recipe", "aptq-max")])


if __name__ == "__main__":
    main()
