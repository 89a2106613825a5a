"""Real processes that hang in many ways: each ends with code 6 in time, says where it was, and so do the others."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import lm as package
from launch.local import free_port
from lm.parallel.processes import Processes
from lm.train import watchdog
from lm.train.config import WatchdogConfig
from lm.train.watchdog import Watchdog, place, stacks, suspects

LIMIT = 1.5

# One of the processes of a run, which do step 0, 1, 2 … together; `happens` is what process `who` does in step 20.
PROGRAM = """
import ctypes, os, signal, sys, threading, time
from lm.parallel.link import join
from lm.parallel.processes import Processes
from lm.parallel.wire import Place
from lm.train import backstop, watchdog
from lm.train.config import WatchdogConfig

address, count, index, folder, limit, who, happens, chance = sys.argv[1:]
backstop.CHANCE_SECONDS = watchdog.CHANCE_SECONDS = int(chance)
index, count = int(index), int(count)

def hang_in_python():
    with a_lock:
        a_lock.acquire()

def hang_in_c():
    ctypes.CDLL(None).sleep(100)

def keep_the_interpreter():
    ctypes.PyDLL(None).sleep(100)

def stop():
    os.kill(os.getpid(), signal.SIGSTOP)

def go_on():
    for _ in range(10):
        time.sleep(0.1)

def break_the_watchdog():
    processes.note = None
    time.sleep(5)

a_lock = threading.Lock()
link = join(Place(address, count, index), {}, 60) if count > 1 else None
processes = Processes(link)
try:
    config = watchdog.WatchdogConfig(step_seconds=float(limit))
    with watchdog.Watchdog(config, folder, processes) as dog:
        for step in range(40):
            dog.phase("step", step)
            processes.meet_before({})
            if step == 20:
                print("step 20", flush=True)
                if index == int(who):
                    globals()[happens]()
            processes.gather("as on the devices", None)
            processes.broadcast("as on the devices")
            time.sleep(0.02)
    if link:
        link.leave()
except BaseException as error:
    if link:
        link.end(error)
    raise
