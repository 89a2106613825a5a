"""TPU slices that are not here, as devices to compile for."""

import dataclasses
import functools
import importlib.metadata
import math
import os
import re
from difflib import get_close_matches
from typing import Any

import jax

from lm.chips import TPUS, Chip
from lm.errors import ConfigError
from lm.plan.machine import Machine


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of one kind of chip; `devices` are what a mesh is made of."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    """Chips along each axis of one slice."""
    slices: int
    wrap: tuple[bool, ...]
    """Along which axes the ends are linked."""
    devices: tuple[jax.Device, ...]

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def hosts(self) -> int:
        return self.chips // math.prod(host_shape(self.chip, self.shape))

    @property
    def machine(self) -> Machine:
        """Without the devices."""
        return Machine(self.chip, self.shape, self.slices, self.wrap)

    @property
    def hbm_bytes(self) -> int:
        """What a program may use on one device."""
        return self.chip.hbm_bytes // self.chip.devices


def topology(name: str, *, slices: int = 1) -> Topology:
    """The slices called `name`, such as v5p:4x4x4: chips, hosts and devices to compile for.

    Raises ConfigError for a name that no slice has, with the nearest that exist, and when libtpu is missing or not
    the one for this JAX.
    """
    chip, shape = parse_name(name)
    if slices < 1:
        raise ConfigError(f"slices must be at least 1, got {slices}")
    wrap = (wrapped(chip, shape),) * len(shape)
    return Topology(name, chip, shape, slices, wrap, _devices(chip, shape, slices, _check_libtpu()))


def parse_name(name: str) -> tuple[Chip, tuple[int, ...]]:
    """Chip and shape in a name like v6e:16x16. Raises ConfigError, with the nearest names, when there is no such."""
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)+)", name)
    chip = TPUS.get(match[1]) if match else None
    shape = tuple(int(side) for side in match[2].split("x")) if match else ()
    if chip is None or shape not in shapes(chip):
        raise ConfigError(
            f"there is no TPU topology {name!r}; the nearest: {', '.join(_nearest(name))}. Chips are {', '.join(TPUS)}"
        )
    return chip, shape


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


def _nearest(name: str) -> list[str]:
    """Three names that exist: of the same chip, or the one spelt most like it, and about as large."""
    kind, mark, sides = re.fullmatch(r"([^:-]*)([:-]?)(.*)", name.lower(), re.DOTALL).groups()  # type: ignore[union-attr]
    kind = _OTHER_NAMES.get(kind, kind)
    chip = TPUS[(get_close_matches(kind, TPUS, 1, 0.0) or ["v5p"])[0]]
    wanted = sorted(max(1, int(side)) for side in re.findall(r"\d+", sides)) or [4] * chip.dimensions
    if mark == "-" and len(wanted) == 1:  # v5p-128: accelerator types count cores where a chip has two
        wanted = [max(1, wanted[0] // (2 if chip.dimensions == 3 else 1))]
    size = math.log(math.prod(wanted))

    def distance(shape: tuple[int, ...]) -> tuple[float, float]:
        same = sorted(shape) != wanted
        return same, abs(math.log(math.prod(shape)) - size) + 0.01 * abs(len(shape) - len(wanted))

    return [f"{chip.name}:{'x'.join(map(str, shape))}" for shape in sorted(shapes(chip), key=distance)[:3]]


def _check_libtpu() -> str:
    """The version of libtpu that is installed. Raises ConfigError when it is missing or not the one for this JAX."""
    wanted = wanted_libtpu()
    try:
        found = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            "compiling for TPU needs libtpu, which is not installed: pip install 'lm[plan]', "
            f"or libtpu=={wanted} alone (there are wheels for Linux on x86-64)"
        ) from None
    if not re.fullmatch(wanted.replace(".", r"\.").replace("*", ".*"), found):
        raise ConfigError(
            f"libtpu {found} does not go with jax {jax.__version__}, which compiles with {wanted}: "
            f"pip install 'libtpu=={wanted}'"
        )
    return found


@functools.cache
def _devices(chip: Chip, shape: tuple[int, ...], slices: int, libtpu: str) -> tuple[jax.Device, ...]:
    # Read when libtpu is loaded: no search for a machine with a TPU, and another process may have it loaded too.
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    from jax.experimental import topologies  # loads much, and only here

    options: dict[str, Any] = {
        "wrap": (wrapped(chip, shape),) * 3,
        "num_slices": slices,
        "chip_config_name": "megacore" if chip in _MEGACORE else "default",
        "chips_per_host_bounds": host_shape(chip, shape),
    }
    name = f"{chip.name}:{'x'.join(map(str, shape))}"
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except Exception as error:
        raise ConfigError(f"libtpu {libtpu} cannot describe {name}: {error}") from error
    return tuple(described.devices)


_SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_MEGACORE = (TPUS["v4"], TPUS["v5p"])
"""Their two cores are one device."""
_OTHER_NAMES = {"v7x": "tpu7x", "v7": "tpu7x", "7x": "tpu7x", "v5litepod": "v5e", "v5lite": "v5e", "v6": "v6e"}
_ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


def wanted_libtpu() -> str:
    """The version of libtpu that the installed JAX was built against, as its `tpu` extra states it."""
    for line in importlib.metadata.requires("jax") or ():
        if match := re.match(r"libtpu\s*==\s*([\d.*]+)", line):
            return match[1]
    return "*"
