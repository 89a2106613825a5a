"""Kinds of operations, from the program and from names alone."""

import pytest

from lm.profile.kinds import kind_by_name, kind_of


@pytest.mark.parametrize(
    ("opcode", "inside", "text", "kind"),
    [
        ("dot", (), "", "matrix products"),
        ("convolution", (), "", "matrix products"),
        ("fusion", ("parameter", "dot", "add", "reduce"), "", "matrix products"),
        ("fusion", ("parameter", "reduce", "multiply"), "", "reductions"),
        ("fusion", ("parameter", "multiply", "broadcast"), "", "elementwise"),
        ("fusion", ("parameter", "transpose", "bitcast", "copy"), "", "copies and layout"),
        ("fusion", ("parameter", "dynamic-update-slice", "constant"), "", "copies and layout"),
        ("fusion", ("parameter", "scatter", "add"), "", "gather, scatter, sort"),
        ("fusion", ("all-reduce", "dynamic-slice", "add"), "all-reduce-scatter.1", "reduce-scatter"),
        ("fusion", ("all-gather", "dot"), "", "all-gather"),
        ("async-start", ("reduce-scatter",), "", "reduce-scatter"),
        ("all-gather-done", (), "", "all-gather"),
        ("ragged-all-to-all", (), "", "all-to-all"),
        ("collective-permute-start", (), "", "collective-permute"),
        ("custom-call", (), "__cublas$lt$matmul gemm.3", "matrix products"),
        ("custom-call", (), "__cudnn$fmhaSoftmax cudnn.3", "attention kernel"),
        ("custom-call", (), "tpu_custom_call splash_mha_fwd", "attention kernel"),
        ("custom-call", (), "tpu_custom_call my_kernel", "other kernels"),
        ("custom-call", (), "annotate_device_placement MoveToHost", "to and from the host"),
        ("infeed", (), "", "to and from the host"),
        ("while", (), "", "loops and calls"),
        ("copy-start", (), "", "copies and layout"),
        ("partition-id", (), "", "other"),
    ],
)
def test_with_the_program(opcode: str, inside: tuple[str, ...], text: str, kind: str) -> None:
    assert kind_of(opcode, inside, text=text) == kind


@pytest.mark.parametrize(
    ("name", "category", "kind"),
    [
        ("fusion.12", "convolution fusion", "matrix products"),
        ("fusion.12", "loop fusion", "elementwise"),
        ("all-gather-start.3", "all-gather-start", "all-gather"),
        ("splash_mha_fwd", "custom fusion", "attention kernel"),
        ("splash_mha_fwd", "custom-call", "attention kernel"),
        ("dot.12", "", "matrix products"),
        ("add.3.remat2", "", "elementwise"),
        ("loop_multiply_reduce_fusion", "", "reductions"),
        ("input_transpose_fusion_1.kd", "", "copies and layout"),
        ("gemm_fusion_dot_6.kd", "", "matrix products"),
        ("wrapped_add.1", "", "elementwise"),
        ("reduce-scatter.1", "", "reduce-scatter"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16(ncclDevKernelArgsStorage)", "", "reduce-scatter"),
        ("ncclDevKernel_AllGather_RING_LL", "", "all-gather"),
        ("ncclDevKernel_SendRecv", "", "collective-permute"),
        ("MemcpyD2H", "", "to and from the host"),
        ("MemcpyD2D", "", "copies and layout"),
        ("sm90_xmma_gemm_bf16bf16_tn", "", "matrix products"),
        ("what_is_this", "", "other"),
    ],
)
def test_by_name(name: str, category: str, kind: str) -> None:
    assert kind_by_name(name, category) == kind
