"""Whatever ends a run, the same command goes on with it, and nothing in its numbers shows that it ended."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from lm.checkpoint.checkpoints import list_checkpoints
from lm.cli import main
from lm.data.batches import Batches
from lm.data.corpus import open_corpus
from lm.train import journal, provenance
from lm.train.progress import Progress
from lm.train.run_directory import RunDirectory

from .conftest import Lm, Logged

STOPPED_AT = 8


def digests(run: Path) -> dict[int, str]:
    return {info.step: info.digest for info in list_checkpoints(run / "checkpoints")}


def contents(folder: Path) -> dict[str, bytes]:
    """All files; the lock aside, in which the last holder left its name."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def copy(stopped: Path, tmp_path: Path) -> Path:
    """A stopped run at another place."""
    return Path(shutil.copytree(stopped, tmp_path / "copy"))


HANGS = """
import sys, threading
from lm.cli import main
from lm.train.progress import Progress

update = Progress.update

def update_and_hang(self, step, values):
    update(self, step, values)
    if step == 7:
        threading.Event().wait()

Progress.update = update_and_hang
sys.exit(main())
"""


def test_a_step_that_hangs_ends_the_run(lm: Lm, undisturbed: Path, workplace: Path, logged: Logged) -> None:
    command = ["train", "tiny.py", "--run.dir", "hung", "--watchdog.step_seconds", "6"]
    ended = subprocess.run(
        [sys.executable, "-c", HANGS, *command], cwd=workplace, capture_output=True, text=True, timeout=240
    )
    assert ended.returncode == 6, ended.stdout + ended.stderr
    *_, line = ended.stderr.splitlines()
    assert re.match(r"lm: no progress for \d+ s in step 7, more than watchdog.step_seconds = 6; ", line)
    run = workplace / "hung"
    assert json.loads((run / "journal.jsonl").read_text().splitlines()[-1])["code"] == 6
    written = (run / "hang.0.txt").read_text()
    assert " in update_and_hang\n" in written
    assert "'MainThread'" in written
    assert "goes on from checkpoint 6" in lm("train", "hung").stdout
    assert digests(run)[12] == digests(undisturbed)[12]
    assert logged(run) == logged(undisturbed)


SLOWLY = """
import sys, time
from lm.cli import main
from lm.data.batches import Evaluation

batch = Evaluation.batch

def batch_later(self, *arguments):
    time.sleep(0.7)
    return batch(self, *arguments)

Evaluation.batch = batch_later
sys.exit(main())
"""


