"""Causal attention over packed documents, behind one call."""

from typing import NamedTuple, Protocol

import jax
import numpy as np

from lm.kernels.attention.blocks import attention_in_blocks


class Places(NamedTuple):
    """Where tokens stand: int32 [B, S] each. A token sees those of its own segment at positions up to its own; one in a
    prefix, all of the prefix of its segment."""

    segments: jax.Array
    positions: jax.Array
    prefix: jax.Array | None = None
    """1 in a prefix, the beginning of a segment, else 0; None: there are none."""


class Columns(Protocol):
    """How the queries of a sequence are split over mesh axes, inside of a `jax.shard_map`."""

    @property
    def order(self) -> np.ndarray:
        """int32 [S], part after part: the columns of its queries."""

    @property
    def parts(self) -> int: ...

    @property
    def axes(self) -> tuple[str, ...]: ...


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    queries: Places,
    keys: Places,
    window: int = 0,
    softcap: float | None = None,
    platform: str = "cpu",
    columns: Columns | None = None,
) -> jax.Array:
    """Attention of q [B, S, H, d] over k, v [B, T, K, d], where K divides H. Returns [B, S, H, d] in q's dtype.

    Scores are scaled by 1 / sqrt(d). `window`: how many positions back a token sees, itself included, and as many ahead
    within a prefix; 0 is all. `softcap`: scores become softcap * tanh(score / softcap) before the mask. When `queries`
    and `keys` are one object (a sequence that looks at itself), or `columns` says which of its columns the queries are,
    positions must grow along the row within each segment.

    `platform`, "tpu" for one, decides how it is computed. The obvious form of it is `lm.kernels.attention.reference`.
    """
    itself = queries is keys or columns is not None
    if platform == "tpu" and itself:
        from lm.kernels.attention import splash  # takes a second, which others need not wait

        if splash.takes(q.shape, k.shape):
            return splash.attention(
                q,
                k,
                v,
                queries.segments,
                keys.segments,
                window,
                softcap,
                columns,
                query_prefix=queries.prefix,
                key_prefix=keys.prefix,
            )
    return attention_in_blocks(
        q,
        k,
        v,
        query_segments=queries.segments,
        query_positions=queries.positions,
        key_segments=keys.segments,
        key_positions=keys.positions,
        query_prefix=queries.prefix,
        key_prefix=keys.prefix,
        window=window,
        softcap=softcap,
        same_tokens=queries is keys,
    )
