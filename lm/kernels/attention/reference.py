"""Attention as it is defined: all scores at once. The oracle for every faster backend."""

import jax
import jax.numpy as jnp


def reference_attention(
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
    query_prefix: jax.Array | None = None,
    key_prefix: jax.Array | None = None,
) -> jax.Array:
    """See `lm.kernels.attention.attention`. Scores and softmax are float32, memory is B * H * S * T."""
    visible = visible_keys(
        query_segments, query_positions, key_segments, key_positions, window, query_prefix, key_prefix
    )
    weights = jax.nn.softmax(masked_scores(q, k, visible, softcap), axis=-1).astype(v.dtype)
    grouped = weights.reshape(q.shape[0], k.shape[2], -1, *weights.shape[2:])
    return jnp.einsum("bkgst,btkd->bskgd", grouped, v).reshape(q.shape)


def visible_keys(
    query_segments: jax.Array,
    query_positions: jax.Array,
    key_segments: jax.Array,
    key_positions: jax.Array,
    window: int,
    query_prefix: jax.Array | None = None,
    key_prefix: jax.Array | None = None,
) -> jax.Array:
    """Which keys each query sees, bool [B, S, T]."""
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    visible = distance >= 0
    if query_prefix is not None and key_prefix is not None:
        visible |= (query_prefix[:, :, None] == 1) & (key_prefix[:, None, :] == 1)
    visible &= query_segments[:, :, None] == key_segments[:, None, :]
    if window:
        visible &= jnp.abs(distance) < window
    return visible


def masked_scores(q: jax.Array, k: jax.Array, visible: jax.Array, softcap: float | None) -> jax.Array:
    """float32 [B, H, S, T], what the softmax is of; the least number where a key is not seen."""
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("bskgd,btkd->bkgst", grouped, k, preferred_element_type=jnp.float32) * head_dim**-0.5
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    return scores.reshape(batch, heads, length, k.shape[1])
