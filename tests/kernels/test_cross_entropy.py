"""The chunked loss against the one that holds all logits: values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.kernels.cross_entropy import chunked, cross_entropy
from lm.kernels.cross_entropy.reference import reference_cross_entropy


def example(batch=3, length=11, width=8, vocabulary=29, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (batch, length, width), dtype)
    output = jax.random.normal(keys[1], (vocabulary, width), jnp.float32)
    targets = jax.random.randint(keys[2], (batch, length), 0, vocabulary)
    mask = jax.random.uniform(keys[3], (batch, length)) * (jnp.arange(length) % 3 > 0)
    return hidden, output, targets, mask


@pytest.mark.parametrize("chunk", [1, 4, 11, 128])
@pytest.mark.parametrize(("z_loss", "softcap"), [(0.0, None), (1e-2, None), (1e-2, 3.0)])
def test_values_and_gradients_are_those_of_the_reference(monkeypatch, chunk, z_loss, softcap):
    monkeypatch.setattr(chunked, "SMALLEST", chunk)
    hidden, output, targets, mask = example()

    def run(function, **options):
        def scaled(hidden, output):  # a cotangent other than 1, as a division by the weight makes it
            total, nll = function(hidden, output, targets, mask, z_loss=z_loss, softcap=softcap, **options)
            return 0.3 * total + 7 * nll, nll  # the likelihood must not add to the gradient

        return jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True)(hidden, output)

    (fast, fast_nll), fast_gradients = run(cross_entropy, logits_at_once=1)
    (slow, slow_nll), slow_gradients = run(reference_cross_entropy)
    np.testing.assert_allclose(fast, slow, rtol=1e-5)
    np.testing.assert_allclose(fast_nll, slow_nll, rtol=1e-5)
    for f, s in zip(fast_gradients, slow_gradients, strict=True):
        np.testing.assert_allclose(f, s, rtol=1e-4, atol=1e-6)


def test_value_without_gradient_is_the_same():
    exact = reference_cross_entropy(*example(), z_loss=0.0, softcap=None)[0]
    np.testing.assert_allclose(cross_entropy(*example())[0], exact, rtol=1e-6)


def test_bfloat16_gradient_stays_close_and_sums_are_float32():
    hidden, output, targets, mask = example(dtype=jnp.bfloat16)
    loss = lambda f, **k: jax.value_and_grad(lambda h, o: f(h, o, targets, mask, **k)[0], argnums=(0, 1))  # noqa: E731
    value, gradients = loss(cross_entropy)(hidden, output)
    exact, exact_gradients = loss(reference_cross_entropy, z_loss=0.0, softcap=None)(hidden.astype(jnp.float32), output)
    assert value.dtype == jnp.float32
    assert gradients[1].dtype == jnp.float32
    np.testing.assert_allclose(value, exact, rtol=1e-2)
    np.testing.assert_allclose(gradients[1], exact_gradients[1], atol=0.05 * float(jnp.abs(exact_gradients[1]).max()))


def test_huge_logits_stay_finite():
    hidden, output, targets, mask = example()
    value, gradient = jax.value_and_grad(lambda h: cross_entropy(1e4 * h, output, targets, mask)[0])(hidden)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


def test_all_logits_are_never_held(monkeypatch):
    """In the compiled gradient, no array has the size of all float32 logits."""
    monkeypatch.setattr(chunked, "SMALLEST", 16)
    hidden, output, targets, mask = example(batch=4, length=128, width=16, vocabulary=512)
    gradient = jax.jit(jax.grad(lambda h, o: cross_entropy(h, o, targets, mask, logits_at_once=1)[0], argnums=(0, 1)))
    temporary = gradient.lower(hidden, output).compile().memory_analysis().temp_size_in_bytes
    assert temporary < 4 * 128 * 512 * 4 / 2
