"""How often a loop of the compiled program runs."""

from lm.plan.hlo import Computation, Instruction, Module

_UNCHANGED = ("copy", "bitcast", "reshape", "copy-done", "copy-start", "optimization-barrier")


def trip_count(loop: Instruction, around: Computation, module: Module) -> int | None:
    """Runs of the body of a `while` that stands in `around`; None when the program does not show it.

    Either the compiler wrote it down, or the loop counts: its condition compares a carried number with a limit, and
    its body adds a constant to that number.
    """
    known = loop.attribute(r'known_trip_count":\{"n":"(\d+)"')
    if known is not None:
        return int(known)
    condition = module.computations[loop.called["condition"][0]]
    body = module.computations[loop.called["body"][0]]
    compare, left, right = _binary(condition.root, condition, module, "compare")
    direction = compare.attribute(r"direction=(\w+)") if compare else None
    if _carried(right) is not None and _added(body, _carried(right), module) is not None:
        left, right = right, left
        direction = {"GT": "LT", "GE": "LE", "NE": "NE"}.get(direction or "")
    counter = _carried(left)
    if counter is None:
        return None
    first, step = _first(loop, counter, around), _added(body, counter, module)
    limit = _constant(right)
    if limit is None and (place := _carried(right)) is not None and _kept(body, place):
        limit = _first(loop, place, around)
    if first is None or limit is None or not step or step < 0:
        return None
    if direction == "LT":
        return max(0, -(-(limit - first) // step))
    if direction == "LE":
        return max(0, (limit - first) // step + 1)
    return (limit - first) // step if direction == "NE" and (limit - first) % step == 0 else None


def _binary(
    found: Instruction, computation: Computation, module: Module, opcode: str
) -> tuple[Instruction | None, Instruction | None, Instruction | None]:
    """The operation with its two sources, also when it is the root of a fusion."""
    if found.opcode == "fusion":
        inside = module.computations[found.called["calls"][0]]
        operation, *sides = _binary(_source(inside.root, inside), inside, module, opcode)
        outer = [
            _source(computation.instructions[found.operands[int(side.arguments)]], computation)
            if side is not None and side.opcode == "parameter"
            else side
            for side in sides
        ]
        return operation, outer[0], outer[1]
    if found.opcode != opcode:
        return None, None, None
    left, right = (_source(computation.instructions[name], computation) for name in found.operands)
    return found, left, right


def _source(instruction: Instruction, computation: Computation) -> Instruction:
    """Where a value comes from, through operations that leave it as it is."""
    while instruction.opcode in _UNCHANGED:
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def _carried(instruction: Instruction | None) -> int | None:
    """The place in the loop's state that an instruction in its body or condition reads."""
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    return int(instruction.attribute(r"\bindex=(\d+)") or 0)


def _constant(instruction: Instruction | None) -> int | None:
    if instruction is None or instruction.opcode != "constant":
        return None
    text = instruction.arguments.strip()
    return int(text) if text.lstrip("-").isdigit() else None


def _first(loop: Instruction, place: int, around: Computation) -> int | None:
    """The number that the loop starts with at a place of its state."""
    state = _source(around.instructions[loop.operands[0]], around)
    if state.opcode != "tuple":
        return None
    return _constant(_source(around.instructions[state.operands[place]], around))


def _added(body: Computation, place: int | None, module: Module) -> int | None:
    """The constant that one run of the body adds at a place of the state."""
    if place is None or body.root.opcode != "tuple":
        return None
    result = _source(body.instructions[body.root.operands[place]], body)
    _, left, right = _binary(result, body, module, "add")
    if _carried(left) == place:
        return _constant(right)
    return _constant(left) if _carried(right) == place else None


def _kept(body: Computation, place: int) -> bool:
    """Whether the body hands on what it found at a place of the state."""
    return body.root.opcode == "tuple" and place == _carried(
        _source(body.instructions[body.root.operands[place]], body)
    )
