"""The public surface: names, lean import, registration with transformers, and line budgets."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import aptq

SOURCE = Path(aptq.__file__).parent
NAMES = {
    "Budget",
    "Data",
    "Grid",
    "Model",
    "Plan",
    "Recipe",
    "Scores",
    "Stage",
    "adapt",
    "assess",
    "compress",
    "load",
    "measure",
    "export_to",
    "plan",
}


def run(code: str) -> str:
    """Standard output of `code` in a new interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_public_names_are_these() -> None:
    assert set(aptq.__all__) == NAMES
    assert set(dir(aptq)) >= NAMES
    for name in NAMES:
        assert getattr(aptq, name).__module__.startswith("aptq.")


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((SOURCE / "__init__.py").read_text())
    seen = {
        (f"{node.module}", alias.name)
        for block in ast.walk(tree)
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == {(module, name) for name, module in aptq._HOME.items()}


def test_no_public_name_hides_a_package() -> None:
    folders = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert not NAMES & folders


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        importlib.import_module("aptq").compres  # noqa: B018


def test_import_is_lean() -> None:
    code = "import sys, aptq, aptq.cli; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert run(code) == "[]"


def test_import_touches_no_gpu() -> None:
    code = "import aptq.pipeline, torch; print(torch.cuda.is_initialized())"
    assert run(code) == "False"


@pytest.mark.parametrize(
    "first",
    [
        "import aptq\nfrom transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table",
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table\nimport aptq",
        "import aptq, transformers.modeling_utils\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table",
        "import aptq.runtime.load\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table",
    ],
    ids=["aptq first", "transformers first", "through the models", "runtime first"],
)
def test_transformers_knows_the_format(first: str) -> None:
    left = "[type(finder).__module__ for finder in sys.meta_path]"
    code = f"{first}\nimport sys\nprint(table['aptq'].__name__, 'aptq.hook' in {left})"
    assert run(code) == "AptqQuantizer False"


def test_looking_for_the_table_does_not_spend_the_hook() -> None:
    code = (
        "import aptq, importlib.util as u, sys; u.find_spec('transformers.quantizers.auto'); "
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as t; print('aptq' in t)"
    )
    assert run(code) == "True"


def code_lines(text: str) -> int:
    """Lines that hold code: no blank ones, comments or docstrings, which cost a reader nothing."""
    held: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.stmt) and not (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        ):
            body = getattr(node, "body", None)
            last = node.end_lineno if body is None else max(node.lineno, body[0].lineno - 1)
            assert last is not None
            held.update(range(node.lineno, last + 1))
    lines = text.splitlines()
    return sum(1 for n in held if lines[n - 1].strip() and lines[n - 1].strip()[0] != "#")


def test_line_budgets() -> None:
    texts = {path.relative_to(SOURCE): path.read_text("utf-8") for path in SOURCE.rglob("*.py")}
    assert {str(path): 1 for path, text in texts.items() if len(text.splitlines()) > 300} == {}
    assert sum(map(code_lines, texts.values())) <= 21_000


def test_functions_are_short() -> None:
    long = []
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                # the lines of the body: long lists of typed options are declarations
                count = node.end_lineno - node.body[0].lineno + 1
                if count > 40:
                    long.append(f"{path.relative_to(SOURCE)}:{node.name} {count}")
    assert long == []


def test_every_file_says_what_it_is() -> None:
    silent = [
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        if not ast.get_docstring(ast.parse(path.read_text("utf-8")))
    ]
    assert silent == []


def test_version_is_the_distribution_s() -> None:
    text = (SOURCE.parents[1] / "pyproject.toml").read_text("utf-8")
    assert 'dynamic = ["version"]' in text
    assert aptq.__version__.count(".") == 2
