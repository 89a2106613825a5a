"""What a step should take on the devices that are here, so that every run can check the model."""

import dataclasses

from jax.sharding import Mesh

from lm.chips import chip_of, measured_cpu
from lm.experiment import Config
from lm.parallel.mesh import count_slices
from lm.plan.analytic import Prediction, predict
from lm.plan.machine import Machine
from lm.plan.topology import wrapped
from lm.train.forecast import Expected
from lm.train.progress import human_bytes


def expect(config: Config, mesh: Mesh) -> Expected | None:
    """Step time, and memory of one device, as the analytic model has it; None where the chip is not known."""
    machine = machine_of(mesh)
    if machine is None:
        return None
    found = predict(config, machine, dict(mesh.shape))
    memory, devices = found.memory, machine.chip.devices
    return Expected(found.step_seconds, memory.total // devices, memory.again // devices, _lines(found, mesh))


def _lines(found: Prediction, mesh: Mesh) -> tuple[str, ...]:
    times, memory, estimate = found.estimate.times, found.memory, found.estimate
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    parts = {name: seconds for name, seconds in times.parts.items() if seconds}
    kinds = ("parameters", "optimizer", "gradients", "saved", "rest", "again")
    held = {name: size for name in kinds if (size := getattr(memory, name))}
    return (
        f"mesh            {sizes}",
        f"step            {times.step:.4g} s, {estimate.tokens_per_second:,.0f} tokens/s, MFU {estimate.mfu:.1%}",
        f"bound by        {times.bound_by}",
        *(f"  {name:<14}{seconds:.4g} s" for name, seconds in parts.items()),
        f"memory          {human_bytes(memory.total)} of {human_bytes(memory.capacity)} a chip",
        *(f"  {name:<14}{human_bytes(size)}" for name, size in held.items()),
    )


def machine_of(mesh: Mesh) -> Machine | None:
    """The chips that a mesh is made of, and how they are linked; None for a kind that is not in the table.

    GPUs are one group in which each reaches all others: where links do not join so many, over the network. CPUs
    are measured, and share one machine, or one for each process.
    """
    devices = list(mesh.devices.flat)
    first, slices = devices[0], count_slices(devices)
    if first.platform == "cpu":
        return Machine(measured_cpu(len(mesh.local_devices)), (len(devices) // slices,), slices, (False,), "cpu")
    chip = chip_of(first.device_kind)
    if chip is None:
        return None
    if first.platform == "tpu":
        # The places of every slice are counted from 0, and two devices of one chip have the same.
        shape = tuple(len({device.coords[i] for device in devices}) for i in range(chip.dimensions))
        return Machine(chip, shape, slices, (wrapped(chip, shape),) * len(shape), "tpu")
    if len(devices) > chip.pod:
        chip = dataclasses.replace(chip, link_bandwidth=chip.network_bandwidth)
    return Machine(chip, (len(devices),), slices, (False,), first.platform)
