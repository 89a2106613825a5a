"""How long, how large, and what a run does besides training steps."""

import dataclasses
import re
from collections.abc import Iterator
from typing import Literal

from lm.config import free

REMAT_NAMES = (
    "query",
    "key",
    "value",
    "attention",
    "attention_output",
    "feed_forward_up",
    "feed_forward_gate",
)
"""Results inside a layer that can be saved: what attention reads and gives (with what its own backward pass needs),
what it adds to the residual stream, and the two products that make the hidden layer."""
MOST_PROFILED_STEPS = 100
"""In one trace: it is held in memory until it is written, and devices keep only so many events."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Steps and the global batch."""

    steps: int = 1000
    batch_size: int = 16
    """B, sequences per step over all devices."""
    sequence_length: int = 256
    """S, tokens per sequence."""
    accumulation: int = free(1)
    """Parts that the batch is computed in, one after the other, before the one update: less memory, same result."""
    remat: Literal["none", "full", "names"] = free("none")
    """What the backward pass computes again: nothing, all of each layer, or all but `saved` and `offloaded`."""
    saved: tuple[str, ...] = free(())
    """For names: results kept on the device, such as `attention`; see REMAT_NAMES."""
    offloaded: tuple[str, ...] = free(())
    """For names: results kept in the memory of the host until the backward pass needs them."""
    optimizer_memory: Literal["device", "host"] = free("device")
    """Where the optimizer's state is between updates."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """What gradients of sharded weights are summed in between devices; bfloat16 is half the bytes."""
    unroll: int = free(1)
    """Layers in the body of the loop over layers. All of them is faster on a CPU; compiling takes longer."""
    deterministic: bool = free(False)
    """Every start on the same machines computes the same bits. TPUs and CPUs do anyway; GPUs then use neither
    operations that add in any order nor kernels that were found fastest at start-up. Settings and machines that would
    sum in another order are refused when the run goes on."""
    z_loss: float = 0.0
    """Weight of logsumexp(logits)² in the loss (PaLM: 1e-4)."""

    def check(self) -> Iterator[tuple[str, str]]:
        for name in ("steps", "batch_size", "sequence_length", "accumulation", "unroll"):
            if getattr(self, name) < 1:
                yield name, f"must be at least 1, got {getattr(self, name)}"
        if self.accumulation >= 1 and self.batch_size % self.accumulation:
            yield "accumulation", f"{self.accumulation} does not divide train.batch_size = {self.batch_size}"
        for name in ("saved", "offloaded"):
            wrong = [result for result in getattr(self, name) if result not in REMAT_NAMES]
            if wrong:
                yield name, f"a layer has no result {wrong[0]!r}; there are {', '.join(REMAT_NAMES)}"
            elif getattr(self, name) and self.remat != "names":
                yield name, f"is for train.remat = 'names', which is {self.remat!r}"
        if both := set(self.saved) & set(self.offloaded):
            yield "offloaded", f"{', '.join(sorted(both))}: saved on the device or on the host, not both"
        if self.remat == "names" and not (self.saved or self.offloaded):
            yield "saved", "train.remat = 'names' needs names here or in train.offloaded; without any, it is 'full'"
        if not 0 <= self.z_loss < float("inf"):
            yield "z_loss", f"must be at least 0, got {self.z_loss}"


@dataclasses.dataclass(frozen=True)
class RecoveryConfig:
    """What happens to steps that would harm the model: none of them is applied."""

    spike_sigmas: float = 10.0
    """Standard deviations that loss and (logarithm of the) gradient norm may be above the mean of the last 128 steps or
    so; lm/train/guard.py has the rule. 0: all that are finite are applied."""
    max_bad_steps: int = free(20)
    """Steps in a row that were not applied after which the run goes back."""
    rewinds: int = free(3)
    """Times that it goes back to the last good checkpoint, and leaves out the batches since, before it ends. 0: never
    goes back."""
    verify_every: int = free(0)
    """Steps from one that is computed twice and compared, bit by bit, to the next: see lm/train/corruption.py. It costs
    that step, and memory for a second state. 0: none."""

    def check(self) -> Iterator[tuple[str, str]]:
        if not 0 <= self.spike_sigmas < float("inf"):
            yield "spike_sigmas", f"must be a number above 0, or 0 for no limit; got {self.spike_sigmas}"
        if self.max_bad_steps < 1:
            yield "max_bad_steps", f"must be at least 1, got {self.max_bad_steps}"
        if self.rewinds < 0:
            yield "rewinds", f"must be at least 0, got {self.rewinds}"
        if self.verify_every < 0:
            yield "verify_every", f"must be at least 0, got {self.verify_every}"


@dataclasses.dataclass(frozen=True)
class WatchdogConfig:
    """How long a phase of a run may go on without progress before the run counts as hung and ends; 0: for ever."""

    start_seconds: float = 3600.0
    """To restore, compile and read the first batch. Building data is not counted."""
    step_seconds: float = 900.0
    """More than `data.stall_seconds`, which can tell what was not read, and than writing a trace takes."""
    evaluation_seconds: float = 3600.0
    """For each batch of held-out text, and for a sample."""
    save_seconds: float = 3600.0
    """For the part of a save that training waits for."""

    def check(self) -> Iterator[tuple[str, str]]:
        for field in dataclasses.fields(self):
            if not 0 <= getattr(self, field.name) < float("inf"):
                yield field.name, f"must be a number above 0, or 0 for no limit; got {getattr(self, field.name)}"


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out loss while training. The last step is always evaluated on all held-out text."""

    every: int = 500
    """Steps from evaluation to evaluation; 0: only at the end."""
    batches: int = 20
    """Batches of held-out text each time, the same ones; 0: all."""

    def check(self) -> Iterator[tuple[str, str]]:
        for name in ("every", "batches"):
            if getattr(self, name) < 0:
                yield name, f"must be at least 0, got {getattr(self, name)}"


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Text generated while training, with every evaluation."""

    prompt: str = ""
    tokens: int = 100
    """0: no samples."""
    temperature: float = 0.8
    top_p: float = 0.95

    def check(self) -> Iterator[tuple[str, str]]:
        if self.tokens < 0:
            yield "tokens", f"must be at least 0, got {self.tokens}"
        if not 0 <= self.temperature < float("inf"):
            yield "temperature", f"must be a number of at least 0, got {self.temperature}"
        if not 0 < self.top_p <= 1:
            yield "top_p", f"must be above 0 and at most 1, got {self.top_p}"


TRACKERS = ("wandb", "mlflow")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """How often metrics are written, and where else they are shown."""

    every: int = 10
    """Steps from line to line of metrics.jsonl and point to point in TensorBoard; the last step always."""
    detail: Literal["all", "scalars"] = "all"
    """all: with every evaluation also attention, histograms and pictures (lm/train/probe.py)."""
    trackers: tuple[str, ...] = ()
    """Services that the run is sent to while it is trained, of TRACKERS; what they are told is in their own environment
    variables."""

    def check(self) -> Iterator[tuple[str, str]]:
        if self.every < 1:
            yield "every", f"must be at least 1, got {self.every}"
        for name in self.trackers:
            if name not in TRACKERS:
                yield "trackers", f"there is no {name!r}, only {' and '.join(TRACKERS)}"
        if len(set(self.trackers)) < len(self.trackers):
            yield "trackers", "has one twice"


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """Which steps are traced; lm/train/profiler.py says where to, and how a run is asked for a trace while it runs."""

    steps: str = ""
    """Such as 20:25 for steps 20 to 24, a range as Python has it; empty: none."""

    @property
    def range(self) -> range:
        begin, _, end = self.steps.partition(":")
        return range(int(begin), int(end)) if self.steps else range(0)

    def check(self) -> Iterator[tuple[str, str]]:
        if not self.steps:
            return
        if not re.fullmatch(r"[0-9]{1,12}:[0-9]{1,12}", self.steps):
            yield "steps", f"must be as 20:25, which is steps 20 to 24; got {self.steps!r}"
        elif not self.range:
            yield "steps", f"{self.steps} has no step: the first one comes before the colon, and the second is left out"
        elif len(self.range) > MOST_PROFILED_STEPS:
            yield "steps", f"{self.steps} are {len(self.range)} steps, more than {MOST_PROFILED_STEPS} in one trace"
