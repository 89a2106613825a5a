"""One mesh with named axes."""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import AxisType, Mesh

from lm.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; one of them may be -1: what is left of the devices."""

    data: int = 1
    """Copies of the model, each with its part of the batch."""
    fsdp: int = -1
    """Parts of the batch and of every parameter: gathered where it is used (fully sharded data parallel)."""
    tensor: int = 1
    """Parts of heads, feed-forward layer and vocabulary."""

    def check(self) -> Iterator[tuple[str, str]]:
        sizes = dataclasses.asdict(self)
        for name, size in sizes.items():
            if size < 1 and size != -1:
                yield name, f"must be at least 1, or -1 for what is left; got {size}"
        if sum(size == -1 for size in sizes.values()) > 1:
            yield "fsdp", f"only one axis of the mesh may be -1, got {sizes}"


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh over these devices (all by default). Raises ConfigError when the sizes do not fit their number."""
    devices = jax.devices() if devices is None else devices
    sizes = dataclasses.asdict(config)
    given = math.prod(size for size in sizes.values() if size != -1)
    filled = {name: len(devices) // given if size == -1 else size for name, size in sizes.items()}
    if math.prod(filled.values()) != len(devices):
        raise ConfigError(
            f"mesh: {' x '.join(f'{name} {size}' for name, size in sizes.items())} does not fit "
            f"{len(devices)} device(s); the product must be {len(devices)}, or leave one axis at -1"
        )
    names = tuple(filled)
    return jax.make_mesh(tuple(filled.values()), names, axis_types=(AxisType.Auto,) * len(names), devices=devices)
