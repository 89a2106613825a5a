"""Attention for TPUs: JAX's splash kernel, which skips blocks that the causal mask hides and never stores scores."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jax.experimental.pallas.ops.tpu import splash_attention
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

if TYPE_CHECKING:
    from lm.kernels.attention import Columns

LANES = 128
"""Blocks are multiples of it, and so is the length of the sequence."""
LARGEST_QUERIES, LARGEST_KEYS = 1024, 2048
"""Of a tile. Smaller ones leave out more of what the mask hides; but the backward pass writes and adds up a gradient of
the queries for each tile of keys, so for it few are better. More do not fit the vector memory of every chip."""
LITTLE_MEMORY = 16 * 2**20
"""Vector memory of a core, in bytes, for which the backward pass is too large with its usual tiles: that of v4."""
NAME = "attention"
"""Under which the result, and what its backward pass needs, can be saved by a remat policy."""


def takes(q: tuple[int, ...], k: tuple[int, ...]) -> bool:
    """Whether the kernel works for these shapes."""
    return q[1] % LANES == 0 and k[1] % LANES == 0 and q[3] >= 64


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    query_segments: jax.Array,
    key_segments: jax.Array,
    window: int,
    softcap: float | None,
    columns: "Columns | None" = None,
    *,
    query_prefix: jax.Array | None = None,
    key_prefix: jax.Array | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `lm.kernels.attention.attention`. Columns stand for positions: within a segment, both grow alike.

    The kernel's mask is known when it is compiled, where prefixes end is not. So with these it runs twice, the second
    time over all scores and with prefixes as segments of their own: three times the work of the causal half.
    """
    shape = q.shape
    q, k, v = ((x.transpose(0, 2, 1, 3)) for x in (q * q.shape[3] ** -0.5, k, v))

    def run(query_segments: jax.Array, key_segments: jax.Array, *, causal: bool) -> jax.Array:
        kernel = _kernel(shape, k.shape[2], window, softcap, columns, causal, interpret)
        y = jax.vmap(kernel)(q, k, v, splash_attention.SegmentIds(query_segments, key_segments))
        return y.transpose(0, 2, 1, 3)

    y = run(query_segments, key_segments, causal=True)
    if query_prefix is None or key_prefix is None:
        return y
    both_ways = run(2 * query_segments + query_prefix, 2 * key_segments + key_prefix, causal=False)
    return jnp.where(query_prefix[:, :, None, None] == 1, both_ways, y)


def block_sizes(
    queries: int, keys: int, window: int, head_dim: int = 128, *, at_once: int = 512
) -> splash_attention.BlockSizes:
    """Tiles for these lengths: as large as fits the vector memory, but not much larger than a window, whose mask
    would leave most of each tile unused. The backward pass is one kernel for all three gradients; of a tile of keys it
    takes `at_once`."""
    limit = max(LANES * 2, _power_of_two(window)) if window else max(queries, keys)
    wide = 1 if head_dim <= LANES else 2
    block_q = _divisor(queries, min(limit, LARGEST_QUERIES // wide))
    block_kv = _divisor(keys, min(limit, LARGEST_QUERIES // wide))
    block_kv_dkv = _divisor(keys, min(limit, LARGEST_KEYS // wide))
    return splash_attention.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_kv_compute=_divisor(block_kv, 512),
        block_q_dkv=block_q,
        block_kv_dkv=block_kv_dkv,
        block_kv_dkv_compute=_divisor(block_kv_dkv, at_once),
        use_fused_bwd_kernel=True,
    )


def _kernel(
    q: tuple[int, ...],
    keys: int,
    window: int,
    softcap: float | None,
    columns: "Columns | None",
    causal: bool,
    interpret: bool,
) -> Any:
    """The kernel for the queries of this device, [B, S, H, d]."""
    _, queries, heads, head_dim = q
    parts = 1 if columns is None else columns.parts
    shape = (keys, keys)
    mask: Any
    if window:
        mask = masks.LocalMask(shape, (window - 1, 0 if causal else window - 1), 0, parts)
    elif causal:
        mask = masks.CausalMask(shape, 0, parts)
    else:  # the same for all queries, whatever their columns
        parts, columns, mask = 1, None, masks.FullMask((queries, keys))
    if columns is not None:
        mask.q_sequence = columns.order
    kernel = splash_attention.make_splash_mha(
        masks.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=parts,
        block_sizes=block_sizes(queries, keys, window, head_dim, at_once=256 if _has_little_memory() else 512),
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=NAME,
        interpret=interpret,
    )
    return kernel if columns is None else _own_part(kernel, columns)


def _has_little_memory() -> bool:
    try:
        return bool(pltpu.get_tpu_info().vmem_capacity_bytes <= LITTLE_MEMORY)
    except ValueError:  # of no TPU: it is interpreted, or compiled for a single device that is not here
        return True


def _own_part(kernel: Any, columns: "Columns") -> Any:
    """What the kernel knows of the mask, for this device's queries: they are one axis of all its tables."""
    index = lax.axis_index(columns.axes)

    def take(x: jax.Array | None, axis: int) -> jax.Array | None:
        return (
            None if x is None else lax.dynamic_slice_in_dim(x, index * (n := x.shape[axis] // columns.parts), n, axis)
        )

    def own(info: Any) -> Any:
        if info is None:
            return None
        return info._replace(
            data_next=take(info.data_next, 1),
            mask_next=take(info.mask_next, 1),
            block_mask=take(info.block_mask, 1),
            q_sequence=take(info.q_sequence, 0),
        )

    infos, settings = kernel.tree_flatten()
    return type(kernel).tree_unflatten(settings, tuple(map(own, infos)))


def _divisor(length: int, largest: int) -> int:
    """The largest multiple of LANES that divides the length and is at most `largest`."""
    return max(size for size in range(LANES, min(length, largest) + 1, LANES) if length % size == 0)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
