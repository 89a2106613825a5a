"""The reader of program text on snippets: shapes with layouts, tuples, loops, fused and split collectives."""

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from lm.plan.hlo import parse, shape_bytes, tuple_parts
from lm.plan.program import Memory, Program, read_text

MEMORY = Memory(0, 0, 0, 0, 0, 0, 0)


@pytest.fixture
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:8]).reshape(2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ("bf16[64,1024]{1,0:T(8,128)(2,1)S(1)}", 64 * 1024 * 2),
        ("f32[]{:T(128)}", 4),
        ("pred[7]", 7),
        ("s4[3,2]", 3),
        ("f8e4m3fn[5]{0}", 5),
        ("s32[<=8]", 32),
        ("token[]", 0),
        ("(f32[2]{0:T(128)}, /*index=1*/(bf16[3], u32[]), token[])", 8 + 6 + 4),
    ],
)
def test_bytes_of_shapes(shape: str, size: int) -> None:
    assert shape_bytes(shape) == size


def test_an_unknown_type_is_an_error() -> None:
    with pytest.raises(ValueError, match="unknown type xyz"):
        shape_bytes("xyz[4]")


def test_parts_of_tuples() -> None:
    shape = "((bf16[1,2]{1,0:T(8,128)}, f32[3]), /*index=1*/u32[]{:S(2)}, s32[2,2]{1,0})"
    assert tuple_parts(shape) == ["(bf16[1,2]{1,0:T(8,128)}, f32[3])", "u32[]{:S(2)}", "s32[2,2]{1,0}"]
    assert tuple_parts("f32[2]{0}") == ["f32[2]{0}"]


def test_text_without_an_entry_is_an_error() -> None:
    with pytest.raises(ValueError, match="ENTRY"):
        parse("%a (p: f32[]) -> f32[] {\n  ROOT %p = f32[] parameter(0)\n}\n")


KERNEL = """
ENTRY %main (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(0)
  %splash_fwd.1 = bf16[8,128]{1,0:T(8,128)(2,1)} custom-call(%p), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"xprof_metadata":"{\\"block_q\\": 512, \\"q_layout\\": 1}"
}}, metadata={op_name="jit(f)/splash_fwd/pallas_call"}
  ROOT %copy.2 = bf16[8,128]{1,0:T(8,128)(2,1)} copy(%splash_fwd.1), backend_config={"estimated_cycles":"7"}
}
"""


def test_attributes_over_several_lines(mesh: Mesh) -> None:
    program = read_text(KERNEL, mesh, MEMORY)
    (kernel,) = program.kernels
    assert (kernel.target, kernel.name, kernel.times) == ("tpu_custom_call", "splash_fwd", 1)
    assert kernel.settings == "block_q: 512, q_layout: 1"
    assert program.cycles == {"copies": 7}


def loop(condition: str, *, first: str = "constant(0)", step: str = "constant(1)", attributes: str = "") -> str:
    """A loop whose body all-reduces 8 KiB; the state is (counter, value, limit)."""
    return f"""
%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}

%body (state: (s32[], f32[2048], s32[])) -> (s32[], f32[2048], s32[]) {{
  %state = (s32[], f32[2048]{{0:T(1024)}}, s32[]) parameter(0)
  %counter = s32[]{{:T(128)}} get-tuple-element(%state), index=0
  %value = f32[2048]{{0:T(1024)}} get-tuple-element(%state), index=1
  %kept = s32[] get-tuple-element(%state), index=2
  %one = s32[] {step}
  %next = s32[]{{:T(128)}} add(%counter, %one)
  %reduced = f32[2048]{{0:T(1024)}} all-reduce(%value), channel_id=1, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %out = (s32[], f32[2048]{{0:T(1024)}}, s32[]) tuple(%next, %reduced, %kept)
}}

%fused_compare (x: s32[], y: s32[]) -> pred[] {{
  %x = s32[] parameter(0)
  %y = s32[] parameter(1)
  ROOT %less = pred[] compare(%x, %y), direction=LT
}}

%condition (state.1: (s32[], f32[2048], s32[])) -> pred[] {{
  %state.1 = (s32[], f32[2048]{{0:T(1024)}}, s32[]) parameter(0)
  %counter.1 = s32[] get-tuple-element(%state.1), index=0
  %carried = s32[] get-tuple-element(%state.1), index=2
  %limit = s32[] constant(11)
  ROOT %go = pred[] {condition}
}}

ENTRY %main (p: f32[2048]) -> f32[2048] {{
  %p = f32[2048]{{0:T(1024)}} parameter(0)
  %start = s32[] {first}
  %copied = s32[] copy(%start)
  %bound = s32[] constant(5)
  %tuple = (s32[], f32[2048]{{0:T(1024)}}, s32[]) tuple(%copied, %p, %bound)
  %while = (s32[], f32[2048]{{0:T(1024)}}, s32[]) while(%tuple), condition=%condition, body=%body{attributes}
  ROOT %result = f32[2048]{{0:T(1024)}} get-tuple-element(%while), index=1
}}
"""


