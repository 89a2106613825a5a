"""What to change: where a compiled step costs more than it should, and where it does not fit."""

import dataclasses
import math
from collections.abc import Iterable

import jax

from lm import config as configs
from lm.chips import GIB
from lm.experiment import Config
from lm.parallel.layout import layout_of
from lm.parallel.mesh import AnyMesh
from lm.parallel.sharding import rules
from lm.plan.analytic import predict, takes_splash
from lm.plan.collectives import Collective
from lm.plan.estimate import Estimate
from lm.plan.machine import Machine
from lm.plan.program import Program
from lm.train.state import abstract_state

LARGE_REPLICATED = 2**23
"""Bytes of a parameter that should not be on every device."""
MUCH_WAITING = 0.2
"""Share of the step that may be spent waiting for communication."""
LANES = 128


def program_warnings(program: Program, found: Estimate, config: Config, mesh: AnyMesh) -> tuple[str, ...]:
    """What the compiled program does that costs more than it should, each with what to change."""
    warnings, train = [], config.train
    if program.unknown_loops:
        loops = ", ".join(program.unknown_loops[:3])
        warnings.append(f"how often these loops run could not be read, so all figures are lower bounds: {loops}")
    weight, inside = _smallest_matrix(config, mesh), [one for one in program.collectives if one.times > 1]
    summed = [one for one in inside if one.kind == "all-reduce" and one.bytes >= 2 * weight]
    if summed:
        warnings.append(
            f"{_largest(summed)}: the size of a weight, all-reduced in a loop, which is twice the bytes of a "
            "reduce-scatter. Another order or size of the mesh axes may avoid it"
        )
    moved = [one for one in inside if one.kind == "all-to-all" and one.times > train.accumulation]
    if moved and mesh.shape["expert"] == mesh.shape["stage"] == 1:
        warnings.append(
            f"{_largest(moved)}: rearranged between devices inside of the layers. Compare mesh.rules with the default"
        )
    times = found.times
    waiting = sum(times.synchronous.values()) / times.step
    if waiting > MUCH_WAITING:
        warnings.append(
            f"{waiting:.0%} of the step waits for communication that nothing is computed beside (more than "
            f"{MUCH_WAITING:.0%}): more tokens per chip and microbatch (train.accumulation, train.batch_size), or "
            "less of mesh.tensor and mesh.context"
        )
    return (*warnings, *_batch_warning(found, config, mesh))


def _largest(found: list[Collective]) -> str:
    one = max(found, key=lambda one: one.bytes * one.times)
    others = f" (and {len(found) - 1} others)" if len(found) > 1 else ""
    return f"{one.op_name or one.name} over {' and '.join(one.axes)}, {_gib(one.bytes)} GiB {one.times} times{others}"


def _batch_warning(found: Estimate, config: Config, mesh: AnyMesh) -> list[str]:
    """The rule: gathering weights and summing gradients, which take the same time for any number of tokens, must not
    take longer than products and attention, which grow with it."""
    kinds = ("all-gather", "reduce-scatter", "all-reduce")
    moved = sum(row.seconds for row in found.traffic if row.kind in kinds)
    work = found.times.products + found.times.attention
    if mesh.shape["tensor"] > 1 or mesh.shape["context"] > 1 or moved <= work:
        return []
    tokens = found.tokens / mesh.size / config.train.accumulation
    enough = f"about {tokens * moved / work:,.0f}" if work else "more"
    return [
        f"{tokens:,.0f} tokens per device and microbatch are too few to hide communication, which takes {moved:.4g} s "
        f"against {work:.4g} of products and attention: {enough} would do. Raise train.batch_size, lower "
        "train.accumulation, or take fewer chips"
    ]


