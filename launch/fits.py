"""Whether a config fits the machines that it is for, before anything is created. Nothing is compiled."""

import json
import math
from typing import TYPE_CHECKING

from lm import config as configs
from lm.errors import ConfigError
from lm.experiment import Config

if TYPE_CHECKING:
    from lm.plan.machine import Machine


def check_fits(config: Config, topology: str, slices: int) -> str:
    """A line with what the model of `lm plan` predicts.

    Raises ConfigError for a topology that there is not, a mesh or batch that does not divide, and a step that does
    not fit the memory of a chip, with the smallest changes that help.
    """
    from lm.parallel.mesh import abstract_mesh  # these load jax
    from lm.plan.advice import smallest_changes
    from lm.plan.analytic import predict
    from lm.plan.machine import between_slices
    from lm.train.describe import describe_sharding

    machine = machine_of(topology, slices)
    chip = machine.chip
    mesh = abstract_mesh(config.mesh, machine.devices)
    sizes = dict(mesh.shape)
    where = f"{slices} x {topology}" if slices > 1 else topology
    if math.prod(between_slices(machine, sizes).values()) != slices:
        raise ConfigError(
            f"mesh: data {sizes['data']} x stage {sizes['stage']} cannot be spread over {slices} slices: make "
            f"mesh.data (or mesh.stage) a multiple of {slices}"
        )
    describe_sharding(config, mesh)  # raises for what does not divide
    found = predict(config, machine, sizes)
    needed, there = found.memory.total / 2**30, found.memory.capacity / 2**30
    if not found.fits:
        changes = smallest_changes(config, machine, sizes, found.memory.total)
        hints = "".join(f"\n    {change.text(chip.devices)}" for change in changes)
        raise ConfigError(
            f"the config does not fit {where}: by the model of `lm plan` a step needs {needed:.1f} GiB a device of "
            f"{there:.1f} GiB. Nothing was created.{' What would help:' if hints else ''}{hints}"
        )
    return f"fits {where}: {needed:.1f} of {there:.1f} GiB a device, {found.step_seconds:.2f} s a step by the model"


def check_mesh(config: Config, devices: int) -> str:
    """A line with the mesh. Raises ConfigError when mesh or batch do not divide over so many GPUs; memory is not looked
    at, as there is no model of it for them."""
    from lm.parallel.mesh import abstract_mesh  # loads jax
    from lm.train.describe import describe_sharding

    mesh = abstract_mesh(config.mesh, devices)
    describe_sharding(config, mesh)
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    return f"mesh on {devices} GPUs: {sizes or 'one device'}; whether their memory is enough is not looked at"


def training_hours(config: str, topology: str, slices: int) -> float:
    """What the steps of a config (the text of its config.json) take by the model, in hours."""
    from lm.parallel.mesh import abstract_mesh
    from lm.plan.analytic import predict

    found = configs.from_dict(Config, json.loads(config))
    machine = machine_of(topology, slices)
    step = predict(found, machine, dict(abstract_mesh(found.mesh, machine.devices).shape)).step_seconds
    return found.train.steps * step / 3600


def machine_of(topology: str, slices: int) -> "Machine":
    """Raises ConfigError for a topology that there is not."""
    from lm.plan.machine import Machine
    from lm.plan.topology import parse_name, wrapped

    chip, shape = parse_name(topology)
    return Machine(chip, shape, slices, (wrapped(chip, shape),) * len(shape))