@pytest.mark.parametrize(
    ("text", "times"),
    [
        (loop("compare(%counter.1, %limit), direction=LT"), 11),
        (loop("compare(%counter.1, %limit), direction=LE"), 12),
        (loop("compare(%counter.1, %limit), direction=NE"), 11),
        (loop("compare(%limit, %counter.1), direction=GT"), 11),
        (loop("compare(%counter.1, %limit), direction=LT", first="constant(2)"), 9),
        (loop("compare(%counter.1, %limit), direction=LT", step="constant(3)"), 4),
        (loop("compare(%counter.1, %limit), direction=LT", first="constant(20)"), 0),
        (loop("compare(%counter.1, %carried), direction=LT"), 5),
        (loop("fusion(%counter.1, %limit), kind=kLoop, calls=%fused_compare"), 11),
        (
            loop(
                "compare(%counter.1, %limit), direction=LT",
                first="parameter(1)",
                attributes=', backend_config={"known_trip_count":{"n":"3"}}',
            ),
            3,
        ),
    ],
)
def test_trip_counts(text: str, times: int, mesh: Mesh) -> None:
    program = read_text(text, mesh, MEMORY)
    assert [(c.kind, c.bytes, c.axes, c.times) for c in program.collectives] == [("all-reduce", 8192, ("fsdp",), times)]
    assert not program.unknown_loops


@pytest.mark.parametrize("where", ["first", "step"])
def test_a_loop_of_unknown_length_counts_once_and_is_named(where: str, mesh: Mesh) -> None:
    unknown = {where: "parameter(1)"}
    program = read_text(loop("compare(%counter.1, %limit), direction=LT", **unknown), mesh, MEMORY)
    assert [c.times for c in program.collectives] == [1]
    assert program.unknown_loops == ("while",)


FUSED_SCATTER = """
%add (a: bf16[], b: bf16[]) -> bf16[] {
  %a = bf16[] parameter(0)
  %b = bf16[] parameter(1)
  ROOT %sum = bf16[] add(%a, %b)
}

%all-reduce-scatter (input: bf16[2048,64]) -> bf16[512,64] {
  %input = bf16[2048,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-reduce.8 = bf16[2048,64]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=5, \
replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %id = u32[] partition-id()
  %zero = u32[] constant(0)
  ROOT %slice = bf16[512,64]{1,0:T(8,128)(2,1)} dynamic-slice(%all-reduce.8, %id, %zero), dynamic_slice_sizes={512,64}
}

ENTRY %main (p: bf16[2048,64]) -> bf16[512,64] {
  %p = bf16[2048,64]{1,0} parameter(0)
  ROOT %fusion = bf16[512,64]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter, metadata={op_name="jit(f)/dot"}
}
"""


def test_an_all_reduce_that_is_cut_is_a_reduce_scatter(mesh: Mesh) -> None:
    (one,) = read_text(FUSED_SCATTER, mesh, MEMORY).collectives
    assert (one.kind, one.operand_bytes, one.result_bytes) == ("reduce-scatter", 2048 * 128, 512 * 128)
    assert (one.axes, one.group_size, one.op_name) == (("fsdp",), 4, "jit(f)/dot")
    assert one.bytes == 2048 * 128
    assert one.wire_bytes == 2048 * 128 * 3 / 4
    # Over all 8 devices, cut into 4: each part is also summed over the pairs that share it.
    (one,) = read_text(FUSED_SCATTER.replace("{0,1,2,3},{4,5,6,7}", "{0,1,2,3,4,5,6,7}"), mesh, MEMORY).collectives
    assert (one.axes, one.wire_bytes) == (("data", "fsdp"), 2048 * 128 * 3 / 4 + 2 * 512 * 128 / 2)


def gather(inside: str) -> str:
    return f"""%{inside} (p.{inside}: bf16[4,64]) -> bf16[16,64] {{
  %p.{inside} = bf16[4,64] parameter(0)
  %all-gather.{inside} = bf16[16,64] all-gather(%p.{inside}), channel_id=2, replica_groups=[2,4]<=[8], \
dimensions={{0}}, frontend_attributes={{chain_id="0"}}
"""


FUSED_ASYNC = (
    gather("first")
    + """  ROOT %call.1 = (bf16[16,64], u32[]) custom-call(%all-gather.first), custom_call_target="AsyncCollectiveStart"
}

"""
    + gather("middle")
    + """  ROOT %convolution = bf16[4,4] convolution(%p.middle, %p.middle), dim_labels=bf_oi->bf
}

"""
    + gather("last")
    + """  ROOT %call.2 = bf16[16,64] custom-call(%all-gather.last), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (p: bf16[4,64]) -> bf16[16,64] {
  %p = bf16[4,64] parameter(0)
  %start = (bf16[16,64], u32[]) fusion(%p), kind=kCustom, calls=%first
  %work = bf16[4,4] fusion(%p), kind=kOutput, calls=%middle, backend_config={"estimated_cycles":"500"}
  ROOT %done = bf16[16,64] fusion(%start), kind=kCustom, calls=%last
}
"""
)


