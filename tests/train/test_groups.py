"""Norms and histograms by kind and by depth, against the same sums in NumPy."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.experiment import Config
from lm.model.config import ModelConfig
from lm.model.transformer import init_params
from lm.optim.optimizer import parameter_group, paths
from lm.parallel.mesh import MeshConfig, make_mesh
from lm.train.groups import groups_of, layer_depths, norms
from lm.train.histograms import EDGES, histograms
from lm.train.state import abstract_state, by_repeats

MODEL = ModelConfig(vocab_size=40, layers=5, width=16, heads=2, windows=(4, 0), embeddings="untied")


def params_of(model: ModelConfig) -> Any:
    """Each layer on another scale, so that they cannot be taken for each other."""
    tree = jax.jit(lambda: init_params(model, jax.random.key(0)))()
    period = len(model.pattern)
    for i, blocks in tree["layers"].items():
        scale = 1.0 + np.arange(int(i), model.layers // period * period, period, dtype=np.float32)
        tree["layers"][i] = jax.tree.map(lambda x, s=scale: x * s.reshape(-1, *[1] * (x.ndim - 1)), blocks)
    for i, block in tree.get("last_layers", {}).items():
        scale = 1.0 + model.layers // period * period + int(i)
        tree["last_layers"][i] = jax.tree.map(lambda x, s=scale: x * s, block)
    return tree


def by_hand(tree: Any, model: ModelConfig) -> dict[str, list[np.ndarray]]:
    """Arrays by depth, one for each layer."""
    period = len(model.pattern)
    depths, of_layer = groups_of(model).depths, layer_depths(model)
    found: dict[str, list[np.ndarray]] = {name: [] for name in depths}
    for path, leaf in zip(paths(tree), jax.tree.leaves(tree), strict=True):
        if path[0] == "layers":
            for j, one in enumerate(np.asarray(leaf, np.float64)):
                found[depths[of_layer[int(path[1]) + j * period]]].append((path, one))
        elif path[0] == "last_layers":
            number = model.layers // period * period + int(path[1])
            found[depths[of_layer[number]]].append((path, np.asarray(leaf, np.float64)))
        else:
            found[path[0]].append((path, np.asarray(leaf, np.float64)))
    return found


def norm(arrays: Any) -> float:
    return math.sqrt(sum((np.asarray(array, np.float64) ** 2).sum() for array in arrays))


def test_a_kind_is_over_all_layers() -> None:
    """Also of a pattern of two with one layer left over."""
    kinds = groups_of(MODEL).kinds
    assert {"embedding", "output", "final_norm/scale", "attention/query", "feed_forward/down"} < set(kinds)
    assert len(kinds) == 3 + 4 + 3 + 2
    tree = params_of(MODEL)
    found = jax.jit(lambda tree: norms(tree, MODEL))(tree)
    assert found.kinds.dtype == jnp.float32
    for name in ("attention/query", "feed_forward/up"):
        module, leaf = name.split("/")
        arrays = [blocks[i][module][leaf] for blocks in (tree["layers"], tree["last_layers"]) for i in blocks]
        assert len(arrays) == 3
        assert found.kinds[kinds.index(name)] == pytest.approx(norm(arrays), rel=1e-5)
    for parts in (found.kinds, found.depths):
        assert np.linalg.norm(parts) == pytest.approx(norm(jax.tree.leaves(tree)), rel=1e-5)
    assert found.whole == pytest.approx(norm(jax.tree.leaves(tree)), rel=1e-5)


def test_which_layers_are_in_a_range() -> None:
    found = [layer_depths(dataclasses.replace(MODEL, layers=layers)).tolist() for layers in (2, 9, 18)]
    assert found == [[1, 2], [1, 1, 2, 3, 4, 5, 6, 7, 8], [1, 1, 1, 2, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8]]


@pytest.mark.parametrize("layers", [1, 2, 5, 8, 9, 21])
def test_depths_are_ranges_of_layers(layers: int) -> None:
    model = dataclasses.replace(MODEL, layers=layers)
    depths = groups_of(model).depths
    assert (depths[0], *depths[-2:]) == ("embedding", "final_norm", "output")
    assert len(depths) == 3 + min(layers, 8)
    tree = params_of(model)
    found = jax.jit(lambda tree: norms(tree, model))(tree).depths
    expected = by_hand(tree, model)
    for name, value in zip(depths, found, strict=True):
        assert value == pytest.approx(norm(array for _, array in expected[name]), rel=1e-5), name


def test_their_names() -> None:
    assert groups_of(dataclasses.replace(MODEL, layers=21)).depths[1:4] == (
        "layers_00-02",
        "layers_03-05",
        "layers_06-08",
    )
    assert groups_of(dataclasses.replace(MODEL, layers=9)).depths[1:3] == ("layers_0-1", "layer_2")
    thousand = groups_of(dataclasses.replace(MODEL, layers=2000, windows=()))
    assert len(thousand.depths) == 11


def test_what_is_not_finite_stays_in_its_depth() -> None:
    tree = params_of(MODEL)
    query = tree["layers"]["1"]["attention"]["query"]
    tree["layers"]["1"]["attention"]["query"] = query.at[1, 0, 0, 0].set(math.nan)  # of layer 3
    found = norms(tree, MODEL)
    assert [name for name, value in zip(groups_of(MODEL).depths, found.depths, strict=True) if math.isnan(value)] == [
        "layer_3"
    ]
    assert math.isnan(found.whole)


def test_rounds_of_a_pipeline_are_counted_by_layer() -> None:
    model = dataclasses.replace(MODEL, layers=8, windows=())
    tree = params_of(model)
    expected, found = norms(tree, model), norms(by_repeats(tree, 2), model)
    assert found.depths == pytest.approx(np.asarray(expected.depths), rel=1e-6)


def test_on_a_mesh() -> None:
    config = Config(model=dataclasses.replace(MODEL, layers=4, windows=(), width=32), mesh=MeshConfig(fsdp=4, tensor=2))
    mesh = make_mesh(config.mesh, jax.devices()[:8])
    tree = params_of(config.model)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh).params)
    spread = jax.device_put(tree, shardings)
    for what in (norms, histograms):
        one, several = (jax.jit(lambda tree, what=what: what(tree, config.model))(each) for each in (tree, spread))
        for found, wanted in zip(jax.tree.leaves(several), jax.tree.leaves(one), strict=True):
            np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_histograms_count_what_there_is() -> None:
    tree = params_of(MODEL)
    found = jax.jit(lambda tree: histograms(tree, MODEL))(tree)
    expected = by_hand(tree, MODEL)
    for i, name in enumerate(groups_of(MODEL).depths):
        matrices = [array.ravel() for path, array in expected[name] if parameter_group(path) != "vector"]
        if not matrices:
            assert name == "final_norm"
            assert found.scale[i] == 0
            continue
        values = np.concatenate(matrices)
        scale = math.sqrt((values**2).mean())
        assert found.scale[i] == pytest.approx(scale, rel=1e-5)
        counts, _ = np.histogram(values, [-np.inf, *(scale * EDGES), np.inf])
        assert found.counts[i].sum() == len(values)
        assert np.abs(np.asarray(found.counts[i]) - counts).max() <= 2, "but for what lies at an edge"
