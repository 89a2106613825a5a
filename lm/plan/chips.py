"""TPU chips: what one of each kind has and does, as published, and how they are wired."""

import dataclasses
import math

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip. Rates are per second and chip, bytes or dense FLOPs; links are counted one way."""

    name: str
    devices: int
    """Devices that JAX shows for each chip."""
    hbm_bytes: int
    """What a program may use of the memory, per chip: the compiler's own limit, a little below what is sold."""
    peak_flops: float
    """bfloat16."""
    hbm_bandwidth: float
    link_bandwidth: float
    """One link to one neighbour, one way."""
    dimensions: int
    """Of the torus: 2 (4 neighbours) or 3 (6)."""
    network_bandwidth: float
    """Data centre network, one way: the way to other slices."""
    pod: int
    """Most chips in one slice."""
    config: str
    """libtpu's name for how the cores of a chip are shown to JAX."""
    clock: float
    """Of its cores, in cycles per second: what the compiler's estimated cycles are counted in."""

    def peak_of(self, chips: int) -> float:
        return self.peak_flops * chips


# Memory limits: what libtpu 0.0.42 says is available when a program needs too much (two devices a chip on TPU7x).
# The rest: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, tables of specifications, 2026. They give links per
# chip, both ways together: v5e 400 GB/s over 4 links, v5p and TPU7x 1,200 over 6, v6e 800 over 4; so 50, 100, 100
# and 100 GB/s for one link one way. v4: 50 GB/s a link (arXiv 2304.01433, table 4). Network per chip: v5p 50 Gbit/s,
# v6e and TPU7x 100; v5e 6.4 Tbit/s for a pod of 256 chips; v4 is given nowhere: as v5p.
# Clock: the peak over the FLOPs that a device does in a cycle (2^17 on v5e, 2^18 on v4 and v5p, 2^19 on v6e and TPU7x).
# The compiler's cycles for a product of 8192 x 8192 come within 2 % of this peak on v5e and v5p, 8 % on v4, 12 % on
# v6e and 24 % on TPU7x, always below it.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", 1, int(30.75 * GIB), 275e12, 1200e9, 50e9, 3, 6.25e9, 4096, "megacore", 1.05e9),
        Chip("v5e", 1, int(15.75 * GIB), 197e12, 819e9, 50e9, 2, 3.125e9, 256, "default", 1.5e9),
        Chip("v5p", 1, int(95.74 * GIB), 459e12, 2765e9, 100e9, 3, 6.25e9, 6144, "megacore", 1.75e9),
        Chip("v6e", 1, int(31.25 * GIB), 918e12, 1638e9, 100e9, 2, 12.5e9, 256, "default", 1.75e9),
        Chip("tpu7x", 2, int(2 * 94.75 * GIB), 2307e12, 7380e9, 100e9, 3, 12.5e9, 9216, "default", 2.2e9),
    )
}

_SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))


def shapes(chip: Chip) -> list[tuple[int, ...]]:
    """The slices that exist: chips along each axis, smallest slice first.

    Two-dimensional ones are listed by Google; three-dimensional ones are a few below a cube of 4 x 4 x 4, and
    everything made of such cubes, sides in rising order, up to the largest slice.
    """
    if chip.dimensions == 2:
        return list(_FLAT)
    sides = range(4, chip.pod // 16 + 1, 4)
    cubes = [(a, b, c) for a in sides for b in sides if b >= a for c in sides if c >= b and a * b * c <= chip.pod]
    return [*_SMALL, *sorted(cubes, key=lambda shape: (math.prod(shape), shape[::-1]))]


def wrapped(chip: Chip, shape: tuple[int, ...]) -> bool:
    """Whether the ends of each axis are linked: cubes of 4 x 4 x 4, and whole pods of the flat kinds."""
    if chip.dimensions == 2:
        return math.prod(shape) == chip.pod
    return all(side % 4 == 0 for side in shape)


def host_shape(chip: Chip, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Chips of one host along each axis: 2 x 2, but 1 and 8 for the flat slices that are one machine."""
    if chip.dimensions == 2 and shape in ((1, 1), (2, 4)):
        return (*shape, 1)
    return 2, 2, 1
