"""The train step itself, compiled for a TPU slice that is not here."""

import importlib.util
import math
import warnings
from pathlib import Path

import jax
import pytest

from lm import config as configs
from lm.experiment import Config
from lm.parallel.mesh import abstract_mesh
from lm.plan.analytic import count_work, predict
from lm.plan.compile import compile_train_step
from lm.plan.program import Program, read_program
from lm.plan.topology import topology
from lm.train.state import abstract_state

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'lm[plan]'"
)
LAYERS, HEAD_DIM = 3, 128


def small(*overrides: str) -> Config:
    sizes = {
        "model.layers": LAYERS,
        "model.width": 256,
        "model.heads": 2,
        "model.kv_heads": 2,
        "model.hidden": 512,
        "model.vocab_size": 512,
        "model.dtype": "bfloat16",
        "train.batch_size": 8,
        "train.sequence_length": 256,
        "mesh.fsdp": -1,
    }
    arguments = [
        part for key, value in sizes.items() if f"--{key}" not in overrides for part in (f"--{key}", str(value))
    ]
    return configs.load(str(Path(__file__).parents[2] / "configs" / "llama3_8b.py"), Config, [*arguments, *overrides])


def compiled(config: Config) -> tuple[Program, int]:
    """The facts, and the bytes of the state on one device."""
    devices = topology("v5e:2x2").devices
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step = compile_train_step(config, devices)
    assert step.lowering_seconds > 0
    assert step.compile_seconds > 0
    assert step.mesh.size == len(devices) == 4
    leaves = jax.tree.leaves(abstract_state(config, step.mesh))
    state = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
    return read_program(step.compiled, step.mesh), state


def test_fully_sharded() -> None:
    config = small()
    program, state = compiled(config)
    batch = 5 * 8 * 256 * 4 // 4 + 8 * 4 // 4
    # Small arrays are padded to tiles.
    assert state + batch <= program.memory.arguments < (state + batch) * 1.05
    assert program.memory.alias >= state
    assert program.memory.peak > program.memory.arguments
    assert not program.unknown_loops

    kernel = 256 * 512 * 2  # bytes of one bfloat16 matrix of the feed-forward layer
    gathered = [c for c in program.collectives if c.kind == "all-gather" and c.bytes % kernel == 0 and c.times > 1]
    assert {c.axes for c in gathered} == {("fsdp",)}
    assert {c.group_size for c in gathered} == {4}
    # Three matrices of every layer, forward and, with full remat, again for the backward pass.
    assert sum(c.bytes * c.times for c in gathered) >= 2 * 3 * LAYERS * kernel

    # What the analytic model counts for the same step, which is compiled nowhere else in the tests.
    machine = topology("v5e:2x2").machine
    work = count_work(config, abstract_mesh(config.mesh, 4).shape)
    assert work.layer_flops + work.loss_flops == pytest.approx(program.product_flops, rel=0.001)
    counted = sum(one.bytes for one in work.exchanges if one.kind == "all-gather")
    found = sum(c.bytes * c.times for c in program.collectives if c.kind == "all-gather")
    assert counted == pytest.approx(found, rel=0.05)
    modelled = predict(config, machine, dict(abstract_mesh(config.mesh, 4).shape)).memory.total
    assert modelled == pytest.approx(program.memory.total, rel=0.25)

    tokens = 8 * 256 // 4
    weights = LAYERS * (4 * 256 * 256 + 3 * 256 * 512) + 256 * 512
    assert program.product_flops >= 6 * tokens * weights


def test_accumulation_repeats_the_collectives() -> None:
    """Once for each microbatch, in a loop around the loop over layers."""
    times = {}
    for accumulation in (1, 2):
        program, _ = compiled(small("--train.accumulation", str(accumulation)))
        times[accumulation] = max(c.times for c in program.collectives)
    assert times == {1: LAYERS, 2: 2 * LAYERS}


def test_one_device_has_no_collectives() -> None:
    devices = topology("v5e:1x1").devices
    step = compile_train_step(small(), devices)
    assert read_program(step.compiled, step.mesh).collectives == ()


@pytest.mark.parametrize(
    ("mesh", "slices", "kinds"),
    [
        ({"fsdp": 4, "tensor": 2}, 1, ("all-gather fsdp", "reduce-scatter fsdp", "all-gather tensor")),
        ({"fsdp": 2, "context": 4}, 1, ("all-gather context",)),
        ({"fsdp": 4, "stage": 2}, 1, ("all-gather fsdp", "collective-permute stage")),
        ({"data": 2, "fsdp": 8}, 2, ("all-gather fsdp", "reduce-scatter fsdp")),
    ],
    ids=str,
)
def test_every_axis_compiles_with_the_fused_attention(
    mesh: dict[str, int], slices: int, kinds: tuple[str, ...]
) -> None:
    sizes = {"mesh.fsdp": 1, "train.sequence_length": 1024, "model.layers": 4, "train.batch_size": 16}
    sizes |= {f"mesh.{axis}": size for axis, size in mesh.items()}
    config = small(*(part for key, value in sizes.items() for part in (f"--{key}", str(value))))
    step = compile_train_step(config, topology("v5e:2x4", slices=slices).devices)
    program = read_program(step.compiled, step.mesh)
    assert any("splash_mha_fwd" in kernel.name for kernel in program.kernels)
    assert any("splash_mha_dkv" in kernel.name for kernel in program.kernels)
    assert not program.unknown_loops
    assert set(kinds) <= {f"{c.kind} {axis}" for c in program.collectives for axis in c.axes}
    # In the loops over layers, no gradient of a weight is summed everywhere.
    summed = [c.bytes for c in program.collectives if c.kind == "all-reduce" and "fsdp" in c.axes and c.times > 1]
    assert max(summed, default=0) < 256 * 256 * 2


def test_what_is_offloaded_lies_on_the_host() -> None:
    activations = small(
        "--train.remat", "names", "--train.saved", "attention", "--train.offloaded", "query,feed_forward_up"
    )
    moments = small("--train.optimizer_memory", "host")
    plain, _ = compiled(small())
    for config in (activations, moments):
        program, _ = compiled(config)
        assert plain.memory.host == 0
        assert program.memory.host > 0
    assert program.memory.arguments < 0.5 * plain.memory.arguments  # two of three arrays of each parameter are away
