"""Documents keep their word: every code block runs, links lead somewhere, words are spelt right.

Blocks run one after the other in a folder of the document's own, with a tiny random model for MODEL
and path/to/model.  A block whose first line is `# needs SOFTWARE` is parsed only; readers see it.
`make` is asked whether it knows the target; `pip`, whether the extra exists.
"""

import ast
import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from aptq.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "examples/README.md"]
PAGES += sorted(ROOT.glob("docs/*.md"))
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELL, PYTHON = ("", "sh", "bash"), ("python",)
SHOWN = ("toml", "text", "json")  # files and output, nothing to run
SAMPLES = ["--samples", "2", "--length", "32"]


@dataclass(frozen=True)
class Snippet:
    """One fenced block."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def needs(self) -> str:
        """Software that its first line asks for."""
        found = re.match(r"# needs (.+)", self.text)
        return found[1] if found else ""


def snippets(page: Path) -> Iterator[Snippet]:
    text = page.read_text("utf-8")
    for found in FENCE.finditer(text):
        line = text[: found.start()].count("\n") + 1
        yield Snippet(page, line, found[1].strip(), found[2])


WRITTEN = [page for page in PAGES if list(snippets(page))]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Widths of a multiple of 32, which every format holds, and room for windows of 2048."""
    words = _tokenizer()
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    folder = tmp_path_factory.mktemp("docs") / "model"
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with a few merges, for llama.cpp insists on some."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    made.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 3], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_runs(page: Path, model: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 200)
    with contextlib.chdir(tmp_path):
        _prepare(page, model)
        for block in snippets(page):
            where = f"{page.relative_to(ROOT)}:{block.line}"
            assert block.language in (*SHELL, *PYTHON, *SHOWN), f"{where}: {block.language!r}"
            if block.language in SHELL:
                _shell(block, model, where)
            elif block.language in PYTHON:
                _python(block, model, where)
            elif block.language == "toml":
                tomllib.loads(block.text)


def _prepare(page: Path, model: Path) -> None:
    """The page on engines begins with a run, and with what an earlier block has exported."""
    if page.name == "engines.md":
        words = ["compress", str(model), "--grid", "int4-g32", "--recipe", "rtn", "--out", "run"]
        assert _aptq(words) == 0
        shutil.copytree("run", "RUN")
        assert _aptq(["export", "run", "--to", "compressed-tensors", "--out", "served"]) == 0


def _shell(block: Snippet, model: Path, where: str) -> None:
    """Each command of a block; several lines may be one."""
    checked = subprocess.run(["bash", "-n"], input=block.text, text=True, capture_output=True)
    assert checked.returncode == 0, f"{where}: {checked.stderr}"
    if block.needs:
        return
    lines = block.text.replace("\\\n", " ").splitlines()
    while lines:
        line = lines.pop(0)
        if "<<'END'" in line:  # a file that the page writes
            end = lines.index("END")
            script = "\n".join([line, *lines[: end + 1]])
            assert subprocess.run(["bash", "-c", script]).returncode == 0, where
            lines = lines[end + 1 :]
            continue
        words = shlex.split(_substituted(line, model), comments=True)
        if not words:
            continue
        assert _known(words, where), f"{where}: nothing can run {line!r}"


def _known(words: list[str], where: str) -> bool:
    """Run a command that a page may contain; False for any other."""
    command, *rest = words
    if command == "aptq":
        assert _aptq(_smaller(rest)) == 0, f"{where}: {shlex.join(words)}"
    elif command == "make":
        found = subprocess.run(["make", "-n", *rest], cwd=ROOT, capture_output=True, text=True)
        assert found.returncode == 0, f"{where}: {found.stderr}"
    elif command == "python":
        assert (ROOT / rest[0]).is_file() or rest[0] == "-m", where
    else:
        return False
    return True


def _substituted(line: str, model: Path) -> str:
    line = re.sub(r"\bMODEL\b|\bpath/to/model\b", str(model), line)
    line = re.sub(r"\bTEXT\b", "text.txt", line).replace("vllm|gguf", "vllm")
    return re.sub(r"--out (DIR|FILE\.gguf)", r"--out made-\1", line)


def _smaller(words: list[str]) -> list[str]:
    """The same command on few tokens, into a folder that is free."""
    if words[0] in ("compress", "measure") and "--samples" not in words:
        words = [*words, *(SAMPLES if "--plan" not in words else [])]
    if words[0] == "eval" and "--length" not in words:
        words = [
            *words,
            "--length",
            "32",
            *(["--windows", "4"] if "--windows" not in words else []),
        ]
    if words[0] == "generate":
        words = [*words, "--tokens", "2"]
    if "--out" in words and words[0] in ("compress", "measure", "export"):
        out = Path(words[words.index("--out") + 1])  # blocks show ways to do one thing
        shutil.rmtree(out, ignore_errors=True)
        out.unlink(missing_ok=True)
    return words


