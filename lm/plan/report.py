"""What a plan says: on one screen, or as JSON."""

import json
import textwrap
from typing import Any

from lm.chips import GIB
from lm.plan.estimate import NETWORKS, Estimate, MemoryUse, Traffic
from lm.plan.plan import Plan
from lm.plan.program import Program

COLUMNS, LINES = 120, 50
"""One screen."""
BOUNDS = {"data_center": "the network between slices", "host": "the way to the host", "memory": "HBM traffic"}


def print_plan(plan: Plan, *, as_object: bool) -> None:
    print(json.dumps(as_json(plan)) if as_object else as_text(plan))


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values: seconds, bytes and FLOPs. What is not known is null.

    `flops_per_step`: model FLOPs of all chips. `memory`: of one chip. `collectives`: for one device.
    """
    found, memory, program, chip = plan.estimate, plan.memory, plan.program, plan.where.chip
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
        "changes": [change.text(chip.devices) for change in plan.changes],
    }
    if found is None or memory is None or program is None:
        return values
    values["memory"] |= {f"{name}_bytes": size for name, (size, _) in memory_by_kind(memory, program).items()}
    values["memory"]["host_bytes"] = memory.host
    kinds = sorted({row.kind for row in found.traffic})
    values["collectives"] = {kind: _collective(plan, found, kind) for kind in kinds}
    return values | {
        "flops_per_step": found.model_flops,
        "product_flops_per_chip": found.product_flops,
        "attention_flops_per_chip": found.attention_flops,
        "hbm_bytes_per_chip": sum(program.hbm_bytes.values()) * chip.devices,
        "hbm_bytes_by_kind": {kind: size * chip.devices for kind, size in program.hbm_bytes.items()},
        "host_bytes_per_chip": program.host_bytes * chip.devices,
        "step_seconds": found.times.step,
        "seconds": found.times.parts,
        "mfu": found.mfu,
        "tokens_per_second": found.tokens_per_second,
        "days": found.days(plan.tokens),
        "chip_hours": found.chip_hours(plan.tokens),
        "dollars": None if plan.price is None else found.chip_hours(plan.tokens) * plan.price,
        "bound_by": found.times.bound_by,
    }


def for_run(values: dict[str, Any], tokens: float, price: float | None) -> dict[str, Any]:
    """What `as_json` gave, for another number of tokens and another price."""
    if values["tokens_per_second"] is None:
        return values | {"tokens": tokens}
    days = tokens / values["tokens_per_second"] / 86400
    hours = days * 24 * values["chips"]
    return values | {
        "tokens": tokens,
        "days": days,
        "chip_hours": hours,
        "dollars": None if price is None else hours * price,
    }


def memory_by_kind(memory: MemoryUse, program: Program) -> dict[str, tuple[int, str]]:
    """Bytes on a chip by what they hold, which add up to the peak, each with its mark as on the screen.

    Gradients and saved activations are the arrays that the loops over layers leave. Where the program has no such
    loops, gradients are modelled, and what is saved is among the rest.
    """
    mark = "m" if program.gradient_bytes is None else "c"
    return {
        "parameters": (memory.parameters, " "),
        "optimizer": (memory.optimizer, " "),
        "gradients": (memory.gradients, mark),
        "saved": (memory.saved, mark),
        "rest": (memory.rest, mark),
        "again": (memory.again, " "),
    }


def link_bytes(row: Traffic, plan: Plan) -> float:
    """What the busiest link of a chip (or its network) carries one way, as the estimate spreads the traffic."""
    chip = plan.where.chip
    return row.seconds * (chip.link_bandwidth if row.network == "links" else chip.network_bandwidth)


def _collective(plan: Plan, found: Estimate, kind: str) -> dict[str, float]:
    rows = [row for row in found.traffic if row.kind == kind]
    return {
        "bytes": sum(row.bytes for row in rows),
        "seconds": sum(row.seconds for row in rows),
        "wire_bytes": sum(row.wire_bytes for row in rows),
        "asynchronous_seconds": sum(row.asynchronous_seconds for row in rows),
        **{f"{network}_seconds": sum(row.seconds for row in rows if row.network == network) for network in NETWORKS},
        **{
            f"bytes_per_{name}": sum(link_bytes(row, plan) for row in rows if row.network == network)
            for name, network in (("link", "links"), ("chip_between_slices", "data_center"))
        },
    }


def as_text(plan: Plan) -> str:
    """One screen. `c` marks what was read from the compiler, `m` what is modelled; the rest follows from the config."""
    where, found, memory, program = plan.where, plan.estimate, plan.memory, plan.program
    sizes = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.shape.items() if size > 1) or "one device"
    slices = f"{where.slices} slices of " if where.slices > 1 else ""
    lines = [
        f"{slices}{where.name}: {where.chips} chips, {where.hosts} hosts; mesh {sizes}; "
        f"compiled in {plan.compile_seconds:.1f} s",
        "",
    ]
    if found is None or memory is None or program is None:
        over = plan.needed_bytes - where.chip.hbm_bytes
        lines.append(
            f"does not fit: needs {_gib(plan.needed_bytes)} GiB per chip c, {_gib(over)} more than the "
            f"{_gib(where.chip.hbm_bytes)} that there are"
        )
        changes = [f"  {change.text(where.chip.devices)}" for change in plan.changes]
        lines += ["", "what would help, the smallest change first:", *(changes or ["  nothing that is known here"])]
    else:
        lines += [*_memory_lines(memory, program), "", *_work_lines(plan, found, program), ""]
        lines += _result_lines(plan, found)
    marks = ["", "c: read from the compiler  m: modelled  no mark: follows from config and chip"]
    return "\n".join([*lines, *_warning_lines(plan.warnings, LINES - len(lines) - len(marks)), *marks])


def _memory_lines(memory: MemoryUse, program: Program) -> list[str]:
    names = {"saved": "saved activations", "rest": "temporary", "again": "state again, to verify"}
    kinds = memory_by_kind(memory, program)
    rows = [(names.get(name, name), *value) for name, value in kinds.items() if name != "again" or memory.again]
    rows.append(("peak", memory.total, "c"))
    lines = [f"  {name:<24} {_gib(size):>10} {mark}" for name, size, mark in rows]
    host = [f"  {'on the host':<24} {_gib(memory.host):>10} c"] if memory.host else []
    head = f"memory per chip, GiB: fits, {memory.total / memory.capacity:.0%} of {_gib(memory.capacity)}"
    return [head, *lines, *host]


def _work_lines(plan: Plan, found: Estimate, program: Program) -> list[str]:
    times, chip = found.times, plan.where.chip
    moved = sum(program.hbm_bytes.values()) * chip.devices
    host = program.host_bytes * chip.devices
    lines = [
        f"{'one step, per chip':<26} {'amount':>14} {'seconds':>10}",
        f"  {'model FLOPs (causal)':<24} {found.model_flops / found.chips / 1e12:>9.3f} TFLOP",
        f"  {'products':<24} {found.product_flops / 1e12:>9.3f} TFLOP {_seconds(times.products)} m (FLOPs c)",
        f"  {'attention kernels':<24} {found.attention_flops / 1e12:>9.3f} TFLOP {_seconds(times.attention)} m",
        f"  {'other operations':<24} {'':>15} {_seconds(times.other)} m",
        f"  {'copies':<24} {'':>15} {_seconds(times.copies)} m",
        f"  {'HBM traffic, at least':<24} {_gib(moved):>9} GiB c {_seconds(moved / chip.hbm_bandwidth)} (in these)",
        *(
            [f"  {'to and from the host':<24} {_gib(host):>9} GiB c {_seconds(times.host)} (beside products)"]
            if host
            else []
        ),
    ]
    if found.traffic:
        head = f"{'runs':>6} {'GiB c':>9} {'per link m':>10} {'seconds m':>10} {'overlapped c':>13}"
        lines += ["", f"{'collectives':<20} {'over':<11} {head}"]
    for row in found.traffic:
        share = row.asynchronous_seconds / row.seconds if row.seconds else 0.0
        numbers = f"{row.runs:>6} {_gib(row.bytes):>9} {_gib(link_bytes(row, plan)):>10} {_seconds(row.seconds)}"
        lines.append(f"  {row.kind:<18} {row.network.replace('_', ' '):<11} {numbers} {share:>13.0%}")
    return lines


def _result_lines(plan: Plan, found: Estimate) -> list[str]:
    times = found.times
    waiting = sum(times.parts[network] for network in NETWORKS)
    hidden = sum(times.asynchronous[network] - times.exposed[network] for network in NETWORKS)
    rows = [
        (
            "predicted step",
            f"{times.step:.4g} s; waiting for communication {waiting:.4g} of it, {hidden:.4g} more is hidden",
        ),
        ("MFU", f"{found.mfu:.1%}"),
        ("tokens/s", f"{found.tokens_per_second:,.0f} ({found.tokens_per_second / found.chips:,.0f} per chip)"),
        ("bound by", BOUNDS.get(times.bound_by, times.bound_by)),
        (
            f"{plan.tokens:,.4g} tokens",
            f"{found.days(plan.tokens):,.2f} days, {found.chip_hours(plan.tokens):,.1f} chip-hours"
            + ("" if plan.price is None else f", ${found.chip_hours(plan.tokens) * plan.price:,.2f}"),
        ),
    ]
    return [f"{name:<20} {value}  m" for name, value in rows]


def _warning_lines(warnings: tuple[str, ...], room: int) -> list[str]:
    """As many whole warnings as the screen has room for, and how many more there are."""
    if not warnings:
        return []
    lines = ["", "warnings"]
    for place, warning in enumerate(warnings):
        wrapped = textwrap.wrap(warning, COLUMNS, initial_indent="  - ", subsequent_indent="    ")
        more = place < len(warnings) - 1
        if len(lines) + len(wrapped) + more > room:
            return [*lines, f"  - {len(warnings) - place} more: --json has all"]
        lines += wrapped
    return lines


def _seconds(seconds: float) -> str:
    return f"{seconds:>10.4g}"


def _gib(size: float) -> str:
    return f"{size / GIB:,.3f}"
