"""The report as text: the decision, its figures, and that nothing from a run folder is markup."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from aptq.report import compare, page
from aptq.report.facts import collect, curves, mean_bits
from aptq.report.plots import bits, depth, front, phases, sensitivity
from tests.report.folders import GRIDS, write_eval, write_run

HOSTILE = "</script><img src=x onerror=alert(1)>'\"&{{style}}"


class Tags(HTMLParser):
    """Every tag with its attributes, and the text outside scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("script", "style"):
            self.words.append(data)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")


def words(path: Path) -> str:
    """What a reader sees without JavaScript."""
    return " ".join(" ".join(Tags(path.read_text("utf-8")).words).split())


def test_the_decision_comes_first(run: Path) -> None:
    text = words(page.write(run))
    head = text[: text.index("Where the bits went")]
    assert "16 MiB became 4 MiB : 4.00 times smaller, 3.5 bits for each weight" in head
    assert "asked: 3.5bpw" in head
    assert "Expected loss: 0.04 nats a token" in head
    assert "not yet measured" in head
    assert "1.25 min" not in head
    assert "75 s" in head
    write_eval(run)
    head = words(page.write(run)).partition("Where the bits went")[0]
    assert "perplexity went from 10.00 to 11.00 (+10.0%)" in head
    assert "same top token at 75.0% of positions" in head
    head = words(page.write(run)).partition("What it cost")[2]
    assert "some.txt 11.000 10.50 to 11.50 0.2500 75.0%" in head
    assert "part.txt 12.000 0.3000 70.0%" in head
    assert "arc_easy acc 50.0% 2.0% 500 55.0% -5.0% ± 1.0% 0.003" in head
    assert "From 0.5 at the beginning of a window to 0.25 at its end." in head


def test_tasks_alone_are_an_evaluation(run: Path) -> None:
    write_eval(run, perplexity=None, kl=None, reference=None, positions=[], texts=[])
    text = words(page.write(run))
    assert "Zero-shot tasks" in text
    assert "Measured by aptq eval" not in text


def test_every_plot_has_words_and_numbers(run: Path) -> None:
    tags = Tags(page.write(run).read_text("utf-8")).tags
    places = [found for _, found in tags if found.get("class") == "plot"]
    assert [found["id"] for found in places] == [
        "bits",
        "curves",
        "front",
        "weights",
        "drift",
        "tuned0",
        "time",
        "memory",
    ]
    assert all(found["role"] == "img" and len(found["aria-label"] or "") > 60 for found in places)
    tables = [tag for tag, _ in tags if tag == "table"]
    assert len(tables) == len(places) + 2  # all layers and the rescued ones


def test_nothing_of_a_run_folder_is_markup(tmp_path: Path) -> None:
    run = write_run(tmp_path / "<img src=x onerror=1>", prefix=HOSTILE, role=HOSTILE)
    write_eval(run, text=HOSTILE)
    (run / "recipe.toml").write_text(
        f"budget = '''{HOSTILE}'''\n[[stage]]\nuse = '<u>1'\n[[stage]]\nuse = '<u>2'\n"
    )
    for path in (page.write(run), compare.write([run, run], tmp_path / "both.html")):
        text = path.read_text("utf-8")
        tags = Tags(text).tags
        assert not {"img", "u"} & {tag for tag, _ in tags}
        assert not [found for _, found in tags if any(key.startswith("on") for key in found)]
        assert len(re.findall(r"</script>", text)) == 3
        held = re.search(r'id="plots">(.*?)</script>', text, re.DOTALL)
        assert held is not None
        assert "<" not in held[1]
        plots = json.loads(held[1])
        assert any("onerror" in json.dumps(plot) for plot in plots)  # it is there, as text


def test_nothing_is_loaded(run: Path) -> None:
    tags = Tags(page.write(run).read_text("utf-8")).tags
    assert not [found for _, found in tags if "src" in found]
    assert [found["href"] for _, found in tags if "href" in found] == ["data:,"]
    (policy,) = [found["content"] for _, found in tags if found.get("http-equiv")]
    assert policy is not None
    assert policy.startswith("default-src 'none'")


