"""The text of a compiled program, as computations of instructions.

Only what the facts in `lm/plan/program.py` need is kept. The grammar is that of XLA's HLO text
(openxla.org/xla/operation_semantics): one instruction a line, `%name = shape opcode(operands), attributes`.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator

_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,<= ]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_CLOSED = re.compile(r"^\}(, execution_thread=.*)?$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_REFERENCE = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(calls|to_apply|called_computations|branch_computations|body|condition)=(\{[^}]*\}|%?[\w.\-]+)"
)
_BRANCHES = re.compile(r"\b(?:true|false)_computation=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line. `shape`, `arguments` and `attributes` are text as it stands in the program."""

    name: str
    opcode: str
    shape: str
    arguments: str
    attributes: str
    root: bool

    @property
    def bytes(self) -> int:
        """Bytes of the result, all parts of a tuple together, without padding to tiles."""
        return shape_bytes(self.shape)

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the instructions that this one reads."""
        return tuple(_REFERENCE.findall(self.arguments))

    @functools.cached_property
    def called(self) -> dict[str, tuple[str, ...]]:
        """Names of computations by the attribute that calls them: calls, to_apply, body, condition, branches."""
        found = {key: tuple(re.findall(r"[\w.\-]+", names)) for key, names in _CALLED.findall(self.attributes)}
        if "branch_computations" in found:
            found["branches"] = found.pop("branch_computations")
        elif branches := _BRANCHES.findall(self.attributes):
            found["branches"] = tuple(branches)
        return found

    @functools.cached_property
    def op_name(self) -> str:
        """The source operation, such as `jit(step)/while/body/dot_general`; empty when the compiler made it."""
        match = re.search(r'\bop_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return match[1] if match else ""

    def attribute(self, pattern: str) -> str | None:
        """The first group of a regular expression found in the attributes."""
        match = re.search(pattern, self.attributes)
        return match[1] if match else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they run (in a scheduled program)."""

    name: str
    instructions: dict[str, Instruction]

    @functools.cached_property
    def root(self) -> Instruction:
        return next(i for i in reversed(self.instructions.values()) if i.root)

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.arguments): i for i in self.instructions.values() if i.opcode == "parameter"}


@dataclasses.dataclass(frozen=True)
class Module:
    computations: dict[str, Computation]
    entry: Computation


def parse(text: str) -> Module:
    """The module printed in `text`. Raises ValueError when it has no entry computation."""
    computations: dict[str, Computation] = {}
    entry, current = None, None
    for line in _lines(text):
        if match := _INSTRUCTION.match(line):
            if current is not None:
                instruction = _instruction(line, match)
                current.instructions[instruction.name] = instruction
        elif match := _COMPUTATION.match(line):
            current = computations[match[2]] = Computation(match[2], {})
            entry = current if match[1] else entry
        elif _CLOSED.match(line):
            current = None
    if entry is None:
        raise ValueError("no ENTRY computation: this is not the text of a compiled program")
    return Module(computations, entry)


def _lines(text: str) -> Iterator[str]:
    """One line for each instruction: attributes of kernels may hold line breaks."""
    held: list[str] = []
    for line in text.splitlines():
        new = line.startswith("  ") and _INSTRUCTION.match(line)
        if held and (new or _CLOSED.match(line)):
            yield "\n".join(held)
            held = []
        if new or held:
            held.append(line)
        else:
            yield line


def dimensions(shape: str) -> tuple[int, ...]:
    """The sizes of an array shape."""
    match = _ARRAY.search(shape)
    return tuple(int(size) for size in match[2].replace("<=", "").split(",") if size) if match else ()


def shape_bytes(shape: str) -> int:
    """Bytes of an array shape or of all arrays in a tuple shape; 4-bit types count a half each."""
    bits = 0
    for dtype, dimensions in _ARRAY.findall(shape):
        size = _bits(dtype)
        for dimension in dimensions.replace("<=", "").split(","):
            size *= int(dimension) if dimension else 1
        bits += size
    return bits // 8


def tuple_parts(shape: str) -> list[str]:
    """The shapes in a tuple shape, one level deep; the shape itself when it is an array."""
    if not shape.startswith("("):
        return [shape]
    parts, depth, start = [], 0, 1
    for place, character in enumerate(shape):
        depth += (character in "([{") - (character in ")]}")
        if (character == "," and depth == 1) or depth == 0:
            parts.append(re.sub(r"/\*.*?\*/", "", shape[start:place]).strip())
            start = place + 1
    return [part for part in parts if part]


def _instruction(line: str, match: re.Match[str]) -> Instruction:
    start = match.end()
    shape_end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    opened = line.index("(", shape_end)
    closed = _closing(line, opened)
    return Instruction(
        name=match[2],
        opcode=line[shape_end:opened].strip(),
        shape=line[start:shape_end],
        arguments=line[opened + 1 : closed],
        attributes=line[closed + 1 :],
        root=match[1] is not None,
    )


def _closing(line: str, opened: int) -> int:
    """Where the parenthesis that opens at `opened` closes."""
    depth = 0
    for found in re.compile(r"[()]").finditer(line, opened):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"unbalanced parentheses in {line.strip()[:200]}")


@functools.cache
def _bits(dtype: str) -> int:
    if dtype in _BITS:
        return _BITS[dtype]
    digits = re.match(r"[a-z]+(\d+)", dtype)
    if digits is None:
        raise ValueError(f"unknown type {dtype} in the program")
    return int(digits[1])
