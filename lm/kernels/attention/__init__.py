"""Causal attention over packed documents, behind one call."""

from typing import NamedTuple

import jax

from lm.kernels.attention.blocks import attention_in_blocks


class Places(NamedTuple):
    """Where tokens stand: int32 [B, S] each. A token sees those of its own segment at positions up to its own."""

    segments: jax.Array
    positions: jax.Array


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    queries: Places,
    keys: Places,
    window: int = 0,
    softcap: float | None = None,
) -> jax.Array:
    """Attention of q [B, S, H, d] over k, v [B, T, K, d], where K divides H. Returns [B, S, H, d] in q's dtype.

    Scores are scaled by 1 / sqrt(d). `window`: how many positions back a token sees, itself included; 0 is all.
    `softcap`: scores become softcap * tanh(score / softcap) before the mask. When `queries` and `keys` are one
    object (a sequence that looks at itself), positions must grow along the row within each segment.

    The obvious form of it is `lm.kernels.attention.reference`.
    """
    return attention_in_blocks(
        q,
        k,
        v,
        query_segments=queries.segments,
        query_positions=queries.positions,
        key_segments=keys.segments,
        key_positions=keys.positions,
        window=window,
        softcap=softcap,
        same_tokens=queries is keys,
    )
