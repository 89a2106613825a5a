"""Several machines that build one directory: real processes that share nothing but files."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lm.data import parts, plan, shares
from lm.data.build import build, build_share
from lm.data.config import DataConfig, TokenizerConfig
from lm.data.shares import Share, parse_share, wait_until
from lm.errors import ConfigError, DataError

Contents = Callable[[Path], dict[str, str]]

# `lm data build`, with parts so small that there are many, and slow so that they can be met.
MACHINE = """
import sys, time
from lm.cli import main
from lm.data import parts, plan, shares

plan.MIN_PART_BYTES = 20_000
shares.POLL_SECONDS = 0.05
encoded = parts._encoded
def slowly(*arguments):
    time.sleep(float(sys.argv[1]))
    yield from encoded(*arguments)
parts._encoded = slowly
sys.exit(main(sys.argv[2:]))
"""


def quiet(message: str) -> None:
    pass


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "MIN_PART_BYTES", 20_000)
    monkeypatch.setattr(shares, "POLL_SECONDS", 0.05)


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randrange(3000)}" for _ in range(draw.randrange(20, 200))) for _ in range(400)]
    texts += [text + " more" for text in draw.sample(texts, 60)] + draw.sample(texts, 20)
    draw.shuffle(texts)
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (tmp_path / "questions.jsonl").write_text(json.dumps({"question": texts[7], "answer": texts[9]}) + "\n")
    return DataConfig(
        (str(tmp_path / "text.jsonl"),),
        tokenizer=TokenizerConfig(vocab_size=400),
        holdout_fraction=0.1,
        workers=1,
        duplicates="near",
        overlap_paths=(str(tmp_path / "questions.jsonl"),),
        overlap="remove",
    )


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(config: DataConfig, tmp_path: Path) -> Iterator[Start]:
    """Starts `lm data build` with these arguments, slowly."""
    settings = tmp_path / "config.py"
    settings.write_text(
        "from lm.data.config import DataConfig, TokenizerConfig\nfrom lm.experiment import Config\n"
        f"config = Config(data={config!r})\n"
    )
    started = []

    def run(*arguments: str, seconds: float = 0.0) -> subprocess.Popen[str]:
        command = [sys.executable, "-u", "-c", MACHINE, str(seconds), "data", "build", str(settings), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(
            subprocess.Popen([*command, f"--data.dir={tmp_path / 'shared'}", "--model.vocab_size=400"], **pipes)
        )  # type: ignore[call-overload]
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.wait()


def test_three_machines_build_what_one_builds(
    config: DataConfig, start: Start, tmp_path: Path, contents: Contents
) -> None:
    last = start("--part", "3/3")
    time.sleep(1.5)  # so that it has to wait
    others = [start("--part", part) for part in ("2/3", "1/3")]
    said = [process.communicate(timeout=120)[0] for process in (last, *others)]
    assert [process.returncode for process in (last, *others)] == [0, 0, 0], said
    assert "waiting for share 1/3 to write plan and tokenizer" in said[0]
    assert sum("built " in text and "tokens to train on" in text for text in said) >= 1
    build(config, tmp_path / "alone", quiet)
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


def test_a_machine_that_is_killed_and_started_again(
    config: DataConfig, start: Start, tmp_path: Path, contents: Contents
) -> None:
    first, second = start("--part=1/2", seconds=0.1), start("--part=2/2", seconds=0.3)
    until = time.monotonic() + 60
    while not list((tmp_path / "shared").glob("part-*[13579].json")) and time.monotonic() < until:  # one of its own
        assert second.poll() is None
        time.sleep(0.02)
    second.send_signal(signal.SIGKILL)
    text = first.communicate(timeout=60)[0]
    assert first.returncode == 0
    assert "share 1/2 of" in text
    assert "still to come from other machines" in text
    assert not (tmp_path / "shared" / "manifest.json").exists()
    third = start("--part=2/2")
    text = third.communicate(timeout=60)[0]
    assert third.returncode == 0, text
    assert "parts are there; going on" in text
    build(config, tmp_path / "alone", quiet)
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


def test_without_a_share_all_that_is_missing_is_built(
    config: DataConfig, tmp_path: Path, contents: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = DataConfig(config.paths, tokenizer=config.tokenizer, holdout_fraction=0.1, workers=1)
    lines: list[str] = []
    assert build_share(plain, tmp_path / "data", lines.append, share=Share(0, 3)) is None
    assert "parts are still to come" in lines[-1]
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "data").glob("part-*.json")}
    assert build_share(plain, tmp_path / "data", quiet, share=Share(2, 3)) is None
    manifest = build(plain, tmp_path / "data", quiet)
    assert {path: path.stat().st_mtime_ns for path in there} == there
    build(plain, tmp_path / "alone", quiet)
    assert contents(tmp_path / "data") == contents(tmp_path / "alone")
    assert build_share(plain, tmp_path / "data", quiet, share=Share(1, 3)) == manifest  # all is done


def test_a_build_of_all_waits_for_machines_at_work(
    config: DataConfig, start: Start, tmp_path: Path, contents: Contents
) -> None:
    """It would take away what they read, once it is done."""
    shared = [start(f"--part={i}/2", seconds=0.2) for i in (1, 2)]
    until = time.monotonic() + 60
    while not list((tmp_path / "shared").glob("duplicates-*")) and time.monotonic() < until:
        time.sleep(0.02)
    whole = start()
    said = [process.communicate(timeout=120)[0] for process in (*shared, whole)]
    assert [process.returncode for process in (*shared, whole)] == [0, 0, 0], said
    assert "another process is building" in said[2]
    assert "looking for duplicates" not in said[2]
    build(config, tmp_path / "alone", quiet)
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")


def test_a_machine_that_still_runs_with_an_earlier_config(
    config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No part of it was done when another one began anew, so that could not see what is coming."""
    old = DataConfig(config.paths, tokenizer=TokenizerConfig("bytes"), holdout_fraction=0.1, workers=1)
    new = replace(old, holdout_fraction=0.2)
    encoded, calls = parts._encoded, []

    def meanwhile(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt
        if len(calls) == 2:
            assert build_share(new, tmp_path / "data", quiet, share=Share(0, 2)) is None
        return encoded(*arguments)

    monkeypatch.setattr(parts, "_encoded", meanwhile)
    with pytest.raises(KeyboardInterrupt):
        build_share(old, tmp_path / "data", quiet, share=Share(0, 2))
    with pytest.raises(DataError, match="was built by a process with another config"):
        build_share(old, tmp_path / "data", quiet, share=Share(1, 2))


def test_another_config_is_refused_once_parts_are_there(config: DataConfig, tmp_path: Path) -> None:
    plain = DataConfig(config.paths, tokenizer=TokenizerConfig("bytes"), holdout_fraction=0.1, workers=1)
    build_share(plain, tmp_path / "data", quiet, share=Share(0, 2))
    other = DataConfig(config.paths, tokenizer=TokenizerConfig("bytes"), holdout_fraction=0.2, workers=1)
    with pytest.raises(DataError, match=r"data\.holdout_fraction: built with 0\.1, now 0\.2"):
        build_share(other, tmp_path / "data", quiet, share=Share(1, 2))


def test_shares() -> None:
    assert [parse_share(f"{i}/3") for i in (1, 2, 3)] == [Share(0, 3), Share(1, 3), Share(2, 3)]
    assert [[share.has(part) for share in map(Share, range(3), [3] * 3)].count(True) for part in range(10)] == [1] * 10
    assert str(Share(1, 3)) == "2/3"
    for text in ("0/3", "4/3", "1", "a/b", "1/0", "-1/3", "", "1/3/3"):
        with pytest.raises(ConfigError, match="the first of eight machines has 1/8, the last one 8/8"):
            parse_share(text)


def test_waiting_is_said_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(shares.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(shares.time, "sleep", lambda seconds: clock.__setitem__(0, clock[0] + 7))
    lines: list[str] = []
    wait_until(lambda: clock[0] > 150, "Godot", lines.append)
    assert lines == ["waiting for Godot"] * 3
    wait_until(lambda: True, "nothing", lines.append)
    assert len(lines) == 3


def test_exit_code(start: Start) -> None:
    process = start("--part", "9/8")
    assert "--part: '9/8' is none" in process.communicate(timeout=60)[0]
    assert process.returncode == os.EX_OK + 2
