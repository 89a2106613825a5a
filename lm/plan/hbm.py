"""Bytes that an instruction of the compiled program moves in the memory of the device (HBM) and of the host.

A fusion reads its operands and writes its results; of an operand that is only cut inside, the pieces, and of a result
that is an operand with a piece replaced, the piece: in a loop over layers, one layer of a stacked array. What lies in
the vector memory or another memory of the core does not count. Each byte counts once for an instruction, so this is
the least that it moves: a product may read an operand again for each tile, and rows are padded to tiles.
"""

import math
import re

from lm.plan.collectives import KINDS
from lm.plan.hlo import Computation, Instruction, Module, dimensions, shape_bytes, tuple_parts

HBM, HOST, CORE = "hbm", "host", "core"

_SPACE = re.compile(r"S\((\d+)\)")
_SPACES = {"0": HBM, "5": HOST}
_NOTHING = (
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"),
    *("optimization-barrier", "partition-id", "replica-id", "async-update"),
)
_BOOKKEEPING = re.compile(
    r'custom_call_target="(AllocateBuffer|ConcatBitcast|PrepareAsyncCallDone|AsyncCollective\w*)"'
)
_UNCHANGED = ("bitcast", "reshape", "copy", "transpose", "convert")
"""What a fusion does to a whole operand without reading more of it than is used of the result."""
_CUTS = ("slice", "dynamic-slice", "gather")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}
"""What replaces a piece of its first operand, with the place of the operand that is the piece."""
_TRANSFERS = (*KINDS, "send", "recv")


def moved(instruction: Instruction, computation: Computation, module: Module) -> dict[str, int]:
    """Bytes by memory, HBM or HOST, of one run; nothing for what other instructions are: loops, branches, ends.

    Of collectives inside fusions and calls, the operands and results do not count here.
    """
    found = {HBM: 0, HOST: 0}
    opcode = instruction.opcode
    if opcode in _NOTHING or opcode.endswith("-done") or _is_bookkeeping(instruction):
        return found
    read: dict[str, float] = {}
    for place, name in enumerate(instruction.operands):
        read[name] = read.get(name, 0) + _read(instruction, place, computation, module)
    for name, elements in read.items():
        for shape in tuple_parts(computation.instructions[name].shape):
            if (space := memory_space(shape)) != CORE and (size := _elements(shape)):
                found[space] += round(min(1, elements / size) * shape_bytes(shape))
    for shape, share in _written(instruction, computation, module):
        if (space := memory_space(shape)) != CORE:
            found[space] += round(share * shape_bytes(shape))
    return found


def memory_space(shape: str) -> str:
    """Where an array of this shape lies: HBM, HOST, or CORE for all memories of the core itself."""
    match = _SPACE.search(shape)
    return _SPACES.get(match[1], CORE) if match else HBM


def is_transfer(instruction: Instruction) -> bool:
    """Whether the instruction is a collective, or a transfer between slices, itself."""
    return instruction.opcode.removesuffix("-start") in _TRANSFERS


def replaced(instruction: Instruction, computation: Computation, module: Module) -> tuple[Instruction, float] | None:
    """For an instruction that replaces a piece of an array in place: what the array was, and elements of the piece.

    None for everything else, also where a fusion makes the array itself and so writes all of it.
    """
    part, opcode = 0, instruction.opcode.removesuffix("-start")
    if opcode == "get-tuple-element":
        part = int(instruction.attribute(r"\bindex=(\d+)") or 0)
        instruction = computation.instructions[instruction.operands[0]]
        opcode = instruction.opcode
    if opcode == "fusion":
        inside = module.computations[instruction.called["calls"][0]]
        root = inside.root
        root = inside.instructions[root.operands[part]] if root.opcode == "tuple" else root
        if (found := replaced(_origin(root, inside), inside, module)) is None:
            return None
        before = _origin(found[0], inside)
        if before.opcode != "parameter":
            return None
        return computation.instructions[instruction.operands[int(before.arguments)]], found[1]
    if opcode not in _UPDATES:
        return None
    arrays = [computation.instructions[name] for name in instruction.operands]
    return arrays[0], _elements(arrays[_UPDATES[opcode]].shape)


def _origin(value: Instruction, computation: Computation) -> Instruction:
    while value.opcode in _UNCHANGED:
        value = computation.instructions[value.operands[0]]
    return value


