"""The loss contract: every term is a sum with its weight, divided once, by whoever has added up all of them."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.kernels.attention import Places
from lm.kernels.cross_entropy import cross_entropy
from lm.model.transformer import Remat, Transformer

Batch = dict[str, jax.Array]
"""tokens, targets, segments, positions int32 [B, S]; loss_mask float32 [B, S]; bytes int32 [B], the bytes of raw
text that the targets of each row with weight 1 stand for."""


class LossSums(NamedTuple):
    """Sums over the tokens of a batch, float32: add them up over microbatches and devices, then divide."""

    total: jax.Array
    """What is minimised, z-loss included, in nats."""
    nll: jax.Array
    """Negative log-likelihood alone, in nats."""
    weight: jax.Array
    """Targets that count."""
    bytes: jax.Array
    """Bytes of text behind them."""


def next_token_loss(
    model: Transformer,
    batch: Batch,
    *,
    dtype: jnp.dtype,
    z_loss: float = 0.0,
    key: jax.Array | None = None,
    remat: Remat = "none",
    unroll: int = 1,
) -> LossSums:
    """Cross-entropy of the targets given the tokens before them in the same document."""
    places = Places(batch["segments"], batch["positions"])
    hidden, _ = model(batch["tokens"], places, dtype=dtype, key=key, remat=remat, unroll=unroll)
    total, nll = cross_entropy(
        hidden,
        model.output_weights,
        batch["targets"],
        batch["loss_mask"],
        z_loss=z_loss,
        softcap=model.config.output_softcap,
    )
    return LossSums(total, nll, jnp.sum(batch["loss_mask"]), jnp.sum(batch["bytes"].astype(jnp.float32)))
