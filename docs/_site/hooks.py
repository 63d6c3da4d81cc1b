"""Pages that are written when the site is built: methods by family, recipes, contributing.

MkDocs calls `on_files` and `on_page_markdown`.  Texts come from the docstrings and dataclasses of
the package, from when.toml, and from benchmarks/results.
"""

import inspect
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from aptq.allocate import allocators
from aptq.contents import Entry, catalogue
from aptq.engine.stage import methods

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from tables import markdown  # noqa: E402  # a script beside its own modules

FAMILIES = {
    "quantize": "Choosing the codes",
    "reconstruct": "Tuning by gradients",
    "lowrank": "Low-rank factors beside the codes",
    "sparse": "Outliers beside the codes",
    "measure": "Measuring sensitivity",
    "allocate": "Dividing the bits",
}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that no file in docs/ holds."""
    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(text: str, page: Any, **_: Any) -> str:
    """Put the shipped recipes where a page asks for them."""
    return (
        text.replace("<!-- recipes -->", recipes()) if page.file.src_uri == "recipes.md" else text
    )


def pages() -> dict[str, str]:
    """Path of a page in the site -> its Markdown."""
    found: dict[str, list[Entry]] = {}
    for entry in catalogue():
        found.setdefault(entry.family, []).append(entry)
    when = tomllib.loads((ROOT / "docs/_site/when.toml").read_text("utf-8"))
    made = {f"methods/{name}.md": family(name, held, when) for name, held in found.items()}
    contributing = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    return made | {"contributing.md": contributing}


def family(name: str, entries: list[Entry], when: dict[str, dict[str, str]]) -> str:
    """The page of one family of methods."""
    title = FAMILIES.get(name, name.capitalize())
    parts = [f"# {title}", f"Written from the source of `{name}` when the site is built."]
    return (
        "\n\n".join([*parts, *(method(entry, when.get(entry.name, {})) for entry in entries)])
        + "\n"
    )


def method(entry: Entry, when: dict[str, str]) -> str:
    """One method: source and objective, when to use it, options, a measured row."""
    held = allocators if entry.family == "allocate" else methods
    cls = held.get(entry.name)
    source = inspect.cleandoc(sys.modules[cls.__module__].__doc__ or "")
    parts = [f"## {entry.name}", paragraphs(source)]
    if entry.about:
        parts.append(plain(entry.about))
    if "when" in when:
        parts.append(f"**When to use it.** {when['when']}")
    if entry.options:
        lines = ["| option | type | default | meaning |", "|---|---|---|---|"]
        for option in entry.options:
            kind = option.kind.replace("|", "or")
            lines.append(f"| `{option.name}` | {kind} | {option.default} | {plain(option.why)} |")
        parts.append("\n".join(lines))
    if "measured" in when:
        table, _, pattern = when["measured"].partition(" ")
        parts += ["**Measured**", markdown(table, ROOT / "benchmarks/results", pattern)]
    return "\n\n".join(parts)


def paragraphs(text: str) -> str:
    """A docstring as paragraphs; formulas keep their stars and brackets."""
    return "\n\n".join(plain(" ".join(some.split())) for some in text.split("\n\n"))


def plain(text: str) -> str:
    """Text in which nothing is Markdown but code spans and links to papers."""
    escaped = re.sub(r"([*_<>\[\]|])", r"\\\1", text)
    escaped = re.sub(r"`[^`]*`", lambda found: found[0].replace("\\", ""), escaped)
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", escaped)


def recipes() -> str:
    """The shipped recipes as they are."""
    files = sorted((ROOT / "src/aptq/recipes").glob("*.toml"))
    return "\n\n".join(f"### {file.stem}\n```toml\n{file.read_text('utf-8')}```" for file in files)