def test_a_collective_in_several_fusions_counts_once(mesh: Mesh) -> None:
    program = read_text(FUSED_ASYNC, mesh, MEMORY)
    (one,) = program.collectives
    assert (one.kind, one.operand_bytes, one.result_bytes, one.times) == ("all-gather", 512, 2048, 1)
    assert (one.asynchronous, one.hidden_cycles) == (True, 500)
    assert program.cycles == {"products": 500}
    assert program.product_flops == 2 * 4 * 4 * 64


PAIRS = """
%wrapped (q: f32[4,8]) -> f32[8] {
  %q = f32[4,8] parameter(0)
  ROOT %scatter = f32[8] reduce-scatter(%q), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
}

ENTRY %main (p: f32[8], q: f32[4,8]) -> f32[32] {
  %p = f32[8] parameter(0)
  %q.1 = f32[4,8] parameter(1)
  %all-gather-start = (f32[8], f32[32]) all-gather-start(%p), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %scatter-start = ((f32[4,8]), f32[8], u32[]) async-start(%q.1), calls=%wrapped
  WORK
  %scatter-update = ((f32[4,8]), f32[8], u32[]) async-update(%scatter-start), calls=%wrapped
  %scatter-done = f32[8] async-done(%scatter-update), calls=%wrapped
  ROOT %all-gather-done = f32[32] all-gather-done(%all-gather-start)
}
"""


@pytest.mark.parametrize("busy", [True, False])
def test_starts_and_dones_are_one(busy: bool, mesh: Mesh) -> None:
    work = '%work = f32[8] fusion(%p), kind=kLoop, calls=%f, backend_config={"estimated_cycles":"9"}' if busy else ""
    f = "%f (r: f32[8]) -> f32[8] {\n  %r = f32[8] parameter(0)\n  ROOT %n = f32[8] negate(%r)\n}\n"
    gathered, scattered = read_text(f + PAIRS.replace("WORK", work), mesh, MEMORY).collectives
    assert (gathered.kind, gathered.operand_bytes, gathered.result_bytes) == ("all-gather", 32, 128)
    assert (scattered.kind, scattered.operand_bytes, scattered.result_bytes) == ("reduce-scatter", 128, 32)
    assert gathered.asynchronous is scattered.asynchronous is busy
    assert gathered.hidden_cycles == (9 if busy else 0)


SPARSE_CORE = """
%called (q: f32[4,8], t: token[]) -> f32[8] {
  %t = token[] parameter(1)
  %q = f32[4,8] parameter(0)
  ROOT %scatter = f32[8] reduce-scatter(%q), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
}, execution_thread="sparsecore"

ENTRY %main (q: f32[4,8]) -> f32[8] {
  %q.1 = f32[4,8] parameter(0)
  %ready = token[] custom-call(), custom_call_target="PrepareAsyncCallDone"
  %call-start = ((f32[4,8], token[]), f32[8]) call-start(%q.1, %ready), async_execution_thread="sparsecore", \
to_apply=%called, backend_config={"collective_algorithm_config":{"emitter":"E","strategy":"S","debug":"S{colors:2 "}}
  %token = token[] custom-call(), custom_call_target="PrepareAsyncCallDone"
  ROOT %call-done = f32[8] call-done(%call-start)
}
"""


def test_a_collective_that_another_core_runs(mesh: Mesh) -> None:
    (one,) = read_text(SPARSE_CORE, mesh, MEMORY).collectives
    assert (one.kind, one.operand_bytes, one.result_bytes, one.axes) == ("reduce-scatter", 128, 32, ("fsdp",))
    assert not one.asynchronous
    assert one.algorithm == "E S colors 2"


CALLS = """
%small (s: f32[8]) -> f32[8] {
  %s = f32[8] parameter(0)
  ROOT %permuted = f32[8] collective-permute(%s), channel_id=1, source_target_pairs={{0,4},{4,0},{1,5},{5,1}}
}

%large (l: f32[8]) -> f32[8] {
  %l = f32[8] parameter(0)
  ROOT %reduced = f32[8] all-reduce(%l), channel_id=2, replica_groups={}, to_apply=%add
}

ENTRY %main (p: f32[8], c: pred[]) -> f32[8] {
  %p = f32[8] parameter(0)
  %c = pred[] parameter(1)
  %branch = f32[8] conditional(%c, %p, %p), BRANCHES
  %called = f32[8] call(%branch), to_apply=%small
  ROOT %again = f32[8] call(%called), to_apply=%small
}
"""


@pytest.mark.parametrize(
    "branches", ["branch_computations={%small, %large}", "true_computation=%large, false_computation=%small"]
)
def test_calls_add_up_and_of_branches_the_dearest_counts(branches: str, mesh: Mesh) -> None:
    program: Program = read_text(CALLS.replace("BRANCHES", branches), mesh, MEMORY)
    found = {c.kind: (c.times, c.axes, c.group_size) for c in program.collectives}
    assert found == {"all-reduce": (1, ("data", "fsdp"), 8), "collective-permute": (2, ("data",), 2)}
