"""The traces of a run: which there are, and one of them read, beside what the run says of itself."""

import dataclasses

from lm import config as configs
from lm.errors import ConfigError, LmError, StorageError
from lm.experiment import Config
from lm.files import reason
from lm.model.flops import flops_per_token, peak_flops
from lm.profile.kinds import PRODUCTS
from lm.profile.summary import Summary, summarize
from lm.profile.trace import trace_of
from lm.profile.xplane import read
from lm.train.journal import facts_of_last
from lm.train.journal import read as read_journal
from lm.train.metrics import read as read_metrics
from lm.train.profiler import traces_folder
from lm.train.run_directory import RunDirectory

_FILE = "*.xplane.pb"
_EXPECTED = "expected_step_seconds"


@dataclasses.dataclass(frozen=True)
class Profile:
    """A summary, and what is known of the run."""

    trace: str
    """Its name: the time at which it was taken."""
    path: str
    summary: Summary
    config: Config | None
    """None: it cannot be read by this version of lm."""
    device_kind: str
    devices: int
    """Of the whole run; of which the trace has those of one process."""
    logged_step_seconds: float | None
    """What metrics.jsonl has for those steps, or the ones next to them."""
    expected_step_seconds: float | None
    """What was predicted when the run started."""

    @property
    def mfu(self) -> float | None:
        """Of the traced steps; None where the peak of the device is not known."""
        return self._of_peak("causal", self.summary.step_seconds)

    @property
    def expected_mfu(self) -> float | None:
        return self._of_peak("causal", self.expected_step_seconds)

    @property
    def products_rate(self) -> float | None:
        """Of the peak, what products reach that the model needs, in the time of all products: recomputed ones count as
        time, not as work."""
        seconds = sum(row.seconds for row in self.summary.kinds if row.name == PRODUCTS)
        return self._of_peak("parameters", seconds)

    def _of_peak(self, which: str, seconds: float | None) -> float | None:
        """FLOPs of a step, counted this way, in so many seconds."""
        peak = peak_flops(self.device_kind)
        if self.config is None or not (peak and self.devices and seconds):
            return None
        train = self.config.train
        flops = float(getattr(flops_per_token(self.config.model, train.sequence_length), which))
        return flops * train.batch_size * train.sequence_length / self.devices / seconds / peak


def names(run: RunDirectory) -> list[str]:
    """Of its traces, the newest last. Raises StorageError when the directory cannot be read."""
    folder = traces_folder(run)
    try:
        return sorted(one.name for one in folder.iterdir() if list(one.glob(_FILE))) if folder.exists() else []
    except Exception as error:  # storage libraries raise classes of their own beside OSError
        raise StorageError(f"cannot list {folder}: {reason(error)}") from error


def load(run: RunDirectory, name: str | None = None) -> Profile:
    """The newest trace, or the one of that name.

    Raises:
      ConfigError: there is none, or none of this name.
      StorageError: it cannot be read, is damaged, or holds no operation of a device.
    """
    known = names(run)
    if not known:
        raise ConfigError(
            f"{run.path} has no trace: `lm profile {run.path} --now` takes one of a run that is going on, and "
            "`lm train … --profile.steps 20:25` one of those steps"
        )
    if name is not None and name not in known:
        raise ConfigError(f"{run.path} has no trace {name!r}; there are {', '.join(known[-10:])}")
    name = name or known[-1]
    (file, *_) = sorted((traces_folder(run) / name).glob(_FILE))
    try:
        summary = summarize(trace_of(read(file)))
    except ValueError:
        raise StorageError(
            f"{file} has no operation of any device: nothing ran while it was taken, or the profiler of this device "
            "did not work (see what the run has said); take another with --now"
        ) from None
    facts = facts_of_last(read_journal(run.journal), ("devices", "kind"))
    logged, expected = _logged(run, summary)
    return Profile(
        trace=name,
        path=str(file),
        summary=summary,
        config=_config(run),
        device_kind=str(facts.get("kind", summary.device_kind)),
        devices=int(facts.get("devices", summary.devices)),
        logged_step_seconds=logged,
        expected_step_seconds=expected,
    )


def _config(run: RunDirectory) -> Config | None:
    try:
        return configs.load(str(run.path), Config)
    except LmError:  # of another version: a trace can be read without
        return None


def _logged(run: RunDirectory, summary: Summary) -> tuple[float | None, float | None]:
    """Step time by metrics.jsonl, of the first line that has all of the steps behind it, and the newest prediction."""
    try:
        lines, _ = read_metrics(run.metrics)
    except StorageError:  # what is beside the trace is no more
        return None, None
    found = [line for line in lines if "step_seconds" in line.values]
    after = [line.values["step_seconds"] for line in found if summary.steps and line.step >= summary.steps[-1]]
    expected = [line.values[_EXPECTED] for line in found if _EXPECTED in line.values]
    return after[0] if after else None, expected[-1] if expected else None
