"""The TPU's attention kernel, interpreted on the CPU, against the reference: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lm.kernels.attention import splash
from lm.kernels.attention.reference import reference_attention
from lm.parallel.layout import Layout

BATCH, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 64


def example(length: int) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (BATCH, length, HEADS, HEAD_DIM))
    k, v = (jax.random.normal(key, (BATCH, length, KV_HEADS, HEAD_DIM)) for key in keys[1:])
    begins = np.random.default_rng(0).random((BATCH, length)) < 0.02
    begins[:, 0] = True
    segments = np.cumsum(begins, axis=1, dtype=np.int32)
    column = np.arange(length, dtype=np.int32)
    positions = column - np.maximum.accumulate(np.where(begins, column, 0), axis=1)
    return q, k, v, jnp.asarray(segments), jnp.asarray(positions.astype(np.int32))


def prefix_of(segments: jax.Array, positions: jax.Array) -> jax.Array:
    """Every second segment begins with one, of a length that differs."""
    return jnp.where((segments % 2 == 1) & (positions < 5 + 11 * segments), 1, 0).astype(jnp.int32)


def wanted(
    length: int, window: int, softcap: float | None, *, prefixes: bool = False
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    q, k, v, segments, positions = example(length)
    prefix = prefix_of(segments, positions) if prefixes else None

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = reference_attention(
            q, k, v, query_segments=segments, query_positions=positions, key_segments=segments,
            key_positions=positions, window=window, softcap=softcap, query_prefix=prefix, key_prefix=prefix,
        )  # fmt: skip
        return jnp.sum(jnp.sin(y)), y

    gradients, y = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    return y, gradients


def assert_close(found: jax.Array, expected: jax.Array) -> None:
    np.testing.assert_allclose(found, expected, atol=2e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("prefixes", [False, True])
@pytest.mark.parametrize(("length", "window", "softcap"), [(256, 0, None), (384, 0, 5.0), (512, 100, None)])
def test_values_and_gradients_are_those_of_the_reference(
    length: int, window: int, softcap: float | None, prefixes: bool
) -> None:
    q, k, v, segments, positions = example(length)
    prefix = prefix_of(segments, positions) if prefixes else None
    given = {"query_prefix": prefix, "key_prefix": prefix, "interpret": True}

    def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = splash.attention(q, k, v, segments, segments, window, softcap, **given)
        return jnp.sum(jnp.sin(y)), y

    gradients, y = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
    expected, expected_gradients = wanted(length, window, softcap, prefixes=prefixes)
    assert_close(y, expected)
    for found, other in zip(gradients, expected_gradients, strict=True):
        assert_close(found, other)


@pytest.mark.parametrize(
    ("parts", "window", "prefixes"), [(2, 0, False), (2, 200, False), (2, 0, True), (2, 200, True)]
)
def test_queries_that_devices_share(parts: int, window: int, prefixes: bool) -> None:
    """Each device has two chunks of the queries, from the front and the back, and all keys."""
    length = 512
    q, k, v, segments, positions = example(length)
    prefix = prefix_of(segments, positions) if prefixes else None
    mesh = jax.make_mesh((parts,), ("context",), devices=jax.devices()[:parts])
    layout = Layout(axes=(("sequence", ("context",)),), sizes=(("context", parts),))

    def on_one(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> tuple[jax.Array, ...]:
        columns = layout.columns(length)

        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
            own = layout.sequence(q), layout.sequence(segments)
            given = {"query_prefix": layout.sequence(prefix), "key_prefix": prefix} if prefix is not None else {}
            y = splash.attention(own[0], k, v, own[1], segments, window, None, columns, interpret=True, **given)
            return jnp.sum(jnp.sin(y)), layout.all_columns(y)

        gradients, y = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return y, *(jax.lax.psum(gradient, "context") for gradient in gradients)

    everywhere = jax.shard_map(on_one, mesh=mesh, in_specs=(P(),) * 4, out_specs=(P(),) * 4, check_vma=False)
    y, *gradients = jax.jit(everywhere)(q, k, v, segments)
    expected, expected_gradients = wanted(length, window, None, prefixes=prefixes)
    assert_close(y, expected)
    for found, other in zip(gradients, expected_gradients, strict=True):
        assert_close(found, other)


def test_tiles_divide_the_sequence_and_are_not_much_larger_than_a_window() -> None:
    for queries, keys, window in [
        (8192, 8192, 0),
        (384, 384, 0),
        (640, 2560, 0),
        (4096, 8192, 1024),
        (4096, 4096, 100),
    ]:
        sizes = splash.block_sizes(queries, keys, window)
        assert queries % sizes.block_q == 0
        assert keys % sizes.block_kv == 0
        assert sizes.block_kv % sizes.block_kv_compute == 0
        assert keys % sizes.block_kv_dkv == 0
        assert not window or sizes.block_kv <= max(256, 2 * window)
    assert splash.block_sizes(8192, 8192, 0).block_kv_dkv == splash.LARGEST_KEYS
    assert splash.block_sizes(8192, 8192, 0, head_dim=256).block_kv_dkv == splash.LARGEST_KEYS // 2


def test_shapes_that_the_kernel_does_not_take() -> None:
    assert splash.takes((2, 256, 4, 64), (2, 512, 2, 64))
    assert not splash.takes((2, 200, 4, 64), (2, 200, 2, 64))
    assert not splash.takes((2, 256, 4, 32), (2, 256, 2, 32))
