"""The loss contract: every term is a sum with its weight, divided once, by whoever has added up all of them."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm.kernels.attention import Places
from lm.kernels.cross_entropy import VocabularyParts, cross_entropy
from lm.model.remat import NO_REMAT, Remat
from lm.model.transformer import Transformer
from lm.parallel.layout import LOCAL, Layout

LOGITS_ON_CPU = 2**21
LOGITS_ON_ACCELERATORS = 2**27
"""How many are computed at once: half a GiB. For each such chunk the gradient of the output weights is read and
written, which on an accelerator should cost less than the products."""

Batch = dict[str, jax.Array]
"""tokens, targets, segments, positions int32 [B, S]; loss_mask float32 [B, S]; bytes int32 [B], the bytes of raw
text that the targets of each row with weight 1 stand for; prefix int32 [B, S], 1 in a prefix, where there are any."""


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
    layout: Layout = LOCAL,
    z_loss: float = 0.0,
    key: jax.Array | None = None,
    remat: Remat = NO_REMAT,
    unroll: int = 1,
) -> LossSums:
    """Cross-entropy of the targets given the tokens before them in the same document.

    On a mesh, rows of the batch are this device's, with whole sequences; the result is its share of the sums.
    """
    places = Places(batch["segments"], batch["positions"], batch.get("prefix"))
    hidden, _ = model(batch["tokens"], places, dtype=dtype, layout=layout, key=key, remat=remat, unroll=unroll)
    rows = {name: layout.loss_rows(batch[name]) for name in ("targets", "loss_mask", "bytes")}
    targets, mask = (layout.sequence(rows[name]) for name in ("targets", "loss_mask"))
    weight = jnp.sum(layout.residual(mask))
    vocabulary_parts = layout.parts("vocab")
    if vocabulary_parts > 1:
        hidden = layout.enter(hidden)
    else:
        targets, mask = layout.residual(targets), layout.residual(mask)
    weights, axes = model.output_weights
    total, nll = cross_entropy(
        hidden,
        weights,
        targets,
        mask,
        z_loss=z_loss,
        softcap=model.config.output_softcap,
        logits_at_once=LOGITS_ON_CPU if layout.platform == "cpu" else LOGITS_ON_ACCELERATORS,
        parts=VocabularyParts(
            gather=functools.partial(layout.whole, axes=axes, dtype=hidden.dtype),
            scatter=functools.partial(layout.scatter, axes=axes),
            over=layout.over("vocab"),
        ),
    )
    size = jnp.sum(rows["bytes"].astype(jnp.float32)) / layout.parts("residual")
    return LossSums(total / vocabulary_parts, nll / vocabulary_parts, weight, size)
