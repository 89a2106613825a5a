"""MLflow. Where, is told to its library: MLFLOW_TRACKING_URI and what belongs to it; MLFLOW_EXPERIMENT_NAME, or lm.

How far it has come is in a tag of the tracked run, which each request sets with the metrics that it brings.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence

from lm import config as configs
from lm.track.tracker import State, TrackedRun
from lm.train.metrics import Line, Mark

METRICS, PARAMS, PARAM_CHARACTERS, TAG_CHARACTERS = 999, 100, 6000, 5000
"""What a request may hold, of 1,000 metrics and tags together, and how long values may be."""
_RUN, _SENT = "lm.run", "lm.sent"
_TAGS = {"commit": "mlflow.source.git.commit"}
_STATES = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}


class MlflowTracker:
    url: str | None = None

    def begin(self, run: TrackedRun) -> Mark | None:
        # Requests are tried again by who follows a run; in the library a try may take minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient

        self._client = MlflowClient()
        experiment = self._experiment()
        found = self._client.search_runs([experiment], f"tags.`{_RUN}` = '{run.id}'", max_results=1)
        tracked = found[0] if found else self._client.create_run(experiment, tags={_RUN: run.id}, run_name=run.name)
        self._id = tracked.info.run_id
        if found:
            self._client.update_run(self._id, "RUNNING")
        self._describe(run, tracked.data.params)
        if (uri := self._client.tracking_uri).startswith("http"):
            self.url = f"{uri.rstrip('/')}/#/experiments/{experiment}/runs/{self._id}"
        sent = tracked.data.tags.get(_SENT)
        self._sent = Mark(*map(int, sent.split())) if sent else Mark(0, -1)
        return self._sent

    def scalars(self, lines: Sequence[Line]) -> None:
        from mlflow.entities import Metric, RunTag

        now = int(1000 * time.time())
        for part, sent in requests(lines, METRICS):
            # A store of files cannot have grad_norm beside a folder of it.
            metrics = [Metric(name.replace("/", "."), float(value), now, step) for step, name, value in part]
            tags = [RunTag(_SENT, f"{sent.rewinds} {sent.step}")] if sent else []
            self._client.log_batch(self._id, metrics=metrics, tags=tags)
            self._sent = sent or self._sent

    def received(self) -> Mark | None:
        return self._sent

    def finish(self, state: State) -> None:
        self._client.set_terminated(self._id, _STATES[state])

    def _experiment(self) -> str:
        if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return given
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "lm"
        found = self._client.get_experiment_by_name(name)
        return found.experiment_id if found else self._client.create_experiment(name)

    def _describe(self, run: TrackedRun, there: Mapping[str, str]) -> None:
        """The config as parameters. Those that are there cannot change: what did since is in tags."""
        from mlflow.entities import Param, RunTag

        texts = {name: x if isinstance(x, str) else json.dumps(x) for name, x in configs.flat(run.config).items()}
        values = {name: text[:PARAM_CHARACTERS] for name, text in texts.items()}
        new = [Param(name, text) for name, text in values.items() if name not in there]
        for begin in range(0, len(new), PARAMS):
            self._client.log_batch(self._id, params=new[begin : begin + PARAMS])
        tags = {_TAGS.get(name, name): text for name, text in run.facts.items() if text}
        tags |= {f"changed.{name}": text for name, text in values.items() if there.get(name, text) != text}
        if tags:
            self._client.log_batch(self._id, tags=[RunTag(name, text[:TAG_CHARACTERS]) for name, text in tags.items()])


def requests(lines: Sequence[Line], size: int) -> Iterator[tuple[list[tuple[int, str, float | int]], Mark | None]]:
    """The values of lines (step, name, value) in parts of at most `size`; each with the last line that ends in it, if
    one does. Of whole lines, so that none is sent in part and then again: only one that is longer is split."""
    part: list[tuple[int, str, float | int]] = []
    sent: Mark | None = None
    for line in lines:
        values = [(line.step, name, value) for name, value in line.values.items()]
        if part and len(part) + len(values) > size:
            yield part, sent
            part = []
        while len(values) > size:
            yield values[:size], None
            values = values[size:]
        part += values
        sent = line.mark
    if part or sent:
        yield part, sent
