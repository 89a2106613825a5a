"""Silent corruption: devices that compute something else the second time, or hold something else than their peers.

A step is computed twice by the same program, from the same state and batch, and what comes out is compared bit by bit,
for each device on its own; then all copies of what several devices hold alike. What is compared are digests
(lm/checkpoint/digest.py), 16 bytes for each array and device, which stay on the devices; the host reads two flags for
each array, when it reads the metrics of the step. While it runs, the state is there twice, in the memory that it lies
in; what lies in that of the host comes to the devices for its digest, as it does for a checkpoint's.

It finds devices that are wrong now and then, and copies that have become different. It does not find a device that
makes the same mistake twice in what no other device computes too.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from lm.checkpoint.digest import leaf_paths, reduce_to_lanes
from lm.errors import CorruptionError, some
from lm.model.loss import Batch
from lm.parallel.processes import Processes
from lm.train.state import TrainState
from lm.train.step import Metrics

_ARRAYS_TOLD = 4
_DEVICES_TOLD = 8
_ARRAYS_GATHERED = 64
"""Of each kind and process: with thousands of devices, what they tell must stay small."""

_Told = tuple[int, str, list[int], dict[str, str]]
"""Of a device: its row; its name; arrays that came out otherwise the second time; digests of those, by number, of which
copies differ on any device."""


@dataclasses.dataclass(frozen=True)
class _Pending:
    """What the devices found, or soon will have."""

    step: int
    lanes: tuple[jax.Array, jax.Array]
    """Of the first and of the second time, uint32 [devices, arrays, 4]."""
    flags: jax.Array
    """bool [2, arrays]: another result the second time; copies that differ. On any device."""


class Verification:
    """Computes steps twice. All processes of a run do so at the same steps, and `check` them at the same place.

    Args:
      train_step: the compiled step, from state (donated) and batch to state and metrics.
      abstract: shapes and shardings of the state.
      metrics: those of the metrics; each is on all devices.
    """

    def __init__(
        self,
        train_step: Callable[[TrainState, Any], tuple[TrainState, Metrics]],
        abstract: TrainState,
        metrics: Any,
        mesh: Mesh,
        processes: Processes,
    ):
        self._step, self._mesh, self._processes = train_step, mesh, processes
        self._names = [*leaf_paths(abstract), *leaf_paths({"metrics": metrics})]
        shardings = jax.tree.map(lambda x: x.sharding, abstract)
        everywhere = jax.NamedSharding(mesh, PartitionSpec())
        metrics = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), metrics)
        specs = [x.sharding.spec for x in jax.tree.leaves((abstract, metrics))]
        self._copy_axes = [_axes_of_copies(mesh, spec) for spec in specs]
        rows = jax.NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        lanes = jax.ShapeDtypeStruct((mesh.size, len(specs), 4), jnp.uint32, sharding=rows)
        self._copy = (
            jax.jit(lambda state: jax.tree.map(jnp.copy, state), out_shardings=shardings).lower(abstract).compile()
        )
        self._digest = jax.jit(_digest(mesh, specs)).lower(jax.tree.leaves((abstract, metrics))).compile()
        self._compare = jax.jit(_compare(mesh, self._copy_axes)).lower(lanes, lanes).compile()
        self._everywhere = everywhere
        self._pending: _Pending | None = None
        self._passed: int | None = None

    def step(self, k: int, state: TrainState, batch: Batch | None) -> tuple[TrainState, Metrics]:
        """Step k, for `train_step`. Nothing is waited for."""
        # The copy is computed on first, so that what goes on is what the plain step would have given.
        first = self._lanes(*self._step(self._copy(state), batch))
        state, metrics = self._step(state, batch)
        second = self._lanes(state, metrics)
        self._pending = _Pending(k, (first, second), self._compare(first, second))
        return state, metrics

    def check(self, k: int) -> None:
        """Waits for step k, if it was computed twice. Raises CorruptionError, which names devices and arrays."""
        if self._pending is None or self._pending.step != k:
            return
        pending, self._pending = self._pending, None
        twice, copies = np.asarray(pending.flags)
        if not twice.any() and not copies.any():
            self._passed = k
            return
        told = self._processes.gather("corruption", list(self._told(pending, copies)))
        message = None if told is None else self._message(k, [one for each in told for one in each])
        raise CorruptionError(self._processes.broadcast("corruption", message))

    def _lanes(self, state: TrainState, metrics: Metrics) -> jax.Array:
        metrics = jax.device_put(metrics, self._everywhere)  # where they are, as a rule
        return self._digest(jax.tree.leaves((state, metrics)))

    def _told(self, pending: _Pending, copies: np.ndarray) -> Iterator[_Told]:
        """For each device of this process."""
        first, second = ({_row(s): np.asarray(s.data)[0] for s in x.addressable_shards} for x in pending.lanes)
        devices = list(self._mesh.devices.flat)
        for row in sorted(first):
            other = np.flatnonzero((first[row] != second[row]).any(-1)).tolist()
            digests = {str(i): second[row][i].tobytes().hex() for i in np.flatnonzero(copies)[:_ARRAYS_GATHERED]}
            yield row, f"{devices[row]}", other[:_ARRAYS_GATHERED], digests

    def _message(self, k: int, told: Sequence[_Told]) -> str:
        devices = list(self._mesh.devices.flat)
        names = {row: f"{name} of {self._processes.name(devices[row].process_index)}" for row, name, _, _ in told}
        lines = []
        if twice := {row: other for row, _, other, _ in told if other}:
            where = some([names[row] for row in twice], _DEVICES_TOLD)
            if 1 < len(devices) == len(twice):
                where = f"all {len(devices)} devices: one is wrong, and its values are in the sums that they exchange"
            arrays = [self._names[i] for i in sorted({i for other in twice.values() for i in other})]
            lines.append(f"computed twice, it gave something else on {where}; in {some(arrays, _ARRAYS_TOLD)}")
        by_device = {row: digests for row, _, _, digests in told}
        odd: dict[tuple[int, ...], list[str]] = {}
        for i in next(iter(by_device.values()), {}):
            for group in _groups(self._mesh, self._copy_axes[int(i)]):
                if rows := _odd({int(row): by_device[row][i] for row in group}):
                    odd.setdefault(rows, []).append(self._names[int(i)])
        for rows, arrays in odd.items():
            where = some([names[row] for row in rows], _DEVICES_TOLD)
            lines.append(f"copies that must be alike differ on {where}; of {some(arrays, _ARRAYS_TOLD)}")
        found = "".join(f"\n    {line}" for line in lines)
        before = f"step {self._passed}" if self._passed is not None else "none since this start"
        return (
            f"step {k} was not computed as it must be:{found}\n"
            "The state was not saved. Take the machine out before the run goes on. The last step that was found right "
            f"is {before}: checkpoints saved later may hold wrong values, and `lm checkpoint copy` makes a run of an "
            "older one"
        )


def _digest(mesh: Mesh, specs: Sequence[PartitionSpec]) -> Callable[[list[jax.Array]], jax.Array]:
    """Of the part of each array that a device holds: uint32 [devices, arrays, 4]."""
    # Without exchanges, and not one program with what compares: in a program that knows an array to be the same on all
    # devices, a compiler may leave out what compares its copies.
    return jax.shard_map(
        lambda leaves: jnp.stack([reduce_to_lanes(x)[0] for x in leaves])[None],
        mesh=mesh,
        in_specs=(list(specs),),
        out_specs=PartitionSpec(mesh.axis_names),
        check_vma=False,
    )


def _compare(mesh: Mesh, copy_axes: Sequence[tuple[str, ...]]) -> Callable[[jax.Array, jax.Array], jax.Array]:
    by_axes: dict[tuple[str, ...], list[int]] = {}
    for i, axes in enumerate(copy_axes):
        if axes:
            by_axes.setdefault(axes, []).append(i)

    def compare(first: jax.Array, second: jax.Array) -> jax.Array:
        first, second = first[0], second[0]
        twice = (first != second).any(-1)
        copies = jnp.zeros_like(twice)
        for axes, which in by_axes.items():
            lanes = second[np.array(which)]
            differ = (lax.pmax(lanes, axes) != lax.pmin(lanes, axes)).any(-1)
            copies = copies.at[np.array(which)].set(differ)
        flags = jnp.stack([twice, copies])
        return lax.pmax(flags.astype(jnp.int32), mesh.axis_names) > 0

    rows = PartitionSpec(mesh.axis_names)
    return jax.shard_map(compare, mesh=mesh, in_specs=(rows, rows), out_specs=PartitionSpec(), check_vma=False)


def _axes_of_copies(mesh: Mesh, spec: PartitionSpec) -> tuple[str, ...]:
    """Along which devices hold the same part of an array."""
    split = {axis for part in spec for axis in (part if isinstance(part, tuple) else (part,))}
    return tuple(axis for axis, size in mesh.shape.items() if size > 1 and axis not in split)


def _groups(mesh: Mesh, axes: tuple[str, ...]) -> np.ndarray:
    """Rows of the devices that hold the same part: [parts, copies]."""
    rows = np.arange(mesh.size).reshape(mesh.devices.shape)
    last = [mesh.axis_names.index(axis) for axis in axes]
    copies = functools.reduce(lambda n, axis: n * mesh.shape[axis], axes, 1)
    return np.moveaxis(rows, last, range(-len(last), 0)).reshape(-1, copies)


def _odd(digests: dict[int, str]) -> tuple[int, ...]:
    """Those that are not like most of them; without a majority all, unless all are alike."""
    (common, count), *others = collections.Counter(digests.values()).most_common()
    if not others:
        return ()
    return tuple(row for row, digest in digests.items() if 2 * count <= len(digests) or digest != common)


def _row(shard: Any) -> int:
    return shard.index[0].start or 0
