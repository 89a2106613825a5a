"""What only shows on a torus, with devices that are only places."""

import dataclasses

import numpy as np
import pytest

from lm.parallel.layout import layout_of
from lm.parallel.mesh import AXES, MeshConfig

Mesh = type("Mesh", (), {})


@dataclasses.dataclass(frozen=True)
class Chip:
    coords: tuple[int, ...]
    platform: str = "tpu"


def on_torus(sides: tuple[int, ...], **sizes: int) -> object:
    mesh = Mesh()
    mesh.shape = {axis: sizes.get(axis, 1) for axis in AXES}
    chips = np.empty(sides, object)
    for place in np.ndindex(*sides):
        chips[place] = Chip(place)
    mesh.devices, mesh.axis_names = chips.reshape(tuple(mesh.shape.values())), AXES
    return mesh


@pytest.mark.parametrize(
    ("sides", "sizes", "lines"),
    [
        ((4, 4, 4), {"fsdp": 64}, {"fsdp": 4}),
        ((8, 8, 8), {"fsdp": 512}, {"fsdp": 8}),
        ((16, 16, 24), {"fsdp": 6144}, {"fsdp": 24}),
        ((16, 16, 1), {"fsdp": 256}, {"fsdp": 16}),
        ((4, 4, 4), {"data": 4, "fsdp": 16}, {}),  # a plane
        ((4, 4, 4), {"fsdp": 16, "tensor": 4}, {}),
        ((4, 1, 1), {"fsdp": 4}, {}),  # a line
        ((2, 2, 1), {"fsdp": 4}, {"fsdp": 2}),
    ],
)
def test_axes_through_all_of_a_torus_are_split_into_lines(
    sides: tuple[int, ...], sizes: dict[str, int], lines: dict[str, int]
) -> None:
    layout = layout_of(MeshConfig(), on_torus(sides, **sizes))  # type: ignore[arg-type]
    assert dict(layout.lines) == lines
