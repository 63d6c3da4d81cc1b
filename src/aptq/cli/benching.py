"""The commands that time: bench run and bench compress."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from aptq.cli import common
from aptq.cli.common import Json, guard, print_json

bench = typer.Typer(no_args_is_help=True, help="Time compressing, or running what it made.")

Out = Annotated[Path | None, typer.Option(help="Write what was measured as JSON")]


@bench.command()
def run(
    model: common.Source,
    reference: Annotated[
        str | None, typer.Option(help="The original, to take turns with, and torch's int4 of it")
    ] = None,
    batches: Annotated[str, typer.Option(help="Rows decoded at once, with commas")] = "1,8,32",
    prompt: Annotated[int, typer.Option(help="Tokens of the prefill")] = 512,
    tokens: Annotated[int, typer.Option(help="Tokens decoded in one turn")] = 32,
    turns: Annotated[int, typer.Option(help="Measurements of each number")] = 5,
    device: common.Device = "auto",
    revision: common.Revision = None,
    out: Out = None,
    as_json: Json = False,
    debug: common.Debug = False,
) -> None:
    """Tokens a second of MODEL in prefill and decoding, and the memory that it holds."""
    with guard(debug):
        from aptq.evaluate.speed import Load, compare, resident
        from aptq.terminal import Display, quiet_libraries
        from aptq.work import Step

        counts = _counts(batches)
        load = Load(batches=counts, prompt=prompt, tokens=tokens, turns=turns)
        if min(prompt, tokens, turns) < 1:
            raise ValueError(
                "nothing to time\n"
                f"--prompt {prompt} --tokens {tokens} --turns {turns}\ngive numbers above 0"
            )
        quiet_libraries()
        with Display(quiet=as_json) as display:
            models = _models(model, reference, device, revision, display)
            rows = compare(
                models,
                "bf16" if "bf16" in models else "packed",
                load,
                lambda done, total: display(Step("time", done, total)),
            )
        found = {
            "model": model,
            "reference": reference,
            **_machine(models["packed"].device),
            "resident_bytes": {name: resident(each) for name, each in models.items()},
            "rows": [row.to_json() for row in rows],
        }
        _show(found, out, as_json, _speed_table)


@bench.command()
def compress(
    model: common.Original,
    grid: common.GridName = None,
    budget: common.Budget = None,
    recipe: common.RecipeName = common.DEFAULT,
    data: common.Text = None,
    samples: common.Samples = None,
    length: common.Length = None,
    device: common.Device = "auto",
    revision: common.Revision = None,
    out: Out = None,
    as_json: Json = False,
    debug: common.Debug = False,
) -> None:
    """Seconds, tokens a second and peak memory of compressing MODEL; nothing is kept."""
    with guard(debug):
        import resource
        import tempfile

        from aptq import pipeline
        from aptq.recipe import Recipe
        from aptq.runtime.open import find_device
        from aptq.terminal import Display, quiet_libraries

        quiet_libraries()
        chosen = Recipe.load(recipe).adapt(
            grid=grid, budget=budget, source=data, samples=samples, length=length
        )
        # beside the current folder: the system's temporary one may be memory
        with Display(quiet=as_json) as display, tempfile.TemporaryDirectory(dir=".") as scratch:
            done = pipeline.compress(
                model,
                Path(scratch) / "run",
                recipe=chosen,
                device=device,
                revision=revision,
                report=display,
            )
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        found = {
            "model": model,
            "recipe": recipe,
            **_machine(find_device(device)),
            "seconds": done.seconds,
            "tokens": done.tokens,
            "tokens_per_second": done.tokens / done.seconds,
            "blocks": len(done.blocks),
            "seconds_per_block": done.seconds / max(1, len(done.blocks)),
            "peak_bytes": peak,
            "peak_device_bytes": max((p.get("device", 0) for p in done.phases.values()), default=0),
            "bits": done.bits,
            "phases": done.phases,
        }
        _show(found, out, as_json, _cost_table)


def _counts(text: str) -> tuple[int, ...]:
    """Batch sizes.  Raises ValueError for what is none."""
    words = text.split(",")
    if not all(word.strip().isdecimal() and int(word) for word in words):
        raise ValueError(f"not batch sizes\n--batches {text}\ngive numbers such as 1,8,32")
    return tuple(int(word) for word in words)


def _models(
    model: str, reference: str | None, device: str, revision: str | None, report: Any
) -> dict[str, Any]:
    """What takes turns: "packed", and with a reference "bf16" and "torch int4"."""
    import copy

    from aptq.evaluate.speed import with_torch_int4
    from aptq.runtime.open import find_device, open_any

    on = find_device(device)
    found = {"packed": open_any(model, on, revision=revision).model}
    if reference is not None:
        import torch

        original = open_any(reference, on).model.to(torch.bfloat16)
        found["bf16"], peer = original, copy.deepcopy(original)
        if count := with_torch_int4(peer):
            found["torch int4"] = peer
        report(f"torch's own int4 holds {count} layers, rounded to nearest: for its speed only")
    return found


def _machine(device: Any) -> dict[str, Any]:
    import torch

    from aptq.recording import device_name

    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def _show(found: dict[str, Any], out: Path | None, as_json: bool, table: Any) -> None:
    import json

    from rich.console import Console

    if out is not None:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print_json(found)
    else:
        Console().print(table(found))


def _speed_table(found: Mapping[str, Any]) -> Any:
    from rich.table import Table

    from aptq.terminal import size

    table = Table(title=f"tokens/s on {found['device']}", box=None)
    for name in ("case", "batch", "model", "tokens/s", "ratio", "memory"):
        table.add_column(name, justify="left" if name in ("case", "model") else "right")
    for row in found["rows"]:
        held = size(found["resident_bytes"][row["model"]])
        figures = (f"{row['rate']:.4g}", f"{row['ratio']:.2f}", held)
        table.add_row(row["case"], str(row["batch"]), row["model"], *figures)
    return table


def _cost_table(found: Mapping[str, Any]) -> Any:
    from rich.table import Table

    from aptq.terminal import size

    table = Table(title=f"compressing on {found['device']}", box=None)
    table.add_column("what")
    table.add_column("", justify="right")
    table.add_row("seconds", f"{found['seconds']:.1f}")
    table.add_row("seconds a block", f"{found['seconds_per_block']:.2f}")
    table.add_row("calibration tokens/s", f"{found['tokens_per_second']:.4g}")
    table.add_row("peak memory", size(found["peak_bytes"]))
    if found["peak_device_bytes"]:
        table.add_row("peak GPU memory", size(found["peak_device_bytes"]))
    for name, phase in found["phases"].items():
        table.add_row(f"  {name}", f"{phase['seconds']:.1f} s")
    return table