def size_warnings(config: Config, mesh: AnyMesh) -> tuple[str, ...]:
    """What follows from sizes alone: dimensions that are padded, parameters that every device holds."""
    model, layout, warnings = config.model, layout_of(config.mesh, mesh), []
    for name, size, parts in (
        ("model.head_dim", model.head_width, 1),
        ("model.width", model.width, 1),
        ("model.hidden", model.hidden_width, layout.parts("mlp")),
        ("model.vocab_size", model.vocab_size, layout.parts("vocab")),
    ):
        padded = -(-size // parts // LANES) * LANES * parts
        if size % (LANES * parts):
            split = f" in {parts} parts of {size / parts:g}" if parts > 1 else ""
            warnings.append(
                f"{name} = {size}{split} is padded to multiples of {LANES}, {padded / size - 1:.1%} more; {padded} "
                "costs the same"
            )
    if not takes_splash(model, config.train.sequence_length, layout.parts("sequence")):
        warnings.append(
            "attention stores its scores, sequence x sequence for each head: the kernel needs heads of 64 or more, and "
            f"parts of the sequence that are multiples of {LANES}"
        )
    if mesh.size == 1:
        return tuple(warnings)
    copied = [
        (leaf.size * leaf.dtype.itemsize, ".".join(str(key.key) for key in path))
        for path, leaf in jax.tree_util.tree_flatten_with_path(abstract_state(config, mesh).params)[0]
        if leaf.sharding.is_fully_replicated and leaf.size * leaf.dtype.itemsize >= LARGE_REPLICATED
    ]
    if copied:
        size, name = max(copied)
        warnings.append(
            f"{len(copied)} parameters, {_gib(sum(size for size, _ in copied))} GiB together, are on every device, of "
            f"them {name} with {_gib(size)}: split them with mesh.fsdp or mesh.tensor"
        )
    return tuple(warnings)


def _smallest_matrix(config: Config, mesh: AnyMesh) -> float:
    """Elements of the smallest matrix of a layer, gathered, as one device has it."""
    model = config.model
    smaller = min(model.key_value_heads * model.head_width, model.hidden_width)
    return model.width * smaller / mesh.shape["tensor"]


# Too little memory


@dataclasses.dataclass(frozen=True)
class Change:
    """Options with which a step should fit."""

    options: tuple[str, ...]
    """As on the command line."""
    needed: float
    """Bytes on one device: modelled, or the compiler's where `fits` is known."""
    chips: int = 1
    """How many times as many chips it takes."""
    fits: bool | None = None
    """What the compiler says; None where it was not asked."""
    failed: str = ""
    """Why it could not be compiled."""

    def text(self, devices: int) -> str:
        """One line, with the memory of a chip of so many devices."""
        more = [f"{self.chips} times as many chips"] if self.chips > 1 else []
        head = ", ".join([*more, " ".join(self.options) or "nothing else"])
        size = f"{_gib(self.needed * devices)} GiB per chip"
        if self.failed:
            return f"{head}: not possible here: {self.failed}"
        if self.fits is None:
            return f"{head}: about {size} m"
        return f"{head}: compiled: {'fits with' if self.fits else 'does not fit, needs'} {size} c"


def smallest_changes(config: Config, machine: Machine, sizes: dict[str, int], needed: int) -> tuple[Change, ...]:
    """Options that should make a step fit that takes `needed` bytes on a device, the smallest change first.

    The analytic model says by how much each changes what is needed.
    """
    train, devices = config.train, machine.chip.devices
    capacity = machine.chip.hbm_bytes / devices
    now = predict(config, machine, sizes).memory.total
    rows = train.batch_size // train.accumulation // math.prod(sizes[axis] for axis in rules(config.mesh)["batch"])
    powers = [parts for parts in _powers(rows) if rows % parts == 0]
    # Lists of names are for another remat policy.
    names = [f"--train.{name}=" for name in ("saved", "offloaded") if getattr(train, name)]
    full = ("--train.remat", "full", *names) if train.remat != "full" else ()
    host = ("--train.optimizer_memory", "host") if train.optimizer_memory == "device" else ()

    def change(
        *, once: bool = False, remat: bool = False, parts: int = 1, offload: bool = False, chips: int = 1
    ) -> Change:
        options: tuple[str, ...] = ("--recovery.verify_every", "0") if once else ()
        options += full if remat else ()
        if parts > 1:
            options += ("--train.accumulation", f"{train.accumulation * parts}")
        options += host if offload else ()
        changed = configs.override(config, options)
        larger = dataclasses.replace(machine, slices=1, shape=(machine.chips * chips,))
        after = predict(changed, larger, sizes | {"fsdp": sizes["fsdp"] * chips}).memory.total
        return Change(options, max(needed + (after - now) / devices, after / devices), chips)

    def first(options: Iterable[Change]) -> list[Change]:
        return next(([option] for option in options if option.needed <= capacity), [])

    most = powers[-1] if powers else 1
    options = [
        *([change(once=True)] if config.recovery.verify_every else []),
        change(remat=True),
        *first(change(parts=parts) for parts in powers),
        change(offload=True),
        *first(change(remat=True, parts=parts) for parts in powers),
        change(remat=True, parts=most, offload=True),
    ]
    fitting = [option for option in options if option.options and option.needed <= capacity]
    if not fitting:
        fitting = first(change(remat=True, parts=most, chips=chips) for chips in _powers(2**13))
    return tuple({option.options: option for option in reversed(fitting)}.values())[::-1]


def _powers(largest: int) -> list[int]:
    return [2**i for i in range(1, max(1, largest).bit_length())]


def _gib(size: float) -> str:
    return f"{size / GIB:,.3f}"
