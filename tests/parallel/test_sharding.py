import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lm.errors import ConfigError
from lm.experiment import Config
from lm.model.config import ModelConfig
from lm.optim.optimizer import paths
from lm.parallel import sharding
from lm.parallel.mesh import AXES, MeshConfig, Rule, make_mesh
from lm.parallel.sharding import RULES, check_table, rules, spec, tree_shardings
from lm.train.config import TrainConfig
from lm.train.state import abstract_state
from lm.train.step import make_train_step


def mesh(**sizes: int) -> jax.sharding.Mesh:
    config = MeshConfig(**({"fsdp": 1} | sizes))
    return make_mesh(config, jax.devices()[: math.prod(config.sizes.values())])


def shapes(tree: Any) -> Any:
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), tree, is_leaf=lambda x: isinstance(x, tuple))


def test_one_axis_takes_what_is_left() -> None:
    def found(**sizes: int) -> dict[str, int]:
        return {axis: size for axis, size in make_mesh(MeshConfig(**sizes)).shape.items() if size > 1}

    assert found(data=2, fsdp=-1, tensor=2) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert found(data=-1, fsdp=2) == {"data": 4, "fsdp": 2}
    assert found(context=-1, fsdp=2) == {"context": 4, "fsdp": 2}


@pytest.mark.parametrize("sizes", [{"fsdp": 3}, {"fsdp": 16}, {"data": 3}, {"data": 2, "fsdp": 2}])
def test_a_mesh_that_does_not_fit_the_devices(sizes: dict[str, int]) -> None:
    said = r"the product must be 8" if "fsdp" in sizes else r"the product of the others must divide 8"
    with pytest.raises(ConfigError, match=rf"does not fit 8 device\(s\); {said}") as error:
        make_mesh(MeshConfig(**sizes))
    assert all(f"{name} {size}" in str(error.value) for name, size in sizes.items())


@pytest.mark.parametrize(
    ("sizes", "field"),
    [
        ({"data": 0}, "data"),
        ({"data": -1, "fsdp": -1}, "data"),
        ({"stage": -1, "fsdp": 1}, "stage"),
        ({"microbatches": 4}, "microbatches"),
        ({"repeats": 2}, "repeats"),
        ({"stage": 4, "microbatches": 6}, "microbatches"),
        ({"stage": 4, "microbatches": -4}, "microbatches"),
        ({"stage": 0, "microbatches": 2}, "stage"),
        ({"rules": (Rule("mlp", ()), Rule("mlp", ("tensor",)))}, "rules"),
    ],
)
def test_sizes_that_no_mesh_has(sizes: dict[str, int], field: str) -> None:
    [(found, _)] = MeshConfig(**sizes).check()
    assert found == field


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "cpu"
    device_kind: str = "fake"


