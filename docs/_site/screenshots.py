"""Pictures of a report for the documents.  usage: screenshots.py REPORT.html FOLDER"""

import shutil
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

# name -> width, height, scheme, where the page is scrolled to
PICTURES = {
    "report-desktop": (1120, 860, "light", 0),
    "report-phone": (390, 844, "dark", 0),
    "report-depth": (1120, 860, "light", 2),
}
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]


def main(report: str, folder: str) -> None:
    browser_path = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser_path is None:
        raise SystemExit("no Chromium is installed")
    Path(folder).mkdir(parents=True, exist_ok=True)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=browser_path, args=FLAGS)
        for name, (width, height, scheme, section) in PICTURES.items():
            size = {"width": width, "height": height}
            page = browser.new_context(viewport=size, color_scheme=scheme).new_page()
            page.goto(Path(report).resolve().as_uri())
            page.wait_for_function("() => document.body.dataset.drawn")
            if section:
                page.locator("section").nth(section).scroll_into_view_if_needed()
                page.evaluate(
                    "n => document.querySelectorAll('section')[n].scrollIntoView()", section
                )
            page.screenshot(path=Path(folder) / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
