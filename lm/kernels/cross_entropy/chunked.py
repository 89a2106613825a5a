"""Cross-entropy over chunks of the sequence: at most [B, chunk, V] logits exist at a time.

The loss is a sum, so its gradient with respect to the logits is known as soon as they are, up to the factor
that comes in the backward pass. The forward pass of a differentiated call therefore computes the gradients
too, while the chunk's logits are at hand, and the backward pass only scales them: three products of the size
of the output projection in place of the four that recomputing the logits needs.
"""

import functools

import jax
import jax.numpy as jnp

CHUNK = 128
"""Positions of the sequence per chunk."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def chunked_cross_entropy(
    hidden: jax.Array,
    output: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    z_loss: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """See `lm.kernels.cross_entropy.cross_entropy`."""
    weights = output.astype(hidden.dtype)

    def body(sums: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        total, nll, _ = _chunk_loss(chunk, weights, z_loss, softcap)
        return sums + jnp.stack([total, nll]), None

    sums, _ = jax.lax.scan(body, jnp.zeros(2, jnp.float32), _chunks(hidden, targets, mask))
    return sums[0], sums[1]


def _forward(
    hidden: jax.Array,
    output: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    z_loss: float,
    softcap: float | None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    weights = output.astype(hidden.dtype)

    def body(carry: tuple[jax.Array, jax.Array], chunk: tuple[jax.Array, ...]) -> tuple[tuple, jax.Array]:
        sums, d_output = carry
        total, nll, d_logits = _chunk_loss(chunk, weights, z_loss, softcap)
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden = d_logits @ weights
        d_output += jnp.einsum("bcv,bcd->vd", d_logits, chunk[0], preferred_element_type=jnp.float32)
        return (sums + jnp.stack([total, nll]), d_output), d_hidden

    start = (jnp.zeros(2, jnp.float32), jnp.zeros(output.shape, jnp.float32))
    (sums, d_output), d_chunks = jax.lax.scan(body, start, _chunks(hidden, targets, mask))
    d_hidden = jnp.moveaxis(d_chunks, 0, 1).reshape(hidden.shape[0], -1, hidden.shape[2])
    return (sums[0], sums[1]), (d_hidden[:, : hidden.shape[1]], d_output.astype(output.dtype))


def _backward(
    z_loss: float,
    softcap: float | None,
    gradients: tuple[jax.Array, jax.Array],
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, jax.Array, None, None]:
    d_hidden, d_output = gradients
    factor = cotangents[0]  # the likelihood, the second result, is only reported
    return d_hidden * factor.astype(d_hidden.dtype), d_output * factor.astype(d_output.dtype), None, None


chunked_cross_entropy.defvjp(_forward, _backward)


def _chunk_loss(
    chunk: tuple[jax.Array, ...], weights: jax.Array, z_loss: float, softcap: float | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sums of the loss and the likelihood of a chunk, and d loss / d logits before the cap [B, C, V] float32."""
    hidden, targets, mask = chunk
    logits = jnp.einsum("bcd,vd->bcv", hidden, weights, preferred_element_type=jnp.float32)
    slope = None
    if softcap is not None:
        squashed = jnp.tanh(logits / softcap)
        logits, slope = softcap * squashed, 1 - jnp.square(squashed)
    top = jnp.max(logits, axis=-1, keepdims=True)
    exponentials = jnp.exp(logits - top)
    normalizer = jnp.sum(exponentials, axis=-1, keepdims=True)
    log_normalizer = (top + jnp.log(normalizer))[..., 0]
    is_target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[..., None]
    nll = log_normalizer - jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
    total = nll + z_loss * jnp.square(log_normalizer)
    factor = (mask * (1 + 2 * z_loss * log_normalizer))[..., None] / normalizer
    d_logits = exponentials * factor - jnp.where(is_target, mask[..., None], 0.0)
    if slope is not None:
        d_logits *= slope
    return jnp.sum(total * mask), jnp.sum(nll * mask), d_logits


def _chunks(hidden: jax.Array, targets: jax.Array, mask: jax.Array) -> tuple[jax.Array, ...]:
    """Splits [B, S, ...] into [chunks, B, C, ...]; what is added to fill the last chunk has weight 0."""
    batch, length = targets.shape
    count = -(-length // CHUNK)
    size = -(-length // count)

    def split(x: jax.Array) -> jax.Array:
        padding = [(0, 0), (0, count * size - length)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, padding) if count * size > length else x
        return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), 1, 0)

    return split(hidden), split(targets), split(mask)
