"""Runs that keep checkpoints on their host too, and go on from there; or from the durable ones, when they cannot."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lm.checkpoint.checkpoints import list_checkpoints
from lm.checkpoint.config import CheckpointConfig
from lm.checkpoint.local import local_directory
from lm.cli import main

from .conftest import Lm, Logged
from .test_rewind import POISONED

# As `python -m lm`, but training waits for each save, and the process is killed when so many steps are logged.
WAITS = """
import os, signal
from lm.checkpoint.checkpoints import Checkpoints
from lm.checkpoint.local import LocalCheckpoints
from lm.train.progress import Progress

update = Progress.update

def waiting(save):
    def save_and_wait(self, *arguments, **options):
        started = save(self, *arguments, **options)
        self.wait()
        return started
    return save_and_wait

def update_and_die(self, step, values):
    update(self, step, values)
    if step == int(os.environ.get("DIES", "0")):
        os.kill(os.getpid(), signal.SIGKILL)

Checkpoints.save, LocalCheckpoints.save = waiting(Checkpoints.save), waiting(LocalCheckpoints.save)
Progress.update = update_and_die
"""
OPTIONS = ("--checkpoint.every=6", "--checkpoint.local_seconds=1e-6")


def train(workplace: Path, run: str, local: Path, *options: str, code: int = 0, **environment: str) -> str:
    command = [sys.executable, "-c", WAITS + POISONED, "train", "tiny.py", "--run.dir", run, *OPTIONS]
    command += [f"--checkpoint.local_dir={local}", *options]
    variables = os.environ | {"POISONED": "()"} | environment
    ended = subprocess.run(command, cwd=workplace, env=variables, capture_output=True, text=True, timeout=120)
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def digest(run: Path) -> str:
    return {info.step: info.digest for info in list_checkpoints(run / "checkpoints")}[12]


@pytest.fixture(scope="module")
def killed(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that was killed at step 10, with a durable checkpoint of step 6, and its local folder."""
    local = tmp_path_factory.mktemp("local")
    train(workplace, "killed_between", local, code=-signal.SIGKILL, DIES="10")
    return workplace / "killed_between", local


@pytest.fixture
def copy(killed: tuple[Path, Path], workplace: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """The same run at another place, and its local folder: the one of all runs, and its own there."""
    run, local = tmp_path / "run", tmp_path / "local"
    shutil.copytree(killed[0], run)
    mine = [local_directory(CheckpointConfig(local_dir=str(x)), y) for x, y in ((killed[1], killed[0]), (local, run))]
    shutil.copytree(*mine)
    return run, local, Path(mine[1])


def test_a_kill_between_durable_saves(
    copy: tuple[Path, Path, Path], workplace: Path, undisturbed: Path, logged: Logged
) -> None:
    run, local, mine = copy
    assert sorted(path.name for path in mine.iterdir() if (path / "manifest.json").exists()) == ["8", "9"]
    said = train(workplace, str(run), local)
    assert "goes on from local checkpoint 9\n" in said
    assert digest(run) == digest(undisturbed)
    assert logged(run) == logged(undisturbed)
    assert list(local.iterdir()) == []  # nobody needs it any more


def test_damaged_ones_are_named_and_the_durable_one_taken(
    copy: tuple[Path, Path, Path], workplace: Path, undisturbed: Path
) -> None:
    run, local, mine = copy
    for file in mine.glob("*/shards.bin"):
        file.write_bytes(bytes(file.stat().st_size))
    said = train(workplace, str(run), local)
    for step in (9, 8):
        assert f"local checkpoint {step} is not used: shards.bin is not as it was written\n" in said
    assert "goes on from checkpoint 6\n" in said
    assert digest(run) == digest(undisturbed)


def test_another_run_that_was_in_the_same_place(
    copy: tuple[Path, Path, Path], workplace: Path, undisturbed: Path, logged: Logged
) -> None:
    run, local, _ = copy
    shutil.rmtree(run)
    said = train(workplace, str(run), local)
    assert "local checkpoint 9 is not used: it is of another run that was in the same run.dir\n" in said
    assert "goes on from" not in said
    assert logged(run) == logged(undisturbed)


def test_what_may_be_gone_on_with_is_as_for_durable_ones(
    copy: tuple[Path, Path, Path], in_workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, local, _ = copy
    command = ["train", "tiny.py", f"--run.dir={run}", *OPTIONS, f"--checkpoint.local_dir={local}"]
    assert main([*command, "--optim.learning_rate=0.5"]) == 2
    error = capsys.readouterr().err
    assert "holds a run with 9 steps done and another config" in error
    assert "optim.learning_rate: 0.001 -> 0.5" in error


def test_a_place_where_nothing_can_be_written(workplace: Path, undisturbed: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    said = train(workplace, "nowhere", tmp_path / "file" / "local")
    assert len(re.findall(r"local checkpoint \S+ was not saved: [^;]+; the run goes on", said)) == 1
    assert digest(workplace / "nowhere") == digest(undisturbed)


def test_after_a_rewind(workplace: Path, tmp_path: Path) -> None:
    options = ("--recovery.max_bad_steps=2",)
    poisoned = {"POISONED": "(8, 9)"}
    said = train(workplace, "back", tmp_path, *options, code=-signal.SIGKILL, DIES="11", **poisoned)
    assert "rewound to checkpoint 6; goes on without the 4 batches that led to step 10" in said
    said = train(workplace, "back", tmp_path, *options, **poisoned)
    assert "goes on from local checkpoint 10\n" in said
    assert "rewound" not in said
    train(workplace, "never_back", tmp_path / "other", LEFT_OUT="6, 4")
    assert digest(workplace / "back") == digest(workplace / "never_back")


def test_stopped_before_a_step_is_done(copy: tuple[Path, Path, Path], lm: Lm, workplace: Path) -> None:
    run, local, _ = copy
    program = f"import signal, os\nfrom lm.train.loop import _Run\nsteps = _Run.steps\n{STOPS}\n{WAITS}{POISONED}"
    command = [sys.executable, "-c", program, "train", str(run), f"--checkpoint.local_dir={local}"]
    ended = subprocess.run(
        command, cwd=workplace, env=os.environ | {"POISONED": "()"}, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 75, ended.stdout + ended.stderr
    assert "9 of 12 steps are done and saved" in ended.stderr
    assert [info.step for info in list_checkpoints(run / "checkpoints")] == [6, 9]


STOPS = """
def stop_at_once(self, first, state):
    self.stop.deferred = True
    os.kill(os.getpid(), signal.SIGTERM)
    return steps(self, first, state)

_Run.steps = stop_at_once
"""
