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
    batch, length, heads, head_dim = q.shape
    kv_heads = k.shape[2]
    grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, head_dim)
    scores = jnp.einsum("bskgd,btkd->bkgst", grouped, k, preferred_element_type=jnp.float32) * head_dim**-0.5
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    visible = distance >= 0
    if query_prefix is not None and key_prefix is not None:
        visible |= (query_prefix[:, :, None] == 1) & (key_prefix[:, None, :] == 1)
    visible &= query_segments[:, :, None] == key_segments[:, None, :]
    if window:
        visible &= jnp.abs(distance) < window
    scores = jnp.where(visible[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgst,btkd->bskgd", weights, v).reshape(q.shape)
