"""On any mesh, and however its devices lie on hosts, the rows that the hosts read are the batch."""

import random

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lm.parallel.rows import local_rows, rows_of, whole_batch

ROWS = 16
LAYOUTS = [
    ({"data": 8}, PartitionSpec("data")),
    ({"data": 2, "fsdp": 4}, PartitionSpec(("data", "fsdp"))),
    ({"data": 2, "fsdp": 4}, PartitionSpec(("fsdp", "data"))),
    ({"fsdp": 4, "tensor": 2}, PartitionSpec("fsdp")),
    ({"tensor": 4, "fsdp": 2}, PartitionSpec("fsdp")),
    ({"stage": 2, "data": 2, "context": 2}, PartitionSpec("data", "context")),
    ({"tensor": 8}, PartitionSpec()),
]


def hosts(mesh: Mesh, kind: str) -> list[set[jax.Device]]:
    """The devices of four imagined hosts."""
    devices = list(mesh.devices.flat)
    if kind == "shuffled":
        random.Random(0).shuffle(devices)
    elif kind == "strided":
        devices = [devices[i] for start in range(4) for i in range(start, 8, 4)]
    return [set(devices[i : i + 2]) for i in range(0, 8, 2)]


def make(sizes: dict[str, int], spec: PartitionSpec) -> NamedSharding:
    mesh = jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))
    return NamedSharding(mesh, spec)


@pytest.mark.parametrize(("sizes", "spec"), LAYOUTS, ids=str)
@pytest.mark.parametrize("kind", ["neighbours", "strided", "shuffled"])
def test_each_host_reads_what_its_devices_hold(sizes: dict[str, int], spec: PartitionSpec, kind: str) -> None:
    sharding = make(sizes, spec)
    indices = sharding.devices_indices_map((ROWS,) if len(spec) < 2 else (ROWS, 4))
    numbers = np.arange(ROWS)
    read: set[int] = set()
    for host in hosts(sharding.mesh, kind):
        rows = rows_of([index for device, index in indices.items() if device in host], ROWS)
        held = [set(numbers[index[0]].tolist()) for device, index in indices.items() if device in host]
        assert set(rows.tolist()) == set.union(*held)
        assert (np.diff(rows) > 0).all()
        read |= set(rows.tolist())
    assert read == set(range(ROWS))


def test_what_nobody_else_holds_is_not_read() -> None:
    sharding = make({"data": 2, "fsdp": 4}, PartitionSpec(("data", "fsdp")))
    indices = sharding.devices_indices_map((ROWS,))
    mine = {sharding.mesh.devices[0, 1], sharding.mesh.devices[1, 3]}
    assert rows_of([index for device, index in indices.items() if device in mine], ROWS).tolist() == [2, 3, 14, 15]
    assert local_rows(sharding, ROWS).tolist() == list(range(ROWS))  # this process holds all


@pytest.mark.parametrize(("sizes", "spec"), LAYOUTS, ids=str)
def test_a_batch_of_one_process_is_what_was_read(sizes: dict[str, int], spec: PartitionSpec) -> None:
    sharding = make(sizes, PartitionSpec(*spec[:1]))
    part = {"tokens": np.arange(ROWS * 4).reshape(ROWS, 4), "bytes": np.arange(ROWS)}
    batch = whole_batch(part, local_rows(sharding, ROWS), ROWS, sharding)
    assert all(np.array_equal(batch[name], part[name]) for name in part)
    assert all(array.sharding == sharding for array in batch.values())
