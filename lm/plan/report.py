"""`lm plan`: the train step compiled for a machine that is not here, and what that says, on one screen or as JSON."""

import dataclasses
import json
import math
import re
import time
from typing import Any

import jax

from lm.errors import ConfigError, LmError
from lm.experiment import Config
from lm.parallel.layout import layout_of
from lm.parallel.mesh import AnyMesh, make_mesh
from lm.plan.collectives import Collective
from lm.plan.compile import compile_train_step
from lm.plan.estimate import NETWORKS, Estimate, MemoryUse, estimate, memory_use, product_sizes, state_bytes
from lm.plan.program import Program, read_program
from lm.plan.topology import Topology, topology
from lm.train.state import abstract_state

GIB = 2**30
LARGE_REPLICATED = 2**23
"""Bytes of a parameter that should not be on every device."""
MUCH_WAITING = 0.2
"""Share of the step that may be spent waiting for communication."""
LANES = 128


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
    memory: MemoryUse | None
    estimate: Estimate | None
    needed_bytes: int
    """On one chip: the peak, or what the compiler says it would take."""
    warnings: tuple[str, ...]
    changes: tuple[str, ...] = ()
    """Where it does not fit: what would help, the smallest first."""


def plan(
    config: Config, name: str, *, slices: int = 1, tokens: float | None = None, price: float | None = None
) -> Plan:
    """Compiles the step of `config` for the slices called `name` and estimates its cost.

    Raises ConfigError for a topology, mesh or batch that cannot be, or when libtpu is missing; LmError when the
    compiler fails for another reason than too little memory.
    """
    for option, value in (("--tokens", tokens), ("--price", price)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{option} must be a number above 0, got {value}")
    where = topology(name, slices=slices)
    if tokens is None:
        tokens = config.train.steps * config.train.batch_size * config.train.sequence_length
    mesh = make_mesh(config.mesh, where.devices)
    start = time.monotonic()
    try:
        step = compile_train_step(config, where.devices)
    except jax.errors.JaxRuntimeError as error:
        seconds = time.monotonic() - start
        needed = needed_memory(str(error))
        if needed is None:
            raise LmError(f"the compiler failed for {where.name}: {error}") from error
        changes = smallest_changes(config, mesh, needed, where.hbm_bytes)
        needed *= where.chip.devices
        return Plan(where, mesh, tokens, price, seconds, None, None, needed, size_warnings(config, mesh), changes)
    seconds = time.monotonic() - start
    program = read_program(step.compiled, mesh)
    result, memory = estimate(program, config, where, mesh), memory_use(program, config, where, mesh)
    return Plan(
        where=where,
        mesh=mesh,
        tokens=tokens,
        price=price,
        compile_seconds=seconds,
        memory=memory,
        estimate=result,
        needed_bytes=memory.total,
        warnings=(*program_warnings(program, result, config, mesh), *size_warnings(config, mesh)),
    )


# What it says


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values: seconds, bytes and FLOPs. What is not known is null.

    `flops_per_step`: model FLOPs of all chips. `memory`: of one chip. `collectives`: for one device.
    """
    found, memory, chip = plan.estimate, plan.memory, plan.where.chip
    values: dict[str, Any] = {
        "fits": found is not None,
        "topology": plan.where.name,
        "slices": plan.where.slices,
        "chips": plan.where.chips,
        "hosts": plan.where.hosts,
        "mesh": dict(plan.mesh.shape),
        "memory": {
            "total_bytes": plan.needed_bytes,
            "capacity_bytes": chip.hbm_bytes,
            "over_bytes": max(0, plan.needed_bytes - chip.hbm_bytes) if found is None else 0,
        },
        "flops_per_step": None,
        "step_seconds": None,
        "mfu": None,
        "tokens_per_second": None,
        "collectives": {},
        "bound_by": "capacity",
        "tokens": plan.tokens,
        "compile_seconds": plan.compile_seconds,
        "warnings": list(plan.warnings),
        "changes": list(plan.changes),
    }
    if found is None or memory is None:
        return values
    for part in ("parameters", "optimizer", "gradients", "rest", "host"):
        values["memory"][f"{part}_bytes"] = getattr(memory, part)
    kinds = sorted({row.kind for row in found.traffic})
    values["collectives"] = {kind: _collective(found, kind) for kind in kinds}
    return values | {
        "flops_per_step": found.model_flops,
        "product_flops_per_chip": found.product_flops,
        "attention_flops_per_chip": found.attention_flops,
        "hbm_bytes_per_chip": found.hbm_bytes,
        "step_seconds": found.times.step,
        "seconds": found.times.parts,
        "mfu": found.mfu,
        "tokens_per_second": found.tokens_per_second,
        "days": found.days(plan.tokens),
        "chip_hours": found.chip_hours(plan.tokens),
        "dollars": None if plan.price is None else found.chip_hours(plan.tokens) * plan.price,
        "bound_by": found.times.bound_by,
    }


def _collective(found: Estimate, kind: str) -> dict[str, float]:
    rows = [row for row in found.traffic if row.kind == kind]
    return {
        "bytes": sum(row.bytes for row in rows),
        "seconds": sum(row.seconds for row in rows),
        "wire_bytes": sum(row.wire_bytes for row in rows),
        "asynchronous_seconds": sum(row.asynchronous_seconds for row in rows),
        **{f"{network}_seconds": sum(row.seconds for row in rows if row.network == network) for network in NETWORKS},
    }


def as_text(plan: Plan) -> str:
    """One screen. `c` marks what was read from the compiler, `m` what is modelled; the rest follows from the config."""
    where, found, memory = plan.where, plan.estimate, plan.memory
    sizes = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.shape.items() if size > 1) or "one device"
    slices = f"{where.slices} slices of " if where.slices > 1 else ""
    lines = [
        f"{slices}{where.name}: {where.chips} chips, {where.hosts} hosts; mesh {sizes}",
        f"compiled in {plan.compile_seconds:.1f} s",
        "",
    ]
    if found is None or memory is None:
        over = plan.needed_bytes - where.chip.hbm_bytes
        lines.append(
            f"does not fit: needs {_gib(plan.needed_bytes)} GiB per chip c, {_gib(over)} more than the "
            f"{_gib(where.chip.hbm_bytes)} that there are"
        )
        lines += ["", "what would help m:", *(f"  {change}" for change in plan.changes)]
    else:
        lines += [*_memory_lines(memory), "", *_work_lines(found), "", *_result_lines(plan, found)]
    if plan.warnings:
        lines += ["", "warnings", *(f"  - {warning}" for warning in plan.warnings)]
    return "\n".join([*lines, "", "c: read from the compiler  m: modelled  no mark: follows from config and chip"])


def _memory_lines(memory: MemoryUse) -> list[str]:
    rows = [
        ("parameters", memory.parameters, " "),
        ("optimizer", memory.optimizer, " "),
        ("gradients", memory.gradients, "m"),
        ("activations, temporary", memory.rest, "m"),
        ("peak", memory.total, "c"),
    ]
    lines = [f"  {name:<24} {_gib(size):>10} {mark}" for name, size, mark in rows]
    host = [f"  {'on the host':<24} {_gib(memory.host):>10} c"] if memory.host else []
    head = f"memory per chip, GiB: fits, {memory.total / memory.capacity:.0%} of {_gib(memory.capacity)}"
    return [head, *lines, *host]


def _work_lines(found: Estimate) -> list[str]:
    times = found.times
    lines = [
        f"{'one step, per chip':<26} {'amount':>14} {'seconds':>10}",
        f"  {'model FLOPs (causal)':<24} {found.model_flops / found.chips / 1e12:>9.3f} TFLOP",
        f"  {'products':<24} {found.product_flops / 1e12:>9.3f} TFLOP {_seconds(times.products)} c",
        f"  {'attention kernels':<24} {found.attention_flops / 1e12:>9.3f} TFLOP {_seconds(times.attention)} m",
        f"  {'other operations':<24} {'':>15} {_seconds(times.other)} c",
        f"  {'copies':<24} {'':>15} {_seconds(times.copies)} c",
        f"  {'HBM traffic, at least':<24} {_gib(found.hbm_bytes):>9} GiB   {_seconds(found.hbm_seconds)} m (in these)",
    ]
    if found.traffic:
        lines += [
            "",
            f"{'collectives':<19} {'over':<11} {'runs':>6} {'GiB c':>9} {'seconds m':>10} {'asynchronous c':>15}",
        ]
    for row in found.traffic:
        share = row.asynchronous_seconds / row.seconds if row.seconds else 0.0
        network = row.network.replace("_", " ")
        lines.append(
            f"  {row.kind:<17} {network:<11} {row.runs:>6} {_gib(row.bytes):>9} {_seconds(row.seconds)} {share:>15.0%}"
        )
    return lines


def _result_lines(plan: Plan, found: Estimate) -> list[str]:
    times = found.times
    waiting = sum(times.parts[network] for network in NETWORKS)
    hidden = sum(times.asynchronous.values()) - sum(times.exposed.values())
    rows = [
        (
            "predicted step",
            f"{times.step:.4g} s; waiting for communication {waiting:.4g} of it, {hidden:.4g} more is hidden",
        ),
        ("MFU", f"{found.mfu:.1%}"),
        ("tokens/s", f"{found.tokens_per_second:,.0f} ({found.tokens_per_second / found.chips:,.0f} per chip)"),
        ("bound by", {"data_center": "the network between slices"}.get(times.bound_by, times.bound_by)),
        (
            f"{plan.tokens:,.4g} tokens",
            f"{found.days(plan.tokens):,.2f} days, {found.chip_hours(plan.tokens):,.1f} chip-hours"
            + ("" if plan.price is None else f", ${found.chip_hours(plan.tokens) * plan.price:,.2f}"),
        ),
    ]
    return [f"{name:<20} {value}  m" for name, value in rows]


def _seconds(seconds: float) -> str:
    return f"{seconds:>10.4g}"


def _gib(size: float) -> str:
    return f"{size / GIB:,.3f}"


# Warnings


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


def smallest_changes(config: Config, mesh: AnyMesh, needed: int, capacity: int) -> tuple[str, ...]:
    """Options that should make a step fit that takes `needed` bytes of `capacity` on a device, the smallest first.

    A model: what is above state and gradients shrinks as saved activations do, in proportion.
    """
    parameters, optimizer = state_bytes(config, mesh)
    train = config.train
    on_device = optimizer if train.optimizer_memory == "device" else 0
    fixed = 2 * parameters + on_device
    variable = max(0, needed - fixed)
    rows = train.batch_size // train.accumulation // layout_of(config.mesh, mesh).parts("batch")
    more = [parts for parts in _powers(rows) if rows % parts == 0 and rows > 1]
    less = _saved(config, "full") / _saved(config, train.remat)
    full = [("--train.remat full", less)] * (train.remat != "full")

    def after(saved: float, parts: int, host: bool, chips: int) -> float:
        return (fixed - on_device * host + variable * saved / parts) / chips

    def accumulate(parts: int) -> str:
        return f"--train.accumulation {train.accumulation * parts}"

    host = ["--train.optimizer_memory host"] * (on_device > 0)
    options = [
        *((text, after(saved, 1, False, 1)) for text, saved in full),
        *_first([(accumulate(parts), after(1, parts, False, 1)) for parts in more], capacity),
        *((text, after(1, 1, True, 1)) for text in host),
        *_first([(f"{text} {accumulate(p)}", after(s, p, False, 1)) for text, s in full for p in more], capacity),
    ]
    saved, words = (full[0][1], [full[0][0]]) if full else (1.0, [])
    parts = more[-1] if more else 1
    together = [*words, *([accumulate(parts)] if more else []), *host]
    options.append((" ".join(together), after(saved, parts, bool(host), 1)))
    fitting = [f"{text}: about {_gib(size)} GiB" for text, size in options if text and size <= capacity]
    fitting = list(dict.fromkeys(fitting))
    if not fitting:
        chips = next((n for n in _powers(2**13) if after(saved, parts, False, n) <= capacity), None)
        basis = " ".join([*words, *([accumulate(parts)] if more else [])])
        if chips is not None:
            size = after(saved, parts, False, chips)
            fitting = [f"{chips} times as many chips, {basis or 'nothing else'}: about {_gib(size)} GiB each"]
    return tuple(fitting)


def _first(options: list[tuple[str, float]], capacity: int) -> list[tuple[str, float]]:
    return next(([option] for option in options if option[1] <= capacity), [])


def _powers(largest: int) -> list[int]:
    return [2**i for i in range(1, max(1, largest).bit_length())]


def _saved(config: Config, remat: str) -> float:
    """Elements for each token that are kept for the backward pass: of all layers, and of the one that is computed."""
    model = config.model
    all_of_one = product_sizes(model)
    kept: float = model.width
    if remat == "none":
        kept = all_of_one
    elif remat == "names":
        heads, grouped = model.heads * model.head_width, model.key_value_heads * model.head_width
        sizes = {"query": heads, "key": grouped, "value": grouped, "attention": heads, "attention_output": model.width}
        kept += sum(sizes.get(name, model.hidden_width) for name in config.train.saved)
    return model.layers / config.mesh.stage * kept + all_of_one


def print_plan(plan: Plan, *, as_object: bool) -> None:
    print(json.dumps(as_json(plan)) if as_object else as_text(plan))
