"""Curves: which points they have, and how they are drawn on terminals, in pipes and in files."""

import io
import math
import re
import sys
from pathlib import Path

import pytest

from lm.cli import main
from lm.errors import ConfigError, StorageError
from lm.report.curves import Axis, Curve, Curves, curves
from lm.report.figure import write
from lm.report.terminal import Canvas, drawn, log_marks_in, marks_in

from .made import line, made

PLAIN = Canvas(60, 16, plain=True)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    lines = [line(k, loss=8.0 - k / 10, grad_norm=1.0) for k in range(0, 50, 10)]
    lines[2]["loss"] = "NaN"
    lines[4] |= {"heldout_loss": 5.0, "step_seconds": 1.0}
    return made(tmp_path / "run", lines=lines)


def of(*runs: Path, metric: str = "loss", x: Axis = "step", smooth: int = 1, log: bool = False) -> Curves:
    return curves(runs, [metric], x=x, smooth=smooth, log=log)


def test_points(run: Path) -> None:
    found = of(run)
    [curve] = found.curves
    assert (found.x_label, found.y_label, curve.name) == ("step", "loss", str(run))
    assert curve.x == [0, 10, 20, 30, 40]
    assert [y for y in curve.y if not math.isnan(y)] == [8.0, 7.0, 5.0, 4.0]
    assert found.notes == [f"1 of 5 values of loss in {run} are not finite"]
    assert of(run, x="tokens").curves[0].x == [1000, 11_000, 21_000, 31_000, 41_000]
    assert of(run, x="seconds").curves[0].x == [0.5, 5.5, 10.5, 15.5, 25.5]
    assert of(run, metric="heldout_loss").curves[0] == Curve(str(run), [40], [5.0])


def test_long_runs_are_in_hours(tmp_path: Path) -> None:
    found = of(made(tmp_path / "run", lines=[line(k, step_seconds=36.0) for k in range(1000)]), x="seconds")
    assert found.x_label == "hours in steps"
    assert found.curves[0].x[-1] == 10


def test_smoothing(run: Path) -> None:
    ys = of(run, smooth=3).curves[0].y
    assert ys[:2] == [8.0, 7.5]
    assert math.isnan(ys[2])
    assert ys[3:] == [6.0, 4.5]  # means of those of the last three that are finite
    with pytest.raises(ConfigError, match="--smooth must be at least 1"):
        of(run, smooth=0)


def test_several_runs_and_metrics(run: Path, tmp_path: Path) -> None:
    other, empty = made(tmp_path / "other", lines=[line(0)]), made(tmp_path / "empty")
    found = curves([run, other, empty], ["loss", "heldout_loss"], x="step", smooth=1, log=False)
    assert [curve.name for curve in found.curves] == [f"{run} loss", f"{run} heldout_loss", f"{other} loss"]
    assert found.y_label == "loss, heldout_loss"
    assert {f"{other} has no heldout_loss", f"{empty} has no metrics yet"} <= set(found.notes)


