"""Replica groups in each of the forms that programs use."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from lm.plan.groups import Groups, groups_of, mesh_axes, slice_groups
from lm.plan.hlo import Instruction


def instruction(attributes: str) -> Instruction:
    return Instruction("x", "all-reduce", "f32[]", "", attributes, False)


ROWS = [(0, 1, 2, 3), (4, 5, 6, 7)]
COLUMNS = [(0, 4), (1, 5), (2, 6), (3, 7)]


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, use_global_device_ids=true", ROWS),
        ("replica_groups={}, to_apply=%add", [tuple(range(8))]),
        ("to_apply=%add", [tuple(range(8))]),
        ("replica_groups=[2,4]<=[8]", ROWS),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", COLUMNS),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}, use_global_device_ids=true", ROWS),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", COLUMNS),
        ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", [tuple(range(8))]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", ROWS),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=(0,4,1,5,2,6,3,7) {'b'}", COLUMNS),
        ("replica_groups=mesh['a'=8] {'a':(1)2}", COLUMNS),
        ("replica_groups=mesh['a'=8] {'a':(4)2}", [(0, 1), (2, 3), (4, 5), (6, 7)]),
        ("channel_id=3, source_target_pairs={{0,1},{1,0}}", [(0, 1), (1, 0)]),
    ],
)
def test_groups(text: str, groups: Groups) -> None:
    assert groups_of(instruction(text), 8) == groups


def test_axes_are_those_along_which_members_differ() -> None:
    mesh = Mesh(
        np.array(jax.devices()[:8]).reshape(2, 1, 4), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3
    )
    assert mesh_axes(ROWS, mesh) == ("tensor",)
    assert mesh_axes(COLUMNS, mesh) == ("data",)
    assert mesh_axes([tuple(range(8))], mesh) == ("data", "tensor")
    assert mesh_axes([(0, 5), (5, 0)], mesh) == ("data", "tensor")
    assert mesh_axes([(0,), (1,)], mesh) == ()


class Device:
    def __init__(self, number: int) -> None:
        self.id = number


@pytest.mark.parametrize(
    ("target", "groups"),
    [
        ('"{1,2}x{0:1}"', [(0, 2), (1, 3)]),
        ('"{1:2}x{0,1}"', [(0, 2), (1, 3)]),
        ("{{100000,200000},{100001,200001}}", [(0, 2), (1, 3)]),
        ("{{100000->200000},{200001->100001}}", [(0, 2), (3, 1)]),
    ],
)
def test_groups_of_transfers_between_slices(target: str, groups: Groups) -> None:
    class TwoSlices:
        devices = np.array([Device(100_000), Device(100_001), Device(200_000), Device(200_001)])

    assert slice_groups(instruction(f"_xla_megascale_target={target},_xla_x=1"), TwoSlices()) == groups  # type: ignore[arg-type]
