"""Model FLOPs per token of training, counted three ways, and the peak rate of a device.

A product of [m, k] and [k, n] counts 2 m k n; the backward pass costs twice the forward pass; recomputation
(remat) never counts. MFU is always the causal count over the peak for dense bfloat16.
"""

import functools
import math
from typing import NamedTuple

import jax

from lm.chips import chip_of
from lm.model.config import ModelConfig
from lm.model.transformer import abstract_params


class Flops(NamedTuple):
    """FLOPs of forward and backward pass for one token."""

    parameters: float
    """6 N: products with weights alone, the output projection included, embedding look-ups not."""
    causal: float
    """The same and attention scores that the mask leaves (windows included): what MFU is measured with."""
    full: float
    """The same and attention over the whole sequence, as PaLM and many others count."""


def parameter_count(config: ModelConfig) -> int:
    """All parameters, embeddings included."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))


@functools.cache
def flops_per_token(config: ModelConfig, sequence_length: int) -> Flops:
    """Counts for sequences of one document of `sequence_length` tokens."""
    d, width = config.width, config.head_width
    projections = d * width * (2 * config.heads + 2 * config.key_value_heads)
    feed_forward = (3 if config.gated else 2) * d * config.hidden_width
    matrices = config.layers * (projections + feed_forward) + config.vocab_size * d
    # Scores and weighted values: 2 * 2 * heads * width per pair of tokens forward, three times that in all.
    per_pair = 12 * config.heads * width
    seen = sum(
        _mean_visible(config.pattern[layer % len(config.pattern)], sequence_length) for layer in range(config.layers)
    )
    return Flops(
        parameters=6.0 * matrices,
        causal=6.0 * matrices + per_pair * seen,
        full=6.0 * matrices + float(per_pair * config.layers * sequence_length),
    )


def _mean_visible(window: int, length: int) -> float:
    """Tokens that a token sees on average under the causal mask, itself counted as half for a full triangle.

    The usual count takes S / 2 for S (S + 1) / 2 pairs; a window w of them leaves w - w² / 2S.
    """
    if window == 0 or window >= length:
        return length / 2
    return window - window * window / (2 * length)


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of one jax device of this kind; None where it is not known (CPUs)."""
    chip = chip_of(device_kind)
    return None if chip is None else chip.peak_flops / chip.devices
