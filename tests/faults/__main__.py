"""Provoke the thirty faults of the table and print expected against seen: python -m tests.faults.

--only 3,12 runs some of them, --list prints the table.  Exit code 1 if one is not as expected.
"""

import argparse
import tempfile
import time
import traceback
import warnings
from pathlib import Path

from tests.faults import figures, inputs, packed, runs  # noqa: F401  (they file their cases)
from tests.faults.bench import CASES, Box, Case


def tried(case: Case, root: Path, models: Path, *, loud: bool) -> str:
    """What is wrong; "" if all is as expected."""
    root.mkdir()
    box = Box(root, models)
    began = time.perf_counter()
    try:
        case.run(box)
        wrong = ""
    except Exception as error:
        wrong = f"{type(error).__name__}: {error}"
        if loud:
            traceback.print_exc()
    word = "no" if wrong else "ok"
    print(f"{case.number:>2} {word} {case.name} ({time.perf_counter() - began:.1f} s)")
    print(f"      expected: {case.expected}")
    print(f"      seen:     {wrong or f'code {box.last.code}: {box.last.short()}'}", flush=True)
    return wrong


def main() -> int:
    """All cases, or those asked for."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--only", help="numbers with commas")
    options.add_argument("--list", action="store_true")
    options.add_argument("--loud", action="store_true", help="tracebacks of what fails")
    given = options.parse_args()
    warnings.simplefilter("ignore")
    numbers = sorted(CASES) if given.only is None else list(map(int, given.only.split(",")))
    if given.list:
        for number in numbers:
            print(number, CASES[number].name, "-", CASES[number].expected)
        return 0
    with tempfile.TemporaryDirectory(prefix="faults ") as folder:
        root = Path(folder)
        wrong = [
            number
            for number in numbers
            if tried(CASES[number], root / str(number), root / "models", loud=given.loud)
        ]
    print(f"{len(numbers) - len(wrong)}/{len(numbers)} as expected; not: {wrong or 'none'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
