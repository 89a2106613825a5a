"""Bytes that instructions move, and what loops fill, on snippets of program text."""

import pytest

from lm.plan.hbm import HBM, HOST, moved
from lm.plan.hlo import parse
from lm.plan.stacks import Stacks, find_stacks

A = 8 * 128 * 4
"""Bytes of an f32[8,128]."""

FUSIONS = """
%cut (p.0: f32[5,8,128], p.1: s32[]) -> f32[8,128] {
  %p.0 = f32[5,8,128]{2,1,0} parameter(0)
  %p.1 = s32[]{:S(6)} parameter(1)
  %zero.0 = s32[] constant(0)
  %converted = bf16[5,8,128]{2,1,0} convert(%p.0)
  %layer = bf16[1,8,128]{2,1,0} dynamic-slice(%converted, %p.1, %zero.0, %zero.0), dynamic_slice_sizes={1,8,128}
  ROOT %flat = bf16[8,128]{1,0} bitcast(%layer)
}

%put (q.0: f32[5,8,128], q.1: f32[8,128], q.2: s32[]) -> f32[5,8,128] {
  %q.0 = f32[5,8,128]{2,1,0} parameter(0)
  %q.1 = f32[8,128]{1,0} parameter(1)
  %q.2 = s32[]{:S(6)} parameter(2)
  %zero.1 = s32[] constant(0)
  %piece = f32[1,8,128]{2,1,0} bitcast(%q.1)
  ROOT %new = f32[5,8,128]{2,1,0} dynamic-update-slice(%q.0, %piece, %q.2, %zero.1, %zero.1)
}

%fill (r.1: f32[8,128], r.2: s32[]) -> f32[5,8,128] {
  %r.1 = f32[8,128]{1,0} parameter(0)
  %r.2 = s32[]{:S(6)} parameter(1)
  %zero.2 = s32[] constant(0)
  %zeros = f32[5,8,128]{2,1,0} broadcast(%zero.2), dimensions={}
  %piece.2 = f32[1,8,128]{2,1,0} bitcast(%r.1)
  ROOT %new.2 = f32[5,8,128]{2,1,0} dynamic-update-slice(%zeros, %piece.2, %r.2, %zero.2, %zero.2)
}

%nested (s.0: f32[5,8,128], s.1: s32[]) -> bf16[8,128] {
  %s.0 = f32[5,8,128]{2,1,0} parameter(0)
  %s.1 = s32[]{:S(6)} parameter(1)
  %inner = bf16[8,128]{1,0} fusion(%s.0, %s.1), kind=kLoop, calls=%cut
  ROOT %doubled = bf16[8,128]{1,0} add(%inner, %inner)
}

%same (u.0: f32[5,8,128]) -> f32[5,8,128] {
  %u.0 = f32[5,8,128]{2,1,0} parameter(0)
  ROOT %bits = f32[5,8,128]{2,1,0} bitcast(%u.0)
}

%through (v.0: f32[5,8,128], v.1: s32[]) -> f32[1,8,128] {
  %v.0 = f32[5,8,128]{2,1,0} parameter(0)
  %v.1 = s32[]{:S(6)} parameter(1)
  %passed = f32[5,8,128]{2,1,0} fusion(%v.0), kind=kLoop, calls=%same
  ROOT %one = f32[1,8,128]{2,1,0} dynamic-slice(%passed, %v.1, %v.1, %v.1), dynamic_slice_sizes={1,8,128}
}

%both (t.0: f32[5,8,128], t.1: s32[]) -> f32[5,8,128] {
  %t.0 = f32[5,8,128]{2,1,0} parameter(0)
  %t.1 = s32[]{:S(6)} parameter(1)
  %part = bf16[8,128]{1,0} fusion(%t.0, %t.1), kind=kLoop, calls=%cut
  %all = f32[5,8,128]{2,1,0} negate(%t.0)
  ROOT %together = (f32[5,8,128]{2,1,0}, bf16[8,128]{1,0}, f32[5,8,128]{2,1,0}) tuple(%all, %part, %t.0)
}
"""


