"""The journal and what goodput makes of it, against a simulated run whose every millisecond is known."""

import json
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lm.errors import ConfigError, Stopped, StorageError
from lm.train import journal as journals
from lm.train.goodput import CAUSES, Goodput, goodput
from lm.train.journal import Journal, highest, note_aside, read, refuse_lost_checkpoints
from lm.train.run_directory import RunDirectory

BEGIN = 1_700_000_000_000


class Clock:
    """Both clocks, in whole milliseconds that pass only when told; `jump` moves the wall clock alone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = self.jump = 0
        monkeypatch.setattr(journals, "monotonic", lambda: self.now / 1000)
        monkeypatch.setattr(journals, "wall_time", lambda: (BEGIN + self.now + self.jump) / 1000)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def start(path: Path | None, clock: Clock | None = None) -> Journal:
    began = time.monotonic() if clock is None else clock.now / 1000
    return Journal(path, facts={"processes": 1}, began=began, report=pytest.fail)


def test_a_run_as_it_should_be(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "journal.jsonl"
    clock.now = 7_000
    with Journal(path, facts={"devices": 8}, began=5.0, report=pytest.fail) as journal:
        clock.now += 3_000
        with journal.time("compile"):
            clock.now += 10_000
        journal.note("compiled")
        with journal.time("step"):
            for k in range(3):
                with journal.time("input"):
                    clock.now += 100
                clock.now += 1_000
                journal.step(k)
                with journal.time("evaluation"):
                    clock.now += 2_000
                    with journal.time("input"):
                        clock.now += 500
            journal.saved(None)
            journal.saved(2)
            journal.saved(2)
        clock.now += 4_000
        live = journal.goodput()
    events = read(path)
    assert [event["event"] for event in events] == ["start", "compiled", "accounts", "saved", "end"]
    assert events[0] | {"devices": 8, "time": (BEGIN + 5_000) / 1000, "done": 0} == events[0]
    assert events[0]["pid"] > 0
    assert events[0]["host"]
    assert events[-1] | {"done": 3, "saved": 2, "code": 0} == events[-1]
    expected = dict.fromkeys(CAUSES, 0) | {
        "start": 5_000,
        "compile": 10_000,
        "step": 3_000,
        "input": 1_800,
        "evaluation": 6_000,
        "other": 4_000,
    }
    assert goodput(events) == live == Goodput(expected, 1)
    assert live.line() == "goodput 10% of 30s: compile 34%, evaluation 20%, start 17%, other 13%, input 6%"
    assert live.values() == {f"goodput/{name}": spent / 29_800 for name, spent in expected.items()} | {
        "goodput/restarts": 0
    }


def test_steps_of_an_earlier_start_or_before_a_rewind_are_replayed(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "journal.jsonl"

    def steps(journal: Journal, first: int, last: int) -> None:
        with journal.time("step"):
            for k in range(first, last):
                clock.now += 1_000
                journal.step(k)

    first = start(path, clock)
    steps(first, 0, 10)
    first.note("accounts")
    clock.now += 20_000  # killed
    second = start(path, clock)
    second.restored(6, "durable")
    steps(second, 6, 12)
    second.rewind(8)
    steps(second, 8, 14)
    second.note("accounts")
    found = goodput(read(path))
    assert found == second.goodput()
    assert {name: spent for name, spent in found.milliseconds.items() if spent} == {
        "step": 14_000,
        "replay": 8_000,
        "lost": 20_000,
    }
    assert found.values()["goodput/restarts"] == 1
    assert highest(read(path), "done", "was_done") == 14


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("jumps", [False, True])
def test_killed_at_random_moments_nothing_is_counted_twice_or_not_at_all(
    seed: int, jumps: bool, tmp_path: Path, clock: Clock
) -> None:
    """Every interval of a simulated run is kept beside the journal. What an event came after is counted under its
    cause, the rest is lost, and the whole is the wall time."""
    draw, path = random.Random(seed), tmp_path / "journal.jsonl"
    spent = dict.fromkeys(CAUSES, 0)
    pending: list[tuple[str, int]] = []
    done = 0

    def pass_time(cause: str) -> None:
        duration = draw.choice([1, 7, 300, 61_000, draw.randrange(4_000_000)])
        clock.now += duration
        pending.append((cause, duration))
        if jumps and draw.random() < 0.2:
            clock.jump += draw.randrange(-10_000_000, 10_000_000)

    def settle() -> None:
        """Counts what has passed, when the journal has grown by an event since."""
        nonlocal size
        if path.stat().st_size != size:
            size = path.stat().st_size
            for cause, duration in pending:
                spent[cause] += duration
            pending.clear()

    for number in range(12):
        new_from = highest(read(path), "done", "was_done")
        journal = start(path, clock)
        size = path.stat().st_size
        first = draw.randrange(done + 1)
        pass_time("start")
        journal.restored(first, "durable")
        settle()
        with journal.time("compile"):
            pass_time("compile")
        done = first
        for k in range(first, first + draw.randrange(12)):
            with journal.time("step"):
                pass_time("replay" if k < new_from else "step")
                if draw.random() < 0.5:
                    with journal.time("input"):
                        pass_time("input")
            journal.step(k)
            done = k + 1
            settle()
            with journal.time("save"):
                pass_time("save")
            if draw.random() < 0.3:
                journal.saved(k)
                settle()
        last = number == 11
        if last or draw.random() < 0.3:
            journal.__exit__(None, Stopped("asked"), None)
            settle()
        pass_time("lost")
        if not last:
            spent["lost"] += sum(duration for _, duration in pending)
            pending.clear()
        if draw.random() < 0.3:
            with path.open("ab") as file:  # power was lost while it wrote
                file.write(b'{"event": "acc')
    found = goodput(read(path))
    assert found.starts == 12
    assert sum(found.milliseconds.values()) == found.total
    if jumps:
        assert found.milliseconds["lost"] >= 0
        spent["lost"] = found.milliseconds["lost"]
    else:
        assert found.total == round(read(path)[-1]["time"] * 1000) - BEGIN
    assert found.milliseconds == spent
    assert sum(map(int, re.findall(r"(\d+)%", found.line()))) == 100


def test_percentages_add_up() -> None:
    thirds = Goodput(dict.fromkeys(CAUSES, 0) | {"step": 1, "input": 1, "lost": 1}, 1)
    assert thirds.line() == "goodput 34% of 0.0s: input 33%, lost 33%"
    assert goodput([]).line() == "goodput 0% of 0.0s"
    assert set(goodput([]).values().values()) == {0}


def test_after_the_end_of_a_run_nobody_waits_for_it(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "journal.jsonl"
    with start(path, clock):
        clock.now += 1_000
    clock.now += 10**9
    with start(path, clock):
        clock.now += 1_000
    assert goodput(read(path)).milliseconds["lost"] == 0


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (Stopped("stopped by SIGTERM:\n9 steps"), 75, "Stopped: stopped by SIGTERM:"),
        (KeyboardInterrupt(), 130, "KeyboardInterrupt: "),
        (ZeroDivisionError("by" * 1000), 1, "ZeroDivisionError: " + "by" * 1000),
    ],
)
def test_how_it_ended(error: BaseException, code: int, reason: str, tmp_path: Path) -> None:
    with pytest.raises(type(error)), start(tmp_path / "journal.jsonl"):
        raise error
    event = read(tmp_path / "journal.jsonl")[-1]
    assert (event["code"], event["reason"]) == (code, reason[:300])


def test_what_is_no_event_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with start(path) as journal:
        journal.step(4)
    sound = path.read_bytes().splitlines(keepends=True)
    accounts = json.loads(sound[1])
    bad = [{**accounts, name: value} for name in ("time", "done", "milliseconds", "start") for value in ([], None)]
    bad += [{**accounts, "time": float("nan")}, {**accounts, "saved": "x"}, {**accounts, "milliseconds": {"step": 0.5}}]
    lines = [json.dumps(event).encode() + b"\n" for event in [*bad, 7, [], {}, None]]
    noise = [b"\n", b"\0\0\0\0\n", b"\xff\xfe\n", b'{"event": "end"\n', *lines]
    path.write_bytes(sound[0] + b"".join(noise) + b"".join(sound[1:]) + sound[1][:30])
    assert [event["event"] for event in read(path)] == ["start", "accounts", "end"]
    note_aside(path, "supervisor", {"code": 6}, pytest.fail)  # behind the line that is cut
    assert [event["event"] for event in read(path)] == ["start", "accounts", "end", "supervisor"]
    start(path)  # which drops all that is no event
    events = read(path)
    assert [event["event"] for event in events] == ["start", "end", "supervisor", "start"]
    assert path.read_bytes().count(b"\n") == 4


def test_months_stay_small(tmp_path: Path, clock: Clock) -> None:
    path = tmp_path / "journal.jsonl"
    for first in range(0, 100 * 400, 400):  # each for two hours
        journal = start(path, clock)
        journal.restored(first, "durable")
        with journal.time("step"):
            for k in range(first, first + 400):
                clock.now += 18_000
                journal.step(k)
                journal.saved(k // 10)
    assert path.stat().st_size < 100 * 1_500 + 400 * 120
    with start(path, clock) as journal, journal.time("step"):
        for k in range(400_000):  # for three months without an end
            clock.now += 20_000
            journal.step(k)
    assert path.stat().st_size < 100 * 1_500 + 1_000 * 300
    assert goodput(read(path)).total == 100 * 400 * 18_000 + 400_000 * 20_000


def test_without_a_path_accounts_are_kept_all_the_same(clock: Clock) -> None:
    with start(None, clock) as journal, journal.time("evaluation"):
        clock.now += 1_000
        journal.step(0)
    assert journal.goodput().milliseconds["evaluation"] == 1_000


def test_failing_storage(tmp_path: Path) -> None:
    said: list[str] = []
    path = tmp_path / "missing" / "journal.jsonl"
    with Journal(path, facts={}, began=time.monotonic(), report=said.append) as journal:
        journal.step(0)
        journal.saved(1)
    (line,) = said
    assert f"cannot write {path}: No such file or directory; the run goes on" in line
    with pytest.raises(StorageError, match="cannot read what happened to the run before"):
        start(tmp_path)


KILLED = """
import sys, time
from lm.train import journal
journal.ACCOUNTS_SECONDS = journal.ACCOUNTS_SHARE = 0.0
first = int(sys.argv[2])
with journal.Journal(sys.argv[1], facts={}, began=time.monotonic(), report=sys.exit) as one, one.time("step"):
    one.restored(first, "durable")
    print("ready", flush=True)
    for k in range(first, 10**9):
        one.step(k)
        one.saved(k)