def _aptq(words: list[str]) -> int:
    done = CliRunner().invoke(app, words)
    if done.exit_code:
        print(shlex.join(words), done.output)
    return done.exit_code


def _python(block: Snippet, model: Path, where: str) -> None:
    """Run in an interpreter of its own: a block may register methods."""
    tree = ast.parse(block.text, where)
    if block.needs:
        return
    code = ast.unparse(tree).replace("path/to/model", str(model))
    code = f"import torch; torch.set_num_threads(1)\n{code}"
    made = re.search(r"aptq\.compress\([^,]+, '([\w/]+)'", code)
    if made:
        shutil.rmtree(made[1], ignore_errors=True)
        code = code.replace(".adapt(", ".adapt(**SMALL, ").replace("samples=8, length=64", "seed=0")
        code = f"SMALL = dict(samples=2, length=32)\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, f"{where}: {done.stderr[-2000:]}"


LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def _slug(heading: str) -> str:
    """Anchor of a heading, as Python-Markdown and GitHub make it."""
    text = re.sub(r"[^\w\s-]", "", heading.replace("`", "")).strip().lower()
    return re.sub(r"\s+", "-", text)


def anchors(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text("utf-8"))
    return {_slug(found) for found in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    made = {"contributing.md": ROOT / "CONTRIBUTING.md"}  # pages that the site adds
    for target in LINK.findall(FENCE.sub("", page.read_text("utf-8"))):
        name, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", name):
            assert name.startswith("https://"), target
            continue
        file = made.get(name, page.parent / name) if name else page
        assert file.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}"


def test_pictures_are_small() -> None:
    pictures = list((ROOT / "docs/images").glob("*"))
    assert len(pictures) >= 2
    for picture in pictures:
        assert picture.suffix == ".png"
        assert 10_000 < picture.stat().st_size < 300_000, picture.name


def test_every_method_says_when_to_use_it() -> None:
    from aptq.contents import catalogue

    table = tomllib.loads((ROOT / "docs/_site/when.toml").read_text("utf-8"))
    assert {entry.name for entry in catalogue()} == set(table)
    for name, entry in table.items():
        assert entry["when"].endswith("."), name
        if "measured" in entry:
            result = entry["measured"].partition(" ")[0]
            assert (ROOT / f"benchmarks/results/{result}.json").is_file(), name


def test_spelling() -> None:
    pytest.importorskip("codespell_lib", reason="needs codespell")
    where = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs", "examples", "src", "tests"]
    command = [sys.executable, "-m", "codespell_lib", *where]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["smaller.sh", "front.sh", "smaller.py", "recipe.py", "method.py"])
def test_examples(name: str, model: Path, tmp_path: Path) -> None:
    """Each in a process of its own: one of them registers a method."""
    tools = Path(sys.executable).parent
    assert (tools / "aptq").exists(), "aptq is not installed beside python"
    variables = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    variables |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    words = [str(ROOT / "examples" / name), str(model), str(tmp_path / "out")]
    if name.endswith(".sh"):
        words = ["bash", *words, "5bpw, 6bpw" if name == "front.sh" else "5bpw"]
        words += SAMPLES if name == "smaller.sh" else []
    else:
        words = [sys.executable, *words]
    done = subprocess.run(words, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")}
    assert (
        left
        >= {
            "smaller.sh": {"out/eval.json", "out/report.html"},
            "front.sh": {"out-front.html", "out-compared.html", "out/5bpw/plan.json"},
            "smaller.py": {"out/eval.json"},
            "recipe.py": {"out/plan.json"},
            "method.py": {"out-rtn/plan.json", "out-narrow/plan.json"},
        }[name]
    )


def test_site_builds_without_warnings(tmp_path: Path) -> None:
    pytest.importorskip("material", reason="needs mkdocs-material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path)]
    variables = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.strip() == ""
    built = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")}
    assert built >= {"index.html", "faq.html", "methods/quantize.html", "contributing.html"}
    for name in built:
        text = (tmp_path / name).read_text("utf-8")
        assert "fonts.googleapis" not in text
        loaded = re.findall(r"<(?:script|link|img)\b[^>]*\b(?:src|href)=\"(https?:[^\"]+)", text)
        assert [url for url in loaded if "canonical" not in url] == [], name
    method = (tmp_path / "methods/quantize.html").read_text("utf-8")
    assert "When to use it." in method
    assert "Measured" in method
