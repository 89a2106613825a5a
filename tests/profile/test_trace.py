"""Traces of every platform in one form: durations, kinds, parts of the model, what is hidden and what waits."""

import time

import jax
import pytest

from lm.profile import kinds
from lm.profile.programs import Programs
from lm.profile.summary import Summary, summarize
from lm.profile.trace import trace_of
from lm.profile.xplane import message_type, parse

from .made import Made, annotated, gpu, program, tpu

US = 1e-6


def summary(made: Made) -> Summary:
    return summarize(trace_of(parse("XSpace", made.serialized())))


def by_kind(found: Summary) -> dict[str, float]:
    return {row.name: pytest.approx(row.seconds, rel=1e-6) for row in found.kinds}


@pytest.mark.parametrize("with_program", [False, True])
def test_a_tpu(with_program: bool) -> None:
    found = summary(tpu(with_program=with_program))
    assert (found.platform, found.device_kind, found.steps, found.runs) == ("tpu", "TPU v5p", (20, 21), 2)
    assert found.step_seconds == pytest.approx(100 * US)
    assert by_kind(found) == {
        "matrix products": 40 * US,
        "all-reduce": 20 * US,
        "attention kernel": 15 * US,
        "elementwise": 10 * US,
        "all-gather": 5 * US,
        "copies and layout": 5 * US,
        "loops and calls": 5 * US,
    }
    exchanged = {one.kind: (one.seconds, one.exposed) for one in found.exchanges}
    assert exchanged["all-gather"] == pytest.approx((40 * US, 5 * US))  # under way for 40, waited for in 5
    assert exchanged["all-reduce"] == pytest.approx((20 * US, 20 * US))
    assert found.busy == pytest.approx(100 * US)
    assert found.between == found.inside == 0
    assert [row.times for row in found.operations] == [1] * 7  # the loop too, though its product begins when it does
    parts = {row.name: row.seconds for row in found.parts}
    if with_program:
        assert parts["feed-forward"] == pytest.approx(40 * US)
        assert parts["attention"] == pytest.approx(15 * US)
        first = found.operations[0]
        assert (first.name, first.source, first.backward) == ("fusion.1", "lm/model/feed_forward.py:43", True)
        assert [row.name for row in found.operations if row.again] == ["fusion.2"]


def test_a_device_that_waits_for_the_host() -> None:
    made = tpu(3, gap=50)
    annotated(made, [20, 21, 22], 150, waits={"input": 40.0})
    found = summary(made)
    assert found.step_seconds == pytest.approx(400 / 3 * US)
    assert found.between == pytest.approx(100 / 3 * US)
    assert found.waits["input"] == pytest.approx(80 / 3 * US)


def test_devices_are_averaged() -> None:
    one, made = summary(tpu()), tpu(devices=2)
    for line in made.space.planes[1].lines:
        for event in line.events:
            event.offset_ps, event.duration_ps = 3 * event.offset_ps, 3 * event.duration_ps
    two = summary(made)
    assert (two.devices, two.runs) == (2, 2)
    assert two.step_seconds == pytest.approx(2 * one.step_seconds)
    assert two.busy == pytest.approx(2 * one.busy)
    assert by_kind(two) == {row.name: 2 * row.seconds for row in one.kinds}
    assert [row.times for row in two.kinds] == [row.times for row in one.kinds]
    assert [found.exposed for found in two.exchanges] == pytest.approx([2 * found.exposed for found in one.exchanges])


def test_steps_before_the_annotated_ones_do_not_count() -> None:
    made = tpu(3)
    (operations,) = [line for line in made.space.planes[0].lines if line.name == "XLA Ops"]
    operations.events[1].duration_ps //= 4  # the product of the first step
    made.space.planes.pop()
    annotated(made, [21, 22], 100)
    found = summary(made)
    assert (found.runs, found.steps) == (2, (21, 22))
    assert found.step_seconds == pytest.approx(100 * US)
    assert by_kind(found)["matrix products"] == 40 * US


