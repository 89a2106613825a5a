"""The attention call against a loop over single tokens in numpy, on packed segments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.kernels.attention import Places, attention, blocks
from lm.kernels.attention.reference import reference_attention


def by_loops(q, k, v, segments, positions, window, softcap, prefix=None):
    prefix = np.zeros_like(segments) if prefix is None else prefix
    batch, length, heads, width = q.shape
    group = heads // k.shape[2]
    out = np.zeros_like(q)
    for b in range(batch):
        for h in range(heads):
            for i in range(length):
                seen = [
                    j
                    for j in range(length)
                    if segments[b, j] == segments[b, i]
                    and (positions[b, j] <= positions[b, i] or (prefix[b, i] and prefix[b, j]))
                    and (window == 0 or abs(positions[b, i] - positions[b, j]) < window)
                ]
                scores = np.array([q[b, i, h] @ k[b, j, h // group] for j in seen]) / np.sqrt(width)
                if softcap is not None:
                    scores = softcap * np.tanh(scores / softcap)
                weights = np.exp(scores - scores.max())
                weights /= weights.sum()
                out[b, i, h] = sum(w * v[b, j, h // group] for w, j in zip(weights, seen, strict=True))
    return out


def packed(rng, batch, length):
    """Rows cut into documents at random places; the end of some rows is padding."""
    segments, positions = np.zeros((batch, length), np.int32), np.zeros((batch, length), np.int32)
    for b in range(batch):
        cuts = np.sort(rng.choice(np.arange(1, length), size=2, replace=False))
        segments[b] = 1 + (np.arange(length)[:, None] >= cuts).sum(1)
        for s in range(1, 4):
            inside = segments[b] == s
            positions[b, inside] = np.arange(inside.sum())
    segments[-1, -3:] = 0
    positions[-1, -3:] = 0
    return segments, positions


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("window", "softcap"), [(0, None), (3, None), (0, 2.0), (1, 5.0)])
def test_attention_is_what_its_definition_says(kv_heads, window, softcap):
    rng = np.random.default_rng(kv_heads + window)
    q = rng.normal(size=(2, 13, 4, 6))
    k, v = rng.normal(size=(2, 2, 13, kv_heads, 6))
    segments, positions = packed(rng, 2, 13)
    places = Places(jnp.array(segments), jnp.array(positions))
    as_float = [jnp.array(x, jnp.float32) for x in (q, k, v)]
    found = attention(*as_float, queries=places, keys=places, window=window, softcap=softcap)
    np.testing.assert_allclose(found, by_loops(q, k, v, segments, positions, window, softcap), atol=2e-5)


def prefixes(rng, segments):
    """The first tokens of some segments."""
    prefix = np.zeros_like(segments)
    for b, s in np.ndindex(len(segments), 3):
        columns = np.flatnonzero(segments[b] == s + 1)
        prefix[b, columns[: rng.integers(0, len(columns) + 1)]] = 1
    return prefix


@pytest.mark.parametrize(("window", "softcap"), [(0, None), (3, None), (0, 2.0), (1, None)])
def test_tokens_of_a_prefix_see_each_other(window, softcap):
    rng = np.random.default_rng(1)
    q = rng.normal(size=(4, 13, 4, 6))
    k, v = rng.normal(size=(2, 4, 13, 2, 6))
    segments, positions = packed(rng, 4, 13)
    prefix = prefixes(rng, segments)
    assert prefix.any(axis=1).all()
    places = Places(*map(jnp.array, (segments, positions, prefix)))
    as_float = [jnp.array(x, jnp.float32) for x in (q, k, v)]
    found = attention(*as_float, queries=places, keys=places, window=window, softcap=softcap)
    wanted = by_loops(q, k, v, segments, positions, window, softcap, prefix)
    np.testing.assert_allclose(found, wanted, atol=2e-5)
    reference = reference_attention(
        *as_float, query_segments=places.segments, query_positions=places.positions, key_segments=places.segments,
        key_positions=places.positions, window=window, softcap=softcap, query_prefix=places.prefix,
        key_prefix=places.prefix,
    )  # fmt: skip
    np.testing.assert_allclose(reference, wanted, atol=2e-5)


def test_no_gradient_crosses_a_document():
    rng = np.random.default_rng(0)
    x = jnp.array(rng.normal(size=(1, 8, 2, 4)), jnp.float32)
    places = Places(jnp.array([[1, 1, 1, 2, 2, 2, 2, 2]]), jnp.array([[0, 1, 2, 0, 1, 2, 3, 4]]))

    def second_document(k):
        return attention(x, k, k, queries=places, keys=places)[:, 3:].sum()

    gradient = jax.grad(second_document)(x)
    assert np.all(np.asarray(gradient[:, :3]) == 0)
    assert np.all(np.abs(np.asarray(gradient[:, 3:])).sum(axis=(0, 2, 3)) > 0)


@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize(("window", "softcap"), [(0, None), (9, None), (9, 2.0), (3, None)])
@pytest.mark.parametrize("with_prefixes", [False, True])
def test_blocks_of_queries_are_as_all_at_once(monkeypatch, kv_heads, window, softcap, with_prefixes):
    """Values and gradients, with rows that no block size divides and documents across the edges of blocks."""
    monkeypatch.setattr(blocks, "SMALLEST_BLOCK", 4)
    rng = np.random.default_rng(kv_heads)
    q, weights = jnp.array(rng.normal(size=(2, 2, 27, 4, 6)), jnp.float32)
    k, v = jnp.array(rng.normal(size=(2, 2, 27, kv_heads, 6)), jnp.float32)
    segments, positions = map(jnp.array, packed(rng, 2, 27))
    prefix = jnp.array(prefixes(rng, np.asarray(segments))) if with_prefixes else None
    places = Places(segments, positions, prefix)
    real = (segments > 0)[..., None, None]  # what padding sees is of no consequence
    weights = weights * real

    def fast(q, k, v):
        return attention(q, k, v, queries=places, keys=places, window=window, softcap=softcap)

    def slow(q, k, v):
        return reference_attention(
            q, k, v, query_segments=segments, query_positions=positions, key_segments=segments,
            key_positions=positions, window=window, softcap=softcap, query_prefix=prefix, key_prefix=prefix,
        )  # fmt: skip

    def run(function):
        return jax.jit(jax.value_and_grad(lambda *a: jnp.sum(function(*a) * weights), argnums=(0, 1, 2)))(q, k, v)

    np.testing.assert_allclose(fast(q, k, v) * real, slow(q, k, v) * real, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), run(fast), run(slow))
