"""Trackers that are down, slow, over quota or broken: training does not notice, and leaves nothing behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lm as package
from lm.train.config import TRACKERS

from ..end_to_end.conftest import Logged
from ..track.conftest import store as store
from ..track.servers import hanging, refusing
from .faulty_bucket import FaultyBucket

ROOT = Path(package.__file__).parent.parent

# Python imports this at its start, also in the processes that training starts: they have less time at the end.
HURRY = """
from lm.train import trackers

trackers.END_SECONDS = trackers.STOP_SECONDS = 4.0
"""


class Place:
    """An environment with a mark, by which its processes are known."""

    def __init__(self, folder: Path):
        self.folder, self.mark = folder, f"LM_TEST_MARK={uuid.uuid4()}"
        (folder / "sitecustomize.py").write_text(HURRY)
        name, _, value = self.mark.partition("=")
        self.environment = os.environ | {
            "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}",
            "WANDB_API_KEY": "0" * 40,
            "WANDB_CONFIG_DIR": str(folder),
            name: value,
        }

    def sees_store(self) -> None:
        """That of the fixture `store`, which may have come later."""
        self.environment |= {name: os.environ[name] for name in ("MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE")}

    def start(self, workplace: Path, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "lm", "train", "tiny.py", f"--run.dir={self.folder}/run", *options]
        return subprocess.Popen(
            command,
            cwd=workplace,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def processes(self) -> list[str]:
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.mark.encode() in (path / "environ").read_bytes().split(b"\0"):
                    found.append((path / "cmdline").read_text().replace("\0", " "))
        return found


def wait_until(what: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path)
    yield place
    wait_until(lambda: not place.processes())


FOREVER = ("--train.steps=1000000", "--optim.schedule=constant", "--eval.every=0", "--checkpoint.every=0")
SERVERS = {
    "refuses connections": lambda: contextlib.nullcontext("http://127.0.0.1:9"),
    "never answers": hanging,
    "403": lambda: refusing(403),
    "429": lambda: refusing(429),
    "507": lambda: refusing(507),
}
QUICK = {("refuses connections", "mlflow"), ("never answers", "wandb"), ("403", "wandb"), ("429", "mlflow")}


def some(name: str, server: str) -> Any:
    return pytest.param(name, server, marks=() if (server, name) in QUICK else pytest.mark.slow)


@pytest.mark.parametrize(("name", "server"), [some(name, server) for name in TRACKERS for server in SERVERS])
def test_a_tracker_that_does_not_take_anything(
    server: str, name: str, place: Place, workplace: Path, undisturbed: Path, logged: Logged
) -> None:
    with SERVERS[server]() as url:
        place.environment |= {"WANDB_BASE_URL": url, "MLFLOW_TRACKING_URI": url}
        process = place.start(workplace, f"--log.trackers={name}")
        said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert logged(place.folder / "run") == logged(undisturbed)
    *_, last = said.splitlines()
    assert last.startswith(f"{name}: ")
    missing = (
        f"12 logged steps are not known to be there: `lm track {place.folder}/run --to {name}` sends what is missing"
    )
    assert last.endswith(missing)


BROKEN = {
    "cannot be imported": (
        "raise RuntimeError('a broken installation')",
        "a broken installation; 12 logged steps are ",
    ),
    "exits": ("import os; os._exit(3)", "ended with exit code 3; `lm track "),
    "crashes": ("import os; os.kill(os.getpid(), 11)", "ended by signal 11; `lm track "),
    "hangs": ("while True: pass", "it did not answer in 4 s; 12 logged steps are "),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_library_that_is_broken(
    how: str, place: Place, workplace: Path, undisturbed: Path, logged: Logged, store: Path
) -> None:
    code, problem = BROKEN[how]
    place.sees_store()
    (place.folder / "mlflow.py").write_text(code)
    process = place.start(workplace, "--log.trackers=mlflow")
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert logged(place.folder / "run") == logged(undisturbed)
    about = [line for line in said.splitlines() if line.startswith("mlflow: ")]
    assert about[-1].startswith(f"mlflow: {problem}")
    assert len(about) <= 2  # once while training, once at the end
    (place.folder / "mlflow.py").unlink()
    command = [sys.executable, "-m", "lm", "track", f"{place.folder}/run", "--to", "mlflow"]
    sent = subprocess.run(command, env=place.environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert sent.stdout == "sent 12 logged steps to mlflow\n", sent.stderr


ENDINGS = [("wandb", signal.SIGKILL, -9), ("mlflow", signal.SIGKILL, -9), ("wandb", signal.SIGTERM, 75)]
ENDINGS += [("mlflow", signal.SIGINT, 75)]


@pytest.mark.parametrize(("name", "number", "code"), ENDINGS)
def test_nothing_is_left_of_a_run_that_is_ended(
    name: str, number: signal.Signals, code: int, place: Place, workplace: Path
) -> None:
    """By a signal, to all processes of its terminal, while its tracker hangs."""
    with hanging() as url:
        place.environment |= {"WANDB_BASE_URL": url, "MLFLOW_TRACKING_URI": url}
        process = place.start(workplace, f"--log.trackers={name}", *FOREVER)
        try:
            metrics, log = place.folder / "run" / "metrics.jsonl", place.folder / "run" / "trackers" / f"{name}.log"
            wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0 and log.exists())
            wait_until(lambda: any("--follow" in one for one in place.processes()))
            time.sleep(2)  # it hangs now
            os.killpg(process.pid, number)
            said, _ = process.communicate(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == code, said
        wait_until(lambda: not place.processes(), 20)
        if code == 75:
            assert f"{name}: it did not answer in 4 s; " in said


def test_ctrl_c_lets_the_tracker_have_all(place: Place, workplace: Path, store: Path) -> None:
    place.sees_store()
    process = place.start(workplace, "--log.trackers=mlflow", "--log.every=50", *FOREVER)
    wait_until((place.folder / "run" / "trackers" / "mlflow.json").exists)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75, said
    (losses,) = store.glob("*/*/metrics/loss")
    assert len(losses.read_text().splitlines()) == len(
        (place.folder / "run" / "metrics.jsonl").read_text().splitlines()
    )


# Looks more often, and fails the first time.
FAILS_ONCE = """
import os
from lm.track import follow, mlflow

