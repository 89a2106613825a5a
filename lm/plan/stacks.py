"""Arrays that a loop fills a piece at a time: what the layers save for the backward pass, and the gradients they leave.

Read from the states of the program's loops, by a rule: of two loops that stand side by side, what the first fills and
the second reads is saved; what the second fills is a gradient. In pipelines and with accumulation the loops stand in
another one.
"""

import dataclasses
from collections.abc import Iterator

from lm.plan.hbm import HBM, memory_space, replaced
from lm.plan.hlo import Computation, Instruction, Module, shape_bytes, tuple_parts

_SAME = ("copy", "copy-start", "copy-done", "bitcast", "optimization-barrier", "dynamic-update-slice-done")


@dataclasses.dataclass(frozen=True)
class Stacks:
    """Bytes in the memory of the device."""

    saved: int
    gradients: int


def find_stacks(module: Module) -> Stacks | None:
    """Of the pair of loops that saves most; None where no loop reads what another one filled."""
    found = [
        stacks
        for computation in module.computations.values()
        for loop in computation.instructions.values()
        if loop.opcode == "while" and (stacks := _between(loop, computation, module)) is not None
    ]
    return max(found, key=lambda one: one.saved, default=None)


def _between(backward: Instruction, computation: Computation, module: Module) -> Stacks | None:
    """What `backward` reads of loops before it in its computation, and what it fills itself."""
    state = _source(computation.instructions[backward.operands[0]], computation)
    if state.opcode != "tuple":
        return None
    saved: dict[tuple[str, int], int] = {}
    for name in state.operands:
        value = _source(computation.instructions[name], computation)
        loop, place = _element(value, computation)
        if loop is not None and loop.opcode == "while" and place in (filled := dict(_filled(loop, module))):
            saved[loop.name, place] = filled[place]
    if not saved:
        return None
    return Stacks(sum(saved.values()), sum(size for _, size in _filled(backward, module)))


def _filled(loop: Instruction, module: Module) -> Iterator[tuple[int, int]]:
    """Places in a loop's state of arrays that it fills a piece at a time, with their bytes in the device's memory:
    none for what lies in a memory of the core or on the host."""
    body = module.computations[loop.called["body"][0]]
    if body.root.opcode != "tuple":
        return
    for place, (name, shape) in enumerate(zip(body.root.operands, tuple_parts(loop.shape), strict=True)):
        if _fills(body.instructions[name], body, module):
            yield place, shape_bytes(shape) if memory_space(shape) == HBM else 0


def _fills(value: Instruction, body: Computation, module: Module) -> bool:
    """Whether a run of the body leaves an array of its state as it is but for a piece, itself or in a loop inside."""
    value = _source(value, body)
    if replaced(value, body, module) is not None:
        return True
    loop, place = _element(value, body)
    return loop is not None and loop.opcode == "while" and place in dict(_filled(loop, module))


def _source(value: Instruction, computation: Computation) -> Instruction:
    while value.opcode in _SAME:
        value = computation.instructions[value.operands[0]]
    return value


def _element(value: Instruction, computation: Computation) -> tuple[Instruction | None, int]:
    """The tuple that a value is taken from, and its place there."""
    if value.opcode != "get-tuple-element":
        return None, 0
    return computation.instructions[value.operands[0]], int(value.attribute(r"\bindex=(\d+)") or 0)
