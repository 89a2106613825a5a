"""Loss on text that is never trained on."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lm.model.loss import Batch, LossSums

AHEAD = 3
"""Batches that may be on the devices at once: the host is faster than they are."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Means over all targets of the batches evaluated."""

    loss: float
    """Nats per token."""
    bits_per_byte: float
    """Bits per byte of the raw text, which compares across tokenizers."""
    tokens: int
    bytes: int
    by_source: Mapping[str, "HeldOut"] = dataclasses.field(default_factory=dict)
    """Of each source of which there was something, where there are several."""

    def values(self) -> dict[str, float]:
        """For metrics.jsonl."""
        found = {"heldout_loss": self.loss, "heldout_bits_per_byte": self.bits_per_byte}
        for name, part in self.by_source.items():
            found |= {f"{key}/{name}": value for key, value in part.values().items()}
        return found

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(min(self.loss, 700.0))


def held_out_loss(
    eval_step: Callable[[Any, Batch], LossSums], params: Any, batches: Iterable[Batch], sources: Sequence[str]
) -> HeldOut:
    """Runs over the batches, already on the devices, and divides once at the end."""
    results: list[LossSums] = []
    for batch in batches:
        results.append(eval_step(params, batch))
        jax.block_until_ready(results[-AHEAD:][0])
    sums = np.sum([np.asarray(one, np.float64) for one in jax.device_get(results)], axis=0)  # [4, sources]
    parts = {name: _means(one) for name, one in zip(sources, sums.T, strict=True)}
    several = {name: part for name, part in parts.items() if part.tokens} if len(parts) > 1 else {}
    return dataclasses.replace(_means(sums.sum(axis=1)), by_source=several)


def _means(sums: np.ndarray) -> HeldOut:
    _, nll, weight, size = sums
    return HeldOut(
        loss=float(nll / max(weight, 1)),
        bits_per_byte=float(nll / (math.log(2) * max(size, 1))),
        tokens=int(weight),
        bytes=int(size),
    )
