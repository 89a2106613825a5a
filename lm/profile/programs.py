"""The compiled programs that a trace holds: what each of their instructions is, and whose it is.

The profiler puts the programs that ran, as XLA compiled them, beside the times. So an operation is named in the trace
alone, and here is found what it computes, which line of which file asked for it, and for which part of the model.
"""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from google.protobuf.message import DecodeError

from lm.profile.kinds import ATTENTION, KERNELS, kind_by_name, kind_of
from lm.profile.xplane import parse

REST = "rest of the step"
_OWN, _LIBRARY = re.compile(r"^.*/lm/"), re.compile(r"^.*/site-packages/")
PARTS = (
    ("attention", ("model/attention.py", "kernels/attention/", "model/positions.py")),
    ("feed-forward", ("model/feed_forward.py", "model/experts.py", "kernels/experts", "kernels/gelu.py")),
    ("norms", ("model/norms.py", "kernels/normalize.py")),
    ("loss", ("model/loss.py", "kernels/cross_entropy/")),
    ("optimizer and checks", ("/optim/", "/optax/", "train/guard.py", "train/groups.py", "train/step.py")),
    ("embedding and residual stream", ("model/transformer.py", "parallel/")),
)
"""Parts of a step, by the innermost of the files that a call went through."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """What the compiler made, as far as it is known."""

    name: str
    kind: str
    part: str = REST
    backward: bool = False
    again: bool = False
    """Whether it computes anew what the forward pass did not keep."""
    source: str = ""
    """file.py:line, of the part; not of what others call too."""
    op_name: str = ""
    """The stack of names of JAX: jit(train_step)/…/dot_general."""
    asynchronous: bool = False
    """Whether it begins, or waits for, what goes on beside others."""
    entry: bool = False
    """Whether it runs once each time the program does."""


class Programs:
    """Of one trace, by number and name. Programs that came from the cache of compiled ones have another number there
    than in the events, and several may have one name: so the one is taken that has the operation."""

    def __init__(self, space: Any):
        self._numbered: dict[int, _Module] = {}
        self._named: dict[str, list[_Module]] = defaultdict(list)
        for plane in space.planes:
            if plane.name == "/host:metadata":
                for number, data in _programs(plane):
                    module = _Module(data)
                    self._numbered[number] = module
                    self._named[module.name].append(module)

    def find(
        self, name: str, *, number: int = 0, program: str = "", category: str = "", op_name: str = "", source: str = ""
    ) -> Operation:
        """An operation by its name, in a program; what else the trace says of it serves where the program is not there.

        Args:
          number, program: those of the program; without its name, the number decides.
        """
        numbered = self._numbered.get(number)
        modules = [numbered] if numbered and program in ("", numbered.name) else []
        for module in (*modules, *self._named.get(program, ())):
            if found := module.operation(name):
                return found
        return _operation(name, kind_by_name(name, category), *_part_of([source] if source else []), op_name)


def _programs(plane: Any) -> Iterator[tuple[int, bytes]]:
    for number, metadata in plane.event_metadata.items():
        for stat in metadata.stats:
            if stat.bytes_value and plane.stat_metadata[stat.metadata_id].name.lower().replace(" ", "_") == "hlo_proto":
                yield _number(metadata.name, number), stat.bytes_value


def _number(name: str, key: int) -> int:
    """jit_train_step(6) is program 6."""
    inside = name.rpartition("(")[2].rstrip(")")
    return int(inside) if inside.isdigit() else key


class _Module:
    def __init__(self, data: bytes):
        try:
            self._proto = parse("HloProto", data).hlo_module
        except DecodeError:  # the times can be read without it
            self._proto = parse("HloProto", b"").hlo_module
        self.name = self._proto.name
        self._computations = {one.id: one for one in self._proto.computations}
        self._instructions = {i.name: (one, i) for one in self._proto.computations for i in one.instructions}
        self._numbered: dict[int, dict[int, Any]] = {}  # instructions, by computation and number
        self._opcodes: dict[int, set[str]] = {}
        self._known: dict[str, Operation] = {}

    def operation(self, name: str) -> Operation | None:
        if name not in self._known and name in self._instructions:
            self._known[name] = self._read(name)
        return self._known.get(name)

    def _read(self, name: str) -> Operation:
        computation, instruction = self._instructions[name]
        metadata, begun = instruction.metadata, self._begun(computation, instruction)
        frames = list(self._frames(metadata.stack_frame_id))
        if metadata.source_file:
            frames.insert(0, f"{metadata.source_file}:{metadata.source_line}")
        part, source = _part_of(frames)
        inside = {opcode for called in begun.called_computation_ids for opcode in self._inside(called)}
        text = " ".join((begun.custom_call_target, begun.name, metadata.op_name))
        kind = kind_of(begun.opcode, inside, text=text)
        if kind == KERNELS and part == "attention":
            kind = ATTENTION
        return _operation(
            name,
            kind,
            part,
            source,
            metadata.op_name,
            asynchronous=instruction.opcode.endswith(("-start", "-update", "-done")),
            entry=computation.id == self._proto.entry_computation_id,
        )

    def _begun(self, computation: Any, instruction: Any) -> Any:
        """What an instruction ends: where it began."""
        while instruction.opcode.endswith(("-done", "-update")) and instruction.operand_ids:
            if computation.id not in self._numbered:
                self._numbered[computation.id] = {one.id: one for one in computation.instructions}
            before = self._numbered[computation.id].get(instruction.operand_ids[0])
            if before is None or not before.opcode.endswith(("-start", "-update")):
                break
            instruction = before
        return instruction

    def _inside(self, number: int) -> set[str]:
        """Opcodes of a computation and all that it calls."""
        if number not in self._opcodes:
            self._opcodes[number] = set()
            for one in self._computations[number].instructions if number in self._computations else ():
                self._opcodes[number].add(one.opcode)
                if one.opcode != "reduce":  # whose computation says how it adds, and is no other work
                    for called in one.called_computation_ids:
                        self._opcodes[number] |= self._inside(called)
        return self._opcodes[number]

    def _frames(self, number: int) -> Iterator[str]:
        """file:line of each call, the innermost first. Everything is counted from 1; 0 is nothing."""
        index = self._proto.stack_frame_index
        while 0 < number <= len(index.stack_frames):
            frame = index.stack_frames[number - 1]
            if not 0 < frame.file_location_id <= len(index.file_locations):
                return
            place = index.file_locations[frame.file_location_id - 1]
            if 0 < place.file_name_id <= len(index.file_names):
                yield f"{index.file_names[place.file_name_id - 1]}:{place.line}"
            number = frame.parent_frame_id


def _operation(
    name: str, kind: str, part: str, source: str, op_name: str, *, asynchronous: bool = False, entry: bool = False
) -> Operation:
    return Operation(
        name,
        kind,
        part,
        backward="transpose(" in op_name,
        again="rematted_computation" in op_name or ".remat" in name,
        source=_LIBRARY.sub("", _OWN.sub("lm/", source)),
        op_name=op_name,
        asynchronous=asynchronous,
        entry=entry,
    )


def _part_of(frames: list[str]) -> tuple[str, str]:
    """The part of the model, and the line in it, of a call that went through these lines, the innermost first."""
    for frame in frames:
        for part, places in PARTS:
            if any(place in frame for place in places):
                return part, frame
    return REST, next((frame for frame in frames if "/lm/" in frame), next(iter(frames), ""))
