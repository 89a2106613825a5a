"""The terminal form on a real pseudo-terminal, seen through a small emulation; the plain form on pipes."""

import fcntl
import io
import itertools
import os
import re
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import pytest

from lm.train import progress as module
from lm.train.progress import Progress, human_bytes, human_count, human_seconds

VALUES = {"loss": 3.2141, "bits_per_byte": 2.3149, "tokens_per_second": 12345.0, "grad_norm": 1.0}


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "monotonic", clock)
    return clock


class Terminal:
    def __init__(self, columns: int) -> None:
        self._master, slave = os.openpty()
        self.resize(columns)
        self.stream = os.fdopen(slave, "w", encoding="utf-8")
        self._written = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def _read(self) -> None:
        while True:
            try:
                self._written += os.read(self._master, 4096)
            except OSError:  # the other side is closed
                return

    def written(self) -> str:
        """Until now."""
        return self._written.decode(errors="replace")

    def end(self) -> str:
        """Everything written."""
        self.stream.close()
        self._reader.join()
        os.close(self._master)
        return self._written.decode()

    def screen(self) -> list[str]:
        """What is to be seen at the end."""
        rows = []
        for row in self.end().split("\n"):
            seen = ""
            for piece in re.split(r"(\r|\x1b\[K)", row):
                if piece == "\r":
                    column = 0
                elif piece == "\x1b[K":
                    seen = seen[:column]
                else:
                    column = 0 if not seen else column
                    seen = seen[:column] + piece + seen[column + len(piece) :]
                    column += len(piece)
            rows.append(seen)
        return rows


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    return Terminal(columns=100)


def test_on_a_terminal_one_line_is_rewritten_and_the_log_gets_plain_lines(
    tmp_path: Path, clock: Clock, terminal: Terminal
) -> None:
    with Progress(600, stream=terminal.stream, log=tmp_path / "log.txt") as progress:
        progress.say("a new run")
        for step in range(1, 121):
            progress.update(step, VALUES | {"loss": 1000.0 if step < 115 else 3.2141})
            if step == 50:
                progress.say("saved step 50\nand said so")
            clock.now += 0.2125
    line = "step 120/600  loss 3.214  2.31 bits/byte  12.3k tokens/s  1m42s left"
    assert terminal.screen() == ["a new run", "saved step 50", "and said so", line, ""]

    log = (tmp_path / "log.txt").read_text()
    assert "\x1b" not in log
    assert "\r" not in log
    assert re.findall(r"^(?:step \d+/600|[a-z 0-9]+$)", log, re.M) == [
        "a new run",
        "step 1/600",
        "step 49/600",
        "saved step 50",
        "and said so",
        "step 97/600",
        "step 120/600",
    ]
    assert log.endswith(line + "\n")


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        (70, "step 2/600  loss 3.214  2.31 bits/byte  12.3k tokens/s  9m58s left"),
        (67, "step 2/600  loss 3.214  2.31 bits/byte  12.3k tokens/s  9m58s left"),
        (66, "step 2/600  loss 3.214  12.3k tokens/s  9m58s left"),
        (40, "step 2/600  loss 3.214  9m58s left"),
        (30, "step 2/600  9m58s left"),
        (15, "step 2/600"),
        (5, "step"),
        (0, "step 2/600  loss 3.214  2.31 bits/byte  12.3k tokens/s  9m58s left"),  # unknown: 80
    ],
)
def test_the_live_line_fits_the_terminal_as_it_is_now(
    clock: Clock, terminal: Terminal, columns: int, line: str
) -> None:
    progress = Progress(600, stream=terminal.stream)
    progress.update(1, VALUES)
    terminal.resize(columns)
    clock.now += 1
    progress.update(2, VALUES)
    assert terminal.screen() == [line]


def test_a_terminal_is_not_flooded(clock: Clock, terminal: Terminal) -> None:
    progress = Progress(10_000, stream=terminal.stream)
    for step in range(1, 10_001):
        progress.update(step, VALUES)
        clock.now += 0.001
    written = terminal.end()
    assert 90 <= written.count("\r") <= 110
    assert "step 10000/10000" in written


