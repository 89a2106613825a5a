"""Attention in plain XLA that leaves out what the causal mask hides: each block of queries meets only the keys up to
its end, and with a window only those from its reach on. Up to 7/16 of the scores are never computed. Prefixes may reach
across any block, so with these all scores are."""

import jax
import jax.numpy as jnp

SMALLEST_BLOCK = 64
MOST_BLOCKS = 8
"""More would save little and cost time to compile."""


def attention_in_blocks(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    query_segments: jax.Array,
    query_positions: jax.Array,
    key_segments: jax.Array,
    key_positions: jax.Array,
    window: int,
    softcap: float | None,
    same_tokens: bool,
    query_prefix: jax.Array | None = None,
    key_prefix: jax.Array | None = None,
) -> jax.Array:
    """See `lm.kernels.attention.attention`. Scores and softmax are float32."""
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))

    whole = [(0, length, 0, k.shape[2])]
    results = []
    for start, stop, first, last in blocks(length, window) if same_tokens and query_prefix is None else whole:
        distance = query_positions[:, start:stop, None] - key_positions[:, None, first:last]
        ahead = distance >= 0
        if query_prefix is not None and key_prefix is not None:
            ahead |= (query_prefix[:, start:stop, None] & key_prefix[:, None, first:last]) == 1
            distance = jnp.abs(distance)
        visible = (query_segments[:, start:stop, None] == key_segments[:, None, first:last]) & ahead
        if window:
            visible &= distance < window
        keys, values = k[:, :, first:last], v[:, :, first:last]
        # The heads of a group and their queries are one axis: a batch of plain matrix products, which XLA does best.
        rows = q[:, :, start:stop].reshape(batch, kv_heads, -1, head_dim)
        scores = jnp.einsum("bkrd,bktd->bkrt", rows, keys, preferred_element_type=jnp.float32)
        scores = scores * head_dim**-0.5
        if softcap is not None:
            scores = softcap * jnp.tanh(scores / softcap)
        by_head = scores.reshape(batch, heads, stop - start, last - first)
        by_head = jnp.where(visible[:, None], by_head, jnp.finfo(jnp.float32).min)
        weights = _softmax(by_head).reshape(scores.shape).astype(v.dtype)
        out = jnp.einsum("bkrt,bktd->bkrd", weights, values)
        results.append(out.reshape(batch, heads, stop - start, head_dim))
    out = results[0] if len(results) == 1 else jnp.concatenate(results, axis=2)
    return out.transpose(0, 2, 1, 3)


def blocks(length: int, window: int) -> list[tuple[int, int, int, int]]:
    """Ranges of queries, each with the keys that it is computed against, of a sequence that looks at itself."""
    count = max(1, min(MOST_BLOCKS, length // SMALLEST_BLOCK))
    size = -(-length // count)
    return [
        (start, min(start + size, length), max(0, start - window + 1) if window else 0, min(start + size, length))
        for start in range(0, length, size)
    ]


@jax.custom_vjp
def _softmax(scores: jax.Array) -> jax.Array:
    """Over the last axis; the gradient needs only the result, and autodiff would keep more."""
    return jax.nn.softmax(scores, axis=-1)


def _softmax_forward(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    weights = _softmax(scores)
    return weights, weights


def _softmax_backward(weights: jax.Array, d: jax.Array) -> tuple[jax.Array]:
    return (weights * (d - jnp.sum(weights * d, axis=-1, keepdims=True)),)


_softmax.defvjp(_softmax_forward, _softmax_backward)
