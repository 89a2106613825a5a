"""How long, how large, and what a run does besides training steps."""

import dataclasses
from collections.abc import Iterator
from typing import Literal

from lm.config import free


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
    remat: Literal["none", "dots", "full"] = free("none")
    """What the backward pass computes again: nothing, all but products with weights, or whole layers."""
    unroll: int = free(1)
    """Layers in the body of the loop over layers. All of them is faster on a CPU; compiling takes longer."""
    z_loss: float = 0.0
    """Weight of logsumexp(logits)² in the loss (PaLM: 1e-4)."""
    max_bad_steps: int = free(20)
    """Steps in a row with a non-finite loss or gradient (none of them is applied) after which the run ends."""

    def check(self) -> Iterator[tuple[str, str]]:
        for name in ("steps", "batch_size", "sequence_length", "accumulation", "unroll", "max_bad_steps"):
            if getattr(self, name) < 1:
                yield name, f"must be at least 1, got {getattr(self, name)}"
        if self.accumulation >= 1 and self.batch_size % self.accumulation:
            yield "accumulation", f"{self.accumulation} does not divide train.batch_size = {self.batch_size}"
        if not 0 <= self.z_loss < float("inf"):
            yield "z_loss", f"must be at least 0, got {self.z_loss}"


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved, and which saves are kept."""

    every: int = 500
    """Steps from save to save; 0: only at the end and when stopped."""
    keep_last: int = 2
    """The newest ones kept."""
    keep_every: int = 0
    """Those at multiples of this many steps are kept for good; 0: none."""

    def check(self) -> Iterator[tuple[str, str]]:
        if self.every < 0:
            yield "every", f"must be at least 0, got {self.every}"
        if self.keep_last < 1:
            yield "keep_last", f"must be at least 1, got {self.keep_last}"
        if self.keep_every < 0:
            yield "keep_every", f"must be at least 0, got {self.keep_every}"


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


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """How often metrics are written."""

    every: int = 10
    """Steps from line to line of metrics.jsonl and point to point in TensorBoard; the last step always."""

    def check(self) -> Iterator[tuple[str, str]]:
        if self.every < 1:
            yield "every", f"must be at least 1, got {self.every}"
