"""Floating-point operations of matrix products, from their shapes in the compiled program."""

import math
import re
from collections.abc import Sequence

import numpy as np

from lm.plan.hlo import Computation, Instruction, dimensions

PRODUCTS = ("convolution", "dot")


def product_flops(instruction: Instruction, computation: Computation) -> int:
    """2 for each multiplication and addition of a `dot` or `convolution` that stands in `computation`.

    TPU programs write products as convolutions; the batch of a batched product becomes a spatial dimension, dilated
    so that each output meets one input: places of the window that fall into holes or padding cost nothing.
    """
    left, right = (dimensions(computation.instructions[name].shape) for name in instruction.operands[:2])
    output = dimensions(instruction.shape)
    if instruction.opcode == "dot":
        contracted = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
        return 2 * math.prod(output) * math.prod(left[int(place)] for place in contracted.split(",") if place)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    if labels is None:
        raise ValueError(f"no dim_labels in convolution {instruction.name}")
    places = [{label: place for place, label in enumerate(part)} for part in labels.groups()]
    sizes = [
        {label: shape[place] for label, place in one.items()}
        for one, shape in zip(places, (left, right, output), strict=True)
    ]
    flops = 2 * sizes[2]["b"] * sizes[2]["f"] * sizes[1]["i"]
    spatial = sorted(label for label in sizes[0] if label.isdigit())
    window = _window(instruction, len(spatial))
    for place, label in enumerate(spatial):
        flops *= _meetings(sizes[0][label], sizes[1][label], sizes[2][label], *(row[place] for row in window))
    return flops


def _window(instruction: Instruction, rank: int) -> list[Sequence[int]]:
    """Strides, low padding, dilations of input and of window for each spatial dimension."""
    text = instruction.attribute(r"window=\{([^}]*)\}") or ""
    fields = dict(part.split("=") for part in text.split())
    numbers = lambda name, default: [int(n) for n in fields[name].split("x")] if name in fields else [default] * rank  # noqa: E731
    padding = [int(part.split("_")[0]) for part in fields["pad"].split("x")] if "pad" in fields else [0] * rank
    return [numbers("stride", 1), padding, numbers("lhs_dilate", 1), numbers("rhs_dilate", 1)]


def _meetings(size: int, window: int, output: int, stride: int, padding: int, dilation: int, spread: int) -> int:
    """Pairs of an output and a place in its window that holds an input, along one dimension."""
    begins, found = np.arange(output) * stride - padding, 0
    for place in range(window):
        at = begins + place * spread
        found += int(((at >= 0) & (at % dilation == 0) & (at // dilation < size)).sum())
    return found
