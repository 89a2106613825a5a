"""Runs of several real processes: the same data and losses as one process, whatever ends them."""

import fcntl
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import lm as package
from launch.local import environment, free_port
from lm.checkpoint.checkpoints import list_checkpoints
from lm.data.batches import Batches
from lm.data.corpus import open_corpus

from .conftest import CONFIG, STALLS, Logged

ROOT = Path(package.__file__).parent.parent

TOLERANCE = 2e-5
"""Relative, of losses near ln 258. Sums of float32 come in another order on another layout, which changes their last
bit (1e-7); twelve steps of Adam, whose first updates are as large for small gradients as for large ones, carry that
on. Another row in one batch, or one that comes twice, changes the loss by 1e-3."""

PROGRAM = """
import os, sys
import numpy as np
from lm.cli import main
from lm.data.batches import Batches
from lm.errors import DataError
from lm.train.progress import Progress

me, (who, at, how) = os.environ["JAX_PROCESS_ID"], os.environ.get("HAPPENS", "none 0 none").split()
update, places = Progress.update, Batches.places

def update_and_happen(self, step, values):
    update(self, step, values)
    if me == who and step == int(at):
        if how == "error":
            raise DataError("shard 7 is gone")
        if how == "bug":
            raise ZeroDivisionError("a bug")
        os.kill(os.getpid(), int(how))

def places_and_note(self, step, *rows):
    source, spans = places(self, step, *rows)
    with open(os.environ["READ"] + "." + me, "a") as file:
        print(step, *spans.start, file=file)
    return source, spans

Progress.update = update_and_happen
if "READ" in os.environ:
    Batches.places = places_and_note
if os.environ.get("SMALL_FILES") == me:
    import resource
    from lm.checkpoint import checkpoints as checkpoint
    begin, fail = checkpoint.Writing.begin, checkpoint.Checkpoints._fail

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    def begin_and_fill_the_disk(self):
        if self._path.path.parent.name == "6":
            limit(100)
        begin(self)

    def fail_and_make_room(self, folder, error):
        limit(resource.RLIM_INFINITY)
        fail(self, folder, error)

    checkpoint.Writing.begin, checkpoint.Checkpoints._fail = begin_and_fill_the_disk, fail_and_make_room
sys.exit(main(sys.argv[1:]))
"""

LOCAL_SAVES_ARE_WAITED_FOR = """
from lm.checkpoint.checkpoints import Checkpoints
from lm.checkpoint.local import LocalCheckpoints

def waiting(save):
    def save_and_wait(self, *arguments, **options):
        started = save(self, *arguments, **options)
        self.wait()
        return started
    return save_and_wait

Checkpoints.save, LocalCheckpoints.save = waiting(Checkpoints.save), waiting(LocalCheckpoints.save)
"""

LAUNCH = """
import json, sys
from launch.local import run
sys.exit(run(sys.argv[1].split("|"), json.loads(sys.stdin.read())))
"""


