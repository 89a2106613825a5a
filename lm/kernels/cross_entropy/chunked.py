"""Cross-entropy over chunks of the sequence: at most [B, chunk, V] logits exist at a time.

The loss is a sum, so its gradient with respect to the logits is known as soon as they are, up to the factor
that comes in the backward pass. The forward pass of a differentiated call therefore computes the gradients
too, while the chunk's logits are at hand, and the backward pass only scales them: three products of the size
of the output projection in place of the four that recomputing the logits needs.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

SMALLEST = 128
"""Positions of the sequence per chunk."""


class VocabularyParts(NamedTuple):
    """What a device holds of the output weights [V, D] when several share them, inside of a `jax.shard_map`."""

    gather: Callable[[jax.Array], jax.Array]
    """From what it stores to what it uses: its part of the rows, all of D, in the dtype of the hidden states."""
    scatter: Callable[[jax.Array], jax.Array]
    """From the float32 gradient of what it uses to that of what it stores."""
    over: tuple[str, ...] = ()
    """The mesh axes over which the rows are split, each part as long, in the order of the ids."""


WHOLE = VocabularyParts(lambda x: x, lambda x: x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def chunked_cross_entropy(
    hidden: jax.Array,
    output: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    z_loss: float,
    softcap: float | None,
    logits_at_once: int,
    parts: VocabularyParts,
) -> tuple[jax.Array, jax.Array]:
    """See `lm.kernels.cross_entropy.cross_entropy`."""
    weights = parts.gather(output).astype(hidden.dtype)

    def body(sums: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        total, nll, _ = _chunk_loss(chunk, weights, z_loss, softcap, parts.over)
        return sums + _weighted(total, nll, chunk[2]), None

    chunks = _chunks(hidden, targets, mask, logits_at_once // weights.shape[0])
    sums, _ = lax.scan(body, jnp.zeros(2, jnp.float32), chunks)
    return sums[0], sums[1]


def chunked_likelihoods(
    hidden: jax.Array,
    output: jax.Array,
    targets: jax.Array,
    softcap: float | None,
    logits_at_once: int,
    parts: VocabularyParts,
) -> jax.Array:
    """See `lm.kernels.cross_entropy.likelihoods`."""
    weights = parts.gather(output).astype(hidden.dtype)

    def body(carry: None, chunk: tuple[jax.Array, ...]) -> tuple[None, jax.Array]:
        return carry, _chunk_loss(chunk, weights, 0.0, softcap, parts.over)[1]

    chunks = _chunks(hidden, targets, jnp.ones(targets.shape, jnp.float32), logits_at_once // weights.shape[0])
    _, nll = lax.scan(body, None, chunks)
    return jnp.moveaxis(nll, 0, 1).reshape(targets.shape[0], -1)[:, : targets.shape[1]]


def _forward(
    hidden: jax.Array,
    output: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    z_loss: float,
    softcap: float | None,
    logits_at_once: int,
    parts: VocabularyParts,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    weights = parts.gather(output).astype(hidden.dtype)

    def body(carry: tuple[jax.Array, jax.Array], chunk: tuple[jax.Array, ...]) -> tuple[tuple, jax.Array]:
        sums, d_output = carry
        total, nll, d_logits = _chunk_loss(chunk, weights, z_loss, softcap, parts.over)
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = d_logits @ weights
        d_output += jnp.einsum("bcv,bcd->vd", d_logits, chunk[0], preferred_element_type=jnp.float32)
        return (sums + _weighted(total, nll, chunk[2]), d_output), d_hidden

    start = (jnp.zeros(2, jnp.float32), jnp.zeros(weights.shape, jnp.float32))
    chunks = _chunks(hidden, targets, mask, logits_at_once // weights.shape[0])
    (sums, d_output), d_chunks = lax.scan(body, start, chunks)
    d_hidden = jnp.moveaxis(d_chunks, 0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])
    return (sums[0], sums[1]), (d_hidden[:, : hidden.shape[1]], parts.scatter(d_output).astype(output.dtype))


def _backward(
    z_loss: float,
    softcap: float | None,
    logits_at_once: int,
    parts: VocabularyParts,
    gradients: tuple[jax.Array, jax.Array],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, None, None]:
    d_hidden, d_output = gradients
    # The likelihood, the second result, is only reported. The sum is that of all parts, and so is its gradient.
    factor = cotangents[0]
    if parts.over:
        factor = lax.psum(factor, parts.over)
    return d_hidden * factor.astype(d_hidden.dtype), d_output * factor.astype(d_output.dtype), None, None


chunked_cross_entropy.defvjp(_forward, _backward)


def _chunk_loss(
    chunk: tuple[jax.Array, ...], weights: jax.Array, z_loss: float, softcap: float | None, over: tuple[str, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of the tokens of a chunk, loss and likelihood [B, C], and d loss / d logits before the cap [B, C, V], float32."""
    hidden, targets, mask = chunk
    logits = jnp.einsum("bcd,vd->bcv", hidden, weights, preferred_element_type=jnp.float32)
    slope = None
    if softcap is not None:
        squashed = jnp.tanh(logits / softcap)
        logits, slope = softcap * squashed, 1 - jnp.square(squashed)
    top = jnp.max(logits, axis=-1, keepdims=True)
    if over:
        top = lax.pmax(top, over)
        targets = targets - lax.axis_index(over) * weights.shape[0]
    exponentials = jnp.exp(logits - top)
    is_target = lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[..., None]
    sums = jnp.sum(exponentials, axis=-1), jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    normalizer, of_target = lax.psum(sums, over) if over else sums
    log_normalizer = top[..., 0] + jnp.log(normalizer)
    nll = log_normalizer - of_target
    total = nll + z_loss * jnp.square(log_normalizer)
    factor = (mask * (1 + 2 * z_loss * log_normalizer) / normalizer)[..., None]
    d_logits = exponentials * factor - jnp.where(is_target, mask[..., None], 0.0)
    if slope is not None:
        d_logits *= slope
    return total, nll, d_logits


def _weighted(total: jax.Array, nll: jax.Array, mask: jax.Array) -> jax.Array:
    return jnp.stack([jnp.sum(total * mask), jnp.sum(nll * mask)])


def _chunks(hidden: jax.Array, targets: jax.Array, mask: jax.Array, tokens: int) -> tuple[jax.Array, ...]:
    """Splits [B, S, ...] into [chunks, B, C, ...] of about so many tokens, at least SMALLEST positions.

    What is added to fill the last chunk has weight 0.
    """
    batch, length = targets.shape
    count = -(-length // max(tokens // batch, SMALLEST))
    size = -(-length // count)

    def split(x: jax.Array) -> jax.Array:
        padding = [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, padding) if count * size > length else x
        return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), 1, 0)

    return split(hidden), split(targets), split(mask)
