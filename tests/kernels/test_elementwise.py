"""GELU and normalisation against autodiff of their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.kernels.gelu import gelu
from lm.kernels.normalize import normalize, reference_normalize


def test_gelu_and_its_gradient():
    x = jnp.linspace(-6, 6, 101)
    exact = lambda x: jax.nn.gelu(x, approximate=False)  # noqa: E731
    np.testing.assert_allclose(gelu(x), exact(x), atol=2e-6)
    fast, slow = (jax.vmap(jax.grad(f))(x) for f in (gelu, exact))
    np.testing.assert_allclose(fast, slow, atol=2e-6)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("scaled", [True, False])
def test_normalize_and_its_gradients(center, scaled):
    rng = np.random.default_rng(0)
    x, weights = jnp.array(rng.normal(1.0, 2.0, (2, 3, 5, 16)), jnp.float32)
    scale = jnp.array(rng.normal(size=16), jnp.float32) if scaled else None

    def run(function):
        def loss(x, scale):
            return jnp.sum(function(x, scale, center=center, epsilon=1e-2) * weights)

        return jax.value_and_grad(loss, argnums=(0, 1) if scaled else 0)(x, scale)

    fast, slow = run(normalize), run(reference_normalize)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), fast, slow)
