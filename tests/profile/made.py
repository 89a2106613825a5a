"""Traces as the profiler writes them, made by hand: on TPUs, GPUs and CPUs, with the program beside them."""

from typing import Any

from lm.profile.xplane import message_type

US = 10**6  # picoseconds


class Made:
    """An XSpace to which planes, lines and events are added. Times are in microseconds."""

    def __init__(self) -> None:
        self.space: Any = message_type("XSpace")()

    def plane(self, name: str) -> "Plane":
        return Plane(self.space.planes.add(name=name))

    def program(self, module: Any, number: int) -> None:
        """Puts a compiled program beside the times."""
        proto = message_type("HloProto")()
        proto.hlo_module.CopyFrom(module)
        known = [plane for plane in self.space.planes if plane.name == "/host:metadata"]
        plane = known[0] if known else self.plane("/host:metadata").proto
        plane.stat_metadata[1].id, plane.stat_metadata[1].name = 1, "Hlo Proto"
        key = len(plane.event_metadata) + 1
        plane.event_metadata[key].id, plane.event_metadata[key].name = key, f"{module.name}({number})"
        plane.event_metadata[key].stats.add(metadata_id=1, bytes_value=proto.SerializeToString())

    def serialized(self) -> bytes:
        return self.space.SerializeToString()


class Plane:
    def __init__(self, proto: Any):
        self.proto = proto
        self._events: dict[tuple[str, str], int] = {}
        self._stats: dict[str, int] = {}

    def line(self, name: str, *, timestamp_ns: int = 0) -> "Line":
        return Line(self, self.proto.lines.add(id=len(self.proto.lines) + 1, name=name, timestamp_ns=timestamp_ns))

    def event(self, name: str, display: str = "", **stats: Any) -> int:
        """The number of a kind of events, with the stats that all of them have."""
        if (name, display) not in self._events:
            number = self._events[name, display] = len(self._events) + 1
            made = self.proto.event_metadata[number]
            made.id, made.name, made.display_name = number, name, display
            for key, value in stats.items():
                self.stat(made.stats, key, value)
        return self._events[name, display]

    def stat(self, stats: Any, name: str, value: Any) -> None:
        if name not in self._stats:
            number = self._stats[name] = len(self._stats) + 1
            self.proto.stat_metadata[number].id, self.proto.stat_metadata[number].name = number, name
        made = stats.add(metadata_id=self._stats[name])
        kind = {int: "int64_value", float: "double_value", str: "str_value", bytes: "bytes_value"}[type(value)]
        setattr(made, kind, value)


class Line:
    def __init__(self, plane: Plane, proto: Any):
        self.plane, self.proto = plane, proto

    def add(
        self, name: str, begin: float, duration: float, *, common: dict[str, Any] | None = None, **stats: Any
    ) -> None:
        """An event; `common` are stats of its kind, `display` among them the short name."""
        common = dict(common or {})
        number = self.plane.event(name, common.pop("display", ""), **common)
        event = self.proto.events.add(metadata_id=number, offset_ps=round(begin * US), duration_ps=round(duration * US))
        for key, value in stats.items():
            self.plane.stat(event.stats, key, value)


def program(name: str, instructions: dict[str, dict[str, Any]], inside: dict[str, list[str]] | None = None) -> Any:
    """A compiled program, all in its entry.

    Args:
      instructions: by name: opcode, and any of target, op_name, frames (file:line, the innermost first), operand.
      inside: of fusions and asynchronous operations: the opcodes of what they compute.
    """
    module = message_type("HloModuleProto")()
    module.name, module.entry_computation_id = name, 1
    entry = module.computations.add(name="main", id=1)
    numbers = {one: 100 + i for i, one in enumerate(instructions)}
    for one, facts in instructions.items():
        made = entry.instructions.add(name=one, id=numbers[one], opcode=facts["opcode"])
        made.custom_call_target = facts.get("target", "")
        made.metadata.op_name = facts.get("op_name", "")
        if frames := facts.get("frames"):
            made.metadata.stack_frame_id = _frames(module.stack_frame_index, frames)
        if "operand" in facts:
            made.operand_ids.append(numbers[facts["operand"]])
        if opcodes := (inside or {}).get(one):
            called = module.computations.add(name=f"{one}.inside", id=len(module.computations) + 1)
            for i, opcode in enumerate(opcodes):
                called.instructions.add(name=f"{one}.{opcode}.{i}", id=1000 * called.id + i, opcode=opcode)
            made.called_computation_ids.append(called.id)
    return module


def _frames(index: Any, frames: list[str]) -> int:
    """Adds the calls, the outermost first, and returns the number of the innermost."""
    parent = 0
    for frame in reversed(frames):
        file, line = frame.rsplit(":", 1)
        index.file_names.append(file)
        index.file_locations.add(file_name_id=len(index.file_names), line=int(line))
        index.stack_frames.add(file_location_id=len(index.file_locations), parent_frame_id=parent)
        parent = len(index.stack_frames)
    return parent


