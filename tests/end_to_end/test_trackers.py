"""Runs that are tracked: what trackers hold is what metrics.jsonl holds, whatever happened to the run."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

import lm as package

from ..track.conftest import service as service
from ..track.conftest import store as store
from ..track.servers import Wandb
from .conftest import Lm, Logged


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def in_mlflow() -> tuple[str, list[dict[str, Any]]]:
    """How the one run ended, and its metrics as in metrics.jsonl; an error when a step has two values."""
    client = MlflowClient()
    experiment = client.get_experiment_by_name("lm")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    found: dict[int, dict[str, Any]] = {}
    for name in run.data.metrics:
        for one in client.get_metric_history(run.info.run_id, name):
            of_step, own = found.setdefault(one.step, {"step": one.step}), name.replace(".", "/")
            assert own not in of_step
            of_step[own] = one.value
    return run.info.status, [found[step] for step in sorted(found)]


def commit() -> str | None:
    """Of the code that is tested, as trackers are told; None when it is no checkout."""
    root = Path(package.__file__).parent
    said = subprocess.run(
        ["git", "-C", root, "log", "-1", "--format=%H"], capture_output=True, text=True
    ).stdout.strip()
    return said or None


def in_wandb(service: Wandb) -> list[dict[str, Any]]:
    (run,) = service.runs.values()
    own = ("_step", "_runtime", "_timestamp")
    return [{"step": row["_step"]} | {name: x for name, x in row.items() if name not in own} for row in run["rows"]]


def test_a_run_is_tracked_to_its_end(
    lm: Lm, workplace: Path, undisturbed: Path, logged: Logged, store: Path, service: Wandb
) -> None:
    ended = lm("train", "tiny.py", "--run.dir", "tracked", "--log.trackers", '("wandb", "mlflow")')
    run = workplace / "tracked"
    assert ended.stderr == ""
    assert ended.stdout.count(f"wandb: tracked at {service.url}/me/lm/runs/") == 1
    assert "not known to be there" not in ended.stdout
    assert "heldout_bits_per_byte" in lines(run)[-1]
    assert in_mlflow() == ("FINISHED", lines(run))
    assert in_wandb(service) == lines(run)
    (kept,) = service.runs.values()
    assert (kept["complete"], kept["exitcode"]) == (True, 0)
    assert json.loads(kept["config"])["train"]["value"]["steps"] == 12
    assert logged(run) == logged(undisturbed)
    assert (kept.get("commit") or "").rstrip("+") == (commit() or "")
    assert "Run summary" in (run / "trackers" / "wandb.log").read_text()  # and not on the terminal
    assert "Run summary" not in ended.stdout


def test_a_run_that_was_stopped_and_one_that_was_killed_go_on_as_one(
    lm: Lm, workplace: Path, undisturbed: Path, logged: Logged, store: Path, service: Wandb
) -> None:
    command = ("train", "tiny.py", "--run.dir", "tracked_again", "--log.trackers", '("wandb", "mlflow")')
    run = workplace / "tracked_again"
    lm(*command, code=75, after=5)
    assert in_mlflow() == ("KILLED", lines(run))
    assert in_wandb(service) == lines(run)
    assert len(lines(run)) == 6
    (kept,) = service.runs.values()
    assert kept["preempting"]
    first = lines(run)
    lm(*command, code=-9, after=11, number=9)  # beyond the checkpoint, so that steps are done again
    lm(*command)
    assert lines(run)[:6] == first
    status, there = in_mlflow()
    assert status == "FINISHED"
    steps = [{name: line[name] for name in ("step", "loss")} for line in lines(run)]
    assert [{name: line[name] for name in ("step", "loss")} for line in there] == steps
    assert [{name: line[name] for name in ("step", "loss")} for line in in_wandb(service)] == steps
    assert there[-1] == lines(run)[-1]
    assert (kept["complete"], kept["exitcode"]) == (True, 0)
    assert logged(run) == logged(undisturbed)


def test_what_cannot_be_is_refused_before_anything_happens(lm: Lm, workplace: Path, tmp_path: Path) -> None:
    ended = lm("train", "tiny.py", "--run.dir", "refused", "--log.trackers", "comet", code=2)
    assert "log.trackers: there is no 'comet', only wandb and mlflow" in ended.stderr
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *p: None if n == 'wandb' else f(n, *p)\n"
    )
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ['PYTHONPATH']}")
        ended = lm("train", "tiny.py", "--run.dir", "refused", "--log.trackers", "wandb", code=2)
    assert ended.stderr == "lm: wandb is not installed here: pip install 'lm[wandb]'\n"
    assert not (workplace / "refused").exists()
    assert "text is not a run" in lm("track", "text", "--to", "mlflow", code=2).stderr
    assert "invalid choice" in lm("track", "text", "--to", "comet", code=2).stderr


def test_a_run_is_sent_afterwards(lm: Lm, undisturbed: Path, tmp_path: Path, store: Path) -> None:
    run = Path(shutil.copytree(undisturbed, tmp_path / "copy"))
    assert lm("track", run, "--to", "mlflow").stdout == "sent 12 logged steps to mlflow\n"
    assert in_mlflow() == ("FINISHED", lines(run))
