"""The report in headless Chromium: every plot drawn, nothing asked of a network, no error."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aptq.report import compare, page
from tests.report.folders import write_eval, write_run

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("needs chromium", allow_module_level=True)

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
SCREENS = {"desktop": (1280, 900), "phone": (390, 844)}
HOSTILE = "</script><img src=x onerror=window.hit=1><a href='javascript:window.hit=1'>x</a>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The report of a run, of one with hostile names, and of several."""
    folder = tmp_path_factory.mktemp("browser")
    run = write_run(folder / "run", blocks=30)
    write_eval(run)
    hostile = write_run(folder / "hostile", prefix=HOSTILE, role=HOSTILE)
    both = compare.write([run, hostile], folder / "both.html")
    return {"run": page.write(run), "hostile": page.write(hostile), "both": both}


class Opened:
    """A page and everything it complained about or asked for."""

    def __init__(self, browser: Any, file: Path, screen: str, scheme: str) -> None:
        width, height = SCREENS[screen]
        size = {"width": width, "height": height}
        self.page = browser.new_context(viewport=size, color_scheme=scheme).new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url[:80]))
        self.page.goto(file.as_uri())
        self.page.wait_for_function("() => document.body.dataset.drawn", timeout=60_000)


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["run", "hostile", "both"])
def test_every_plot_is_drawn(
    browser: Any, files: dict[str, Path], name: str, scheme: str, screen: str
) -> None:
    opened = Opened(browser, files[name], screen, scheme)
    assert opened.said == []
    assert [url for url in opened.asked if not url.startswith(("file:", "data:"))] == []
    assert len([url for url in opened.asked if url.startswith("file:")]) == 1
    places = opened.page.query_selector_all(".plot")
    assert len(places) == {"both": 2, "run": 9, "hostile": 8}[name]
    for place in places:
        marks = place.query_selector_all(".trace, .point, .hm image, image")
        box = place.bounding_box()
        assert marks, place.get_attribute("id")
        assert box is not None
        assert box["height"] > 90
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= SCREENS[screen][0]
    wide = opened.page.evaluate("document.documentElement.scrollWidth")
    assert wide <= SCREENS[screen][0]  # nothing has to be scrolled sideways
    assert opened.page.evaluate("window.hit") is None
    opened.page.close()


def test_names_stay_text_in_plots(browser: Any, files: dict[str, Path]) -> None:
    opened = Opened(browser, files["hostile"], "desktop", "light")
    opened.page.hover("#bits .nsewdrag", position={"x": 40, "y": 12})
    opened.page.wait_for_selector("#bits .hoverlayer text")
    shown = opened.page.text_content("#bits .hoverlayer")
    assert "onerror=window.hit=1" in shown
    assert opened.page.query_selector_all("#bits a, #bits img") == []
    assert "onerror" in opened.page.text_content("#bits .yaxislayer-above")
    assert opened.page.evaluate("window.hit") is None
    opened.page.close()


def test_colours_follow_the_reader(browser: Any, files: dict[str, Path]) -> None:
    """Another scheme and paper redraw the plots; text keeps its contrast."""
    opened = Opened(browser, files["run"], "desktop", "light")
    colour = "() => getComputedStyle(document.querySelector('#curves .xtick text')).fill"
    light = opened.page.evaluate(colour)
    opened.page.emulate_media(color_scheme="dark")
    opened.page.wait_for_function(f"{colour} !== '{light}'")
    opened.page.emulate_media(media="print")
    opened.page.wait_for_function(f"{colour} === 'rgb(0, 0, 0)'")
    assert opened.said == []
    opened.page.close()


def test_tables_open_by_keyboard(browser: Any, files: dict[str, Path]) -> None:
    opened = Opened(browser, files["run"], "phone", "light")
    first = opened.page.locator("figure:has(#bits) summary")
    first.focus()
    opened.page.keyboard.press("Enter")
    table = opened.page.locator("details[open] table").first
    assert table.is_visible()
    assert table.locator("tbody tr").count() == 30
    opened.page.close()