@pytest.mark.parametrize(
    ("sizes", "outer"),
    [
        ({"data": 2}, "data"),
        ({"data": 4, "tensor": 2}, "data"),
        ({"stage": 2}, "stage"),
        ({"data": 2, "stage": 2, "tensor": 2}, "data"),
    ],
)
def test_only_copies_and_stages_lie_on_different_slices(sizes: dict[str, int], outer: str) -> None:
    devices = [FakeDevice(i, slice_index=i // 4) for i in range(8)]
    grid = make_mesh(MeshConfig(**sizes), devices).devices  # type: ignore[arg-type]
    slices = np.vectorize(lambda device: device.slice_index)(grid)
    for axis, name in enumerate(AXES):
        crosses = bool((slices != np.take(slices, [0], axis=axis)).any())
        assert crosses == (name == outer), name


def test_slow_links_carry_nothing_else() -> None:
    devices = [FakeDevice(i, slice_index=i // 2) for i in range(8)]
    with pytest.raises(ConfigError, match=r"cannot be spread over 4 slices.*make mesh\.data .* a multiple of 4"):
        make_mesh(MeshConfig(data=2), devices)  # type: ignore[arg-type]


def test_axes_go_where_the_table_says() -> None:
    on = mesh(data=2, fsdp=2, tensor=2)
    assert spec(("vocab", "embed"), (32, 16), on, RULES, tensor="embedding") == P(("tensor",), ("fsdp",))
    assert spec(("batch",), (8,), on, RULES, tensor="batch") == P(("data", "fsdp"))
    assert spec(("layers", "embed", "mlp"), (3, 4, 6), mesh(tensor=2), RULES, tensor="up") == P(None, None, ("tensor",))
    assert spec(("experts", "expert_embed", "mlp"), (8, 4, 6), mesh(expert=4, tensor=2), RULES, tensor="up") == P(
        ("expert",), None, ("tensor",)
    )


def test_a_config_replaces_entries_of_the_table() -> None:
    table = rules(MeshConfig(rules=(Rule("embed", ("fsdp",)), Rule("vocab", ()))))
    assert (table["embed"], table["vocab"], table["mlp"]) == (("fsdp",), (), ("tensor",))
    with pytest.raises(ConfigError, match=r"mesh\.rules: nothing is named 'colour'; there are batch"):
        rules(MeshConfig(rules=(Rule("colour", ("fsdp",)),)))
    assert [field for field, _ in Rule("embed", ("sideways",)).check()] == ["axes"]
    assert [field for field, _ in Rule("embed", ("fsdp", "fsdp")).check()] == ["axes"]


@pytest.mark.parametrize(
    ("sizes", "rule", "said"),
    [
        ({"data": 2}, Rule("batch", ("fsdp",)), r"mesh\.data is 2, but the rules for batch, residual and layers"),
        ({"stage": 2}, Rule("layers", ()), r"mesh\.stage is 2, but the rules"),
        ({"tensor": 2}, Rule("residual", ("context",)), r"mesh\.tensor is 2, but the rules"),
        ({"fsdp": 2}, Rule("mlp", ("fsdp",)), r"mlp is computed in parts, over tensor or not at all"),
        ({"tensor": 2}, Rule("kv_heads", ()), r"heads, kv_heads and all_heads meet in attention"),
        ({"tensor": 2}, Rule("embed", ("tensor",)), r"embed is gathered for use"),
        ({"fsdp": 2}, Rule("head_dim", ("fsdp",)), r"head_dim cannot be split"),
        ({"context": 2}, Rule("residual", ()), r"must begin with the axes of sequence"),
        ({"context": 2}, Rule("batch", ("data", "context")), r"batch and residual cannot both be split over context"),
        ({"tensor": 2}, Rule("batch", ("data", "tensor")), r"batch and residual cannot both be split over tensor"),
        ({"stage": 2}, Rule("batch", ("data", "stage")), r"batch and layers cannot both be split over stage"),
        ({"data": 2}, Rule("layers", ("data",)), r"layers is over stage"),
    ],
)
def test_rules_that_cannot_work(sizes: dict[str, int], rule: Rule, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_table(mesh(**sizes), rules(MeshConfig(rules=(rule,))))


@pytest.mark.parametrize(
    ("axes", "shape", "said"),
    [
        (("vocab", "colour"), (8, 8), r"x \(8, 8\): no rule for axis 'colour'; there are batch"),
        (
            ("embed", "mlp"),
            (6, 8),
            r"x \(6, 8\): embed of 6 cannot be split over mesh axes fsdp of 4 = 4; 6 is divisible by 2, 3, 6",
        ),
        (("mlp", "heads"), (8, 8), r"x \(8, 8\): mlp and heads would both be split over mesh axis tensor"),
    ],
)
def test_a_layout_that_cannot_be_names_tensor_axis_and_sizes(
    axes: tuple[str, ...], shape: tuple[int, ...], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        spec(axes, shape, mesh(fsdp=4, tensor=2), RULES, tensor="x")


def test_a_large_tensor_on_every_device_is_an_error_where_the_model_is_split() -> None:
    tree = shapes({"a": {"table": (1024, 2**15)}})
    axes = {"a": {"table": ("positions", "head_dim")}}
    with pytest.raises(ConfigError, match=r"a\.table \(1024, 32768\): 134,217,728 bytes would be on every device"):
        tree_shardings(tree, axes, mesh(fsdp=2), RULES)
    tree_shardings(tree, axes, mesh(data=2), RULES)
    tree_shardings(shapes({"a": {"table": (1024, 2**14)}}), axes, mesh(fsdp=2), RULES)  # just not large
    assert sharding.LARGE_BYTES == 4 * 1024 * 2**14


MODEL = ModelConfig(vocab_size=32, layers=2, width=12, heads=3, hidden=16)


@pytest.mark.parametrize(
    ("sizes", "model", "train", "said"),
    [
        (
            {"fsdp": 8},
            {},
            {},
            r"embedding .* of 1,536 bytes: embed of 12 cannot be split over .* fsdp of 8",
        ),
        ({"tensor": 2}, {}, {}, r"attention\.\w+ .*heads of 3 cannot be split over mesh axes tensor of 2"),
        ({"tensor": 2}, {"heads": 6, "kv_heads": 3}, {}, r"attention\.key .*kv_heads of 3 cannot be split"),
        ({"stage": 4}, {}, {}, r"model\.layers = 2 cannot be shared out over mesh\.stage 4"),
        ({"stage": 2, "repeats": 2}, {}, {}, r"model\.layers = 2 .* mesh\.stage 2 x mesh\.repeats 2"),
        ({"data": 2, "fsdp": 2}, {}, {"batch_size": 6}, r"accumulation \(6,\): batch of 6 .* data x fsdp of 2 x 2 = 4"),
        ({"data": 4}, {}, {"accumulation": 4}, r"accumulation \(2,\): batch of 2 cannot be split"),
        ({"data": 2, "stage": 2, "microbatches": 8}, {}, {}, r"leaves 4 rows .* 8 microbatches of the pipeline"),
        ({"context": 2}, {}, {"sequence_length": 30}, r"30 cannot be split by twice mesh\.context = 4;.* 28 and 32"),
        ({"tensor": 3}, {}, {"sequence_length": 32}, r"32 cannot be split by mesh\.tensor = 3;.* 30 and 33"),
    ],
)
def test_what_the_mesh_cannot_split_is_refused_before_anything_is_allocated(
    sizes: dict[str, int], model: dict[str, int], train: dict[str, int], said: str
) -> None:
    config = Config(
        model=dataclasses.replace(MODEL, **model),
        train=dataclasses.replace(TrainConfig(batch_size=8, sequence_length=32), **train),
        mesh=MeshConfig(**({"fsdp": 1} | sizes)),
    )
    on = mesh(**{axis: size for axis, size in sizes.items() if axis in AXES})
    if "tensor" in sizes and sizes["tensor"] == 3:
        config = dataclasses.replace(config, model=dataclasses.replace(MODEL, vocab_size=33, hidden=18))
    with pytest.raises(ConfigError, match=said):
        make_train_step(config, on)


def test_moments_lie_where_their_parameters_do() -> None:
    config = Config(model=ModelConfig(vocab_size=32, layers=2, width=16, heads=4))
    state = abstract_state(config, mesh(fsdp=4, tensor=2))
    adam = next(part for part in state.opt_state if hasattr(part, "mu"))
    for moments in (adam.mu, adam.nu):
        found = dict(zip(paths(moments), jax.tree.leaves(moments), strict=True))
        for path, leaf in zip(paths(state.params), jax.tree.leaves(state.params), strict=True):
            assert found[path].sharding == leaf.sharding
            assert leaf.sharding.is_fully_replicated == (path[-1] in ("scale", "bias")), path
    assert adam.count.sharding.is_fully_replicated
    assert state.step.sharding.is_fully_replicated