def test_a_terminal_is_told_what_is_under_way(
    monkeypatch: pytest.MonkeyPatch, clock: Clock, terminal: Terminal, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "WATCH_SECONDS", 0.005)
    doing = [("compile", 0)]

    def wait(seconds: float) -> None:
        seen = terminal.written().count("\r")
        clock.now += seconds
        until = time.monotonic() + 30
        while terminal.written().count("\r") < seen + 3:
            assert time.monotonic() < until
            time.sleep(0.005)

    with Progress(600, stream=terminal.stream, log=tmp_path / "log.txt") as progress:
        progress.watch(lambda: doing[0])
        time.sleep(0.1)
        wait(12)
        progress.say("compiled")
        doing[0] = "step", 0
        progress.update(1, VALUES | {"mfu": 0.412})
        wait(9)
        doing[0] = "evaluation", 1
        wait(0.1)
        wait(3)
        assert terminal.written().endswith("41% MFU  evaluating for 3.0s\x1b[K")
    line = "step 1/600  loss 3.214  2.31 bits/byte  12.3k tokens/s  41% MFU"
    assert "\rcompiling for 12s\x1b[K\r\x1b[Kcompiled\n" in terminal.written().replace("\r\n", "\n")
    assert "training for" not in terminal.written()
    assert terminal.screen() == ["compiled", line, ""]
    assert (tmp_path / "log.txt").read_text() == f"compiled\n{line}\n"


def test_a_run_that_ends_before_its_first_step_leaves_no_live_line(
    monkeypatch: pytest.MonkeyPatch, terminal: Terminal
) -> None:
    monkeypatch.setattr(module, "WATCH_SECONDS", 0.005)
    monkeypatch.setattr(module, "OTHER_SHORT_SECONDS", 0.0)
    with Progress(600, stream=terminal.stream) as progress:
        progress.watch(lambda: ("restore", 0))
        until = time.monotonic() + 30
        while "restoring for 0.0s" not in terminal.written():
            assert time.monotonic() < until
            time.sleep(0.005)
    assert terminal.screen() == [""]


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch, clock: Clock, terminal: Terminal) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with Progress(2, stream=terminal.stream) as progress:
        progress.update(1, {})
        progress.update(2, {})
    assert terminal.end() == "step 1/2\r\nstep 2/2\r\n"  # the terminal's own \r


