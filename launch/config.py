"""The root of a machines file: where a run is launched, and what it is called there."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from launch.gke import Gke
from launch.local import Local
from launch.slurm import Slurm
from launch.ssh import Ssh
from launch.target import problems
from launch.tpu_vm import TpuVm


@dataclasses.dataclass(frozen=True)
class Machines:
    """One target, and what all targets have."""

    name: str
    """Of the launch, on the target: folders, jobs and machines are called so."""
    local: Local | None = None
    ssh: Ssh | None = None
    slurm: Slurm | None = None
    gke: Gke | None = None
    tpu_vm: TpuVm | None = None
    python: str = "python3"
    """The interpreter there, with the dependencies of lm; the code itself is copied."""
    setup: tuple[str, ...] = ()
    """Lines of shell that come before it, each of them: modules to load, an environment to activate."""
    environment: tuple[str, ...] = ()
    """NAME=VALUE for all processes."""

    def check(self) -> Iterator[tuple[str, str]]:
        yield from problems(self.name, self.python, self.setup, self.environment)
        given = [name for name in TARGETS if getattr(self, name) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            yield given[-1] if given else TARGETS[0], f"one target must be given, of {', '.join(TARGETS)}; got {found}"

    @property
    def target(self) -> tuple[str, Any]:
        """The name of the target, and its section."""
        return next((name, getattr(self, name)) for name in TARGETS if getattr(self, name) is not None)


TARGETS = ("local", "ssh", "slurm", "gke", "tpu_vm")
"""Each is a field of `Machines`, and a module here with `target(name, section, commands)`."""
SECTIONS = frozenset(field.name for field in dataclasses.fields(Machines))
"""Overrides whose key starts with one of these are for the machines, all others for the config."""