def tpu(steps: int = 2, *, gap: float = 0.0, devices: int = 1, with_program: bool = False) -> Made:
    """Steps of 100 us: a loop with a product (40) and arithmetic (10) in it, 5 of its own; an all-gather beside the
    product, of which 5 us are waited for; an all-reduce of 20; the attention kernel (15), and a copy (5)."""
    made = Made()
    if with_program:
        made.program(STEP, 7)
    for device in range(devices):
        plane = made.plane(f"/device:TPU:{device}")
        plane.stat(plane.proto.stats, "device_type_string", "TPU v5p")
        modules, ops, beside = (plane.line(name) for name in ("XLA Modules", "XLA Ops", "Async XLA Ops"))
        for k in range(steps):
            at = 1000.0 + k * (100 + gap)
            modules.add("jit_train_step(12345)", at, 100, run_id=k, program_id=7)
            for name, begin, duration, category in (
                ("while.1", 0, 60, "while"),
                ("fusion.1", 0, 40, "convolution fusion"),
                ("all-gather-done.1", 40, 5, "all-gather-done"),
                ("fusion.2", 45, 10, "loop fusion"),
                ("all-reduce.3", 60, 20, "all-reduce"),
                ("splash_mha_fwd.4", 80, 15, "custom-call"),
                ("copy.5", 95, 5, "data formatting"),
            ):
                common = {"display": name, "hlo_category": category, "tf_op": f"jit(train_step)/{name}:"}
                ops.add(f"%{name} = f32[8] thing()", at + begin, duration, common=common)
            beside.add(
                "%all-gather-start.1 = f32[8] thing()",
                at + 5,
                40,
                common={"display": "all-gather-start.1", "hlo_category": "all-gather-start"},
            )
    annotated(made, list(range(20, 20 + steps)), 100 + gap)
    return made


def annotated(made: Made, steps: list[int], length: float, waits: dict[str, float] | None = None) -> None:
    """The annotations of the loop; `waits` begin with each step."""
    line = made.plane("/host:CPU").line("python")
    for i, k in enumerate(steps):
        line.add("train", 1000.0 + i * length, length, step_num=k)
        for name, duration in (waits or {}).items():
            line.add(f"lm: {name}", 1000.0 + i * length - duration, duration)


STEP = program(
    "jit_train_step",
    {
        "while.1": {"opcode": "while"},
        "fusion.1": {
            "opcode": "fusion",
            "op_name": "jit(train_step)/transpose(jvp())/while/body/dot_general",
            "frames": ["/x/lm/model/linear.py:20", "/x/lm/model/feed_forward.py:43", "/x/lm/model/transformer.py:50"],
        },
        "all-gather-start.1": {"opcode": "all-gather-start"},
        "all-gather-done.1": {"opcode": "all-gather-done", "operand": "all-gather-start.1"},
        "fusion.2": {"opcode": "fusion", "op_name": "jit(train_step)/checkpoint/rematted_computation/mul"},
        "all-reduce.3": {"opcode": "all-reduce"},
        "splash_mha_fwd.4": {
            "opcode": "custom-call",
            "target": "tpu_custom_call",
            "frames": ["/x/lm/kernels/attention/splash.py:30"],
        },
        "copy.5": {"opcode": "copy"},
    },
    {"fusion.1": ["parameter", "dot", "add"], "fusion.2": ["parameter", "multiply"]},
)


def gpu(steps: int = 3) -> Made:
    """Steps of 100 us: products (50) on one stream, an all-reduce (60) on another from 20 on, then arithmetic (10), and
    a copy from the host (5); 15 in which nothing runs."""
    made = Made()
    made.program(GPU_STEP, 9)
    plane = made.plane("/device:GPU:0")
    plane.stat(plane.proto.stats, "device_vendor", "Nvidia")
    compute, other, copies = (
        plane.line(name) for name in ("Stream #7(Compute)", "Stream #8(Compute)", "Stream #9(MemcpyH2D)")
    )
    for k in range(steps):
        at, of = 1000.0 + k * 100, {"hlo_module": "jit_train_step", "program_id": 9}
        compute.add("sm90_xmma_gemm", at, 25, hlo_op="gemm_fusion_dot", **of)
        compute.add("sm90_xmma_gemm", at + 25, 25, hlo_op="gemm_fusion_dot", **of)
        other.add("ncclDevKernel_AllReduce_Sum_f32", at + 20, 60, hlo_op="all-reduce-start", **of)
        compute.add("loop_add_fusion", at + 80, 10, hlo_op="loop_add_fusion", **of)
        copies.add("MemcpyH2D", at + 85, 5)
    return made


GPU_STEP = program(
    "jit_train_step",
    {
        "gemm_fusion_dot": {"opcode": "fusion", "frames": ["/x/lm/model/attention.py:69"]},
        "all-reduce-start": {"opcode": "all-reduce-start"},
        "loop_add_fusion": {"opcode": "fusion", "frames": ["/site-packages/optax/_src/update.py:3"]},
    },
    {"gemm_fusion_dot": ["dot"], "loop_add_fusion": ["parameter", "add"]},
)