def _read(instruction: Instruction, place: int, computation: Computation, module: Module) -> float:
    """Elements that an instruction reads of the operand at `place`; infinite for all of it."""
    opcode = instruction.opcode.removesuffix("-start")
    if place == 0 and opcode in _CUTS:
        return sum(_elements(part) for part in _results(instruction))
    if place == 0 and opcode in _UPDATES:
        # A scatter adds to what is there, as a rule.
        updates = computation.instructions[instruction.operands[_UPDATES[opcode]]]
        return _elements(updates.shape) if opcode == "scatter" else 0
    if opcode == "recv":
        return 0
    if (inside := _body(instruction, module)) is not None:
        return _read_inside(inside.parameters[place], inside, module, math.inf)
    return math.inf


def _read_inside(value: Instruction, computation: Computation, module: Module, beyond: float) -> float:
    """Elements that a fused computation reads of a value; `beyond` if the value is what it returns."""
    if value is computation.root:
        return beyond
    total = 0.0
    for user in computation.instructions.values():
        for place, name in enumerate(user.operands):
            if name != value.name:
                continue
            if user.opcode in _UNCHANGED:
                total += _read_inside(user, computation, module, beyond)
            elif user.opcode == "fusion":
                inside = module.computations[user.called["calls"][0]]
                after = _read_inside(user, computation, module, beyond)
                total += _read_inside(inside.parameters[place], inside, module, after)
            elif user.opcode in ("tuple", *KINDS) or _is_bookkeeping(user):
                pass  # handed on as it is; what a collective reads is counted with the collective
            else:
                total += _read(user, place, computation, module)
    return total


def _written(instruction: Instruction, computation: Computation, module: Module) -> list[tuple[str, float]]:
    """The shapes of the results with the share of each that is written."""
    shapes = [part for shape in _results(instruction) for part in tuple_parts(shape)]
    inside = _body(instruction, module)
    if inside is None:
        piece = replaced(instruction, computation, module)
        return [(shape, piece[1] / _elements(shape) if piece else 1.0) for shape in shapes]
    root = inside.root
    roots = [inside.instructions[name] for name in root.operands] if root.opcode == "tuple" else [root] * len(shapes)
    return [(shape, _share(one, shape, inside, module)) for shape, one in zip(shapes, roots, strict=False)]


def _share(result: Instruction, shape: str, inside: Computation, module: Module) -> float:
    """The part of a result that a fusion writes: none of what it only hands on, of what is replaced the piece."""
    if result.opcode == "parameter" or _is_carried(result, inside):
        return 0.0
    piece = replaced(_origin(result, inside), inside, module)
    if piece is None or _origin(piece[0], inside).opcode != "parameter":
        return 1.0
    return min(1.0, piece[1] / max(1, _elements(shape)))


def _is_carried(result: Instruction, inside: Computation) -> bool:
    """Whether a result in a fusion is that of a collective, which the fusion only starts, goes on with or ends."""
    while result.opcode in (*_UNCHANGED, "dynamic-slice", "get-tuple-element"):
        result = inside.instructions[result.operands[0]]
    return result.opcode in KINDS or _is_bookkeeping(result)


def _results(instruction: Instruction) -> list[str]:
    """The shapes that an instruction writes: a start also returns its operands and bookkeeping."""
    opcode, parts = instruction.opcode, tuple_parts(instruction.shape)
    if opcode in ("copy-start", "recv"):
        return parts[:1]
    if opcode == "send":
        return []
    if opcode.endswith("-start") and opcode != "all-reduce-start":
        return parts[1:2]
    return parts


def _body(instruction: Instruction, module: Module) -> Computation | None:
    """The computation that a fusion, or the start of an asynchronous call, stands for."""
    if instruction.opcode not in ("fusion", "async-start", "call-start"):
        return None
    called = instruction.called
    return module.computations[called.get("calls", called.get("to_apply", ()))[0]]


def _is_bookkeeping(instruction: Instruction) -> bool:
    return instruction.opcode == "custom-call" and _BOOKKEEPING.search(instruction.attributes) is not None


def _elements(shape: str) -> int:
    return sum(math.prod(dimensions(part)) for part in tuple_parts(shape) if "[" in part)
