import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.model.config import ModelConfig
from lm.model.transformer import abstract_params
from lm.optim.config import OptimConfig
from lm.optim.optimizer import decays, optimizer, parameter_group, paths

CONFIG = OptimConfig(beta1=0.8, beta2=0.95, epsilon=1e-3, weight_decay=0.3, clip_norm=1.5)
SHAPES = {"embedding": (5, 4), "layers": {"0": {"up": (2, 4, 6), "up_bias": (2, 6)}}, "final_norm": {"scale": (4,)}}


def draw(seed: int, size: float = 1.0) -> dict:
    generator = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: np.asarray(size * generator.normal(size=shape), np.float32),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def adamw(config: OptimConfig, params: dict, gradients: list[dict], rate: float) -> list[np.ndarray]:
    """Algorithm 2 of Loshchilov & Hutter 2019 in float64, with the gradient clipped first."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(params)]
    decayed = [decays(config, path) for path in paths(params)]
    m, v = ([np.zeros_like(x) for x in leaves] for _ in range(2))
    for t, gradient in enumerate(gradients, 1):
        g = [np.asarray(x, np.float64) for x in jax.tree.leaves(gradient)]
        if config.clip_norm is not None:
            norm = math.sqrt(sum((x**2).sum() for x in g))
            g = [x * min(1.0, config.clip_norm / norm) for x in g]
        for i, x in enumerate(g):
            m[i] = config.beta1 * m[i] + (1 - config.beta1) * x
            v[i] = config.beta2 * v[i] + (1 - config.beta2) * x**2
            step = m[i] / (1 - config.beta1**t) / (np.sqrt(v[i] / (1 - config.beta2**t)) + config.epsilon)
            leaves[i] = leaves[i] - rate * (step + config.weight_decay * decayed[i] * leaves[i])
    return leaves


@pytest.mark.parametrize("clip_norm", [None, 1.5])
@pytest.mark.parametrize("decayed", ["matrices", "matrices_and_embeddings"])
def test_updates_are_those_of_the_paper(
    clip_norm: float | None, decayed: Literal["matrices", "matrices_and_embeddings"]
) -> None:
    config = dataclasses.replace(CONFIG, clip_norm=clip_norm, decayed=decayed)
    gradients = [draw(k, size) for k, size in enumerate((1.0, 0.01, 30.0, 0.1), 1)]  # above and below the norm
    transformation, params = optimizer(config), draw(0)
    state = transformation.init(params)
    for gradient in gradients:
        updates, state = transformation.update(gradient, state, params, grad_norm=optax.tree.norm(gradient))
        params = jax.tree.map(lambda p, u: p - 0.1 * u, params, updates)
    for found, expected in zip(jax.tree.leaves(params), adamw(config, draw(0), gradients, 0.1), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_the_state_is_two_float32_trees_and_a_count() -> None:
    state = optimizer(CONFIG).init(draw(0))
    counts = [leaf for leaf in jax.tree.leaves(state) if leaf.shape == ()]
    rest = [leaf for leaf in jax.tree.leaves(state) if leaf.shape != ()]
    assert [(leaf.dtype, int(leaf)) for leaf in counts] == [(jnp.int32, 0)]
    assert sorted(leaf.shape for leaf in rest) == sorted(2 * [leaf.shape for leaf in jax.tree.leaves(draw(0))])
    assert all(leaf.dtype == jnp.float32 for leaf in rest)


def test_every_parameter_of_every_kind_of_model_has_its_group() -> None:
    config = ModelConfig(
        vocab_size=16,
        layers=3,
        width=8,
        heads=2,
        windows=(4, 0),
        qk_norm="per_head",
        norm="layer",
        norm_parameters="scale_and_bias",
        norm_placement="sandwich",
        bias="all",
        positions="learned",
        embeddings="untied",
    )
    tree = abstract_params(config)
    found: dict[str, set[str]] = {"matrix": set(), "embedding": set(), "vector": set()}
    for path in paths(tree):
        found[parameter_group(path)].add(path[-1])
    assert found["embedding"] == {"embedding", "positions"}
    assert found["matrix"] == {"query", "key", "value", "output", "up", "gate", "down"}
    assert all(name == "scale" or name.endswith("bias") for name in found["vector"])
    assert decays(CONFIG, ("layers", "0", "attention", "query"))
    assert decays(CONFIG, ("output",))
    assert decays(CONFIG, ("embedding",))
    only_matrices = dataclasses.replace(CONFIG, decayed="matrices")
    assert not decays(only_matrices, ("embedding",))
    assert decays(only_matrices, ("output",))
    assert not any(decays(CONFIG, path) for path in paths(tree) if parameter_group(path) == "vector")
