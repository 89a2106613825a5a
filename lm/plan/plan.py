"""`lm plan`: the train step compiled for a machine that is not here, and what is known of it then."""

import dataclasses
import math
import re
import time

import jax

from lm import config as configs
from lm.errors import ConfigError, LmError
from lm.experiment import Config
from lm.parallel.mesh import AnyMesh, make_mesh
from lm.plan.advice import Change, program_warnings, size_warnings, smallest_changes
from lm.plan.compile import compile_train_step
from lm.plan.estimate import Estimate, MemoryUse, estimate, memory_use, second_state_bytes
from lm.plan.program import Program, memory_of, read_program
from lm.plan.topology import Topology, topology

COMPILED_CHANGES = 3
"""Changes that are compiled, at most, to find one with which a step fits."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of one config on one topology. Without `estimate`, the step needs more memory than there is."""

    where: Topology
    mesh: AnyMesh
    tokens: float
    """To train on."""
    price: float | None
    """Dollars for an hour of one chip."""
    compile_seconds: float
    program: Program | None
    memory: MemoryUse | None
    estimate: Estimate | None
    needed_bytes: int
    """On one chip: the peak, or what the compiler says it would take."""
    warnings: tuple[str, ...]
    changes: tuple[Change, ...] = ()
    """Where it does not fit: what would help, the smallest first."""


def plan(
    config: Config,
    name: str,
    *,
    slices: int = 1,
    tokens: float | None = None,
    price: float | None = None,
    advise: bool = True,
) -> Plan:
    """Compiles the step of `config` for the slices called `name` and estimates its cost.

    Raises ConfigError for a topology, mesh or batch that cannot be, or when libtpu is missing; LmError when the
    compiler fails for another reason than too little memory. `advise`: where a step does not fit, compile changes too.
    """
    tokens = check_run(config, tokens, price)
    where = topology(name, slices=slices)
    mesh = make_mesh(config.mesh, where.devices)
    sizes = size_warnings(config, mesh)
    start = time.monotonic()
    compiled = _compile(config, where)
    seconds = time.monotonic() - start
    if isinstance(compiled, int):
        changes = smallest_changes(config, where.machine, dict(mesh.shape), compiled) if advise else ()
        changes = compiled_changes(config, where, changes)
        needed = compiled * where.chip.devices
        return Plan(where, mesh, tokens, price, seconds, None, None, None, needed, sizes, changes)
    program = read_program(compiled, mesh)
    result, memory = estimate(program, config, where, mesh), memory_use(program, config, where, mesh)
    return Plan(
        where=where,
        mesh=mesh,
        tokens=tokens,
        price=price,
        compile_seconds=seconds,
        program=program,
        memory=memory,
        estimate=result,
        needed_bytes=memory.total,
        warnings=(*program_warnings(program, result, config, mesh), *sizes),
    )


def check_run(config: Config, tokens: float | None, price: float | None) -> float:
    """The tokens to train on: what the config says where they are None. Raises ConfigError for what is no number."""
    for option, value in (("--tokens", tokens), ("--price", price)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{option} must be a number above 0, got {value}")
    return config.train.steps * config.train.batch_size * config.train.sequence_length if tokens is None else tokens


def _compile(config: Config, where: Topology) -> jax.stages.Compiled | int:
    """The compiled step or, when it needs more memory than a device has, how many bytes it needs."""
    again = second_state_bytes(config, make_mesh(config.mesh, where.devices))
    try:
        compiled = compile_train_step(config, where.devices).compiled
        total = memory_of(compiled).total + again
        return total if again and total > where.hbm_bytes else compiled
    except jax.errors.JaxRuntimeError as error:
        needed = needed_memory(str(error))
        if needed is None:
            raise LmError(f"the compiler failed for {where.name}: {error}") from error
        return needed + again


def compiled_changes(config: Config, where: Topology, changes: tuple[Change, ...]) -> tuple[Change, ...]:
    """The changes with what the compiler says of the first few, up to one with which the step fits."""
    found = list(changes)
    for place, change in enumerate(changes[:COMPILED_CHANGES]):
        if change.chips > 1:
            break
        try:
            changed = configs.override(config, change.options)
            configs.check(changed)
            compiled = _compile(changed, where)
        except LmError as error:
            found[place] = dataclasses.replace(change, failed=str(error).splitlines()[0])
            continue
        fits = not isinstance(compiled, int)
        again = second_state_bytes(changed, make_mesh(changed.mesh, where.devices))
        needed = compiled if isinstance(compiled, int) else memory_of(compiled).total + again
        found[place] = dataclasses.replace(change, needed=needed, fits=fits)
        if fits:
            break
    return tuple(found)


_NEEDED = (
    re.compile(r"\(([\d.]+)([BKMGT]?)\) exceeds available HBM"),
    re.compile(r"Used ([\d.]+)([BKMGT]?) of [\d.]+[BKMGT]? hbm", re.IGNORECASE),
)


def needed_memory(message: str) -> int | None:
    """Bytes on one device that a program would take, as XLA says when that is too much; None for other errors."""
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    for pattern in _NEEDED:
        if match := pattern.search(message):
            return int(float(match[1]) * 1024 ** "BKMGT".index(match[2] or "B"))
    return None