def bytes_of(line: str) -> tuple[int, int]:
    """In the memories of the device and of the host, for one instruction on parameters that it may name."""
    text = (
        FUSIONS
        + f"""
ENTRY %main () -> f32[8,128] {{
  %stack = f32[5,8,128]{{2,1,0:T(8,128)}} parameter(0)
  %a = f32[8,128]{{1,0:T(8,128)}} parameter(1)
  %near = f32[8,128]{{1,0:T(8,128)S(1)}} parameter(2)
  %far = f32[5,8,128]{{2,1,0:T(8,128)S(5)}} parameter(3)
  %i = s32[]{{:T(128)S(6)}} parameter(4)
  %rows = s32[3]{{0:T(128)S(1)}} parameter(5)
  ROOT %it = {line}
}}
"""
    )
    module = parse(text)
    found = moved(module.entry.root, module.entry, module)
    return found[HBM], found[HOST]


SLICE = "dynamic_slice_sizes={1,8,128}"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("f32[8,128]{1,0} add(%a, %near)", (2 * A, 0)),
        ("f32[8,128]{1,0} multiply(%a, %a)", (2 * A, 0)),
        ("f32[8,128]{1,0:S(1)} negate(%near)", (0, 0)),
        ("f32[8,128]{0,1} copy(%a)", (2 * A, 0)),
        ("f32[8,128]{1,0} bitcast(%a)", (0, 0)),
        ("(f32[8,128]{1,0:S(1)}, f32[8,128]{1,0}, u32[]{:S(2)}) copy-start(%a)", (A, 0)),
        ("(f32[5,8,128]{2,1,0}, f32[5,8,128]{2,1,0:S(5)}, u32[]{:S(2)}) copy-start(%far)", (5 * A, 5 * A)),
        (
            "((f32[8,128]{1,0}), f32[2,128]{1,0:S(1)}, u32[]{:S(2)}) slice-start(%a), slice={[0:2], [0:128]}",
            (A // 4, 0),
        ),
        (
            "((f32[5,8,128]{2,1,0:S(5)}, s32[]), f32[1,8,128]{2,1,0}, u32[]{:S(2)}) "
            f"dynamic-slice-start(%far, %i, %i, %i), {SLICE}",
            (A, A),
        ),
        (
            "((f32[5,8,128]{2,1,0:S(5)}, f32[8,128]), f32[5,8,128]{2,1,0:S(5)}, u32[]{:S(2)}) "
            "dynamic-update-slice-start(%far, %a, %i, %i, %i)",
            (A, A),
        ),
        (f"f32[1,8,128]{{2,1,0}} dynamic-slice(%stack, %i, %i, %i), {SLICE}", (2 * A, 0)),
        ("f32[5,8,128]{2,1,0} dynamic-update-slice(%stack, %a, %i, %i, %i)", (2 * A, 0)),
        ("f32[3,128]{1,0} gather(%a, %rows), offset_dims={1}", (2 * 3 * 128 * 4, 0)),
        # More rows than there are: no row is read twice.
        ("f32[16,128]{1,0} gather(%a, %rows), offset_dims={1}", (3 * A, 0)),
        ("bf16[8,128]{1,0} fusion(%stack, %i), kind=kLoop, calls=%cut", (A + A // 2, 0)),
        ("bf16[8,128]{1,0} fusion(%stack, %i), kind=kLoop, calls=%nested", (A + A // 2, 0)),
        ("f32[1,8,128]{2,1,0} fusion(%stack, %i), kind=kLoop, calls=%through", (2 * A, 0)),
        ("f32[5,8,128]{2,1,0} fusion(%stack, %a, %i), kind=kLoop, calls=%put", (2 * A, 0)),
        ("f32[5,8,128]{2,1,0} fusion(%a, %i), kind=kLoop, calls=%fill", (6 * A, 0)),
        (
            "(f32[5,8,128]{2,1,0}, bf16[8,128]{1,0}, f32[5,8,128]{2,1,0}) fusion(%stack, %i), kind=kLoop, calls=%both",
            (10 * A + A // 2, 0),
        ),
        ('f32[8,128]{1,0} custom-call(%a, %near), custom_call_target="tpu_custom_call"', (2 * A, 0)),
        ('f32[8,128]{1,0} custom-call(), custom_call_target="AllocateBuffer"', (0, 0)),
        ("f32[64,128]{1,0} all-gather(%a), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}", (9 * A, 0)),
    ],
    ids=lambda value: value.split("(")[0][-30:] if isinstance(value, str) else None,
)
def test_what_one_instruction_moves(line: str, expected: tuple[int, int]) -> None:
    assert bytes_of(line) == expected


STACKS = (
    FUSIONS
    + """
%forward (state: (s32[], f32[8,128], f32[5,8,128])) -> (s32[], f32[8,128], f32[5,8,128]) {
  %state = (s32[], f32[8,128]{1,0}, f32[5,8,128]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,128]{1,0} get-tuple-element(%state), index=1
  %xs = f32[5,8,128]{2,1,0} get-tuple-element(%state), index=2
  %put.1 = f32[5,8,128]{2,1,0} fusion(%xs, %x, %i), kind=kLoop, calls=%put
  %y = f32[8,128]{1,0} negate(%x)
  ROOT %out = (s32[], f32[8,128]{1,0}, f32[5,8,128]{2,1,0}) tuple(%i, %y, %put.1)
}

%backward (state.1: (s32[], f32[5,8,128], bf16[5,8,128])) -> (s32[], f32[5,8,128], bf16[5,8,128]) {
  %state.1 = (s32[], f32[5,8,128]{2,1,0}, bf16[5,8,128]{2,1,0}) parameter(0)
  %j = s32[] get-tuple-element(%state.1), index=0
  %saved = f32[5,8,128]{2,1,0} get-tuple-element(%state.1), index=1
  %gradients = bf16[5,8,128]{2,1,0} get-tuple-element(%state.1), index=2
  %layer.1 = bf16[8,128]{1,0} fusion(%saved, %j), kind=kLoop, calls=%cut
  %put.2 = bf16[5,8,128]{2,1,0} dynamic-update-slice(%gradients, %layer.1, %j, %j, %j)
  %copied = bf16[5,8,128]{2,1,0} copy(%put.2)
  ROOT %out.1 = (s32[], f32[5,8,128]{2,1,0}, bf16[5,8,128]{2,1,0}) tuple(%j, %saved, %copied)
}

%condition (state.2: (s32[])) -> pred[] {
  %state.2 = (s32[]) parameter(0)
  ROOT %go = pred[] constant(true)
}

ENTRY %main (a: f32[8,128]) -> bf16[5,8,128] {
  %a = f32[8,128]{1,0} parameter(0)
  %k = s32[] constant(0)
  %empty = f32[5,8,128]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  %none = bf16[5,8,128]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  %first = (s32[], f32[8,128]{1,0}, f32[5,8,128]{2,1,0}) tuple(%k, %a, %empty)
  %loop = (s32[], f32[8,128]{1,0}, f32[5,8,128]{2,1,0}) while(%first), condition=%condition, body=%forward
  %kept = f32[5,8,128]{2,1,0} get-tuple-element(%loop), index=2
  %second = (s32[], f32[5,8,128]{2,1,0}, bf16[5,8,128]{2,1,0}) tuple(%k, READS, %none)
  %loop.1 = (s32[], f32[5,8,128]{2,1,0}, bf16[5,8,128]{2,1,0}) while(%second), condition=%condition, body=%backward
  ROOT %result = bf16[5,8,128]{2,1,0} get-tuple-element(%loop.1), index=2
}
"""
)


def test_what_one_loop_leaves_for_the_next() -> None:
    assert find_stacks(parse(STACKS.replace("READS", "%kept"))) == Stacks(saved=5 * A, gradients=5 * A // 2)
    assert find_stacks(parse(STACKS.replace("READS", "%empty"))) is None
    near = STACKS.replace("READS", "%kept").replace(
        "%loop = (s32[], f32[8,128]{1,0}, f32[5,8,128]{2,1,0})",
        "%loop = (s32[], f32[8,128]{1,0}, f32[5,8,128]{2,1,0:S(1)})",
    )
    assert find_stacks(parse(near)) == Stacks(saved=0, gradients=5 * A // 2)
