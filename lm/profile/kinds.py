"""The kinds of operations that time is counted by, from what a compiled program, or a trace without one, says of each.

Fusions are of the kind of what costs most in them: products, then reductions, then arithmetic, then mere moving.
"""

import re
from collections.abc import Collection

PRODUCTS = "matrix products"
ATTENTION = "attention kernel"
KERNELS = "other kernels"
ELEMENTWISE = "elementwise"
REDUCTIONS = "reductions"
INDEXED = "gather, scatter, sort"
COPIES = "copies and layout"
HOST = "to and from the host"
LOOPS = "loops and calls"
OTHER = "other"
COLLECTIVES = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)

_PRODUCTS = {"dot", "convolution", "ragged-dot", "scaled-dot"}
_REDUCTIONS = {"reduce", "reduce-window", "select-and-scatter", "batch-norm-training", "batch-norm-grad"}
_INDEXED = {"gather", "scatter", "sort", "topk"}
_HOST = {"infeed", "outfeed", "send", "recv"}
_LOOPS = {"while", "call", "conditional"}
_MOVES = {
    "copy",
    "transpose",
    "reshape",
    "slice",
    "dynamic-slice",
    "dynamic-update-slice",
    "dynamic-reshape",
    "concatenate",
    "pad",
    "reverse",
}
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "broadcast", "iota", "domain", "after-all"}
_ASYNCHRONOUS = re.compile(r"-(start|update|done)$")
_NUMBER = re.compile(r"([._](\d+|clone|remat\d*|kd))+$")
# Of TPUs: what the compiler calls the kinds of its fusions, where that is not the opcode.
_CATEGORIES = {
    "convolution fusion": PRODUCTS,
    "output fusion": PRODUCTS,
    "loop fusion": ELEMENTWISE,
    "non-fusion elementwise": ELEMENTWISE,
    "input fusion": REDUCTIONS,
    "reduce fusion": REDUCTIONS,
    "data formatting": COPIES,
    "copy fusion": COPIES,
    "all-reduce fusion": "all-reduce",
    "all-gather fusion": "all-gather",
    "all-reduce-scatter fusion": "reduce-scatter",
    "host send": HOST,
    "host recv": HOST,
    "custom fusion": KERNELS,
}
_ATTENTION_WORDS = ("attention", "fmha", "splash", "flash", "attn")
_PRODUCT_WORDS = ("gemm", "matmul", "cublas", "cijk", "cutlass", "convolution", "$conv", "dot")


def is_asynchronous(opcode: str) -> bool:
    """Whether this begins or ends something that goes on beside other operations."""
    return _ASYNCHRONOUS.search(opcode) is not None


def synchronous(opcode: str) -> str:
    """What is begun or ended: `all-gather` of `all-gather-start`."""
    return _ASYNCHRONOUS.sub("", opcode)


def kind_of(opcode: str, inside: Collection[str] = (), *, text: str = "") -> str:
    """The kind of an operation.

    Args:
      inside: of a fusion, or an asynchronous operation: opcodes of all that it computes.
      text: of a custom call or kernel: its target and names, in which words are looked for.
    """
    opcode = synchronous(opcode)
    if opcode in ("fusion", "async"):
        return _of_all(set(inside), text)
    if opcode == "custom-call":
        return _of_words(text) or KERNELS
    if opcode in _HOST | {"host"}:
        return HOST
    return _of_one(opcode)


def kind_by_name(name: str, category: str = "") -> str:
    """The same without the program: from the name of an operation or kernel, and what the trace says of it."""
    if category in _CATEGORIES and not (category == "custom fusion" and _of_words(name)):
        return _CATEGORIES[category]
    if category and (found := kind_of(category, text=name)) != OTHER:
        return found
    lower = name.lower()
    if lower.startswith("memcpy") or lower.startswith("copydeviceto") or lower.startswith("copyhostto"):
        return HOST if re.search(r"h2d|d2h|host", lower) else COPIES
    if "nccl" in lower or "rccl" in lower:
        squeezed = re.sub(r"[^a-z]", "", lower)
        return next((one for one in COLLECTIVES if one.replace("-", "") in squeezed), "collective-permute")
    if "copybuffer" in lower or "memset" in lower or "fillbuffer" in lower:
        return COPIES
    plain = synchronous(_NUMBER.sub("", lower.lstrip("%")))
    words = re.split(r"[_\s]", plain)
    if words[-1] == "fusion":
        return _of_all({word for word in words[:-1] if word not in ("loop", "input", "wrapped")}, plain)
    if (found := _of_one(plain)) != OTHER:
        return found
    return _of_words(lower) or (_of_one(words[-1]) if words[0] == "wrapped" else OTHER)


def _of_words(text: str) -> str | None:
    lower = text.lower()
    if "movetohost" in lower or "movetodevice" in lower or "pinned_host" in lower:
        return HOST
    if any(word in lower for word in _ATTENTION_WORDS):
        return ATTENTION
    return PRODUCTS if any(word in lower for word in _PRODUCT_WORDS) else None


def _of_all(opcodes: set[str], text: str) -> str:
    plain = {synchronous(opcode) for opcode in opcodes}
    for kind in COLLECTIVES:
        if kind in plain:
            return "reduce-scatter" if kind == "all-reduce" and "scatter" in text else kind
    for found, kind in ((_HOST, HOST), (_PRODUCTS, PRODUCTS), (_INDEXED, INDEXED), (_REDUCTIONS, REDUCTIONS)):
        if plain & found:
            return kind
    if "custom-call" in plain or not plain:
        return _of_words(text) or (KERNELS if plain else ELEMENTWISE)
    return COPIES if plain <= _MOVES | _FREE else ELEMENTWISE


def _of_one(opcode: str) -> str:
    if opcode in COLLECTIVES:
        return opcode
    if opcode == "ragged-all-to-all":
        return "all-to-all"
    table = ((_PRODUCTS, PRODUCTS), (_REDUCTIONS, REDUCTIONS), (_INDEXED, INDEXED), (_MOVES, COPIES), (_LOOPS, LOOPS))
    for found, kind in table:
        if opcode in found:
            return kind
    if opcode in _HOST:
        return HOST
    return ELEMENTWISE if opcode in _ARITHMETIC or opcode in _FREE else OTHER


_ARITHMETIC = {
    *("abs", "add", "and", "atan2", "cbrt", "ceil", "clamp", "compare", "complex", "convert", "cosine", "divide"),
    *("erf", "exponential", "exponential-minus-one", "floor", "imag", "is-finite", "log", "log-plus-one", "logistic"),
    *("map", "maximum", "minimum", "multiply", "negate", "not", "or", "popcnt", "power", "real", "reduce-precision"),
    *("remainder", "rng", "rng-bit-generator", "round-nearest-afz", "round-nearest-even", "rsqrt", "select", "sign"),
    *("shift-left", "shift-right-arithmetic", "shift-right-logical", "sine", "sqrt", "stochastic-convert", "subtract"),
    *("tan", "tanh", "xor", "elementwise"),
}
