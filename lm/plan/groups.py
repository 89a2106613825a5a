"""Which devices a collective joins, and along which axes of the mesh."""

import re

import numpy as np
from jax.sharding import Mesh

from lm.plan.hlo import Instruction

Groups = list[tuple[int, ...]]
"""Places in the program's list of devices: in the order of `mesh.devices.flat`."""

_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, *device_ids=\((.*?)\))? *\{([^}]*)\}")
_IOTA = re.compile(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)")
_LISTS = re.compile(r"replica_groups=\{((?:\{[\d, ]*\},? *)*)\}")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{[\d, ]*\},? *)*)\}")


def groups_of(instruction: Instruction, devices: int) -> Groups:
    """The groups of a collective over `devices` devices; for a permutation, its (source, target) pairs."""
    attributes = instruction.attributes
    if match := _PAIRS.search(attributes):
        return _lists(match[1])
    if match := _MESH.search(attributes):
        return _mesh_groups(*match.groups())
    if match := _IOTA.search(attributes):
        shape, order = match[1].split("<=")
        return [tuple(row) for row in _iota(order).reshape(_numbers(shape)).tolist()]
    match = _LISTS.search(attributes)
    return (_lists(match[1]) if match else []) or [tuple(range(devices))]


def slice_groups(transfer: Instruction, mesh: Mesh) -> Groups:
    """The groups of a transfer between slices, which names devices by their ids.

    Either `"{1,2}x{0:3}"`, each device of the second set in every slice of the first (an id is 100,000 times the
    number of the slice, from 1, plus a number in the slice), or lists of ids, or pairs with an arrow.
    """
    target = transfer.attribute(r'_xla_megascale_target=("[^"]*"|\{\{.*?\}\})') or ""
    places = {device.id: place for place, device in enumerate(mesh.devices.flat)}
    if match := re.fullmatch(r'"\{([^}]*)\}x\{([^}]*)\}"', target):
        slices, members = _ranges(match[1]), _ranges(match[2])
        ids = [[100_000 * one + member for one in slices] for member in members]
    else:
        ids = [_numbers(group) for group in re.findall(r"\{([^{}]+)\}", target)]
    return [tuple(places[one] for one in group if one in places) for group in ids]


def mesh_axes(groups: Groups, mesh: Mesh) -> tuple[str, ...]:
    """Names of the mesh axes along which the groups run: those in which members of one group differ."""
    shape, axes = mesh.devices.shape, set()
    for group in groups:
        coordinates = np.stack(np.unravel_index(np.asarray(group), shape))
        axes |= set(np.flatnonzero((coordinates != coordinates[:, :1]).any(axis=1)).tolist())
    return tuple(name for place, name in enumerate(mesh.axis_names) if place in axes)


def _mesh_groups(sizes: str, order: str | None, axes: str) -> Groups:
    """`mesh['a'=4,'b'=16], device_ids=([4,16]T(1,0)) {'b'}`: groups along some axes of a mesh of devices.

    An axis may be named in part: `'b':(2)4` is the 4 parts in the middle of one that is split 2 x 4 x rest.
    """
    names = re.findall(r"'([^']*)'=(\d+)", sizes)
    shape = [int(size) for _, size in names]
    devices = np.arange(int(np.prod(shape))) if order is None else _device_ids(order)
    parts = {name: (int(before or 1), int(size or 0)) for name, before, size in _AXES.findall(axes)}
    split: list[int] = []
    along: list[bool] = []
    for (name, _), size in zip(names, shape, strict=True):
        before, part = parts.get(name, (1, 0))
        part = part or size
        split += [before, part, size // (before * part)]
        along += [False, name in parts, False]
    kept = [place for place, inside in enumerate(along) if not inside]
    inside = [place for place, one in enumerate(along) if one]
    members = int(np.prod([split[place] for place in inside]))
    table = devices.reshape(split).transpose(*kept, *inside).reshape(-1, members)
    return [tuple(row) for row in table.tolist()]


_AXES = re.compile(r"'([^']*)'(?::\((\d+)\)(\d+))?")


def _device_ids(order: str) -> np.ndarray:
    return _iota(order) if order.startswith("[") else np.asarray(_numbers(order))


def _iota(text: str) -> np.ndarray:
    """`[4,16]T(1,0)`: the numbers from 0 in a 4 x 16 array, its axes then turned."""
    shape, _, order = text.partition("T")
    numbers = np.arange(int(np.prod(_numbers(shape)))).reshape(_numbers(shape))
    return (numbers.transpose(_numbers(order)) if order else numbers).reshape(-1)


def _lists(text: str) -> Groups:
    return [tuple(_numbers(group)) for group in re.findall(r"\{([^}]*)\}", text)]


def _ranges(text: str) -> list[int]:
    """`0:3,8`: 0, 1, 2, 3 and 8."""
    found: list[int] = []
    for first, last in re.findall(r"(\d+)(?::(\d+))?", text):
        found += range(int(first), int(last or first) + 1)
    return found


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
