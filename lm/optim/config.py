"""How parameters are updated."""

import dataclasses
from collections.abc import Iterator
from typing import Literal


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW (Loshchilov & Hutter 2019) with clipping by the global norm and a schedule."""

    learning_rate: float = 1e-3
    """The highest of the schedule."""
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "cosine"
    """After the warm-up: hold, fall along a half cosine or a line to the end, or hold and fall along a line over
    the last `decay_steps` (warm-up, stable, decay)."""
    warmup_steps: int = 100
    decay_steps: int | None = None
    """For wsd. None: a fifth of all steps."""
    final_fraction: float = 0.1
    """Share of `learning_rate` that is left at the last step."""
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    """Per step, times the learning rate."""
    decayed: Literal["matrices", "matrices_and_embeddings"] = "matrices_and_embeddings"
    """What decays. Norms and biases never do."""
    clip_norm: float | None = 1.0
    """Gradients with a larger global norm are scaled down to it. None: never."""

    def check(self) -> Iterator[tuple[str, str]]:
        for name in ("learning_rate", "epsilon"):
            if not 0 < getattr(self, name) < float("inf"):
                yield name, f"must be a number above 0, got {getattr(self, name)}"
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                yield name, f"must be at least 0 and below 1, got {getattr(self, name)}"
        if not 0 <= self.final_fraction <= 1:
            yield "final_fraction", f"is a share of the learning rate, 0 to 1; got {self.final_fraction}"
        if not 0 <= self.weight_decay < float("inf"):
            yield "weight_decay", f"must be at least 0, got {self.weight_decay}"
        if self.warmup_steps < 0:
            yield "warmup_steps", f"must be at least 0, got {self.warmup_steps}"
        if self.decay_steps is not None and self.schedule != "wsd":
            yield "decay_steps", f"is for optim.schedule = 'wsd'; {self.schedule!r} falls to the end"
        if self.decay_steps is not None and self.decay_steps < 1:
            yield "decay_steps", f"must be at least 1, or none; got {self.decay_steps}"
        if self.clip_norm is not None and not self.clip_norm > 0:
            yield "clip_norm", f"must be above 0, or none for no clipping; got {self.clip_norm}"
