import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from lm.errors import ConfigError
from lm.experiment import Config
from lm.model.config import ModelConfig
from lm.optim.optimizer import paths
from lm.parallel import sharding
from lm.parallel.mesh import MeshConfig, make_mesh
from lm.parallel.sharding import check_batch, spec, tree_shardings
from lm.train.config import TrainConfig
from lm.train.state import abstract_state


def mesh(**sizes: int) -> jax.sharding.Mesh:
    config = MeshConfig(**({"data": 1, "fsdp": 1, "tensor": 1} | sizes))
    return make_mesh(config, jax.devices()[: math.prod(dataclasses.astuple(config))])


def shapes(tree: Any) -> Any:
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), tree, is_leaf=lambda x: isinstance(x, tuple))


def test_one_axis_takes_what_is_left() -> None:
    assert dict(make_mesh(MeshConfig(data=2, fsdp=-1, tensor=2)).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(MeshConfig(data=-1, fsdp=2)).shape) == {"data": 4, "fsdp": 2, "tensor": 1}


@pytest.mark.parametrize("sizes", [{"fsdp": 3}, {"fsdp": 16}, {"data": 3}, {"data": 2, "fsdp": 2}])
def test_a_mesh_that_does_not_fit_the_devices(sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"does not fit 8 device\(s\); the product must be 8") as error:
        make_mesh(MeshConfig(**sizes))
    assert all(f"{name} {size}" in str(error.value) for name, size in sizes.items())


@pytest.mark.parametrize(("sizes", "field"), [({"data": 0}, "data"), ({"data": -1, "fsdp": -1}, "fsdp")])
def test_sizes_that_no_mesh_has(sizes: dict[str, int], field: str) -> None:
    [(found, _)] = MeshConfig(**sizes).check()
    assert found == field


def test_axes_go_where_the_table_says() -> None:
    on = mesh(data=2, fsdp=2, tensor=2)
    assert spec(("vocab", "embed"), (32, 16), on, tensor="embedding") == PartitionSpec("tensor", "fsdp")
    assert spec(("batch",), (8,), on, tensor="batch") == PartitionSpec(("data", "fsdp"))
    assert spec(("layers", "embed", "mlp"), (3, 4, 6), mesh(tensor=2), tensor="up") == PartitionSpec(
        None, None, "tensor"
    )


@pytest.mark.parametrize(
    ("axes", "shape", "said"),
    [
        (("vocab", "colour"), (8, 8), r"x: no rule for axis 'colour'; there are batch, vocab"),
        (("embed", "mlp"), (6, 8), r"x \(6, 8\): embed of 6 cannot be split over mesh axes fsdp of 4"),
        (("mlp", "heads"), (8, 8), r"x: axes \('mlp', 'heads'\) put two dimensions on mesh axis tensor"),
    ],
)
def test_a_layout_that_cannot_be_names_tensor_axis_and_sizes(
    axes: tuple[str, ...], shape: tuple[int, ...], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        spec(axes, shape, mesh(fsdp=4, tensor=2), tensor="x")


def test_a_large_tensor_on_every_device_is_an_error_where_the_model_is_split() -> None:
    tree = shapes({"a": {"table": (1024, 2**15)}})
    axes = {"a": {"table": ("positions", "head_dim")}}
    with pytest.raises(ConfigError, match=r"a\.table \(1024, 32768\): 134,217,728 bytes would be on every device"):
        tree_shardings(tree, axes, mesh(fsdp=2))
    tree_shardings(tree, axes, mesh(data=2))
    tree_shardings(shapes({"a": {"table": (1024, 2**14)}}), axes, mesh(fsdp=2))  # just not large
    assert sharding.LARGE_BYTES == 4 * 1024 * 2**14


def test_a_model_that_the_mesh_cannot_split_is_refused_before_anything_is_allocated() -> None:
    config = Config(model=ModelConfig(vocab_size=32, layers=1, width=12, heads=3), train=TrainConfig(batch_size=8))
    with pytest.raises(ConfigError, match=r"embedding \(32, 12\): embed of 12 cannot be split .* fsdp of 8"):
        abstract_state(config, mesh(fsdp=8))
    with pytest.raises(ConfigError, match=r"attention\.\w+ .*heads of 3 cannot be split over mesh axes tensor of 2"):
        abstract_state(config, mesh(tensor=2))
    with pytest.raises(ConfigError, match=r"accumulation \(6,\): batch of 6 .* data x fsdp of 4"):
        check_batch(6, mesh(data=2, fsdp=2))
    check_batch(8, mesh(data=2, fsdp=2, tensor=2))


def test_moments_lie_where_their_parameters_do() -> None:
    config = Config(model=ModelConfig(vocab_size=32, layers=2, width=16, heads=4))
    state = abstract_state(config, mesh(fsdp=4, tensor=2))
    adam = next(part for part in state.opt_state if hasattr(part, "mu"))
    for moments in (adam.mu, adam.nu):
        found = dict(zip(paths(moments), jax.tree.leaves(moments), strict=True))
        for path, leaf in zip(paths(state.params), jax.tree.leaves(state.params), strict=True):
            assert found[path].sharding == leaf.sharding
            assert not leaf.sharding.is_fully_replicated, path
    assert adam.count.sharding.is_fully_replicated
    assert state.step.sharding.is_fully_replicated
