"""A machine as the models of `lm plan` see it: chips, how they are linked, and along which links a mesh axis lies."""

import dataclasses
import math

from lm.chips import Chip
from lm.parallel.mesh import AXES, BETWEEN_SLICES

Spans = list[tuple[int, bool]]
"""Chips along each dimension of the torus that a group of devices spans, and whether these are a ring."""


@dataclasses.dataclass(frozen=True)
class Machine:
    """Slices of one kind of chip; unlike a `Topology` it needs neither libtpu nor devices."""

    chip: Chip
    shape: tuple[int, ...]
    """Chips along each axis of one slice."""
    slices: int = 1
    wrap: tuple[bool, ...] = ()
    """Along which axes the ends are linked; empty: none."""
    platform: str = "tpu"

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices


def between_slices(machine: Machine, sizes: dict[str, int]) -> dict[str, int]:
    """How many parts of each mesh axis lie on different slices."""
    outer, left = dict.fromkeys(AXES, 1), machine.slices
    for axis in BETWEEN_SLICES:
        outer[axis] = math.gcd(sizes[axis], left)
        left //= outer[axis]
    return outer


def spans_by_axis(machine: Machine, sizes: dict[str, int]) -> dict[str, Spans]:
    """The lines of the torus that each mesh axis lies along inside of a slice, as `make_mesh` lays it out.

    Axes are laid from the last, which talk most: one that is as long as some dimensions together takes these,
    whole; another takes parts of what is left. Devices of one chip are the innermost part.
    """
    outer = between_slices(machine, sizes)
    wrap = machine.wrap or (False,) * len(machine.shape)
    left = list(machine.shape)
    cores = machine.chip.devices
    found: dict[str, Spans] = {}
    for axis in reversed(AXES):
        size = sizes[axis] // outer[axis]
        inside = math.gcd(size, cores)
        size, cores = size // inside, cores // inside
        found[axis] = []
        whole = _subset(left, size)
        for place in whole:
            found[axis].append((left[place], wrap[place] and left[place] == machine.shape[place] > 2))
            left[place] = 1
        if not whole:
            for place in sorted(range(len(left)), key=lambda i: -left[i]):
                part = math.gcd(size, left[place])
                if part > 1:
                    ring = wrap[place] and part == machine.shape[place] > 2
                    found[axis].append((part, ring))
                    size, left[place] = size // part, left[place] // part
    return found


def _subset(left: list[int], size: int) -> list[int]:
    """Dimensions whose product is `size`, as many as can be; none when there are no such."""
    best: list[int] = []
    for chosen in range(1, 2 ** len(left)):
        places = [place for place in range(len(left)) if chosen >> place & 1 and left[place] > 1]
        if math.prod(left[place] for place in places) == size and size > 1 and len(places) > len(best):
            best = places
    return best
