"""A real TensorBoard over real runs: what its pages ask for is there, also of runs that were stopped, cut or broken."""

import json
import math
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.local import free_port
from lm.train.dashboard import tag

from .conftest import Lm

SEEN = ("--sample.tokens=5", "--eval.every=4")
LOSS = tag("loss")


class Board:
    """TensorBoard over a folder, asked as its pages ask it."""

    def __init__(self, folder: Path):
        self.port = free_port()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tensorboard.main", f"--logdir={folder}", f"--port={self.port}", "--host=127.0.0.1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def ask(self, plugin: str, posted: dict | None = None, **query: str) -> Any:
        url = f"http://127.0.0.1:{self.port}/data/{plugin}?{urllib.parse.urlencode(query)}"
        data = None if posted is None else json.dumps(posted).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"} if data else {})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def wait_for(self, runs: set[str]) -> None:
        until = time.monotonic() + 90
        while True:
            try:
                found = self.ask("plugin/scalars/tags")
                if all(LOSS in found.get(run, {}) for run in runs):
                    return
            except OSError:
                pass
            assert time.monotonic() < until, "TensorBoard does not show the runs"
            time.sleep(0.2)

    def steps(self, run: str, name: str = LOSS) -> list[int]:
        return [step for _, step, _ in self.ask("plugin/scalars/scalars", run=run, tag=name)]

    def values(self, run: str, name: str = LOSS) -> list[Any]:
        return [value for _, _, value in self.ask("plugin/scalars/scalars", run=run, tag=name)]


@pytest.fixture(scope="module")
def runs(lm: Lm, workplace: Path) -> Path:
    """whole: never stopped; resumed: twice, and started once more when it was done; torn: its event file is cut;
    broken: its updates are infinite."""
    folder = workplace / "boards"
    lm("train", "tiny.py", f"--run.dir={folder}/whole", *SEEN)
    for code, after in ((75, 4), (75, 9), (0, None), (0, None)):
        lm("train", "tiny.py", f"--run.dir={folder}/resumed", *SEEN, code=code, after=after)
    lm("train", "tiny.py", f"--run.dir={folder}/torn", *SEEN)
    [events] = (folder / "torn" / "tensorboard").glob("events*")
    events.write_bytes(events.read_bytes()[: events.stat().st_size * 2 // 3])
    options = ("--optim.learning_rate=1e30", "--optim.warmup_steps=0", "--optim.clip_norm=none")
    recovery = ("--recovery.max_bad_steps=3", "--recovery.rewinds=0", "--recovery.spike_sigmas=0")
    lm("train", "tiny.py", f"--run.dir={folder}/broken", *SEEN, *options, *recovery, code=4)
    return folder


@pytest.fixture(scope="module")
def board(runs: Path) -> Iterator[Board]:
    found = Board(runs)
    found.wait_for({f"{name}/tensorboard" for name in ("whole", "resumed", "torn", "broken")})
    yield found
    found.process.terminate()
    found.process.wait()


def test_every_page_has_what_it_shows(board: Board) -> None:
    run = "whole/tensorboard"
    pages = board.ask("plugins_listing")
    shown = {"scalars", "custom_scalars", "images", "histograms", "distributions", "text", "hparams", "timeseries"}
    assert {name for name in shown if pages[name]["enabled"]} == shown
    assert board.steps(run) == list(range(12))
    [attention] = board.ask("plugin/images/images", run=run, tag="attention", sample="0")[-1:]
    assert attention["step"] == 12
    assert len(board.ask("plugin/images/images", run=run, tag="loss of each token", sample="0")) == 3
    weights = board.ask("plugin/histograms/histograms", run=run, tag="parameters/layer_0")
    assert [step for _, step, _ in weights] == [3, 7, 12]
    attention_and_feed_forward = 4 * 16 * 16 + 3 * 16 * 64
    assert [sum(count for _, _, count in bins) for _, _, bins in weights] == [attention_and_feed_forward] * 3
    gradients = board.ask("plugin/histograms/histograms", run=run, tag="mean gradients/layer_0")
    assert [sum(count for _, _, count in bins) for _, _, bins in gradients] == [attention_and_feed_forward] * 3
    texts = {name: board.ask("plugin/text/text", run=run, tag=name)[0]["text"] for name in ("config", "plan", "sample")}
    assert "batch_size" in texts["config"]
    assert "memory" in texts["plan"]


def test_the_page_of_charts_finds_its_curves(board: Board) -> None:
    layout = board.ask("plugin/custom_scalars/layout")
    assert [one["title"] for one in layout["category"]] == [
        "Is it learning?",
        "Is it healthy?",
        "Is it fast?",
        "Is it whole?",
    ]
    empty = []
    for category in layout["category"]:
        for chart in category["chart"]:
            found = [
                board.ask("plugin/custom_scalars/scalars", run="whole/tensorboard", tag=pattern)
                for pattern in chart["multiline"]["tag"]
            ]
            if not any(one["regex_valid"] and one["tag_to_events"] for one in found):
                empty.append(chart["title"])
    assert empty == ["held-out bits per byte, by source", "model FLOPs utilization"], "one source, and a CPU"


def test_runs_are_compared_by_what_they_were_told(board: Board) -> None:
    asked = {"experimentName": "", "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_RUNNING"], "colParams": [],
             "startIndex": 0, "sliceSize": 10}  # fmt: skip
    groups = board.ask("plugin/hparams/session_groups", posted=asked)["sessionGroups"]
    rates = {one["name"].split()[0]: one["hparams"]["optim.learning_rate"] for one in groups}
    assert set(rates) == {"whole", "resumed", "torn", "broken"}
    assert rates["broken"] == 1e30
    [whole] = [one for one in groups if one["name"].startswith("whole ")]
    values = {one["name"]["tag"]: one["value"] for one in whole["metricValues"]}
    assert values[LOSS] == pytest.approx(board.values("whole/tensorboard")[-1])


def test_a_resumed_run_has_every_step_once_and_in_order(board: Board) -> None:
    for name in ("loss", "grad_norm", "update_ratio/layer_0"):
        whole, resumed = (board.ask("plugin/scalars/scalars", run=f"{run}/tensorboard", tag=tag(name))
                          for run in ("whole", "resumed"))  # fmt: skip
        assert [step for _, step, _ in resumed] == list(range(12))
        assert [value for *_, value in resumed] == [value for *_, value in whole]
    pictures = board.ask("plugin/images/images", run="resumed/tensorboard", tag="attention", sample="0")
    assert [one["step"] for one in pictures] == [3, 7, 12]


def test_an_event_file_that_was_cut_is_shown_up_to_there(board: Board) -> None:
    found = board.steps("torn/tensorboard")
    assert 0 < len(found) < 12
    assert found == list(range(len(found)))


def test_what_is_not_finite_is_shown(board: Board) -> None:
    assert all(math.isfinite(value) for value in board.values("broken/tensorboard"))
    shown = board.values("broken/tensorboard", tag("update_norm"))
    assert shown
    assert not any(math.isfinite(float(value)) for value in shown)


def test_a_port_that_is_taken(runs: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ended = subprocess.run(
            [sys.executable, "-m", "tensorboard.main", f"--logdir={runs}", f"--port={port}", "--host=127.0.0.1"],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert ended.returncode != 0
    assert f"port {port}" in ended.stderr
