"""Where mesh axes lie on a torus: the model against what `make_mesh` does with real descriptions of slices."""

import importlib.util
from typing import Any

import pytest

from lm.parallel.mesh import AXES, MeshConfig, make_mesh
from lm.plan.machine import Machine, between_slices, spans_by_axis
from lm.plan.topology import topology

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'lm[plan]'"
)


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "slices", "sizes"),
    [
        ("v5p:4x4x4", 1, {"fsdp": 64}),
        ("v5p:4x4x4", 1, {"fsdp": 16, "tensor": 4}),
        ("v5p:4x4x8", 1, {"fsdp": 16, "tensor": 8}),
        ("v5p:4x4x4", 1, {"data": 4, "fsdp": 16}),
        ("v5e:16x16", 1, {"fsdp": 16, "tensor": 16}),
        ("v6e:16x16", 2, {"data": 2, "fsdp": 256}),
        ("v5e:4x8", 1, {"stage": 4, "fsdp": 8}),
        ("tpu7x:4x4x4", 1, {"fsdp": 128}),
    ],
    ids=str,
)
def test_as_the_mesh_is_laid_out(name: str, slices: int, sizes: dict[str, int]) -> None:
    where = topology(name, slices=slices)
    mesh = make_mesh(MeshConfig(**({"fsdp": 1} | sizes)), where.devices)
    found = spans_by_axis(where.machine, dict(mesh.shape))
    assert where.machine.devices == mesh.size
    for axis in AXES:
        assert sorted(found[axis]) == sorted(_spans(axis, where, mesh)), axis


def _spans(axis: str, where: Any, mesh: Any) -> list[tuple[int, bool]]:
    """Chips along each dimension of the torus, on one slice, on which devices along the axis differ."""
    index = tuple(slice(None) if name == axis else 0 for name in mesh.axis_names)
    devices = list(mesh.devices[index].flat)
    own = [d for d in devices if getattr(d, "slice_index", 0) == getattr(devices[0], "slice_index", 0)]
    counts = [len({device.coords[i] for device in own}) for i in range(len(where.shape))]
    return [
        (count, wrap and count == side > 2)
        for count, side, wrap in zip(counts, where.shape, where.wrap, strict=True)
        if count > 1
    ]


def test_parts_of_a_dimension_are_no_ring() -> None:
    from lm.chips import TPUS

    machine = Machine(TPUS["v5e"], (16, 16), 1, (True, True))
    sizes = dict.fromkeys(AXES, 1) | {"fsdp": 64, "tensor": 4}
    found = spans_by_axis(machine, sizes)
    assert found["tensor"] == [(4, False)]
    assert sorted(found["fsdp"]) == [(4, False), (16, True)]


def test_what_crosses_slices() -> None:
    from lm.chips import TPUS

    machine = Machine(TPUS["v5e"], (16, 16), 4, (True, True))
    outer = between_slices(machine, dict.fromkeys(AXES, 1) | {"data": 2, "stage": 2, "fsdp": 256})
    assert {axis: size for axis, size in outer.items() if size > 1} == {"data": 2, "stage": 2}
