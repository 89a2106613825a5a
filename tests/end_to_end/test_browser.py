"""TensorBoard's pages in a real browser: a run of 10,000 steps, one that was stopped and resumed, 30 side by side.

    pip install playwright && apt-get install chromium && pytest -m slow tests/end_to_end/test_browser.py

With LM_SCREENSHOTS=FOLDER each page is also saved there.
"""

import argparse
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.dashboard import write

from .conftest import Lm
from .test_tensorboard import LOSS, SEEN, Board

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium: apt-get install chromium"),
]
Open = Callable[[str], Any]
SECONDS = 60_000


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install playwright")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": 1400, "height": 1000})
        browser.close()


@pytest.fixture
def open_page(page: Any) -> Iterator[Callable[[Path, set[str]], Open]]:
    boards: list[Board] = []

    def over(folder: Path, runs: set[str]) -> Open:
        board = Board(folder)
        boards.append(board)
        board.wait_for(runs)

        def opened(name: str) -> Any:
            page.goto("about:blank")
            page.goto(f"http://127.0.0.1:{board.port}/#{name}")
            return page

        return opened

    yield over
    for board in boards:
        board.process.terminate()
        board.process.wait()


def sees(page: Any, *words: str) -> None:
    """Waits until all of it can be seen, in whatever component."""
    for word in words:
        page.get_by_text(word, exact=False).first.wait_for(state="attached", timeout=SECONDS)


def keep(page: Any, name: str) -> None:
    if folder := os.environ.get("LM_SCREENSHOTS"):
        page.wait_for_timeout(3000)
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


def test_every_page_of_a_run_of_10_000_steps(open_page: Callable, lm: Lm, workplace: Path) -> None:
    folder = workplace / "browsed-long"
    options = ("--train.steps=10000", "--eval.every=500", "--log.every=10", "--checkpoint.every=5000")
    lm("train", "tiny.py", f"--run.dir={folder}/long", "--sample.tokens=20", "--sample.prompt=the ", *options)
    opened = open_page(folder, {"long/tensorboard"})

    page = opened("timeseries")
    sees(
        page, "1 overview", "1 learning: loss", "2 healthy: grad_norm", "3 fast: tokens_per_second", "4 whole: goodput"
    )
    keep(page, "timeseries")

    page = opened("custom_scalars")
    sees(page, "Is it learning?", "Is it healthy?", "Is it fast?", "Is it whole?")
    page.wait_for_function(_CURVES, arg=8, timeout=SECONDS)
    keep(page, "custom_scalars")

    page = opened("images")
    sees(page, "attention", "loss of each token")
    page.wait_for_function(_PICTURES, arg=2, timeout=SECONDS)
    keep(page, "images")

    for name, words in {
        "histograms": ("mean gradients", "parameters"),
        "distributions": ("mean gradients", "parameters"),
        "text": ("batch_size", "bound by"),
        "hparams": ("optim.learning_rate", "TABLE VIEW"),
    }.items():
        page = opened(name)
        sees(page, *words)
        keep(page, name)


def test_a_resumed_run_has_no_zigzag(open_page: Callable, lm: Lm, workplace: Path) -> None:
    folder = workplace / "browsed"
    for code, after in ((75, 5), (0, None)):
        lm("train", "tiny.py", f"--run.dir={folder}/resumed", *SEEN, code=code, after=after)
    page = open_page(folder, {"resumed/tensorboard"})("custom_scalars")
    sees(page, "Is it learning?")
    page.wait_for_function(_CURVES, arg=4, timeout=SECONDS)
    back = page.evaluate(_BACKWARD)
    assert back == 0, "no curve goes back in x"
    keep(page, "resumed")


def test_30_runs_side_by_side(open_page: Callable, tmp_path: Path) -> None:
    options = argparse.Namespace(steps=2000, every=10, layers=4, sources=1)
    for i in range(30):
        write(tmp_path / f"run-{i:02}", i, options)
    opened = open_page(tmp_path, {f"run-{i:02}/tensorboard" for i in range(30)})
    page = opened("timeseries")
    sees(page, LOSS, "run-00", "run-09")
    keep(page, "30-timeseries")
    page = opened("hparams")
    sees(page, "run-00", "run-29")
    keep(page, "30-hparams")


# Of all components, also those within others.
_ALL = """
const all = (root, wanted) => [...root.querySelectorAll("*")].flatMap(
    (one) => [...(one.matches(wanted) ? [one] : []), ...(one.shadowRoot ? all(one.shadowRoot, wanted) : [])]);
"""
_PATHS = """all(document, "path.line").map((one) => one.getAttribute("d") || "")
    .filter((d) => (d.match(/L/g) || []).length > 3)"""
_CURVES = f"(count) => {{ {_ALL} return {_PATHS}.length >= count; }}"
_BACKWARD = f"""() => {{ {_ALL} return {_PATHS}.filter((d) => {{
    const x = [...d.matchAll(/[ML](-?[0-9.e]+)/g)].map((one) => Number(one[1]));
    return x.some((value, i) => i > 0 && value < x[i - 1] - 1e-6);
}}).length; }}"""
_PICTURES = f"""(count) => {{ {_ALL}
    return all(document, "img").filter((one) => one.naturalWidth > 100).length >= count; }}"""