trackers.AGAIN_SECONDS, follow.POLL_SECONDS = (0.5, 900.0), 0.2
begin = mlflow.MlflowTracker.begin

def fails_once(self, run):
    if os.path.exists({mark!r}):
        return begin(self, run)
    open({mark!r}, "x").close()
    raise ConnectionError("no route to host")

mlflow.MlflowTracker.begin = fails_once
"""


def test_a_tracker_is_fed_while_training_goes_on(place: Place, workplace: Path, store: Path) -> None:
    """By the next process when the first has failed; and each value is there once."""
    place.sees_store()
    (place.folder / "sitecustomize.py").write_text(HURRY + FAILS_ONCE.format(mark=f"{place.folder}/failed"))
    process = place.start(workplace, "--log.trackers=mlflow", "--log.every=50", *FOREVER)

    def arrived() -> list[int]:
        texts = [file.read_text() for file in store.glob("*/*/metrics/loss")]
        return [int(line.split()[2]) for text in texts for line in text.splitlines()]

    try:
        wait_until(lambda: len(arrived()) > 0)
        first = len(arrived())
        wait_until(lambda: len(arrived()) > first)
        assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        said, _ = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 75, said
    assert said.count("mlflow: no route to host; training goes on, and it is tried again") == 1
    steps = [json.loads(line)["step"] for line in (place.folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert arrived() == steps


def test_a_run_in_a_bucket(place: Place, workplace: Path, undisturbed: Path, logged: Logged, store: Path) -> None:
    bucket = FaultyBucket()
    try:
        place.environment |= bucket.variables
        place.sees_store()
        command = [sys.executable, "-m", "lm", "train", "tiny.py", "--run.dir=gs://bucket/run", "--log.trackers=mlflow"]
        ended = subprocess.run(
            command, cwd=workplace, env=place.environment, capture_output=True, text=True, timeout=200
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
    finally:
        bucket.close()
    assert "mlflow: " not in ended.stdout
    (losses,) = store.glob("*/*/metrics/loss")
    assert [float(line.split()[1]) for line in losses.read_text().splitlines()] == [
        line["loss"] for line in logged(undisturbed)
    ]
    (held_out,) = store.glob("*/*/metrics/heldout_loss")
    assert float(held_out.read_text().splitlines()[-1].split()[1]) == logged(undisturbed)[-1]["heldout_loss"]