def test_a_long_evaluation_that_gets_further_is_no_hang(workplace: Path) -> None:
    command = ["train", "tiny.py", "--run.dir", "evaluated_slowly", "--train.steps=2", "--checkpoint.every=0"]
    ended = subprocess.run(
        [sys.executable, "-c", SLOWLY, *command, "--watchdog.evaluation_seconds=4"],
        cwd=workplace,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    last = json.loads((workplace / "evaluated_slowly" / "journal.jsonl").read_text().splitlines()[-1])
    assert last["milliseconds"]["evaluation"] > 6000


def test_stopped_and_resumed_is_undisturbed(
    lm: Lm, undisturbed: Path, stopped: Path, copy: Path, logged: Logged
) -> None:
    assert max(digests(stopped)) == STOPPED_AT
    assert [line["step"] for line in logged(stopped)] == list(range(STOPPED_AT))
    before = contents(stopped)
    ended = lm("train", copy)
    assert f"goes on from checkpoint {STOPPED_AT}" in ended.stdout
    assert ended.stderr == ""
    assert contents(stopped) == before  # it went on where it is, not where it was
    assert digests(copy)[12] == digests(undisturbed)[12]
    assert logged(copy) == logged(undisturbed)
    assert [line["step"] for line in logged(copy)] == list(range(12))
    for step in (0, STOPPED_AT, 11):
        mine, other = (Batches(open_corpus(run / "data"), 4, 32, 0).batch(step) for run in (copy, undisturbed))
        assert all(np.array_equal(mine[name], other[name]) for name in mine)


def test_ctrl_c_and_a_kill_between_checkpoints(lm: Lm, undisturbed: Path, workplace: Path, logged: Logged) -> None:
    command = ("train", "tiny.py", "--run.dir", "interrupted")
    ended = lm(*command, code=75, after=2, number=signal.SIGINT)
    assert "stopped by SIGINT: 3 of 12 steps are done and saved; `lm train interrupted` goes on" in ended.stderr
    lm(*command, code=-signal.SIGKILL, after=8, number=signal.SIGKILL)
    assert 3 <= max(digests(workplace / "interrupted")) <= 6
    assert len(logged(workplace / "interrupted")) == 8
    lm(*command)
    assert digests(workplace / "interrupted")[12] == digests(undisturbed)[12]
    assert logged(workplace / "interrupted") == logged(undisturbed)


def test_killed_at_random_moments(lm: Lm, undisturbed: Path, workplace: Path, logged: Logged) -> None:
    run = workplace / "killed"
    command = ["train", "tiny.py", "--run.dir", "killed", "--checkpoint.every", "1", "--checkpoint.keep_last", "12"]
    process = subprocess.Popen(
        [sys.executable, "-m", "lm", *command], cwd=workplace, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not (run / "checkpoints" / "1" / "manifest.json").exists() and process.poll() is None:
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.5))
    finally:
        process.kill()
        process.wait()
    lm(*command)
    found, expected = digests(run), digests(undisturbed)
    assert [found[step] for step in found if step in expected] == [expected[step] for step in expected if step in found]
    assert 12 in found
    assert logged(run) == logged(undisturbed)


def test_a_run_is_repeated_from_its_directory_alone(lm: Lm, undisturbed: Path, workplace: Path, logged: Logged) -> None:
    lm("train", undisturbed, "--run.dir", "repeated")
    assert digests(workplace / "repeated") == digests(undisturbed)
    assert logged(workplace / "repeated") == logged(undisturbed)


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ("--optim.learning_rate=0.5", "optim.learning_rate: 0.001 -> 0.5"),
        ("--data.paths=text/1*.txt", "data.paths: ('text',) -> ('text/1*.txt',)"),
        ("--model.width=32", "model.width: 16 -> 32"),
        ("--run.seed=1", "run.seed: 0 -> 1"),
        ("--train.steps=20", "train.steps: 12 -> 20"),
        ("--train.steps=5", "train.steps: 12 -> 5"),
        ("--train.z_loss=1e-4", "train.z_loss: 0.0 -> 0.0001"),
    ],
)
def test_another_experiment_is_refused(
    change: str, difference: str, copy: Path, in_workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(copy)
    assert main(["train", str(copy), change]) == 2
    error = capsys.readouterr().err
    assert difference in error
    assert "choose another --run.dir" in error
    assert contents(copy) == before


def test_data_that_was_built_from_other_files_is_refused(
    copy: Path, tmp_path: Path, in_workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "build", "tiny.py", "--data.paths=text/1*.txt", f"--data.dir={tmp_path}/other"]) == 0
    before = contents(copy / "checkpoints")
    assert main(["train", str(copy), f"--data.dir={tmp_path}/other"]) == 3
    assert f"{tmp_path}/other" in capsys.readouterr().err
    assert contents(copy / "checkpoints") == before