class Place:
    """A folder with a config and text, where runs are made once and looked at by the tests of all workers."""

    def __init__(self, folder: Path):
        self.folder = folder

    def once(self, name: str, make: Callable[[str], None]) -> Path:
        """A run that `make` makes; not to be changed."""
        with (self.folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            done = self.folder / f"{name}.done"
            if not done.exists():
                make(name)
                done.touch()
        return self.folder / name

    def copy(self, run: Path, name: str) -> Path:
        return Path(shutil.copytree(run, self.folder / name))

    def launch(
        self, processes: int, devices: int, *arguments: str | Path, code: int = 0, program: str = "", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs `lm` in so many processes, or `program` in its place, and looks at the exit code."""
        port = free_port()
        places = [environment(index, processes, devices, port) | variables for index in range(processes)]
        command = [sys.executable, *(["-c", program] if program else ["-m", "lm"]), *map(str, arguments)]
        ended = subprocess.run(
            [sys.executable, "-c", LAUNCH, "|".join(command)],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            input=json.dumps(places),
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert ended.returncode == code, ended.stdout + ended.stderr
        return ended

    def single(self, devices: int, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
        ended = subprocess.run(
            [sys.executable, "-m", "lm", *map(str, arguments)],
            cwd=self.folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": str(devices)},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert ended.returncode == code, ended.stdout + ended.stderr
        return ended


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = shared / "processes"
    folder.mkdir(exist_ok=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "compiled")

    def fill(name: str) -> None:
        (folder / "tiny.py").write_text(CONFIG)
        (folder / "text").mkdir()
        draw = random.Random(0)
        words = ["the", "cat", "saw", "a", "dog", "on", "mat", "and", "ran", "to", "old", "tree"]
        for number in range(40):
            (folder / "text" / f"{number}.txt").write_text(" ".join(draw.choice(words) for _ in range(50)) + "\n")

    Place(folder).once("texts", fill)
    return Place(folder)


@pytest.fixture(scope="session")
def one(place: Place) -> Path:
    """One process with one device."""
    return place.once("one", lambda name: place.single(1, "train", "tiny.py", "--run.dir", name) and None)


@pytest.fixture(scope="session")
def two(place: Place) -> Path:
    """Two processes with two devices each; they sample too."""

    def make(name: str) -> None:
        command = ("train", "tiny.py", "--run.dir", name, "--sample.tokens=6")
        ended = place.launch(2, 2, *command, program=PROGRAM, READ=str(place.folder / "two_read"))
        assert ended.stderr == ""
        assert {line[:4] for line in ended.stdout.splitlines()} == {"[0] "}

    return place.once("two", make)


def digests(run: Path) -> dict[int, str]:
    return {info.step: info.digest for info in list_checkpoints(run / "checkpoints") if info.problem is None}


def same_losses(run: Path, other: Path, logged: Logged) -> None:
    lines, expected = logged(run), logged(other)
    assert [line["step"] for line in lines] == [line["step"] for line in expected] == list(range(12))
    for line, wanted in zip(lines, expected, strict=True):
        assert line.keys() == wanted.keys()
        for name in ("loss", "bits_per_byte", "heldout_loss", "heldout_bits_per_byte"):
            if name in line:
                assert math.isclose(line[name], wanted[name], rel_tol=TOLERANCE), (line["step"], name)


def test_two_processes_are_one(place: Place, one: Path, two: Path, logged: Logged) -> None:
    same_losses(two, one, logged)
    place.single(4, "train", "tiny.py", "--run.dir", "one_of_four", "--eval.every=4")
    same_losses(place.folder / "one_of_four", two, logged)
    assert "held-out: " in (two / "log.txt").read_text()
    assert "sample:" in (two / "log.txt").read_text()


def test_other_verbs_in_two_processes(place: Place, two: Path) -> None:
    generate = ("generate", "two", "--prompt=the cat", "--max-tokens=4", "--temperature=0")
    expected = place.single(4, *generate).stdout
    assert place.launch(2, 2, *generate).stdout == "".join(f"[0] {line}\n" for line in expected.splitlines())
    wanted = json.loads(place.single(4, "eval", "two", "--json").stdout)
    for devices in (2, 3):  # six devices cannot split the width
        (line,) = place.launch(2, devices, "eval", "two", "--json").stdout.splitlines()
        assert json.loads(line.removeprefix("[0] ")) == pytest.approx(wanted, rel=TOLERANCE)


def test_each_process_reads_its_rows_and_no_other(place: Place, two: Path) -> None:
    batches = Batches(open_corpus(two / "data"), 4, 32, 0)
    read = []
    for index in range(2):
        lines = (place.folder / f"two_read.{index}").read_text().splitlines()
        read.append({int(step): starts for step, *starts in map(str.split, lines)})
    for step in range(12):
        expected = list(map(str, batches.places(step)[1].start))
        assert (read[0][step], read[1][step]) == (expected[:2], expected[2:])


@pytest.mark.slow
def test_four_processes_killed_and_two_go_on(place: Place, one: Path, logged: Logged) -> None:
    ended = place.launch(4, 1, "train", "tiny.py", "--run.dir", "killed", code=137, program=PROGRAM, HAPPENS="2 8 9")
    assert f"[0] lm: process 2 on {socket.gethostname()} (pid " in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "Check failure" not in ended.stderr
    run = place.folder / "killed"
    done = max(digests(run))
    assert 3 <= done <= 6
    ended = place.launch(2, 1, "train", "killed", program=PROGRAM, READ=str(place.folder / "killed_read"))
    assert f"[0] goes on from checkpoint {done}\n" in ended.stdout
    same_losses(run, one, logged)
    batches = Batches(open_corpus(run / "data"), 4, 32, 0)
    lines = [(place.folder / f"killed_read.{i}").read_text().splitlines() for i in range(2)]
    read = [{int(step): starts for step, *starts in map(str.split, part)} for part in lines]
    for step in range(done, 12):
        assert read[0][step] + read[1][step] == list(map(str, batches.places(step)[1].start))


@pytest.mark.parametrize("count", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_what_two_saved_goes_on_in_any_number(count: int, place: Place, one: Path, two: Path, logged: Logged) -> None:
    run = place.copy(two, f"in_{count}")
    shutil.rmtree(run / "checkpoints" / "12")
    done = max(digests(run))
    split = () if count == 1 else ("--mesh.context=2",)  # a batch has four rows
    ended = place.launch(count, 1, "train", run.name, *split)
    assert f"[0] goes on from checkpoint {done}\n" in ended.stdout
    same_losses(run, one, logged)


def test_a_source_that_hangs_in_one_process_ends_all(place: Place) -> None:
    command = ("train", "tiny.py", "--run.dir", "hanging", "--data.stall_seconds=2")
    ended = place.launch(2, 1, *command, code=3, program=STALLS, HAPPENS="hangs", WHERE="1")
    assert " s from source web: shard 7: record 3, which is more than data.stall_seconds" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert 3 <= max(digests(place.folder / "hanging")) <= 6


def test_a_signal_to_any_process_stops_all(place: Place, two: Path, logged: Logged) -> None:
    command = ("train", "tiny.py", "--run.dir", "stopped", "--sample.tokens=6")
    ended = place.launch(2, 2, *command, code=75, program=PROGRAM, HAPPENS=f"1 7 {int(signal.SIGTERM)}")
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"[0] lm: stopped by SIGTERM at process 1 on {socket.gethostname()} (pid ")
    run = place.folder / "stopped"
    done = max(digests(run))
    assert f" {done} of 12 steps are done and saved; `lm train stopped` goes on from there" in line
    assert 8 <= done <= 10
    before = place.copy(run, "stopped_elsewhere")
    place.launch(2, 2, "train", "stopped")
    assert digests(run)[12] == digests(two)[12]  # on the same layout, bit for bit
    assert logged(run) == logged(two)

    place.single(2, "train", before, "--mesh.tensor=2")
    same_losses(before, two, logged)


def test_a_damaged_checkpoint_is_damaged_for_all(place: Place, two: Path) -> None:
    run = place.copy(two, "damaged")
    largest = max((p for p in (run / "checkpoints/12").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    flipped = bytearray(largest.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    largest.write_bytes(flipped)
    ended = place.launch(2, 2, "train", "damaged")
    assert ended.stdout.count("checkpoint damaged/checkpoints/12 is bad and not used: ") == 1
    assert "[0] goes on from checkpoint 9\n" in ended.stdout
    assert digests(run)[12] == digests(two)[12]


def test_a_local_tier_counts_when_all_processes_have_it(place: Place, two: Path) -> None:
    run, local = place.folder / "local_tier", place.folder / "local_tier_of_hosts"
    program = LOCAL_SAVES_ARE_WAITED_FOR + PROGRAM
    options = ("--checkpoint.every=6", f"--checkpoint.local_dir={local}", "--checkpoint.local_seconds=1e-6")
    command = ("train", "tiny.py", "--run.dir", str(run), *options)
    place.launch(2, 2, *command, code=137, program=program, HAPPENS="1 10 9")
    held, (folder,) = run.with_name("held"), local.iterdir()
    steps = [{path.parent.name for path in folder.glob(f"process-{i}/*/manifest.json")} for i in range(2)]
    done = max(map(int, steps[0] & steps[1]))
    assert 6 < done < 10
    shutil.copytree(run, held)
    shutil.copytree(local, held / "local")

    def again(lost: str | None, processes: int, devices: int) -> str:
        for target, kept in ((run, held), (local, held / "local")):
            shutil.rmtree(target)
            shutil.copytree(kept, target)
        shutil.rmtree(run / "local")
        if lost:
            shutil.rmtree(folder / lost)
        return place.launch(processes, devices, *command, program=program).stdout

    assert f"[0] goes on from local checkpoint {done}\n" in again(None, 2, 2)
    assert digests(run)[12] == digests(two)[12]
    assert not any(local.iterdir())
    said = again("process-1", 2, 2)
    assert f"[0] local checkpoint {done} is not used: process 1 on {socket.gethostname()}: it is not there\n" in said
    assert "[0] goes on from checkpoint 6\n" in said
    assert digests(run)[12] == digests(two)[12]
    said = again(None, 4, 1)
    problem = f"process 0 on {socket.gethostname()}: it is of another layout of arrays over processes and devices: "
    assert f"[0] local checkpoint {done} is not used: {problem}" in said
    assert "[0] goes on from checkpoint 6\n" in said


SAVES_SLOWLY = """
import os, time
from lm.checkpoint.checkpoints import Checkpoints
from lm.train import loop

start, loop.SLOWEST_SECONDS = Checkpoints._start, 0.0

def start_slowly(self, *arguments, **options):
    start(self, *arguments, **options)
    time.sleep(3.0 if os.environ["JAX_PROCESS_ID"] == "1" else 0.0)

Checkpoints._start = start_slowly
"""


@pytest.mark.slow
def test_one_that_saves_slowly_is_named(place: Place) -> None:
    command = ("train", "tiny.py", "--run.dir", "saves_slowly", "--eval.every=0")
    said = place.launch(2, 1, *command, program=SAVES_SLOWLY + PROGRAM).stdout
    line = rf"^\[0\] process 1 on {socket.gethostname()} holds the others up: it saves for \S+ s of each step, "
    assert re.search(line, said, re.MULTILINE), said


@pytest.mark.parametrize("who", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_one_that_is_stopped_for_good_ends_the_other(who: int, place: Place, two: Path, logged: Logged) -> None:
    name, port = f"frozen_{who}", free_port()
    command = ("train", "tiny.py", "--run.dir", name, "--sample.tokens=6", "--watchdog.step_seconds=8")
    # Where neither an evaluation nor a save comes soon: the other one is in a step when it waits.
    variables = {"PYTHONPATH": str(ROOT), "HAPPENS": f"{who} 4 {int(signal.SIGSTOP)}"}
    options = {"cwd": place.folder, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *command], env=environment(i, 2, 2, port) | variables, **options
        )
        for i in range(2)
    ]
    try:
        os.waitid(os.P_PID, started[who].pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        _, error = started[1 - who].communicate(timeout=60)
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert [process.returncode for process in started] == ([-9, 6] if who == 0 else [6, -9])
    said = re.compile(r"no progress for \d+ s in step [45], more than watchdog.step_seconds = 8; ")
    assert said.search(error)
    if who:  # whom only process 0 can name
        assert re.search(rf"process 1 on {socket.gethostname()} was last heard \d+ s ago, in ", error)
    run = place.folder / name
    stacks = (run / f"hang.{1 - who}.txt").read_text()
    assert said.match(stacks)
    assert "'MainThread'" in stacks
    place.launch(2, 2, "train", name)
    assert digests(run)[12] == digests(two)[12]
    assert logged(run) == logged(two)


@pytest.mark.parametrize(
    ("how", "code", "said"), [("error", 3, "lm: shard 7 is gone"), ("bug", 1, "ZeroDivisionError")]
)
def test_an_error_in_one_ends_all(how: str, code: int, said: str, place: Place) -> None:
    ended = place.launch(
        2, 1, "train", "tiny.py", "--run.dir", f"ended_by_{how}", code=code, program=PROGRAM, HAPPENS=f"1 4 {how}"
    )
    assert any(line.startswith("[1] ") and said in line for line in ended.stderr.splitlines())
    assert f"[0] lm: process 1 on {socket.gethostname()} (pid " in ended.stderr


def test_the_coordinator_is_killed(place: Place, two: Path, logged: Logged) -> None:
    name = "without_a_head"
    ended = place.launch(2, 2, "train", "tiny.py", "--run.dir", name, code=137, program=PROGRAM, HAPPENS="0 8 9")
    assert f"[1] lm: process 0 on {socket.gethostname()} has ended, and so does the run: " in ended.stderr
    assert "Check failure" not in ended.stderr
    place.launch(2, 2, "train", name)
    assert digests(place.folder / name)[12] == digests(two)[12]
    assert logged(place.folder / name) == logged(two)


def test_a_save_that_fails_in_one_fails_in_all_and_the_run_goes_on(place: Place, two: Path) -> None:
    command = ("train", "tiny.py", "--run.dir", "unsaved")
    ended = place.launch(2, 2, *command, program=PROGRAM, SMALL_FILES="1")
    assert ended.stderr == ""
    said = f"checkpoint unsaved/checkpoints/6 was not saved: process 1 on {socket.gethostname()}: "
    (line,) = [line for line in ended.stdout.splitlines() if said in line]
    assert "; the run goes on" in line
    assert 6 not in digests(place.folder / "unsaved")
    assert digests(place.folder / "unsaved")[12] == digests(two)[12]


def start(place: Place, count: int, changed: dict[int, list[str]], **variables: str) -> list[tuple[int, str]]:
    """Exit code and what was printed to stderr, for each of the processes in `changed`; these are its options."""
    port = free_port()
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = []
    for index, arguments in changed.items():
        folder = arguments.pop(0)
        process = subprocess.Popen(
            [sys.executable, "-m", "lm", "train", "tiny.py", *arguments],
            cwd=folder,
            env=environment(index, count, 1, port) | variables,
            **options,
        )
        started.append(process)
    results = []
    for process in started:
        _, error = process.communicate(timeout=200)
        results.append((process.returncode, str(error)))
    return results


def test_another_config_in_one_process(place: Place) -> None:
    here = str(place.folder)
    arguments = [here, "--run.dir=differs"]
    results = start(place, 2, {0: list(arguments), 1: [*arguments, "--optim.learning_rate=0.5"]})
    for code, error in results:
        assert code == 2
        assert f"process 1 on {socket.gethostname()}:\n    config: optim.learning_rate is 0.5, not 0.001" in error
        assert "Traceback" not in error
    assert not (place.folder / "differs").exists()


def test_other_data_in_one_process(place: Place, one: Path) -> None:
    other = place.folder / "other_data"
    (other / "text").mkdir(parents=True)
    shutil.copy(place.folder / "tiny.py", other)
    for number in range(9):
        (other / "text" / f"{number}.txt").write_text("another text\n" * (9 + number))
    run = ["--run.dir", str(place.folder / "other_data_run"), "--data.dir=built"]
    place.single(1, "data", "build", other / "tiny.py", f"--data.paths={other}/text", f"--data.dir={other}/built")
    results = start(place, 2, {0: [str(place.folder), *run], 1: [str(other), *run]})
    for code, error in results:
        assert code == 2
        assert f"process 1 on {socket.gethostname()}:\n    data: the fingerprint of built is " in error
        assert "Traceback" not in error


def test_one_that_never_comes(place: Place) -> None:
    here = str(place.folder)
    for code, error in start(place, 3, {0: [here], 2: [here]}, LM_START_SECONDS="8"):
        assert code == 6
        assert "1 of 3 processes did not come to 127.0.0.1:" in error
        assert "within 8 s: process 1; here are 0 on " in error
        assert "Traceback" not in error


def test_no_coordinator(place: Place) -> None:
    ((code, error),) = start(place, 2, {1: [str(place.folder)]}, LM_START_SECONDS="1")
    assert code == 6
    assert error.startswith("lm: process 1 cannot reach the coordinator (process 0) at 127.0.0.1:")
    assert len(error.splitlines()) == 1


def test_a_port_that_is_taken(place: Place) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        variables = {"JAX_COORDINATOR_ADDRESS": address, "JAX_COORDINATOR_BIND_ADDRESS": address}
        ((code, error),) = start(place, 2, {0: [str(place.folder)]}, **variables)
    assert code == 2
    assert error.startswith(f"lm: port {address.rpartition(':')[2]} on this host, ")
    assert "is taken" in error
    assert len(error.splitlines()) == 1
