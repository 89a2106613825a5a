"""MLflow's own library and store."""

import fcntl
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from lm.errors import ConfigError, StorageError
from lm.track import send as sending
from lm.track.follow import catch_up
from lm.track.mlflow import requests
from lm.train.metrics import Line
from lm.train.run_directory import RunDirectory

from .conftest import Made


def the_run(name: str = "lm") -> Run:
    client = MlflowClient()
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    return run


def history(run: Run, name: str) -> list[tuple[int, Any]]:
    return [(one.step, one.value) for one in MlflowClient().get_metric_history(run.info.run_id, name)]


def send(run: Made) -> None:
    catch_up(RunDirectory(run.path), "mlflow", print)


def test_what_is_logged_is_there_once(made: Callable[..., Made], store: Path) -> None:
    run = made(
        steps=6,
        config={"data": {"paths": ["x" * 9000], "sources": [{"path": "a"}]}, "many": {str(i): i for i in range(250)}},
    )
    run.log(0, loss=0.1 + 0.2, grad_norm=2.0, **{"grad_norm/layer_0": 0.5})
    run.log(1, loss="NaN", grad_norm="Infinity")
    send(run)
    send(run)
    run.log(2, loss=-1e-300)
    send(run)
    tracked = the_run()
    (first, (step, value), last) = history(tracked, "loss")
    assert (first, last) == ((0, 0.1 + 0.2), (2, -1e-300))
    assert step == 1
    assert math.isnan(value)
    assert history(tracked, "grad_norm.layer_0") == [(0, 0.5)]
    assert history(tracked, "grad_norm") == [(0, 2.0), (1, math.inf)]
    params = tracked.data.params
    assert params["train.steps"] == "6"
    assert params["data.sources.0.path"] == "a"
    assert len(params["data.paths"]) == 6000
    assert params["many.249"] == "249"
    assert tracked.info.run_name == "made"
    assert tracked.data.tags["host"] == "trainer"
    assert tracked.info.status == "KILLED"  # it does not say how it ended


def test_the_end_is_told_and_so_are_its_values(made: Callable[..., Made], store: Path) -> None:
    run = made(steps=2)
    run.log(0, loss=2)
    run.log(1, loss=1)
    run.note("end", code=4)
    send(run)
    assert the_run().info.status == "FAILED"
    assert history(the_run(), "loss") == [(0, 2)]  # the last one changes when the run gets done
    run.metrics.write_text(run.metrics.read_text().replace('"loss": 1}', '"loss": 1, "heldout_loss": 3}'))
    run.note("start", start="another")
    run.note("end", start="another", code=0)
    send(run)
    assert the_run().info.status == "FINISHED"
    assert history(the_run(), "loss") == [(0, 2), (1, 1)]
    assert history(the_run(), "heldout_loss") == [(1, 3)]


def test_after_a_rewind_steps_have_a_second_value(made: Callable[..., Made], store: Path) -> None:
    run = made(steps=9)
    for step in range(4):
        run.log(step, loss=step)
    send(run)
    run.metrics.write_text("".join(run.metrics.read_text().splitlines(keepends=True)[:2]))
    for step in range(2, 5):
        run.log(step, loss=10 * step, rewinds=1)
    send(run)
    send(run)
    assert history(the_run(), "loss") == [(0, 0), (1, 1), (2, 2), (3, 3), (2, 20), (3, 30), (4, 40)]


def test_it_goes_on_from_what_the_tracker_has(
    made: Callable[..., Made], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without what was noted here, and with parameters that changed, which MLflow refuses."""
    run = made(steps=9, config={"log": {"every": 1}})
    run.log(0, loss=0)
    send(run)
    (run.path / "trackers" / "mlflow.json").unlink()
    (run.path / "config.json").write_text('{"train": {"steps": 9}, "log": {"every": 5}}')
    run.log(1, loss=1)
    send(run)
    assert history(the_run(), "loss") == [(0, 0), (1, 1)]
    assert the_run().data.params["log.every"] == "1"
    assert the_run().data.tags["changed.log.every"] == "5"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "elsewhere")
    send(run)
    assert history(the_run("elsewhere"), "loss") == [(0, 0), (1, 1)]


def test_a_request_that_fails_halfway_is_made_up_for(
    made: Callable[..., Made], store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sending, "LINES", 20)
    run = made(steps=9999)
    for step in range(30):
        run.log(step, **{f"m{i}": step + i / 100 for i in range(100)})
    log_batch, calls = MlflowClient.log_batch, []

    def fails_later(self: MlflowClient, run_id: str, **sent: Any) -> None:
        calls.append(sent)
        if len(calls) == 4:
            raise ConnectionError("it went away")
        log_batch(self, run_id, **sent)

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "log_batch", fails_later)
        # Parameters, tags, the nine steps that fit into a request, and then
        with pytest.raises(
            StorageError, match=r"it went away; 21 logged steps are not known to be there: `lm track .* --to mlflow`"
        ):
            send(run)
    send(run)
    tracked = the_run()
    for i in range(100):
        assert history(tracked, f"m{i}") == [(step, step + i / 100) for step in range(30)]


def test_requests_are_few_and_not_too_large() -> None:
    lines = [Line(step, {f"m{i}": i for i in range(step)}) for step in range(12)]
    parts = list(requests(lines, 10))
    assert [len(part) for part, _ in parts] == [10, 5, 6, 7, 8, 9, 10, 10, 1]  # 0 + 1 + 2 + 3 + 4 values, then 5
    assert [value for part, _ in parts for value in part] == [(k, f"m{i}", i) for k in range(12) for i in range(k)]
    seen: list[int] = []
    for part, sent in parts:  # nothing is said to be there before all of it is
        seen += [step for step, _, _ in part]
        assert sent is None or seen.count(sent.step) == sent.step
    assert [sent and sent.step for _, sent in parts] == [4, 5, 6, 7, 8, 9, 10, None, 11]


def test_what_was_never_started_cannot_be_sent(tmp_path: Path, made: Callable[..., Made], store: Path) -> None:
    run = made(steps=1)
    (run.path / "journal.jsonl").unlink()
    with pytest.raises(ConfigError, match="has nothing to send"):
        send(run)


def test_two_do_not_send_at_once(made: Callable[..., Made], store: Path, track: Callable[..., str]) -> None:
    run = made(steps=9)
    run.log(0, loss=0)
    (run.path / "trackers").mkdir()
    with open(run.path / "trackers" / ".mlflow.lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        said = track(run.path, "mlflow", code=2)
    assert said == f"lm: {run.path} is being sent to mlflow by another process\n"
    assert not store.exists()
    assert track(run.path, "mlflow") == "sent 1 logged steps to mlflow\n"