"""


def test_real_kills(tmp_path: Path) -> None:
    path, draw = tmp_path / "journal.jsonl", random.Random()
    begin = time.time()
    for number in range(4):
        done = highest(read(path), "done")
        command = [sys.executable, "-c", KILLED, str(path), str(done)]
        process = subprocess.Popen(command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            time.sleep(draw.uniform(0, 0.2))
        finally:
            process.kill()
            process.communicate()
        events = read(path)
        assert len(events) == len([line for line in path.read_bytes().splitlines() if line])
        found = goodput(events)
        assert found.starts == number + 1
        assert highest(events, "done") >= done
        assert found.milliseconds["replay"] == 0
        assert 0 < found.total <= (time.time() - begin) * 1000 + 5


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    with RunDirectory(tmp_path / "run") as run:
        return run


def test_a_run_that_saved_does_not_start_over(run: RunDirectory) -> None:
    refuse_lost_checkpoints(run)  # new
    with start(Path(run.journal)) as journal:
        journal.step(5)
    run.metrics.write_text('{"step": 0}\n')
    refuse_lost_checkpoints(run)  # ended before its first save
    with start(Path(run.journal)) as journal:
        journal.saved(6)
    with pytest.raises(ConfigError, match=r"step 6 was saved, as .*journal.jsonl says, but .*checkpoints has no check"):
        refuse_lost_checkpoints(run)
    (run.checkpoints / "6").mkdir()  # half of one is none
    with pytest.raises(ConfigError, match=r"Put the checkpoints back, or choose another run.dir"):
        refuse_lost_checkpoints(run)
    (run.checkpoints / "6" / "manifest.json").touch()
    refuse_lost_checkpoints(run)
    (run.checkpoints / "6").rename(run.checkpoints / "6.bad")  # restoring says what is to be said
    refuse_lost_checkpoints(run)


def test_a_run_without_a_journal_does_not_start_over(run: RunDirectory) -> None:
    run.metrics.write_text('{"step": 0}\n')
    with pytest.raises(ConfigError, match=r"steps were done, as .*metrics.jsonl says, but .*checkpoints has no check"):
        refuse_lost_checkpoints(run)
    journal = start(Path(run.journal))  # what this start notes says nothing of earlier ones
    with pytest.raises(ConfigError, match="steps were done"):
        refuse_lost_checkpoints(run)
    journal.step(0)
    refuse_lost_checkpoints(run)


def test_what_is_under_way(tmp_path: Path, clock: Clock) -> None:
    with start(tmp_path / "journal.jsonl", clock) as journal:
        assert journal.now() == ("start", 0)
        with journal.time("step"):
            journal.step(0)
            with journal.time("input"):
                assert journal.now() == ("input", 1)
            with journal.time("evaluation"), journal.time("input"):
                assert journal.now() == ("evaluation", 1)
            journal.step(1)
            journal.rewind(1)
            assert journal.now() == ("replay", 1)
            journal.step(1)
            assert journal.now() == ("step", 2)
        assert journal.now() == ("other", 2)
