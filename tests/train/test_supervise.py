"""The supervisor, with small programs in place of a run."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lm.train.journal import read

ROOT = Path(__file__).parents[2]

SUPERVISE = """
import sys
from pathlib import Path
from lm.train import supervise
supervise.BACK_OFF_SECONDS = {back_off}
code = supervise.supervise([sys.executable, "-c", sys.argv[1]], lambda: Path("journal.jsonl"), restarts={restarts})
assert "jax" not in sys.modules
sys.exit(code)
"""

# A start that restores what was saved, does `steps` steps, saves, and ends as `ends` says, for each start in turn.
START = """
import os, signal, sys, time
from lm.errors import *
from lm.train.journal import Journal, highest, read
events = read("journal.jsonl")
steps, end = (%s)[sum(event["event"] == "start" for event in events)]
step = highest(events, "saved")
try:
    with Journal("journal.jsonl", facts={}, began=time.monotonic(), report=sys.exit) as journal:
        journal.restored(step, "durable")
        for k in range(step, step + steps):
            journal.step(k)
            journal.saved(k + 1)
        if isinstance(end, BaseException):
            raise end
        if end:
            journal.note("accounts")
            signal.signal(end, signal.SIG_DFL) if end != signal.SIGKILL else None
            os.kill(os.getpid(), end)
except BaseException as error:
    os._exit(130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1))
"""


def start(folder: Path, program: str, *, restarts: int, back_off: tuple[float, float]) -> subprocess.Popen[str]:
    code = SUPERVISE.format(restarts=restarts, back_off=back_off)
    return subprocess.Popen(
        [sys.executable, "-c", code, program],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def supervise(
    folder: Path, program: str, *, restarts: int = 10, back_off: tuple[float, float] = (0.01, 0.02)
) -> tuple[int, list[str]]:
    process = start(folder, program, restarts=restarts, back_off=back_off)
    _, err = process.communicate(timeout=60)
    lines = [re.sub(r" after \S+,", " after 1s,", line) for line in err.splitlines()]
    assert all(line.startswith("lm: supervisor: ") for line in lines), err
    return process.returncode, [line.removeprefix("lm: supervisor: ") for line in lines]


def test_what_can_be_restarted_is_until_it_is_done(tmp_path: Path) -> None:
    ends = (
        "(2, signal.SIGKILL), (1, LostProcessError('gone')), (1, StorageError('full')), "
        "(0, MissingProcessError('late')), (1, DataError('late')), "
        "(1, Stopped('preempted')), (0, signal.SIGSEGV), (1, ZeroDivisionError()), (1, ZeroDivisionError()), (1, None)"
    )
    code, said = supervise(tmp_path, START % ends)
    assert code == 0
    assert said == [
        f"{how} after 1s, at step {step}; starts again in 0.0s"
        for how, step in [
            ("killed by SIGKILL", "2 or later"),
            ("ended with exit code 6", 3),
            ("ended with exit code 5", 4),
            ("ended with exit code 6", 4),
            ("ended with exit code 3", 5),
            ("ended with exit code 75", 6),
            ("killed by SIGSEGV", "6 or later"),
            ("ended with exit code 1", 7),
            ("ended with exit code 1", 8),
        ]
    ]
    events = read(tmp_path / "journal.jsonl")
    told = [event for event in events if event["event"] == "supervisor"]
    assert [event["code"] for event in told] == [137, 6, 5, 6, 3, 75, 139, 1, 1]
    assert [event["of"] for event in told] == [e["start"] for e in events if e["event"] == "start"][:-1]


@pytest.mark.parametrize(
    ("end", "code"),
    [("ConfigError('no')", 2), ("DivergedError('nan')", 4), ("KeyboardInterrupt()", 130), ("signal.SIGINT", 130)],
)
def test_what_a_restart_would_not_change_is_not(end: str, code: int, tmp_path: Path) -> None:
    assert supervise(tmp_path, START % f"(1, {end}), (1, None)") == (code, [])


def test_without_progress_there_is_a_limit(tmp_path: Path) -> None:
    ends = "(2, 9), (0, 9), (0, 9), (1, 9), (0, 9), (0, 9), (0, 9), (1, None)"
    code, said = supervise(tmp_path, START % ends, restarts=3, back_off=(0.1, 0.3))
    assert code == 137
    assert [line.partition("; ")[2] for line in said] == [
        *[f"starts again in {wait}s" for wait in (0.1, 0.2, 0.3, 0.1, 0.2, 0.3)],
        "does not start again: --restarts 3 in a row got no further than step 3 (3 saved)",
    ]
    assert read(tmp_path / "journal.jsonl")[-1]["then"] == said[-1].partition("; ")[2]


def test_a_bug_twice_at_the_same_step_is_enough(tmp_path: Path) -> None:
    code, said = supervise(tmp_path, START % "(1, TypeError()), (1, TypeError()), (0, TypeError()), (1, None)")
    assert code == 1
    assert said[-1].endswith("; does not start again: ended twice with a bug, at the same step 2")
    assert len(said) == 3
    (tmp_path / "journal.jsonl").unlink()
    code, said = supervise(tmp_path, "raise SystemExit(1)")
    assert code == 1
    assert said[-1] == "ended with exit code 1 after 1s, at step 0 or later; does not start again: " + (
        "ended twice with a bug, at the same step 0"
    )
    assert len(said) == 2


def test_what_a_start_left_behind_ends_with_it(tmp_path: Path) -> None:
    left = "import subprocess, sys; print(subprocess.Popen(['sleep', '300'], stdout=sys.stderr).pid, file=sys.stderr)"
    process = start(tmp_path, left, restarts=1, back_off=(0.1, 0.1))
    _, err = process.communicate(timeout=60)  # the end of stderr comes when nobody has it open
    assert process.returncode == 0
    assert not lives(int(err))


WAITS = """
import os, signal, sys, time
got = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: got.append(number))
print(os.getpid(), flush=True)
while not got:
    time.sleep(0.01)
time.sleep(0.3)
print(got, flush=True)
sys.exit(75)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on_once_and_nothing_starts_again(number: int, tmp_path: Path) -> None:
    process = start(tmp_path, WAITS, restarts=10, back_off=(0.01, 0.01))
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(number)
    assert process.communicate(timeout=60) == (f"[{int(number)}]\n", "")
    assert process.returncode == 75


def test_a_signal_while_it_waits_ends_it(tmp_path: Path) -> None:
    process = start(tmp_path, "raise SystemExit(6)", restarts=10, back_off=(300.0, 300.0))
    assert process.stderr is not None
    assert "starts again in 5m00s" in process.stderr.readline()
    process.terminate()
    assert process.wait(timeout=60) == 75


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="others have no death signal")
def test_when_it_is_killed_the_run_stops_as_if_asked(tmp_path: Path) -> None:
    process = start(tmp_path, WAITS, restarts=10, back_off=(0.01, 0.01))
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    out, _ = process.communicate(timeout=60)  # until the child has closed it
    assert out == f"[{int(signal.SIGTERM)}]\n"
    until = time.monotonic() + 20
    while lives(child) and time.monotonic() < until:
        time.sleep(0.05)
    assert not lives(child)


def lives(number: int) -> bool:
    try:
        return re.search(r"State:\s+Z", Path(f"/proc/{number}/status").read_text()) is None
    except (ProcessLookupError, FileNotFoundError):
        return False