def test_without_a_terminal_there_is_a_line_now_and_then_and_the_last(tmp_path: Path, clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(100, stream=stream, log=tmp_path / "log.txt") as progress:
        progress.say("hello")
        for step in range(1, 35):
            progress.update(step, {"loss": float("nan")})
            clock.now += 1
    assert stream.getvalue() == (
        "hello\n"
        "step 1/100  loss nan\n"
        "step 11/100  loss nan  1m29s left\n"
        "step 21/100  loss nan  1m19s left\n"
        "step 31/100  loss nan  1m09s left\n"
        "step 34/100  loss nan  1m06s left\n"
    )
    assert (tmp_path / "log.txt").read_text() == stream.getvalue()


def test_the_longer_a_run_the_rarer_its_plain_lines(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(200_000, stream=stream)
    at = []
    for step in range(1, 86_401):
        before = stream.tell()
        progress.update(step, {})
        at += [step] * (stream.tell() > before)
        clock.now += 1
    pauses = [after - before for before, after in itertools.pairwise(at)]
    assert pauses[:100] == [10] * 100
    assert sorted(pauses) == pauses
    assert pauses[-1000:] == [60] * 1000


def test_a_second_start_adds_to_the_log(tmp_path: Path, clock: Clock) -> None:
    for start in ("first", "second"):
        with Progress(10, stream=None, log=tmp_path / "log.txt") as progress:
            progress.say(start)
    assert (tmp_path / "log.txt").read_text() == "first\nsecond\n"


def test_the_time_left_follows_the_recent_pace(clock: Clock) -> None:
    stream = io.StringIO()
    progress = Progress(2000, stream=stream)

    def run(first: int, last: int, seconds: float) -> None:
        for step in range(first, last + 1):
            clock.now += seconds
            progress.update(step, {})

    def left() -> str:
        progress._write_plain_line()
        return stream.getvalue().splitlines()[-1].split("  ")[-1]

    run(501, 600, 3.0)  # resumed: the pace is of this start
    assert left() == "1h10m left"
    run(601, 800, 0.5)  # the slow beginning is forgotten
    assert left() == "10m00s left"
    clock.now += 100_000  # a suspended laptop counts as ten steps
    run(801, 801, 0.5)
    assert left() == "10m54s left"  # 1199 * (99 * 0.5 + 5) / 99, one interval fewer than updates
    for step in range(811, 1802, 10):  # logged every ten steps
        clock.now += 5
        progress.update(step, {})
    run(1802, 1802, 0.5)
    assert left() == "1m39s left"


def test_what_is_said_cannot_drive_the_terminal_or_break_the_log(
    tmp_path: Path, clock: Clock, terminal: Terminal
) -> None:
    with Progress(2, stream=terminal.stream, log=tmp_path / "log.txt") as progress:
        progress.say("a\tb \x1b[2J\r\x07\x9b \udce9 é")
    expected = "a\tb \\x1b[2J\\x0d\\x07\\x9b ? é"
    assert (tmp_path / "log.txt").read_text() == expected + "\n"
    assert "\x1b[2J" not in terminal.end()


def test_a_stream_that_knows_only_ascii(clock: Clock) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Progress(2, stream=stream).say("é")
    assert stream.buffer.getvalue() == b"?\n"


def test_a_closed_stream_and_none_at_all(tmp_path: Path, clock: Clock) -> None:
    closed = io.StringIO()
    closed.close()
    for name, stream in (("closed", closed), ("none", None)):
        with Progress(1, stream=stream, log=tmp_path / name) as progress:
            progress.update(1, {})
            progress.say("done")
        assert (tmp_path / name).read_text() == "step 1/1\ndone\n"


def test_a_log_that_cannot_be_written_is_told_and_the_rest_is_shown(tmp_path: Path, clock: Clock) -> None:
    stream = io.StringIO()
    with Progress(2, stream=stream, log=tmp_path) as progress:
        progress.update(1, {})
        progress.update(2, {})
    first, told, last = stream.getvalue().splitlines()
    assert (first, last) == ("step 1/2", "step 2/2")
    assert "Is a directory; the run goes on" in told


TALKATIVE = """
import sys
from lm.train.progress import Progress
with Progress(3, stream=sys.stdout, log=sys.argv[1]) as progress:
    progress.say("ready")
    sys.stdin.readline()
    for step in (1, 2, 3):
        progress.update(step, {})
        progress.say(f"after {step}")
    print("and a plain print")
"""


def test_a_reader_that_goes_away_does_not_end_the_run_or_change_its_exit_code(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", TALKATIVE, str(tmp_path / "log.txt")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    process.stdout.close()
    process.stdin.write("\n")
    process.stdin.close()
    assert (process.wait(60), process.stderr.read()) == (0, "")
    process.stderr.close()
    log = (tmp_path / "log.txt").read_text()
    assert log == "ready\nstep 1/3\nafter 1\nafter 2\nstep 3/3\nafter 3\n"


def test_stdout_that_was_closed_before_the_start(tmp_path: Path) -> None:
    command = f"exec {sys.executable} -c '{TALKATIVE}' {tmp_path}/log.txt >&- </dev/null"
    ended = subprocess.run(["bash", "-c", command.replace("print(", "str(")], stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert "after 3" in (tmp_path / "log.txt").read_text()


def test_threads_do_not_mix_their_lines(tmp_path: Path) -> None:
    with Progress(1, stream=io.StringIO(), log=tmp_path / "log.txt") as progress:

        def talk(letter: str) -> None:
            for _ in range(200):
                progress.say(letter * 50)

        threads = [threading.Thread(target=talk, args=(letter,)) for letter in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert sorted(lines) == sorted(letter * 50 for letter in "abcd" for _ in range(200))


def test_human_seconds() -> None:
    cases = {
        0: "0.0s", 0.26: "0.3s", 9.94: "9.9s", 9.96: "10s", 42.4: "42s", 59.7: "1m00s", 102: "1m42s",
        3599.6: "1h00m", 7500: "2h05m", 86_399: "1d00h", 273_600: "3d04h", 40 * 86_400: "40d00h",
    }  # fmt: skip
    assert {seconds: human_seconds(seconds) for seconds in cases} == cases


def test_human_count() -> None:
    cases = {
        0: "0", 7: "7", 0.25: "0.25", 42.06: "42.1", 950: "950", 999.4: "999", 999.6: "1.00k",
        12_345: "12.3k", 999_499: "999k", 999_950: "1.00M", 4_560_000: "4.56M",
        1.2e9: "1.20B", 1.5e13: "15.0T", 2e15: "2000T",
        -1500: "-1.50k",
    }  # fmt: skip
    assert {count: human_count(count) for count in cases} == cases


def test_human_bytes() -> None:
    cases = {0: "0 B", 950: "950 B", 12_345: "12.3 kB", 4_560_000: "4.56 MB", 1.2e9: "1.20 GB", 1.5e13: "15.0 TB"}
    assert {count: human_bytes(count) for count in cases} == cases
