import io

import pytest

from lm.data import progress
from lm.data.progress import Meter, Named, Terminal, time_left


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_without_a_terminal_a_line_each_ten_seconds(clock: list[float]) -> None:
    lines: list[str] = []
    meter = Meter("tokenising", 200_000_000, lines.append)
    for second in range(1, 41):
        clock[0] += 1
        meter(2_000_000 * second)
    assert lines == [
        "tokenising: 20.0 of 200.0 MB, 2.0 MB/s, 1 min 30 s left",
        "tokenising: 40.0 of 200.0 MB, 2.0 MB/s, 1 min 20 s left",
        "tokenising: 60.0 of 200.0 MB, 2.0 MB/s, 1 min 10 s left",
        "tokenising: 80.0 of 200.0 MB, 2.0 MB/s, 1 min 0 s left",
    ]
    meter.finish()
    assert lines[-1] == "tokenising: 200.0 MB in 40 s, 5.0 MB/s"


def test_on_a_terminal_one_line_is_rewritten(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    stream = io.StringIO()
    terminal = Terminal(stream)
    meter = Meter("tokenising", 50_000_000_000, Named("web", terminal))
    for part in (1, 2, 3):
        clock[0] += 0.4
        meter(part * 10_000_000_000)
    terminal("built")
    meter.finish()
    assert stream.getvalue() == (
        "web: tokenising: 20.0 of 50.0 GB, 25000.0 MB/s, 1 s left"
        "\rbuilt                                                   \n"
        "web: tokenising: 50.0 GB in 1 s, 41666.7 MB/s\n"
    )
    terminal.live("x" * 100)
    assert stream.getvalue().endswith("\n" + "x" * 59)


def test_nothing_yet_and_more_than_there_should_be(clock: list[float]) -> None:
    lines: list[str] = []
    meter = Meter("tokenising", 1_000_000, lines.append)
    clock[0] += 11
    meter(0)
    clock[0] += 11
    meter(2_000_000)
    assert lines == [
        "tokenising: 0.0 of 1.0 MB, 0.0 MB/s, waiting for the first of it",
        "tokenising: 1.0 MB, 0.0 MB/s, 0 s left",
    ]


def test_time_left() -> None:
    assert [time_left(s) for s in (0.2, 59.4, 60, 3599, 3600, 90_000)] == [
        "0 s",
        "59 s",
        "1 min 0 s",
        "59 min 59 s",
        "1 h 0 min",
        "25 h 0 min",
    ]