def test_bad_input(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"no metric 'los' in metrics\.jsonl; did you mean 'loss'"):
        of(run, metric="los")
    with pytest.raises(ConfigError, match="there are bits_per_byte, grad_norm, "):
        of(run, metric="zzzz")
    with pytest.raises(ConfigError, match=r"nothing can be drawn; .* has no metrics yet"):
        of(made(tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"nothing can be drawn; 1 of 1 values of loss in .* are not finite"):
        of(made(tmp_path / "nan", lines=[line(0, loss="NaN")]))
    with pytest.raises(ConfigError, match="not above 0"):
        of(made(tmp_path / "below", lines=[line(0, loss=-1.0)]), log=True)
    assert main(["plot", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"lm: {tmp_path} is not a run, it has no config.json\n"


def test_damaged_lines_are_said(tmp_path: Path) -> None:
    run = made(tmp_path / "run", lines='{"step": 0, "loss": 1}\nx\n{"step": 2, "loss": 1}\n{"step": 3, "lo')
    assert of(run).curves[0].x == [0, 2]
    assert of(run).notes == [f"1 lines of {run}/metrics.jsonl cannot be read"]


def test_plain_text_is_ascii_and_fits(run: Path) -> None:
    text = list(drawn(of(run), PLAIN))
    assert "\n".join(text).isascii()
    assert "\x1b" not in "\n".join(text)
    assert max(map(len, text[:-1])) <= 59
    assert text[0].strip() == "loss"
    assert text[15].strip() == "step"
    assert sum(row.count("*") for row in text[1:-1]) > 20
    assert text[-1] == f"* {run}  last 4, least 4"
    two = "\n".join(drawn(curves([run], ["loss", "grad_norm"], x="step", smooth=1, log=False), PLAIN))
    assert re.search(r"^a .* loss  last 4", two, re.M)
    assert re.search(r"^b .* grad_norm  last 1", two, re.M)


def test_on_a_terminal_there_are_colours_and_dots(run: Path) -> None:
    text = "\n".join(drawn(of(run), Canvas(60, 16, plain=False)))
    assert re.search("[\u2801-\u28ff]", text)
    assert "\x1b[38;5;" in text
    shown = re.sub(r"\x1b\[[\d;]*m", "", text).splitlines()
    assert max(map(len, shown[:-1])) <= 59


@pytest.mark.parametrize("log", [False, True])
def test_shapes_that_are_hard_to_draw(log: bool) -> None:
    nan = math.nan
    for xs, ys in [
        ([5], [3.0]),
        ([0, 1], [3.0, 3.0]),
        ([0, 1, 2, 3], [1.0, nan, nan, 2.0]),
        ([0, 1, 2], [nan, 1e-300, 1e300]),
        ([0, 1], [1e-9, 1.1e-9]),
        (list(range(100_000)), [1.0 + x % 7 for x in range(100_000)]),
    ]:
        for canvas in (PLAIN, Canvas(1, 1, plain=True), Canvas(300, 60, plain=False)):
            assert len(list(drawn(Curves([Curve("a", xs, ys)], "step", "loss", log, []), canvas))) >= 9


def test_spikes_stay_when_points_are_left_out() -> None:
    ys = [1.0] * 50_000
    ys[33_333] = 9.0
    text = list(drawn(Curves([Curve("a", list(range(50_000)), ys)], "step", "loss", False, []), PLAIN))
    assert "*" in text[2]  # right below the frame


def test_marks_are_round() -> None:
    assert marks_in(0, 299, 6) == [0, 50, 100, 150, 200, 250]
    assert marks_in(2.1, 8.2, 5) == [4, 6, 8]
    assert marks_in(7, 7, 5) == [7]
    assert log_marks_in(0.003, 20, 8) == [0.01, 0.1, 1, 10]
    assert log_marks_in(2.1, 8.2, 5) == [4, 6, 8]
    assert len(log_marks_in(1e-300, 1e300, 5)) <= 5


def test_which_streams_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    for name in ("TERM", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    assert Canvas.of(Stream()) == Canvas(200, 20, plain=False)
    ascii_only = Stream()
    ascii_only.encoding = "ascii"
    assert Canvas.of(ascii_only).plain
    assert Canvas.of(io.StringIO()).plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert Canvas.of(Stream()).plain
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert Canvas.of(Stream()).plain


def test_files(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    assert main(["plot", str(run), "--log", "--out", str(tmp_path / "new" / "a.png")]) == 0
    assert (tmp_path / "new" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"written to {tmp_path}/new/a.png\n"
    with pytest.raises(StorageError, match="cannot write"):
        write(of(run), str(run / "config.json" / "c.png"))


@pytest.mark.parametrize("log", [False, True])
def test_what_is_in_a_picture(log: bool, tmp_path: Path) -> None:
    """Names as they are: no formulas, and none left out."""
    matplotlib = pytest.importorskip("matplotlib", reason="needs the extra `plot`")
    found = Curves([Curve("_$x$", [0, 1, 2], [1.0, 100.0, 3.0]), Curve("b", [0], [1.0])], "hours", "$y$", log, [])
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        write(found, str(tmp_path / "b.SVG"))
    text = (tmp_path / "b.SVG").read_text()
    assert text.startswith("<?xml")
    assert {"_$x$", "b", "hours", "$y$"} <= {shown.strip() for shown in re.findall(r">([^<>]*)</text>", text)}
    assert ("10^{1}" in text) == log


def test_files_that_cannot_be(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"a\.pdf: the name must end with \.png or \.svg"):
        write(of(run), str(tmp_path / "a.pdf"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'lm\[plot\]'"):
        write(of(run), str(tmp_path / "a.png"))
