"""`lm train --supervise`: real runs that are killed, started again by themselves, and end as if nothing had been."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import lm as package
from lm.checkpoint.checkpoints import list_checkpoints

from .conftest import Logged

ROOT = Path(package.__file__).parent.parent

# Python imports this at its start. A run kills itself when it has logged as many steps as the first word of the file
# KILLS says, and takes the word out; of several processes, the second does. At the word "meeting" the first does so
# when it has heard of the second.
FAULTS = """
import os, signal, sys
from pathlib import Path

if "train" in sys.orig_argv and "--supervise" not in sys.orig_argv:
    from lm.parallel.hub import Hub
    from lm.train.progress import Progress

    kills, update, send = Path(os.environ["KILLS"]), Progress.update, Hub._send

    def kill_at(word):
        first, *rest = kills.read_text().split() or ["none"]
        if word == first:
            kills.write_text(" ".join(rest))
            os.kill(os.getpid(), signal.SIGKILL)

    def update_and_kill(self, step, values):
        update(self, step, values)
        kill_at(str(step))

    def send_and_kill(self, peer, message):
        send(self, peer, message)
        if message == ["heard"] and peer is not self._own:
            kill_at("meeting")

    Hub._send = send_and_kill
    if os.environ.get("JAX_PROCESS_ID", "1") == "1":
        Progress.update = update_and_kill
"""


@pytest.fixture
def faulty(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """An environment in which runs are killed at these steps."""

    def environment(*steps: int | str) -> dict[str, str]:
        (tmp_path / "sitecustomize.py").write_text(FAULTS)
        (tmp_path / "kills").write_text(" ".join(map(str, steps)))
        return os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "KILLS": str(tmp_path / "kills")}

    return environment


def digests(run: Path) -> dict[int, str]:
    return {info.step: info.digest for info in list_checkpoints(run / "checkpoints")}


def supervise(
    workplace: Path, *arguments: str, environment: dict[str, str] | None = None, code: int
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lm", "train", "tiny.py", *arguments, "--supervise"]
    ended = subprocess.run(command, cwd=workplace, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended


def test_killed_twice_it_ends_as_if_nothing_had_been(
    faulty: Callable[..., dict[str, str]], undisturbed: Path, workplace: Path, logged: Logged
) -> None:
    ended = supervise(workplace, "--run.dir", "supervised", environment=faulty(5, 9), code=0)
    first, second = ended.stderr.splitlines()
    assert first.startswith("lm: supervisor: killed by SIGKILL after ")
    assert first.endswith("; starts again in 1.0s")
    assert second.startswith("lm: supervisor: killed by SIGKILL after ")
    assert digests(workplace / "supervised")[12] == digests(undisturbed)[12]
    assert logged(workplace / "supervised") == logged(undisturbed)


def test_a_bad_config_is_said_once(workplace: Path) -> None:
    ended = supervise(workplace, "--model.heads", "3", code=2)
    assert ended.stderr.count("lm: ") == ended.stderr.count("model.heads") == 1
    ended = supervise(workplace, "--restarts", "-1", code=2)
    assert "--restarts is for --supervise, and at least 0; got -1" in ended.stderr


def test_the_limit(faulty: Callable[..., dict[str, str]], workplace: Path) -> None:
    command = ("--run.dir", "killed_in_vain", "--checkpoint.every", "100", "--restarts", "1")
    ended = supervise(workplace, *command, environment=faulty(2, 2, 2, 2), code=137)
    assert (
        ended.stderr.splitlines()[-1]
        .partition("; ")[2]
        .startswith("does not start again: --restarts 1 in a row got no further than step ")
    )


def test_sigterm_saves_and_ends_it(workplace: Path) -> None:
    command = [sys.executable, "-m", "lm", "train", "tiny.py", "--run.dir", "asked", "--train.steps", "100000"]
    process = subprocess.Popen(
        [*command, "--optim.schedule", "constant", "--eval.every", "0", "--supervise"],
        cwd=workplace,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        metrics = workplace / "asked" / "metrics.jsonl"
        while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 75
    (line,) = err.splitlines()
    done = max(digests(workplace / "asked"))
    assert line.startswith(f"lm: stopped by SIGTERM: {done} of 100000 steps are done and saved")


@pytest.mark.slow
def test_of_several_processes_one_is_killed_and_all_start_again(
    faulty: Callable[..., dict[str, str]], workplace: Path
) -> None:
    # Only the first process finds compiled programs: on a busy machine it would wait for the other one longer than the
    # collectives allow.
    none_compiled = {"JAX_ENABLE_COMPILATION_CACHE": "false"}

    def launch(run: str, *steps: int | str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "launch.local", "--processes", "2", "--", "train", "tiny.py", "--run.dir", run]
        ended = subprocess.run(
            [*command, "--supervise"],
            cwd=workplace,
            env=faulty(*steps) | none_compiled,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended

    assert launch("together").stderr == ""
    ended = launch("together_again", 8)
    assert "[1] lm: supervisor: killed by SIGKILL after " in ended.stderr
    assert "[0] lm: supervisor: ended with exit code 6 after " in ended.stderr
    assert ended.stderr.count("starts again in 1.0s") == 2
    assert digests(workplace / "together_again")[12] == digests(workplace / "together")[12]
    ended = launch("met_late", "meeting")
    assert "[0] lm: supervisor: killed by SIGKILL after " in ended.stderr
    assert "[1] lm: supervisor: ended with exit code 6 after " in ended.stderr
    assert re.search(r"^\[1\] lm: process 0 at \S+ ended before all 2 processes had come", ended.stderr, re.MULTILINE)
    assert digests(workplace / "met_late")[12] == digests(workplace / "together")[12]
