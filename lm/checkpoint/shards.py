"""The part of a state that the devices of one process hold, as raw bytes in one file, and back onto the same devices.

What several devices of the process hold alike is there once. An index, as JSON, says which part of its array each is.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath

from lm.checkpoint.digest import leaf_paths
from lm.checkpoint.manifest import BadCheckpoint, LeafDigest
from lm.errors import some

T = TypeVar("T")

FILE = "shards.bin"

Part = tuple[tuple[int, int], ...]
"""Begin and end in each dimension."""
Index = Mapping[str, Sequence[tuple[Part, int]]]
"""By path of the array: its parts, and where each begins in the file, in bytes."""


def copy_shards(state: Any) -> dict[str, dict[Part, np.ndarray]]:
    """By path of the array, its parts. Returns when the arrays may be donated.

    On CPU devices nothing is copied: their buffers are held, and donated ones replaced.
    """
    distinct = {
        path: {_part(shard.index, x.shape): shard.data for shard in x.addressable_shards}
        for path, x in zip(leaf_paths(state), jax.tree.leaves(state), strict=True)
    }
    for parts in distinct.values():  # all copies are under way before the first is waited for
        for data in parts.values():
            data.copy_to_host_async()
    return {path: {part: np.asarray(data) for part, data in parts.items()} for path, parts in distinct.items()}


def write_shards(folder: epath.Path, shards: Mapping[str, Mapping[Part, np.ndarray]]) -> Index:
    """Writes them to the folder. Raises OSError."""
    index: dict[str, list[tuple[Part, int]]] = {}
    with open(folder / FILE, "wb") as file:
        for path, parts in shards.items():
            index[path] = []
            for part, data in parts.items():
                index[path].append((part, file.tell()))
                file.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
    return index


def read_shards(folder: epath.Path, index: Index, abstract: T) -> T:
    """The state that was written, on the devices of this process; for an `index` that fits."""

    def array(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        offsets = dict(index[path])

        def read(part: tuple[slice, ...] | None) -> np.ndarray:
            at = _part(part, leaf.shape)
            shape = [end - begin for begin, end in at]
            count = int(np.prod(shape, dtype=np.int64))
            data = np.fromfile(folder / FILE, np.uint8, count * leaf.dtype.itemsize, offset=offsets[at])
            return data.view(leaf.dtype).reshape(shape)

        return jax.make_array_from_callback(leaf.shape, leaf.sharding, read)

    leaves, structure = jax.tree.flatten(abstract)
    found = [array(path, leaf) for path, leaf in zip(leaf_paths(abstract), leaves, strict=True)]
    return jax.tree.unflatten(structure, found)


def refuse_other_layout(index: Index, saved: Mapping[str, LeafDigest], abstract: Any) -> None:
    """Raises BadCheckpoint when these are not the parts, of arrays of the kinds `saved`, that this process would hold
    of an `abstract` state."""
    wanted = dict(zip(leaf_paths(abstract), jax.tree.leaves(abstract), strict=True))
    other = [path for path in {**wanted, **saved} if path not in wanted or path not in saved or path not in index]
    for path in wanted.keys() - set(other):
        leaf = wanted[path]
        parts = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
        same = {_part(part, leaf.shape) for part in parts} == {part for part, _ in index[path]}
        if not same or (saved[path].shape, saved[path].dtype) != (leaf.shape, leaf.dtype.name):
            other.append(path)
    if other:
        raise BadCheckpoint(f"it is of another layout of arrays over processes and devices: {some(sorted(other))}")


def index_to_json(index: Index) -> dict[str, Any]:
    return {path: [[part, offset] for part, offset in parts] for path, parts in index.items()}


def index_from_json(found: Mapping[str, Any]) -> Index:
    """Raises KeyError, TypeError or ValueError for what is none."""
    return {
        path: [(tuple((int(begin), int(end)) for begin, end in part), int(offset)) for part, offset in parts]
        for path, parts in found.items()
    }


def _part(index: tuple[slice, ...] | None, shape: Sequence[int]) -> Part:
    return tuple(piece.indices(size)[:2] for piece, size in zip(index or (), shape, strict=True))
