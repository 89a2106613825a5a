"""Model FLOPs per token of training, counted three ways, and the peak rates of chips.

A product of [m, k] and [k, n] counts 2 m k n; the backward pass costs twice the forward pass; recomputation
(remat) never counts. MFU is always the causal count over the peak for dense bfloat16.
"""

import math
from typing import NamedTuple

import jax

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


_PEAK_TFLOPS = {
    # jax device_kind: dense bfloat16 TFLOP/s of one jax device, from the makers' data sheets.
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
    "TPU7x": 1153.5,  # two devices to a chip of 2307
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA H100 80GB HBM3": 989.0,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H200": 989.0,
    "NVIDIA B200": 2250.0,
}


def peak_flops(device_kind: str) -> float | None:
    """Peak dense bfloat16 FLOP/s of a jax device of this kind; None where it is not known (CPUs)."""
    tflops = _PEAK_TFLOPS.get(device_kind)
    return None if tflops is None else tflops * 1e12
