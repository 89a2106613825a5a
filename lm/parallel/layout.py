"""How one device takes part in a computation: which part of each array it holds, and what it exchanges.

The train step is written for one device and runs on all of them (`jax.shard_map`): every exchange between devices is
one of the methods here, and nothing else is exchanged. On a single device all of them are the identity.

What a device returns is its share: the loss of the run is the sum over all devices. So the gradient of an array that
several devices hold copies of is the sum of what each of them finds (`finish`), whatever axis they lie on.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from lm.parallel.mesh import AnyMesh, MeshConfig
from lm.parallel.sharding import check_table, rules, split_axes


@dataclasses.dataclass(frozen=True)
class Layout:
    """A table of rules on a mesh, as the code on one device needs it. Hashable, so it may be a static argument."""

    axes: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """By logical name: the mesh axes that split it. Names that nothing splits are left out."""
    sizes: tuple[tuple[str, int], ...] = ()
    """By mesh axis, those of size 1 left out."""
    platform: str = "cpu"
    """Of the devices computed on, which need not be those at hand."""
    reduce_dtype: str = "float32"
    """What gradients of weights are summed in between devices."""

    lines: tuple[tuple[str, int], ...] = ()
    """By mesh axis: how many of its devices in a row lie along one line of the torus, for axes that go through all of
    its dimensions. libtpu has no reduce-scatter over these: it sums everything everywhere, twice the bytes."""
    microbatches: int = 1
    """In the pipeline, for each part of the batch that is computed at once."""
    repeats: int = 1
    """Rounds that each makes through all stages."""

    # Facts, known while tracing

    def over(self, name: str) -> tuple[str, ...]:
        """Mesh axes that split dimensions of this logical name."""
        return dict(self.axes).get(name, ())

    def size(self, *axes: str) -> int:
        """Devices along these mesh axes."""
        return math.prod(dict(self.sizes).get(axis, 1) for axis in axes)

    def parts(self, name: str) -> int:
        return self.size(*self.over(name))

    def gathered_parts(self, name: str) -> int:
        """Parts that a dimension is stored in and gathered from."""
        return self.parts(name) if name in GATHERED else 1

    @property
    def stages(self) -> int:
        return self.size("stage")

    # Weights

    def whole(self, weight: jax.Array, axes: tuple[str, ...], dtype: jnp.dtype) -> jax.Array:
        """A stored weight as it is used: cast, then gathered along the dimensions that are only stored in parts."""
        weight = weight.astype(dtype)
        for dimension, name in enumerate(axes):
            if name in GATHERED and self.over(name):
                weight = lax.all_gather(weight, self.over(name), axis=dimension, tiled=True)
        return weight

    def scatter(self, gradient: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        """The inverse, for the gradient of what `whole` gave: summed, and this device's part of it, float32."""
        for dimension, name in enumerate(axes):
            if name in GATHERED and self.over(name):
                gradient = self._sum_and_scatter(gradient.astype(self.reduce_dtype), self.over(name), dimension)
        return gradient.astype(jnp.float32)

    def _sum_and_scatter(self, x: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
        line = dict(self.lines).get(axes[0]) if len(axes) == 1 else None
        if line is None:
            return lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True)
        # First over planes of the torus, then along the lines that are left: together the same as one step.
        lines = np.arange(self.size(*axes)).reshape(-1, line)
        for groups in (lines.T, lines):
            x = lax.psum_scatter(x, axes[0], scatter_dimension=dimension, axis_index_groups=groups.tolist(), tiled=True)
        return x

    def finish(self, gradients: Any, specs: Any) -> Any:
        """Sums the gradients of parameters over the axes that these specs do not split."""

        def missing(spec: PartitionSpec) -> tuple[str, ...]:
            used = {axis for part in spec if part for axis in ((part,) if isinstance(part, str) else part)}
            return tuple(axis for axis, _ in self.sizes if axis not in used)

        leaves, structure = jax.tree.flatten(gradients)
        found = [missing(spec) for spec in jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec))]
        for axes in sorted(set(found) - {()}):
            which = [i for i, other in enumerate(found) if other == axes]
            for i, total in zip(which, lax.psum([leaves[i] for i in which], axes), strict=True):
                leaves[i] = total
        return jax.tree.unflatten(structure, leaves)

    def total(self, share: jax.Array) -> jax.Array:
        """The sum of what all devices return."""
        return lax.psum(share, tuple(axis for axis, _ in self.sizes)) if self.sizes else share

    # The sequence
    #
    # A device holds two chunks of each sequence, the i-th from the front and the i-th from the back: so all devices
    # have as much to do under a causal mask. Between layers (the residual stream), its part is split once more, over
    # `tensor`.

    def sequence(self, x: jax.Array) -> jax.Array:
        """This device's columns of x [B, S, …], in the order in which it keeps them."""
        axes = self.over("sequence")
        if not axes:
            return x
        count = self.size(*axes)
        size = x.shape[1] // (2 * count)
        index = lax.axis_index(axes)
        front, back = (
            lax.dynamic_slice_in_dim(x, chunk * size, size, axis=1) for chunk in (index, 2 * count - 1 - index)
        )
        return jnp.concatenate([front, back], axis=1)

    def residual(self, x: jax.Array) -> jax.Array:
        """What this device keeps, between layers, of columns as `sequence` gives them."""
        axes = self._tensor
        if not axes:
            return x
        size = x.shape[1] // self.size(*axes)
        return lax.dynamic_slice_in_dim(x, lax.axis_index(axes) * size, size, axis=1)

    def all_columns(self, x: jax.Array) -> jax.Array:
        """The whole sequence, in its own order, from every device's part x [B, s, …]."""
        axes = self.over("sequence")
        if not axes:
            return x
        count, (batch, length, *rest) = self.size(*axes), x.shape
        chunks = lax.all_gather(x.reshape(batch, 2, length // 2, *rest), axes, axis=1, tiled=False)
        ordered = jnp.concatenate([chunks[:, :, 0], chunks[:, ::-1, 1]], axis=1)
        return ordered.reshape(batch, count * length, *rest)

    def columns(self, length: int) -> "Columns | None":
        """Which columns `sequence` gives to which device; None: all to each."""
        axes = self.over("sequence")
        if not axes:
            return None
        count = self.size(*axes)
        size = length // (2 * count)
        chunks = [chunk for i in range(count) for chunk in (i, 2 * count - 1 - i)]
        order = np.concatenate([np.arange(chunk * size, (chunk + 1) * size, dtype=np.int32) for chunk in chunks])
        return Columns(order, count, axes)

    def enter(self, x: jax.Array) -> jax.Array:
        """From the residual stream [B, s / tensor, D] to what a layer reads, [B, s, D]."""
        return lax.all_gather(x, self._tensor, axis=1, tiled=True) if self._tensor else x

    def leave(self, y: jax.Array, summed_over: str) -> jax.Array:
        """Back again, from a product over dimensions of this logical name: partial sums where that is split."""
        if not self._tensor:
            return y
        if self.over(summed_over):
            return lax.psum_scatter(y, self._tensor, scatter_dimension=1, tiled=True)
        return self.residual(y)

    @property
    def _tensor(self) -> tuple[str, ...]:
        return self.over("residual")[len(self.over("sequence")) :]

    # Rows

    def loss_rows(self, x: jax.Array) -> jax.Array:
        """Of this device's rows x [B, …], those that it computes the loss of: stages share them."""
        if self.stages == 1:
            return x
        size = x.shape[0] // self.stages
        return lax.dynamic_slice_in_dim(x, lax.axis_index("stage") * size, size, axis=0)

    def look_up(self, table: jax.Array, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Rows of table [V, D], stored float32 in parts, for ids [B, s]: this device's residual stream [B, s', D].

        Each device looks up, in the columns that it stores, the ids of all devices that store others, and they
        exchange the results: for batches that are small against V, far less than the table. The gradient of the
        table is summed where the table is, in float32.
        """
        group, vocab = self.over("embed"), self.over("vocab")
        everyone = lax.all_gather(ids, group, axis=0) if group else ids[None]
        if vocab:
            local = everyone - lax.axis_index(vocab) * table.shape[0]
            inside = (local >= 0) & (local < table.shape[0])
            rows = jnp.where(inside[..., None], table[jnp.clip(local, 0, table.shape[0] - 1)], 0)
        else:
            rows = table[everyone]
        rows = rows.astype(dtype)
        if group:
            rows = lax.all_to_all(rows, group, split_axis=0, concat_axis=3, tiled=True)
        return self.leave(rows[0], "vocab")


class Columns(NamedTuple):
    """How a sequence is split: device after device, the columns that each keeps."""

    order: np.ndarray
    parts: int
    axes: tuple[str, ...]


LOCAL = Layout()
"""One device that holds everything; also for code that the compiler splits by itself."""

GATHERED = ("embed", "expert_embed")


def layout_of(config: MeshConfig, mesh: AnyMesh, *, reduce_dtype: str = "float32") -> Layout:
    """The layout of a config on its mesh, to compute with if that has devices. Raises ConfigError for rules that
    cannot work."""
    table = rules(config)
    check_table(mesh, table)
    axes = {name: split_axes(name, mesh, table) for name in table}
    return Layout(
        axes=tuple((name, over) for name, over in axes.items() if over),
        sizes=tuple((axis, size) for axis, size in mesh.shape.items() if size > 1),
        platform="cpu" if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0].platform,
        reduce_dtype=reduce_dtype,
        lines=() if isinstance(mesh, AbstractMesh) else _lines(mesh),
        microbatches=config.pipeline_microbatches,
        repeats=config.repeats,
    )


def _lines(mesh: Mesh) -> tuple[tuple[str, int], ...]:
    """See `Layout.lines`."""
    if mesh.devices.flat[0].platform != "tpu":
        return ()
    places = np.array([device.coords for device in mesh.devices.flat]).reshape(*mesh.devices.shape, -1)
    through = (places != places[(0,) * mesh.devices.ndim]).reshape(-1, places.shape[-1]).any(axis=0)
    found = []
    for dimension, axis in enumerate(mesh.axis_names):
        along = np.moveaxis(places, dimension, 0).reshape(mesh.devices.shape[dimension], -1, places.shape[-1])[:, 0]
        moves = along != along[0]
        if len(along) < 2 or through.sum() < 2 or not (moves.any(axis=0) == through).all():
            continue
        line = next(i for i in range(len(along)) if moves[: i + 1].any(axis=0).sum() > 1)
        if len(along) % line == 0:
            found.append((axis, line))
    return tuple(found)


def on_each_device(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`function` of local parts as a function of whole arrays."""
    if mesh.size == 1:
        return function
    # What is the same on several devices is our business: see the docstring of this file.
    return functools.partial(
        jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    )
