"""The pictures in docs/pictures: a run's page at both widths, light and dark, and the run in optuna-dashboard.

`python -m scripts.draw_face RUN`, with Chromium and playwright on the machine. RUN is a run folder with a report.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import threading
import urllib.request
from pathlib import Path
from typing import Any

from mergesearch.commands.dashboard import serving
from mergesearch.commands.page import write_page

ROOT = Path(__file__).parent.parent
WIDTHS, MODES = (1280, 400), ("light", "dark")
_HEIGHT = 900


def draw_page(browser: Any, page: Path, out: Path) -> list[Path]:
    """Pictures of a page from its beginning to the recipes by depth, at both widths and in both modes."""
    made = []
    for width in WIDTHS:
        for mode in MODES:
            file = out / f"page-{width}-{mode}.png"
            _shoot(browser, page.absolute().as_uri(), file, width, mode, "html[data-drawn='yes']", until="#depth")
            made.append(file)
    return made


def draw_dashboard(browser: Any, run: Path, out: Path) -> Path:
    """A picture of a run in optuna-dashboard."""
    file = out / "dashboard.png"
    with serving(run, port=0, every=3600) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}"
        with urllib.request.urlopen(f"{here}/api/studies") as answer:
            (study,) = json.load(answer)["study_summaries"]
        address = f"{here}/dashboard/studies/{study['study_id']}"
        _shoot(browser, address, file, WIDTHS[0], MODES[0], ".scatterlayer .point")
        server.shutdown()
    return file


def _shoot(browser: Any, address: str, file: Path, width: int, mode: str, there: str, until: str = "") -> None:
    """One picture, once what is at `there` (a selector) is drawn: the window, or the page to the end of `until`."""
    page = browser.new_page(viewport={"width": width, "height": _HEIGHT}, color_scheme=mode)
    page.set_default_timeout(180_000)
    page.goto(address)
    page.wait_for_selector(there, state="attached")
    if until:
        box = page.locator(until).bounding_box()
        clip = {"x": 0, "y": 0, "width": width, "height": box["y"] + box["height"]}
        page.screenshot(path=str(file), animations="disabled", full_page=True, clip=clip)
    else:
        page.wait_for_timeout(2000)  # for what moves into its place; a picture is no test
        page.screenshot(path=str(file), animations="disabled")
    page.close()


def main() -> None:
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pictures")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as running:
        page = Path(folder) / "page.html"
        write_page(given.run, page)
        browser = running.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=["--no-sandbox"]
        )
        for file in [*draw_page(browser, page, given.out), draw_dashboard(browser, given.run, given.out)]:
            print(file)
        browser.close()


if __name__ == "__main__":
    main()
