"""The loss contract: every term is a sum with its weight, divided once, by whoever has added up all of them."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lm.kernels.attention import Places
from lm.kernels.cross_entropy import VocabularyParts, cross_entropy, likelihoods
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
    found = _read(model, batch, dtype, layout, key, remat, unroll)
    total, nll = cross_entropy(found.hidden, found.output, found.targets, found.mask, z_loss=z_loss, **found.how)
    parts = layout.parts("vocab")
    size = jnp.sum(found.bytes.astype(jnp.float32)) / layout.parts("residual")
    return LossSums(total / parts, nll / parts, jnp.sum(found.weight), size)


def row_losses(model: Transformer, batch: Batch, *, dtype: jnp.dtype, layout: Layout = LOCAL) -> LossSums:
    """The same by row [b], without z-loss and gradient: a device's share of rows `layout.loss_rows`."""
    found = _read(model, batch, dtype, layout)
    nll = likelihoods(found.hidden, found.output, found.targets, **found.how)
    nll = jnp.sum(nll * found.mask, axis=1) / layout.parts("vocab")
    size = found.bytes.astype(jnp.float32) / layout.parts("residual")
    return LossSums(nll, nll, jnp.sum(found.weight, axis=1), size)


class _Read(NamedTuple):
    """Of the rows, and with the tokens, that this device computes the loss of."""

    hidden: jax.Array
    output: jax.Array
    targets: jax.Array
    mask: jax.Array
    weight: jax.Array
    """`mask`, of the residual stream: tokens that no other device counts too."""
    bytes: jax.Array
    how: dict[str, Any]


def _read(
    model: Transformer,
    batch: Batch,
    dtype: jnp.dtype,
    layout: Layout,
    key: jax.Array | None = None,
    remat: Remat = NO_REMAT,
    unroll: int = 1,
) -> _Read:
    places = Places(batch["segments"], batch["positions"], batch.get("prefix"))
    hidden, _ = model(batch["tokens"], places, dtype=dtype, layout=layout, key=key, remat=remat, unroll=unroll)
    rows = {name: layout.loss_rows(batch[name]) for name in ("targets", "loss_mask", "bytes")}
    targets, mask = (layout.sequence(rows[name]) for name in ("targets", "loss_mask"))
    weight = layout.residual(mask)
    if layout.parts("vocab") > 1:
        hidden = layout.enter(hidden)
    else:
        targets, mask = layout.residual(targets), weight
    output, axes = model.output_weights
    how = {
        "softcap": model.config.output_softcap,
        "logits_at_once": LOGITS_ON_CPU if layout.platform == "cpu" else LOGITS_ON_ACCELERATORS,
        "parts": VocabularyParts(
            gather=functools.partial(layout.whole, axes=axes, dtype=hidden.dtype),
            scatter=functools.partial(layout.scatter, axes=axes),
            over=layout.over("vocab"),
        ),
    }
    return _Read(hidden, output, targets, mask, weight, rows["bytes"], how)
