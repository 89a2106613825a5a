import json
import os
import shutil
from pathlib import Path

import pytest

from lm.checkpoint.checkpoints import list_checkpoints
from lm.cli import main
from lm.train.run_directory import RunDirectory

from .made import Writer, abstract, bits, rewrite_manifest, small, steps

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What looks like a run, with checkpoints 2, 4, 6 (bad, as its files show), 8, and one that was set aside."""
    run = tmp_path / "run"
    writer = Writer(run / "checkpoints", keep_last=9)
    writer.write(2, 4, 6, 8)
    (run / "config.json").write_text("{}")
    shutil.copytree(run / "checkpoints" / "4", run / "checkpoints" / "4.bad")
    flip(run / "checkpoints" / "6" / "tokenizer.model")
    return run


def flip(path: Path) -> None:
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


def test_list(run: Path, capsys: Captured) -> None:
    (run / "checkpoints" / "2" / "manifest.json").write_text("{}")
    assert main(["checkpoint", "list", str(run)]) == 0
    header, *lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert header == ["step", "status", "tier", "MB", "hours", "ago", "digest"]
    digests = {info.step: info.digest for info in list_checkpoints(run / "checkpoints")}
    assert lines[0] == ["2", "bad", "durable", "manifest.json", "is", "not", "as", "it", "was", "written"]
    assert lines[1][:3] + lines[1][4:] == ["4", "good", "durable", "0.0", digests[4]]
    assert lines[2] == ["4", "set", "aside", "durable", "kept", "as", "4.bad"]
    assert [line[0] for line in lines] == ["2", "4", "4", "6", "8"]
    assert main(["checkpoint", "list", str(run), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["status"] for row in rows] == ["bad", "good", "set aside", "good", "good"]
    assert rows[1]["bytes"] > 500


def test_verify_reads_all_files(run: Path, capsys: Captured) -> None:
    assert main(["checkpoint", "verify", str(run)]) == 5
    captured = capsys.readouterr()
    assert [line.split(maxsplit=1) for line in captured.out.splitlines()] == [
        ["2", "good"],
        ["4", "good"],
        ["6", "bad: tokenizer.model is not as it was written"],
        ["8", "good"],
    ]
    assert "1 of the checkpoints in" in captured.err
    assert main(["checkpoint", "verify", str(run), "--step=8"]) == 0
    assert main(["checkpoint", "verify", str(run), "--step=6"]) == 5
    assert main(["checkpoint", "verify", str(run), "--step=7"]) == 2
    assert "has no checkpoint 7; there are 8, 6, 4, and 1 more" in capsys.readouterr().err
    assert steps(run / "checkpoints") == [2, 4, 6, 8]


def test_show(run: Path, capsys: Captured) -> None:
    assert main(["checkpoint", "show", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step = 8"
    assert "leaves.w = float32[4, 8]" in lines
    assert "scalars.step = 8" in lines
    assert "files.tokenizer.model = 256 bytes" in lines
    assert main(["checkpoint", "show", str(run), "--step=4", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["step"], facts["leaves"]["w"], facts["data"]) == (4, ["float32", 4, 8], None)


def test_copy_is_a_run_with_one_checkpoint(run: Path, tmp_path: Path, capsys: Captured) -> None:
    target = tmp_path / "copies" / "one"
    assert main(["checkpoint", "copy", str(run), str(target), "--step=4"]) == 0
    assert f"lm train {target}" in capsys.readouterr().out
    assert (target / "config.json").read_bytes() == (run / "checkpoints" / "4" / "config.json").read_bytes()
    assert bits(Writer(target / "checkpoints").restore(4, abstract(small(4)))) == bits(small(4))
    before = {path: path.stat().st_mtime_ns for path in target.rglob("*")}
    assert main(["checkpoint", "copy", str(run), str(target), "--step=8"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == before
    for step, code, said in (6, 5, "tokenizer.model is not as it was written"), (5, 2, "has no checkpoint 5"):
        assert main(["checkpoint", "copy", str(run), str(tmp_path / "other"), f"--step={step}"]) == code
        assert said in capsys.readouterr().err
        assert not (tmp_path / "other").exists()


def test_what_is_copied_is_what_was_verified(run: Path, tmp_path: Path, capsys: Captured) -> None:
    folder = run / "checkpoints" / "4"
    (tmp_path / "secret").write_text("a secret")
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.model").symlink_to(tmp_path / "secret")
    rewrite_manifest(folder)
    assert main(["checkpoint", "copy", str(run), str(tmp_path / "other"), "--step=4"]) == 5
    assert "tokenizer.model is a link" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_prune_keeps_the_newest_good_one_and_what_is_bad(run: Path, capsys: Captured) -> None:
    flip(run / "checkpoints" / "8" / "tokenizer.model")
    command = ["checkpoint", "prune", str(run), "--keep-last=1"]
    assert main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "8  bad, and left alone: tokenizer.model is not as it was written" in said
    assert said.splitlines()[-1].split() == ["2", "would", "be", "removed"]
    assert steps(run / "checkpoints") == [2, 4, 6, 8]
    assert main([*command, "--keep-every=2"]) == 0
    assert steps(run / "checkpoints") == [2, 4, 6, 8]
    with RunDirectory(run):
        assert main(command) == 2
    assert f"is in use by process {os.getpid()}" in capsys.readouterr().err
    assert steps(run / "checkpoints") == [2, 4, 6, 8]
    assert main(command) == 0
    assert steps(run / "checkpoints") == [4, 6, 8]
    assert (run / "checkpoints" / "4.bad").exists()
    assert main(["checkpoint", "prune", str(run), "--keep-last=0"]) == 2


def test_what_is_no_run_or_has_nothing(tmp_path: Path, capsys: Captured) -> None:
    for verb in ["list"], ["verify"], ["show"], ["copy", "x", "--step=1"], ["prune", "--keep-last=1"]:
        assert main(["checkpoint", verb[0], str(tmp_path), *verb[1:]]) == 2
        assert "is not a run, it has no config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{}")
    for verb in "verify", "show":
        assert main(["checkpoint", verb, str(tmp_path)]) == 2
        assert "has no checkpoint" in capsys.readouterr().err
    assert main(["checkpoint", "list", str(tmp_path)]) == 0
