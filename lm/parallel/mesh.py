"""One mesh with named axes, laid out after the machine: slow links carry the outer axes."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from lm.errors import ConfigError

AXES = ("stage", "data", "fsdp", "expert", "context", "tensor")
"""From the slowest links to the fastest: stages and copies talk least, parts of one product most."""

AnyMesh = Mesh | AbstractMesh

BETWEEN_SLICES = ("data", "stage")
"""What may cross from slice to slice, in this order of preference."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """Where dimensions with a logical name go, in place of what the table in lm/parallel/sharding.py says."""

    name: str
    axes: tuple[str, ...] = ()
    """Axes of the mesh; empty: not split."""

    def check(self) -> Iterator[tuple[str, str]]:
        for axis in self.axes:
            if axis not in AXES:
                yield "axes", f"the mesh has no axis {axis!r}; there are {', '.join(AXES)}"
        if len(set(self.axes)) < len(self.axes):
            yield "axes", f"names an axis twice: {self.axes}"


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1: what is left of the devices."""

    data: int = 1
    """Copies of the model, each with its part of the batch. With several slices, a multiple of their number (or
    `stage` is)."""
    fsdp: int = -1
    """Parts of the batch and of every parameter: gathered where it is used (fully sharded data parallel)."""
    tensor: int = 1
    """Parts of heads, feed-forward layer and vocabulary; the sequence is split as well outside of products."""
    context: int = 1
    """Parts of each sequence; parameters are sharded over it like over fsdp."""
    expert: int = 1
    """Parts of the experts; everything else treats it like fsdp."""
    stage: int = 1
    """Parts of the stack of layers, computed as a pipeline."""
    microbatches: int = 0
    """Parts of the batch that are in the pipeline; 0: as many as stages. More of them leave less of it idle."""
    repeats: int = 1
    """How many times a microbatch goes round all stages, through a part of each one's layers every time: the
    circular schedule, which is idle less."""
    rules: tuple[Rule, ...] = ()
    """Entries that replace those of the table of rules."""

    @property
    def sizes(self) -> dict[str, int]:
        """By axis, in the order of AXES."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def pipeline_microbatches(self) -> int:
        return self.microbatches or self.stage

    def check(self) -> Iterator[tuple[str, str]]:
        for name, size in self.sizes.items():
            if size < 1 and size != -1:
                yield name, f"must be at least 1, or -1 for what is left; got {size}"
        left = [name for name, size in self.sizes.items() if size == -1]
        if len(left) > 1:
            yield left[0], f"only one axis of the mesh may be -1, got {' and '.join(left)}"
        if self.stage == -1:
            yield "stage", "the number of stages decides how the layers are split: write it out"
        elif self.stage == 1:
            for name, least in (("microbatches", 0), ("repeats", 1)):
                if getattr(self, name) > max(least, 1):
                    yield name, f"is for a pipeline, and mesh.stage is 1; got {getattr(self, name)}"
        elif self.stage > 1 and (self.microbatches < 0 or self.microbatches % self.stage):
            yield "microbatches", f"must be a multiple of mesh.stage = {self.stage}, or 0; got {self.microbatches}"
        if self.repeats < 1:
            yield "repeats", f"must be at least 1, got {self.repeats}"
        names = [rule.name for rule in self.rules]
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            yield "rules", f"two are for {twice[0]!r}: write one, with all axes"


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over these devices (all by default). Raises ConfigError when the sizes do not fit them."""
    devices = jax.devices() if devices is None else devices
    sizes = _fill(config, len(devices))
    slices = count_slices(devices)
    if slices > 1:
        outer = _between_slices(sizes, slices)
        inner = tuple(size // outer[axis] for axis, size in sizes.items())
        grid = mesh_utils.create_hybrid_device_mesh(
            inner, tuple(outer.values()), devices, allow_split_physical_axes=True
        )
    elif devices[0].platform == "tpu":  # follows the torus
        grid = mesh_utils.create_device_mesh(tuple(sizes.values()), devices, allow_split_physical_axes=True)
    else:
        grid = np.asarray(devices).reshape(tuple(sizes.values()))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def count_slices(devices: Sequence[jax.Device]) -> int:
    """Between how many groups of these devices the links are slow. GPUs are one group: their axes may cross hosts."""
    if devices[0].platform == "gpu":
        return 1
    return len({getattr(device, "slice_index", None) for device in devices})


def abstract_mesh(config: MeshConfig, count: int | None = None) -> AbstractMesh:
    """The mesh over so many devices, which need not exist. None: as many as the sizes say or, with a -1, are here.

    Raises ConfigError as `make_mesh`.
    """
    if count is None:
        given = config.sizes.values()
        count = len(jax.devices()) if -1 in given else math.prod(given)
    sizes = _fill(config, count)
    return AbstractMesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _fill(config: MeshConfig, count: int) -> dict[str, int]:
    given = math.prod(size for size in config.sizes.values() if size != -1)
    filled = {axis: count // given if size == -1 else size for axis, size in config.sizes.items()}
    if math.prod(filled.values()) != count:
        shown = " x ".join(f"{axis} {size}" for axis, size in config.sizes.items() if size != 1) or "1"
        how = f"product must be {count}, or leave one axis at -1"
        if -1 in config.sizes.values():
            how = f"product of the others must divide {count}"
        raise ConfigError(f"mesh: {shown} does not fit {count} device(s); the {how}")
    return filled


def _between_slices(sizes: dict[str, int], slices: int) -> dict[str, int]:
    """How many parts of each axis lie on different slices."""
    outer, left = dict.fromkeys(sizes, 1), slices
    for axis in BETWEEN_SLICES:
        outer[axis] = math.gcd(sizes[axis], left)
        left //= outer[axis]
    if left > 1:
        raise ConfigError(
            f"mesh: data {sizes['data']} x stage {sizes['stage']} cannot be spread over {slices} slices, and no other "
            f"axis may cross the slow links between them: make mesh.data (or mesh.stage) a multiple of {slices}"
        )
    return outer
