"""The collectives that one computation runs, each once, in whatever form the compiler left them."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

from jax.sharding import Mesh

from lm.plan.groups import Groups, groups_of, mesh_axes, slice_groups
from lm.plan.hlo import Computation, Instruction, Module, shape_bytes, tuple_parts

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_KERNEL = 'custom_call_target="tpu_custom_call"'
_START, _DONE = '"AsyncCollectiveStart"', '"AsyncCollectiveDone"'
_TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_RENDEZVOUS = r'_xla_host_transfer_rendezvous="([^"]*)"'


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program, its sizes for one device and one run."""

    kind: str
    name: str
    op_name: str
    """The operation of the source that asked for it."""
    operand_bytes: int
    result_bytes: int
    group_size: int
    """Devices that take part with one device, itself included; 2 for a permutation."""
    axes: tuple[str, ...]
    """Mesh axes that it runs along."""
    asynchronous: bool
    """Whether the program computes something between its start and its end."""
    hidden_cycles: int
    """Estimated cycles of what it computes there, one run."""
    algorithm: str
    """How the compiler carries it out, in its own words; colors are the paths over the torus used at once."""
    network: Literal["links", "data_center"] = "links"
    """Links between the chips of a slice, or the network between slices."""
    times: int = 1
    """Runs in one step."""

    @property
    def bytes(self) -> int:
        """Of the whole, unsharded side: the result of a gather, the operand of a scatter."""
        return self.operand_bytes if self.kind == "reduce-scatter" else self.result_bytes

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends in one run on a ring of its group, the least possible for all but all-to-all."""
        n = self.group_size
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.result_bytes)
        if self.kind == "all-reduce":
            return 2 * self.result_bytes * (n - 1) / n
        if self.kind == "reduce-scatter" and self.result_bytes:
            # Summed over more devices than it is split over: the parts are all-reduced over the rest.
            split = max(1, round(self.operand_bytes / self.result_bytes))
            rest = max(1.0, n / split)
            return self.operand_bytes * (split - 1) / split + 2 * self.result_bytes * (rest - 1) / rest
        return self.bytes * (n - 1) / n


def find_collectives(
    computation: Computation, module: Module, mesh: Mesh, cycles_of: Callable[[Instruction], int]
) -> Iterator[Collective]:
    """Collectives that a run of `computation` starts itself: not those in its loops, branches and calls."""
    order = list(computation.instructions.values())
    users = {name: one for one in reversed(order) for name in one.operands}
    for place, instruction in enumerate(order):
        after = order[place + 1 :]
        for inner, inside in _started(instruction, computation, module):
            done = _end(instruction, inner, after, module)
            parts = _scattered(inner, inside)
            kind = inner.opcode.removesuffix("-start")
            yield Collective(
                kind="reduce-scatter" if parts else kind,
                name=instruction.name,
                op_name=_op_name(inner, instruction, done, users),
                operand_bytes=sum(inside.instructions[name].bytes for name in inner.operands),
                result_bytes=parts or _result_bytes(inner, done),
                algorithm=_algorithm(inner.attributes + instruction.attributes),
                **_members(kind, groups_of(inner, mesh.devices.size), mesh),
                **_overlap(done, after, cycles_of),
            )
        if instruction.opcode == "send" and (match := _TRANSFER.search(instruction.attributes)):
            # Between slices a collective is a send to the network's runtime, which also adds, and a recv from it.
            key = instruction.attribute(_RENDEZVOUS)
            recv = next(one for one in order if one.opcode == "recv" and one.attribute(_RENDEZVOUS) == key)
            done = next((one for one in after if one.opcode == "recv-done" and recv.name in one.operands), None)
            kind = "collective-permute" if match[1] == "ONE_TO_ONE" else match[1].lower().replace("_", "-")
            yield Collective(
                kind=kind,
                name=instruction.name,
                op_name=_op_name(instruction, recv, done, users) or key or "",
                operand_bytes=computation.instructions[instruction.operands[0]].bytes,
                result_bytes=shape_bytes(tuple_parts(recv.shape)[0]),
                algorithm="",
                network="data_center",
                **_members(kind, slice_groups(instruction, mesh), mesh),
                **_overlap(done, after, cycles_of),
            )


def _members(kind: str, groups: Groups, mesh: Mesh) -> dict[str, Any]:
    size = 2 if kind == "collective-permute" else max(len(group) for group in groups)
    return {"group_size": size, "axes": mesh_axes(groups, mesh)}


def _overlap(
    done: Instruction | None, after: list[Instruction], cycles_of: Callable[[Instruction], int]
) -> dict[str, Any]:
    """Whether, and for how many cycles, something is computed before the end; nothing where there is no end."""
    between = after[: after.index(done)] if done is not None else []
    cycles = sum(cycles_of(one) for one in between)
    busy = any(one.opcode in ("while", "call", "conditional") or _KERNEL in one.attributes for one in between)
    return {"asynchronous": cycles > 0 or busy, "hidden_cycles": cycles}


def _algorithm(attributes: str) -> str:
    found = [re.search(pattern, attributes) for pattern in (r'"emitter":"(\w+)"', r'"strategy":"(\w+)"')]
    words = [match[1] for match in found if match]
    if colors := re.search(r"\bcolors:(\d+)", attributes):
        words.append(f"colors {colors[1]}")
    return " ".join(words)


def _op_name(inner: Instruction, start: Instruction, done: Instruction | None, users: dict[str, Instruction]) -> str:
    """The source operation; where the compiler lost it, that of the next instruction that has one."""
    for one in (inner, start, done):
        if one is not None and one.op_name:
            return one.op_name
    one = users.get((done or start).name)
    while one is not None and not one.op_name:
        one = users.get(one.name)
    return "" if one is None else f"before {one.op_name}"


def _started(
    instruction: Instruction, computation: Computation, module: Module
) -> Iterator[tuple[Instruction, Computation]]:
    """The collectives that begin with an instruction, each with the computation that it is written in.

    TPU programs also carry them inside fusions: an all-reduce whose result is cut (a reduce-scatter), or one that
    starts in a fusion, goes on in fusions with computation and ends in another: each of these repeats it. Those that
    the SparseCores run stand in a computation that is called and waited for later.
    """
    if instruction.opcode.removesuffix("-start") in KINDS:
        yield instruction, computation
    elif instruction.opcode in ("fusion", "async-start", "call-start"):
        called = instruction.called
        for name in called.get("calls", called.get("to_apply", ())):
            inside = module.computations[name]
            begins = any(_START in one.attributes for one in inside.instructions.values())
            for inner in inside.instructions.values():
                if inner.opcode == "fusion":
                    yield from _started(inner, inside, module)
                elif inner.opcode in KINDS and (begins or "chain_id=" not in inner.attributes):
                    yield inner, inside


def _end(start: Instruction, inner: Instruction, after: list[Instruction], module: Module) -> Instruction | None:
    """What waits for the collective that `start` begins; None when it is over with `start` itself."""
    if start.opcode.endswith("-start"):
        names = {start.name}
        for one in after:
            if names & set(one.operands):
                if one.opcode.endswith("-done"):
                    return one
                names.add(one.name)
    elif start.opcode == "fusion" and (channel := inner.attribute(r"channel_id=(\d+)")):
        for one in after:
            for name in one.called.get("calls", ()) if one.opcode == "fusion" else ():
                held = module.computations[name].instructions.values()
                ends = any(_DONE in part.attributes for part in held)
                if ends and any(part.attribute(r"channel_id=(\d+)") == channel for part in held):
                    return one
    return None


def _scattered(inner: Instruction, inside: Computation) -> int:
    """Bytes that are kept of an all-reduce of which each device only cuts out its part; 0 when it keeps all."""
    if inner.opcode != "all-reduce":
        return 0
    carried, kept, other = {inner.name}, 0, False
    for one in inside.instructions.values():
        if carried & set(one.operands):
            if one.opcode in ("bitcast", "copy", "reshape", "get-tuple-element"):
                carried.add(one.name)
            elif one.opcode == "dynamic-slice":
                kept += one.bytes
            else:
                other = True
    whole_is_result = inside.root.name in carried
    return 0 if other or whole_is_result else kept


def _result_bytes(inner: Instruction, done: Instruction | None) -> int:
    """Of the collective's result: a start returns operands and bookkeeping as well."""
    if not inner.opcode.endswith("-start"):
        return inner.bytes
    if done is not None:
        return done.bytes
    parts = tuple_parts(inner.shape)
    return shape_bytes(parts[1] if len(parts) > 1 else parts[0])