def test_a_gpu() -> None:
    found = summary(gpu())
    assert (found.platform, found.runs) == ("gpu", 3)
    assert by_kind(found) == {
        "all-reduce": 60 * US,
        "matrix products": 50 * US,
        "elementwise": 10 * US,
        kinds.HOST: 5 * US,
    }
    exchanged = {one.kind: (one.seconds, one.exposed) for one in found.exchanges}
    assert exchanged["all-reduce"] == pytest.approx((60 * US, 30 * US))  # from 50 to 80 nothing is computed
    assert exchanged[kinds.HOST] == pytest.approx((5 * US, 0), abs=1e-12)
    assert found.step_seconds == pytest.approx(290 / 3 * US)  # the last ends at 290
    assert {row.name for row in found.parts} >= {"attention", "optimizer and checks"}
    (first,) = [row for row in found.operations if row.name == "gemm_fusion_dot"]
    assert first.times == pytest.approx(2)


def test_a_gpu_without_a_program() -> None:
    made = gpu()
    del made.space.planes[0]
    found = summary(made)
    assert found.runs == 1
    assert by_kind(found)["matrix products"] == 150 * US


def test_a_cpu() -> None:
    """Threads share the operations of two devices; a loop on one thread waits for what is on another."""
    made = Made()
    plane = made.plane("/host:CPU")
    for thread in range(2):
        line = plane.line(f"tf_XLAEigen/{thread}")
        for k in range(2):
            at = 1000.0 + k * 100
            of = {"hlo_module": "jit_train_step", "program_id": 3, "run_id": k, "device_ordinal": 0}
            if thread == 0:
                line.add("while.1", at, 80, hlo_op="while.1", **of)
            line.add("dot.1", at + 10, 30, hlo_op="dot.1", **of)
            line.add("end: dot.1", at + 40, 1)
            line.add("add.2", at + 60, 5, hlo_op="add.2", **of | {"device_ordinal": 1})
    trace = trace_of(parse("XSpace", made.serialized()))
    assert [device.name for device in trace.devices] == ["/device:CPU:0", "/device:CPU:1"]
    found = summarize(trace)
    first = trace.devices[0]
    assert sum(span.seconds for span in first.spans) == pytest.approx(2 * 2 * 30 * US)
    assert len(first.runs) == 2
    assert found.kinds[0].name == "matrix products"


def test_a_trace_without_devices() -> None:
    made = Made()
    annotated(made, [1], 100)
    with pytest.raises(ValueError, match="no operation"):
        summary(made)


def test_jax_reads_what_the_tests_make() -> None:
    """The made traces are in the profiler's own format."""
    found = jax.profiler.ProfileData.from_serialized_xspace(tpu(with_program=True).serialized())
    plane = found.find_plane_with_name("/device:TPU:0")
    names = {line.name: len(list(line.events)) for line in plane.lines}
    assert names == {"XLA Modules": 2, "XLA Ops": 14, "Async XLA Ops": 2}


def test_a_real_trace(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Of this machine's CPU, read here and by jax: the same operations, for as long."""
    folder = tmp_path_factory.mktemp("trace")
    double = jax.jit(lambda x: (x @ x).sum() + x.max())
    x = jax.numpy.ones((256, 256))
    double(x).block_until_ready()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level, options.host_tracer_level = 0, 1
    with jax.profiler.trace(folder, profiler_options=options):
        for _ in range(3):
            double(x).block_until_ready()
    (file,) = folder.rglob("*.xplane.pb")
    data = file.read_bytes()
    trace = trace_of(parse("XSpace", data))
    plane = jax.profiler.ProfileData.from_serialized_xspace(data).find_plane_with_name("/host:CPU")
    theirs = [event for line in plane.lines for event in line.events if "hlo_op" in dict(event.stats)]
    ours = [span for device in trace.devices for span in device.spans]
    assert len(ours) == len(theirs) > 0
    assert sum(span.seconds for span in ours) == pytest.approx(sum(event.duration_ns for event in theirs) * 1e-9)
    assert len(trace.devices[0].runs) == 3
    assert "matrix products" in {span.operation.kind for span in ours}


def test_large_programs_take_no_longer_for_each_operation() -> None:
    instructions: dict[str, dict[str, str]] = {}
    for i in range(25_000):
        instructions[f"all-gather-start.{i}"] = {"opcode": "all-gather-start"}
        instructions[f"all-gather-done.{i}"] = {"opcode": "all-gather-done", "operand": f"all-gather-start.{i}"}
    made = Made()
    made.program(program("jit_train_step", instructions), 7)
    programs, until = Programs(made.space), time.monotonic() + 10
    for name in instructions:
        assert programs.find(name, number=7).kind == "all-gather"
        assert time.monotonic() < until


def test_messages_are_declared_once() -> None:
    assert message_type("XSpace") is message_type("XSpace")
