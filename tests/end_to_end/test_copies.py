"""One checkpoint, copied out of a run, is a run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from lm.checkpoint.checkpoints import list_checkpoints
from lm.cli import main


def test_a_copy_goes_on_and_is_evaluated_and_continued(
    undisturbed: Path,
    tmp_path: Path,
    in_workplace: Path,
    logged: Callable[[Path], list[dict[str, float]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = tmp_path / "copy"
    assert main(["checkpoint", "copy", str(undisturbed), str(copy), "--step=9"]) == 0
    values = []
    for options in [str(undisturbed), "--step=9"], [str(copy), f"--data={undisturbed}/data"]:
        capsys.readouterr()
        assert main(["eval", *options, "--json"]) == 0
        values.append(json.loads(capsys.readouterr().out))
    assert values[0] == values[1]
    assert main(["generate", str(copy), "--prompt=the cat", "--max-tokens=2"]) == 0
    assert main(["train", str(copy)]) == 0
    assert "goes on from checkpoint 9\n" in capsys.readouterr().out
    there, here = (list_checkpoints(run / "checkpoints")[-1] for run in (undisturbed, copy))
    assert (here.step, here.digest) == (12, there.digest)
    assert logged(copy) == logged(undisturbed)[9:]