print("done", flush=True)
"""

Ended = tuple[int | None, str, str]


class Run:
    """Some processes, and how they end."""

    def __init__(self, folder: Path, count: int, who: int, happens: str, *, limit: float = LIMIT, chance: int = 1):
        address = f"127.0.0.1:{free_port()}"
        self.folder = folder
        self.began = time.monotonic()
        self.processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    PROGRAM,
                    *map(str, (address, count, index, folder, limit, who, happens, chance)),
                ],
                env=os.environ | {"PYTHONPATH": str(Path(package.__file__).parent.parent)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for index in range(count)
        ]

    def wait_for_step_20(self) -> None:
        for process in self.processes:
            assert process.stdout is not None
            assert process.stdout.readline() == "step 20\n"
        self.began = time.monotonic()

    def ended(self, *, but: int | None = None) -> list[Ended]:
        """Exit code, stdout and stderr of each process; `but`: one that does not end, and is killed."""
        found: list[Ended] = []
        for index, process in enumerate(self.processes):
            if index == but:
                found.append((None, "", ""))
                continue
            out, error = process.communicate(timeout=60)
            found.append((process.returncode, out, error))
        self.seconds = time.monotonic() - self.began
        return found

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def runs() -> Iterator[list[Run]]:
    found: list[Run] = []
    yield found
    for run in found:
        run.close()


def started(runs: list[Run], *arguments: object, **options: float) -> Run:
    runs.append(Run(*arguments, **options))  # type: ignore[arg-type]
    return runs[-1]


def test_a_healthy_run_ends_well(folder: Path, runs: list[Run]) -> None:
    for code, out, error in started(runs, folder, 2, 0, "go_on").ended():
        assert (code, out, error) == (0, "step 20\ndone\n", "")
    assert not list(folder.iterdir())


@pytest.mark.parametrize(("happens", "where"), [("hang_in_python", "hang_in_python"), ("hang_in_c", "hang_in_c")])
def test_a_process_alone(happens: str, where: str, folder: Path, runs: list[Run]) -> None:
    run = started(runs, folder, 1, 0, happens)
    run.wait_for_step_20()
    ((code, _, error),) = run.ended()
    assert code == 6
    assert LIMIT <= run.seconds < LIMIT + 10
    written = (folder / "hang.0.txt").read_text()
    for text in (error, written):
        assert "in step 20, more than watchdog.step_seconds = 1.5; the stacks of all threads are in " in text
        assert f" in {where}\n" in text
        assert "'MainThread'" in text
        assert "'watchdog'" in text
    assert error.splitlines()[-1].startswith("lm: no progress for ")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="its timers are those of Linux")
def test_a_process_in_which_no_python_runs(folder: Path, runs: list[Run]) -> None:
    run = started(runs, folder, 1, 0, "keep_the_interpreter")
    run.wait_for_step_20()
    ((code, _, error),) = run.ended()
    assert code == 6
    assert LIMIT < run.seconds < LIMIT + 10
    assert "in keep_the_interpreter\n" in error


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="its timers are those of Linux")
def test_a_process_in_which_no_python_runs_ends_the_others(folder: Path, runs: list[Run]) -> None:
    run = started(runs, folder, 3, 1, "keep_the_interpreter")
    run.wait_for_step_20()
    results = run.ended()
    assert [code for code, _, _ in results] == [6, 6, 6]
    assert run.seconds < LIMIT + 15
    assert "process 1 on" in results[0][2]
    assert "in keep_the_interpreter\n" in results[1][2]


def test_a_bug_in_the_watchdog_ends_nothing(folder: Path, runs: list[Run]) -> None:
    ((code, out, error),) = started(runs, folder, 1, 0, "break_the_watchdog").ended()
    assert (code, out) == (0, "step 20\ndone\n")
    assert "TypeError" in error


@pytest.mark.parametrize("who", [0, 2])
def test_one_of_four_hangs(who: int, folder: Path, runs: list[Run]) -> None:
    run = started(runs, folder, 4, who, "hang_in_c")
    run.wait_for_step_20()
    results = run.ended()
    assert [code for code, _, _ in results] == [6] * 4
    assert run.seconds < LIMIT + 15
    assert " in hang_in_c\n" in results[who][2] + (folder / f"hang.{who}.txt").read_text()
    others = [error for index, (_, _, error) in enumerate(results) if index != who]
    # Who is the first to say it tells the others; all may be the first.
    named = any(f"process {who} on " in error for error in others)
    assert named or all("no progress for " in error for error in others), results


@pytest.mark.parametrize("who", [0, 2])
def test_one_of_four_is_stopped_for_ever(who: int, folder: Path, runs: list[Run]) -> None:
    run = started(runs, folder, 4, who, "stop")
    run.wait_for_step_20()
    results = run.ended(but=who)
    others = [result for index, result in enumerate(results) if index != who]
    assert [code for code, _, _ in others] == [6] * 3
    assert run.seconds < LIMIT + 15
    if who:  # whom only process 0 could name
        assert any(f"process {who} on " in e and " has not come to 'gather/" in e for _, _, e in others), results
        assert any(f"process {who} on " in e and " was last heard " in e for _, _, e in others), results


@pytest.mark.parametrize("count", [1, 2])
def test_time_in_which_all_were_stopped_does_not_count(count: int, folder: Path, runs: list[Run]) -> None:
    """More than the limit, of the watchdog and of what ends a process without Python."""
    run = started(runs, folder, count, 0, "go_on", limit=2.5, chance=4)
    run.wait_for_step_20()
    time.sleep(0.3)
    for process in run.processes:
        process.send_signal(signal.SIGSTOP)
    time.sleep(8.0)
    for process in run.processes:
        process.send_signal(signal.SIGCONT)
    for code, out, error in run.ended():
        assert (code, out, error) == (0, "done\n", "")


class Endings(Processes):
    """Of one process, which does not end but notes how it would have."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[str] = []

    def end(self, error: BaseException) -> None:  # type: ignore[override]
        self.ends.append(str(error))
        threading.Event().wait()