def test_files_that_say_something_else_by_now_are_refused(
    copy: Path, tmp_path: Path, in_workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(in_workplace / "text", tmp_path / "text")
    shutil.rmtree(copy / "data")  # so that it is built again
    (tmp_path / "text" / "3.txt").write_text("another story " * 30)
    monkeypatch.chdir(tmp_path)
    before = contents(copy / "checkpoints")
    assert main(["train", str(copy)]) == 2
    error = capsys.readouterr().err
    assert f"checkpoint {STOPPED_AT} was trained on other data than {copy}/data holds now" in error
    assert contents(copy / "checkpoints") == before


def test_what_is_free_may_change(copy: Path, in_workplace: Path, logged: Logged, undisturbed: Path) -> None:
    free = ["--checkpoint.every=5", "--eval.every=5", "--log.every=3", "--train.accumulation=2", "--train.remat=full"]
    assert main(["train", str(copy), *free]) == 0
    assert {10, 12} <= digests(copy).keys()
    losses, expected = ({line["step"]: line.get("loss") for line in logged(run)} for run in (copy, undisturbed))
    assert sorted(losses) == [*range(STOPPED_AT), 9, 11]  # step 9 also has the held-out loss after it
    assert losses[11] == pytest.approx(expected[11], rel=1e-5)


def test_a_deterministic_run_goes_on_only_as_it_was(
    copy: Path,
    in_workplace: Path,
    undisturbed: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = contents(copy)
    assert main(["train", str(copy), "--train.deterministic=true", "--train.accumulation=2"]) == 2
    assert "\ntrain.accumulation: 1 -> 2\ntake what it was trained with" in capsys.readouterr().err
    with monkeypatch.context() as elsewhere:
        facts = journal.facts_of_last
        elsewhere.setattr(journal, "facts_of_last", lambda *given: facts(*given) | {"devices": 8})
        assert main(["train", str(copy), "--train.deterministic=true"]) == 2
        assert "\ndevices: 8 -> 1\n" in capsys.readouterr().err
    assert contents(copy) == before
    assert main(["train", str(copy), "--train.deterministic=true"]) == 0
    assert digests(copy)[12] == digests(undisturbed)[12]
    assert main(["train", str(copy), "--train.deterministic=true", "--mesh.microbatches=2"]) == 2


def test_a_constant_schedule_may_be_extended_and_a_finished_run_started(
    in_workplace: Path, capsys: pytest.CaptureFixture[str], logged: Logged
) -> None:
    command = ["train", "tiny.py", "--run.dir=extended", "--optim.schedule=constant", "--eval.every=0"]
    assert main([*command, "--train.steps=4"]) == 0
    assert main([*command, "--train.steps=6"]) == 0
    assert [line["step"] for line in logged(in_workplace / "extended")] == list(range(6))
    finished = digests(in_workplace / "extended")
    capsys.readouterr()
    assert main([*command, "--train.steps=6"]) == 0
    assert "next:\n    tensorboard --logdir extended" in capsys.readouterr().out
    assert digests(in_workplace / "extended") == finished
    assert [line["step"] for line in logged(in_workplace / "extended")] == list(range(6))


def test_a_run_in_use_is_left_alone(copy: Path, in_workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunDirectory(copy):
        before = contents(copy)
        assert main(["train", str(copy)]) == 2
        assert f"{copy} is in use by process {os.getpid()}" in capsys.readouterr().err
        assert contents(copy) == before


def damage(checkpoint: Path, kind: str) -> None:
    largest = max((p for p in checkpoint.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if kind == "half-written":
        (checkpoint / "manifest.json").unlink()
        largest.unlink()
    elif kind == "truncated":
        os.truncate(largest, largest.stat().st_size // 2)
    else:
        flipped = bytearray(largest.read_bytes())
        flipped[len(flipped) // 2] ^= 1
        largest.write_bytes(flipped)


@pytest.mark.parametrize("kind", ["flipped", "truncated", "half-written"])
def test_a_damaged_checkpoint_costs_steps_and_nothing_else(
    kind: str, copy: Path, in_workplace: Path, undisturbed: Path, capsys: pytest.CaptureFixture[str], logged: Logged
) -> None:
    *_, older, newest = sorted(digests(copy))
    assert newest == STOPPED_AT
    damage(copy / "checkpoints" / str(newest), kind)
    assert main(["train", str(copy)]) == 0
    said = capsys.readouterr().out
    assert f"goes on from checkpoint {older}\n" in said
    if kind != "half-written":  # of which nothing is known
        assert f"checkpoint {copy}/checkpoints/{STOPPED_AT} is bad and not used" in said
        assert (copy / "checkpoints" / f"{STOPPED_AT}.bad").is_dir()
    assert digests(copy)[12] == digests(undisturbed)[12]
    assert logged(copy) == logged(undisturbed)


@pytest.fixture
def small_files_only() -> Iterator[None]:
    """As a full disk: no file grows beyond 30 kB. Logs stay below, states do not."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_does_not_end_the_run(
    copy: Path,
    in_workplace: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    small_files_only: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    say = Progress.say

    def say_and_make_room(self: Progress, message: str) -> None:
        say(self, message)
        if "was not saved" in message:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    monkeypatch.setattr(Progress, "say", say_and_make_room)
    assert main(["train", str(copy)]) == 0
    said = capsys.readouterr().out
    assert f"checkpoint {copy}/checkpoints/9 was not saved: " in said
    assert f"the run goes on, the last good one is {STOPPED_AT}" in said
    assert digests(copy)[12] == digests(undisturbed)[12]


def test_a_last_state_that_cannot_be_saved_is_no_success(
    copy: Path, in_workplace: Path, small_files_only: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(copy)]) == 5
    assert "the last state could not be saved" in capsys.readouterr().err
    assert max(digests(copy)) == STOPPED_AT


def test_divergence_from_the_start(in_workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--optim.learning_rate=1e30", "--recovery.max_bad_steps=4", "--optim.warmup_steps=0"]
    assert main(["train", "tiny.py", "--run.dir=diverged", *options]) == 4
    captured = capsys.readouterr()
    assert "step 3: loss or gradient not finite, not applied (4 in a row)" in captured.out
    assert "rewound to the start; goes on without the 4 batches that led to step 4" in captured.out
    assert "diverged, and rewound 1 times (no checkpoint is older than step 0)" in captured.err
    assert list_checkpoints(in_workplace / "diverged" / "checkpoints") == []  # nothing that was not applied is saved


def test_nothing_is_compiled_once_training_is_under_way(in_workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[str, int]] = []
    done = 0

    def count(self: Progress, step: int, values: object) -> None:
        nonlocal done
        done = step

    def listen(event: str, duration_secs: float, **details: str | int) -> None:
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            compiled.append((str(details["fun_name"]), done))

    monkeypatch.setattr(Progress, "update", count)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert main(["train", "tiny.py", "--run.dir=compiled", "--eval.every=0", "--checkpoint.every=4"]) == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert sum("train_step" in name for name, _ in compiled) == 1
    assert [name for name, step in compiled if 1 <= step < 12] == []


def test_other_code_and_versions_are_refused_unless_allowed(
    copy: Path,
    in_workplace: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before, here = contents(copy), provenance.provenance()
    other = {"code": here["code"] | {"lm/model/loss.py": "other"}, "versions": here["versions"] | {"jax": "99.1"}}
    monkeypatch.setattr(provenance, "provenance", lambda: other)
    assert main(["train", str(copy), "--allow", "code"]) == 2
    error = capsys.readouterr().err
    assert f"checkpoint {STOPPED_AT} was made by other versions than is here:" in error
    assert f"jax: {here['versions']['jax']} -> 99.1" in error
    assert error.endswith("add --allow versions\n")
    assert contents(copy) == before
    assert main(["train", str(copy), "--allow", "code", "--allow", "versions"]) == 0
    said = capsys.readouterr().out
    assert f"not as it was up to checkpoint {STOPPED_AT}: lm/model/loss.py: " in said
    assert digests(copy)[12] == digests(undisturbed)[12]
    monkeypatch.undo()
    assert main(["train", str(copy), "--train.steps=12"]) == 2  # the checkpoint says what made it
