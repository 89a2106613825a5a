"""The arithmetic of an estimate, on programs made by hand."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from lm.chips import CHIPS, GIB
from lm.experiment import Config
from lm.model.config import ModelConfig
from lm.model.flops import flops_per_token
from lm.parallel.mesh import AXES, MeshConfig, abstract_mesh
from lm.plan.collectives import Collective
from lm.plan.estimate import (
    HOST_EXPOSED,
    Times,
    attention_flops,
    collective_seconds,
    estimate,
    memory_use,
    visible_tiles,
)
from lm.plan.program import Kernel, Memory, Program
from lm.plan.rates import rates_of
from lm.plan.topology import Topology
from lm.train.config import RecoveryConfig, TrainConfig

MEMORY = Memory(arguments=0, outputs=0, alias=0, temporary=0, code=0, peak=10 * GIB, host=GIB)
CONFIG = Config(
    model=ModelConfig(layers=2, width=256, heads=4, head_dim=64, kv_heads=2, hidden=512, vocab_size=1024),
    train=TrainConfig(batch_size=8, sequence_length=2048, steps=10),
    mesh=MeshConfig(fsdp=-1),
)


def machine(name: str, shape: tuple[int, ...], *, slices: int = 1, wrap: bool = False, **sizes: int) -> tuple[Any, Any]:
    """A topology and a mesh over it, its devices in the order of their places."""
    chip = CHIPS[name]
    devices = [
        SimpleNamespace(coords=(*place, 0)[:3], slice_index=i, platform="tpu")
        for i in range(slices)
        for place in np.ndindex(shape)
        for _ in range(chip.devices)
    ]
    where = Topology(f"{name}:made", chip, shape, slices, (wrap,) * len(shape), tuple(devices))  # type: ignore[arg-type]
    grid = np.empty(len(devices), dtype=object)
    grid[:] = devices
    counts = {axis: sizes.get(axis, 1) for axis in AXES}
    mesh = SimpleNamespace(
        axis_names=AXES, devices=grid.reshape(tuple(counts.values())), shape=counts, size=len(devices)
    )
    return where, mesh


def collective(kind: str, size: int, group: int, **changes: Any) -> Collective:
    base = Collective(kind, kind, "", size, size, group, ("fsdp",), False, 0, "")
    return dataclasses.replace(base, **changes)


def program(**changes: Any) -> Program:
    return dataclasses.replace(Program((), {}, 0, (), MEMORY, ()), **changes)


@pytest.mark.parametrize(
    ("shape", "wrap", "kind", "group", "expected"),
    [
        # Bytes that one device sends, over the links that a ring on each dimension uses.
        ((2, 2), False, "all-gather", 4, 0.75 / 2),
        ((4, 4), False, "all-gather", 16, 15 / 16 / 2),
        ((16, 16), True, "all-gather", 256, 255 / 256 / 4),
        ((16, 16), True, "all-reduce", 256, 2 * 255 / 256 / 4),
        ((16, 16), True, "all-gather", 16, 15 / 16 / 2),  # one line only
        ((16, 16), True, "collective-permute", 2, 1.0),
        # Half of what each has crosses the middle of the torus: 16 columns have 2 * 16 links for 128 devices.
        ((16, 16), True, "all-to-all", 256, 128 / 2 / (2 * 16)),
        ((4, 4), False, "all-to-all", 16, 8 / 2 / 4),
    ],
)
def test_seconds_on_links(shape: tuple[int, ...], wrap: bool, kind: str, group: int, expected: float) -> None:
    where, mesh = machine("v6e", shape, wrap=wrap, fsdp=int(np.prod(shape)))
    size = int(where.chip.link_bandwidth)  # one second on one link
    assert collective_seconds(collective(kind, size, group), where, mesh) == pytest.approx(expected)


def test_devices_of_a_chip_share_its_links() -> None:
    where, mesh = machine("tpu7x", (4, 4, 4), wrap=True, fsdp=128)
    size = int(where.chip.link_bandwidth)
    assert collective_seconds(collective("all-gather", size, 128), where, mesh) == pytest.approx(127 / 128 * 2 / 6)


def test_between_slices_the_network_counts() -> None:
    where, mesh = machine("v5e", (2, 2), slices=2, data=2, fsdp=4)
    size = int(where.chip.network_bandwidth)
    one = collective("all-reduce", size, 2, axes=("data",), network="data_center")
    assert collective_seconds(one, where, mesh) == pytest.approx(1.0)


def test_what_is_hidden_and_what_adds() -> None:
    times = Times(
        products=2.0,
        attention=1.0,
        other=0.5,
        copies=0.25,
        synchronous={"links": 0.125, "data_center": 0.0},
        asynchronous={"links": 2.5, "data_center": 7.0},
    )
    assert times.exposed == {"links": 0.0, "data_center": 4.0, "host": 0.0}
    assert times.step == 2 + 1 + 0.5 + 0.25 + 0.125 + 4
    assert times.bound_by == "data_center"
    # Two seconds each way: the forward pass hides one of them, the backward pass two.
    assert dataclasses.replace(times, host=4.0).exposed["host"] == 1.0
    assert dataclasses.replace(times, host=1.0).exposed["host"] == HOST_EXPOSED  # never all
    alone = dataclasses.replace(times, asynchronous={"links": 0.0, "data_center": 0.0})
    assert (alone.step, alone.bound_by) == (3.875, "compute")


def test_a_whole_estimate() -> None:
    where, mesh = machine("v5e", (2, 2), fsdp=4)
    clock, link = where.chip.clock, int(where.chip.link_bandwidth)
    bandwidth = where.chip.hbm_bandwidth * rates_of(where.chip).memory
    gathers = [collective("all-gather", link, 4, times=4, asynchronous=hidden) for hidden in (True, False)]
    found = estimate(
        program(
            collectives=tuple(gathers),
            cycles={"products": int(2 * clock), "other": int(clock), "copies": int(9 * clock)},
            hbm_bytes={"products": 1, "other": 10**15, "copies": int(bandwidth / 2)},  # what is less counts
            product_flops=10**12,
        ),
        CONFIG,
        where,
        mesh,
    )
    assert found.times.parts == pytest.approx(
        {"compute": 2.0, "memory": 1.5, "links": 1.5, "data_center": 0.0, "host": 0.0}
    )
    assert found.times.step == pytest.approx(5.0)
    (row,) = found.traffic
    assert (row.kind, row.runs, row.bytes) == ("all-gather", 8, 8 * link)
    assert (row.seconds, row.asynchronous_seconds) == pytest.approx((3.0, 1.5))
    assert found.product_flops == 10**12
    assert found.tokens == 8 * 2048
    flops = flops_per_token(CONFIG.model, 2048).causal * 8 * 2048
    assert found.model_flops == flops
    assert found.mfu == pytest.approx(flops / (5.0 * 4 * 197e12))
    assert found.tokens_per_second == pytest.approx(8 * 2048 / 5)
    assert found.days(8 * 2048 * 86400) == pytest.approx(5.0)
    assert found.chip_hours(8 * 2048 * 3600) == pytest.approx(5.0 * 4)


@pytest.mark.parametrize(
    ("tiles", "expected"),
    [
        ((1024, 256, 256), 1 + 2 + 3 + 4),
        ((1024, 256, 512), 1 + 1 + 2 + 2),
        ((1024, 512, 256), 2 + 4),
        ((1024, 1024, 1024), 1),
        ((1024, 256, 256, 256), 1 + 2 + 2 + 2),
        ((1024, 256, 256, 1), 4),
    ],
)
def test_tiles_under_the_mask(tiles: tuple[int, ...], expected: int) -> None:
    length, queries, keys, *window = tiles
    assert visible_tiles(*tiles) == expected
    place = np.arange(length)
    seen = place[:, None] >= place
    if window:
        seen &= place[:, None] - place < window[0]
    assert seen.reshape(length // queries, queries, length // keys, keys).any(axis=(1, 3)).sum() == expected


def test_attention_kernels() -> None:
    kernels = (Kernel("tpu_custom_call", "splash_mha_fwd_residuals", "", 4),)
    kernels += (Kernel("tpu_custom_call", "splash_mha_dkv_no_residuals", "", 2), Kernel("AllocateBuffer", "x", "", 9))
    where, mesh = machine("v5e", (2, 2), fsdp=4)
    # Rows of a device x heads, of 64 padded to 128; tiles 1024 x 1024 forward and 1024 x 2048 backward.
    one = 2 * 4 * 128
    expected = one * (4 * 4 * 3 * 1024 * 1024 + 2 * 10 * 2 * 1024 * 2048)
    assert attention_flops(program(kernels=kernels), CONFIG, mesh) == expected
    found = estimate(program(kernels=kernels), CONFIG, where, mesh)
    assert found.attention_flops == expected
    assert found.times.attention == pytest.approx(expected / (197e12 * rates_of(where.chip).attention))
    assert attention_flops(program(), CONFIG, mesh) == 0

    # A run is over the rows of one microbatch; how often it is run, the program says.
    train = dataclasses.replace(CONFIG.train, accumulation=2)
    assert attention_flops(program(kernels=kernels), dataclasses.replace(CONFIG, train=train), mesh) == expected / 2
    _, parts = machine("v5e", (2, 2), fsdp=2, tensor=2)
    sharded = dataclasses.replace(CONFIG, mesh=MeshConfig(fsdp=2, tensor=2))
    assert attention_flops(program(kernels=kernels), sharded, parts) == expected


def test_memory_by_kind() -> None:
    where, _ = machine("v5e", (2, 2), fsdp=4)
    mesh = abstract_mesh(CONFIG.mesh, 4)
    use = memory_use(program(), CONFIG, where, mesh)
    matrices = 2 * (256 * (2 * 256 + 2 * 128) + 3 * 256 * 512) + 1024 * 256
    norms = 5 * 256  # on every device
    assert use.parameters == matrices * 4 // 4 + norms * 4
    assert use.gradients == use.parameters
    assert 0 <= use.optimizer - 2 * use.parameters <= 16  # and counts
    assert use.parameters + use.optimizer + use.gradients + use.rest == use.total == 10 * GIB
    assert (use.capacity, use.host) == (where.chip.hbm_bytes, GIB)
    train = dataclasses.replace(CONFIG.train, optimizer_memory="host")
    assert memory_use(program(), dataclasses.replace(CONFIG, train=train), where, mesh).optimizer == 0


def test_a_step_that_is_computed_twice_has_its_state_twice() -> None:
    where, _ = machine("v5e", (2, 2), fsdp=4)
    mesh, recovery = abstract_mesh(CONFIG.mesh, 4), RecoveryConfig(verify_every=100)
    once = memory_use(program(), CONFIG, where, mesh)
    use = memory_use(program(), dataclasses.replace(CONFIG, recovery=recovery), where, mesh)
    assert (once.again, use.again) == (0, use.parameters + use.optimizer)
    assert use == dataclasses.replace(once, again=use.again, total=once.total + use.again)
    train = dataclasses.replace(CONFIG.train, optimizer_memory="host")
    use = memory_use(program(), dataclasses.replace(CONFIG, train=train, recovery=recovery), where, mesh)
    assert (use.again, use.host) == (use.parameters, once.host + once.optimizer)