def test_heat_map_holds_every_layer(run: Path) -> None:
    found = collect(run)
    (plot,), _ = bits(found)
    assert (plot["columns"], len(plot["rows"]), plot["low"], plot["high"]) == ([*range(6)], 7, 2, 5)
    z = {(row, block): value for row, line in zip(plot["rows"], plot["z"], strict=True)
         for block, value in enumerate(line)}  # fmt: skip
    for cell in found.cells:
        assert cell.block is not None
        assert z[cell.role, cell.block] == pytest.approx(cell.bits, abs=1e-4)
        assert cell.score == {"int2-g64-z": 0.3, "int3-g64-z": 0.02, "int4-g64-z": 0.002}[cell.grid]
    hover = plot["hover"][0][2]
    assert "model.layers.2.q_proj" in hover
    assert "scales: one for 64 columns" in hover
    assert "damping: 0.01 of the mean diagonal" in hover
    assert "fallbacks: 1" in hover


def test_curves_add_the_layers_of_a_role(run: Path) -> None:
    found = collect(run)
    expected = [
        (bit, 6 * loss) for bit, loss in zip(GRIDS.values(), (0.3, 0.02, 0.002), strict=False)
    ]
    assert curves(found)["down"] == [pytest.approx(point) for point in expected]
    (plot,), text = sensitivity(found)
    assert [one["name"] for one in plot["series"]] == ["q", "k", "v", "o", "gate", "up", "down"]
    assert "1.8 nats per token at 2.28 bits" in text


def test_depth_tells_stages_apart(run: Path) -> None:
    plots, _ = depth(collect(run))
    weights, drift, tuned = plots
    assert [one["name"] for one in weights["series"]] == ["after gptq", "after autoround"]
    assert weights["series"][1]["y"] == [0.08] * 6
    assert drift["series"][0]["y"][-1] == pytest.approx(0.05)
    assert [one["y"][0] for one in tuned["series"]] == [0.2, 0.1]


def test_front_shows_this_run_and_what_was_measured(run: Path) -> None:
    write_eval(run)
    (plot,), text = front(collect(run))
    curve, own, measured = plot["series"]
    assert len(curve["x"]) == 8
    assert (own["x"], own["y"]) == ([3.4999], [0.04])
    assert measured["y"] == [0.25]
    assert "This run, expected: 0.04 at 3.5 bits. This run, measured KL: 0.25 at 3.5 bits." in text


def test_an_old_run_still_has_a_report(run: Path) -> None:
    log = run / "log.jsonl"
    kept = [line for line in log.read_text().splitlines()
            if json.loads(line)["event"] in ("start", "layer", "block", "done")]  # fmt: skip
    log.write_text("\n".join(kept) + "\n")
    (run / "scores.json").unlink()
    found = collect(run)
    assert sensitivity(found) == front(found) == phases(found) == ([], "")
    (weights,), _ = depth(found)
    assert weights["series"][0]["name"] == "after autoround"
    assert weights["series"][0]["y"][0] == pytest.approx(0.01)
    assert mean_bits(found.inside()) == pytest.approx(3.3, abs=0.2)
    assert "Where the bits went" in words(page.write(run))


def test_comparison(tmp_path: Path) -> None:
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    path = compare.write([one, two], tmp_path / "both.html")
    assert "2 runs, from 4 MiB to 4 MiB" in words(path)
    assert '"expected loss, nats per token"' in path.read_text()
    write_eval(one)
    write_eval(two, kl=0.5, text="other.txt")
    text = compare.write([one, two], path).read_text()
    assert "KL to the original, nats per token" in text
    assert "their figures do not compare" in text


def test_without_plotly(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "plotly.offline", None)
    with pytest.raises(ValueError, match="the report needs Plotly") as error:
        page.write(run)
    assert len(str(error.value).splitlines()) == 3
    assert not (run / "report.html").exists()