@pytest.fixture
def endings(monkeypatch: pytest.MonkeyPatch) -> Endings:
    monkeypatch.setattr(watchdog, "exit_after", lambda seconds, code: None)
    return Endings()


def wait_until(done: Callable[[], bool], seconds: float = 10) -> None:
    until = time.monotonic() + seconds
    while not done() and time.monotonic() < until:
        time.sleep(0.02)


def test_each_phase_has_its_limit(endings: Endings, tmp_path: Path) -> None:
    config = WatchdogConfig(start_seconds=0, step_seconds=0.5, evaluation_seconds=1.5, save_seconds=0)
    said: list[str] = []
    dog = Watchdog(config, tmp_path, endings, said.append)
    dog.__enter__()
    for name in ("start", "data", "save", "evaluation"):  # none of these has ended after a second
        dog.phase(name, 7)
        time.sleep(1.0)
    for step in range(20):
        dog.phase("step", step)
        time.sleep(0.05)
    assert endings.ends == []
    dog.phase("evaluation", 9)
    wait_until(lambda: endings.ends)
    dog._backstop.close()
    (text,) = endings.ends
    assert "in evaluation 9, more than watchdog.evaluation_seconds = 1.5;" in text
    assert said == [text]


def test_a_directory_that_cannot_be_written_does_not_keep_a_hang(endings: Endings, tmp_path: Path) -> None:
    dog = Watchdog(WatchdogConfig(start_seconds=0.2), tmp_path / "missing", endings)
    dog.__enter__()
    wait_until(lambda: endings.ends)
    dog._backstop.close()
    assert len(endings.ends) == 1


def test_a_disk_that_hangs_does_not_keep_a_hang(endings: Endings, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "hang.0.txt")  # who writes there waits for a reader
    began = time.monotonic()
    dog = Watchdog(WatchdogConfig(start_seconds=0.2), tmp_path, endings)
    dog.__enter__()
    wait_until(lambda: endings.ends)
    dog._backstop.close()
    assert len(endings.ends) == 1
    assert time.monotonic() - began >= watchdog.WRITE_SECONDS


def test_what_was_set_is_set_back(tmp_path: Path) -> None:
    """An abort after a run is an abort."""
    program = """
import os, sys
from lm.train.config import WatchdogConfig
from lm.train.watchdog import Watchdog
with Watchdog(WatchdogConfig(), sys.argv[1]):
    pass
os.abort()
"""
    ended = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(Path(package.__file__).parent.parent)},
        capture_output=True,
    )
    assert ended.returncode == -signal.SIGABRT


def test_stacks_name_the_threads() -> None:
    waiting = threading.Event()
    thread = threading.Thread(target=waiting.wait, name="the loader", daemon=True)
    thread.start()
    text = stacks()
    waiting.set()
    assert "Thread 'the loader'" in text
    assert "test_stacks_name_the_threads" in text


def test_suspects() -> None:
    def name(index: int) -> str:
        return f"process {index} on h{index}"

    fine = {index: (99.0 - index, ["step", 7]) for index in range(4)}
    assert suspects(fine, 100.0, 10.0, name) == []
    assert suspects({}, 100.0, 10.0, name) == []
    silent = fine | {3: (40.0, ["step", 7])}
    assert suspects(silent, 100.0, 10.0, name) == ["process 3 on h3 was last heard 60 s ago, in step 7"]
    behind = fine | {2: (99.0, ["evaluation", 6])}
    assert suspects(behind, 100.0, 10.0, name) == ["process 2 on h2 is still in evaluation 6"]
    assert suspects(fine | {2: (99.0, ["start", None])}, 100.0, 10.0, name) == ["process 2 on h2 is still in start"]
    many = {index: (0.0 + index, ["step", 7]) for index in range(9)}
    lines = suspects(many, 100.0, 10.0, name)
    assert lines[0] == "process 0 on h0 was last heard 100 s ago, in step 7"
    assert lines[3:] == ["and 6 more"]


def test_a_phase_is_named_with_its_step() -> None:
    assert (place(("start", None)), place(("step", 0))) == ("start", "step 0")
