"""What a config amounts to: each parameter with its shape, what the optimizer does to it, and where it lies."""

import math
from collections.abc import Sequence

import jax

from lm.experiment import Config
from lm.model.flops import flops_per_token
from lm.model.transformer import abstract_params
from lm.optim.optimizer import decays, parameter_group, paths
from lm.parallel.layout import layout_of
from lm.parallel.mesh import AnyMesh
from lm.train.state import abstract_state, stored_axes
from lm.train.step import check_batch


def describe(config: Config) -> str:
    """A table of the parameters, their number, and the FLOPs of training. Allocates nothing."""
    tree = abstract_params(config.model)
    rows = []
    for path, leaf in zip(paths(tree), jax.tree.leaves(tree), strict=True):
        decay = f"decay {config.optim.weight_decay:g}" if decays(config.optim, path) else "no decay"
        rows.append((".".join(path), _shape(leaf), parameter_group(path), f"AdamW, {decay}"))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    flops = flops_per_token(config.model, config.train.sequence_length)
    tokens = config.train.batch_size * config.train.sequence_length
    lines = [
        *_table(rows),
        "",
        f"parameters             {count:,}",
        f"tokens per step        {tokens:,}",
        f"tokens in all          {tokens * config.train.steps:,}",
        f"model FLOPs per token  {flops.parameters:.4g} (6 N)  {flops.causal:.4g} (causal, for MFU)  "
        f"{flops.full:.4g} (full attention)",
        f"model FLOPs in all     {flops.causal * tokens * config.train.steps:.4g}",
    ]
    return "\n".join(lines)


def describe_sharding(config: Config, mesh: AnyMesh) -> str:
    """A table of the parameters on a mesh: shape, names of the axes, mesh axes that split them, bytes on each device;
    and the bytes of the whole state. Allocates nothing. Raises ConfigError for layouts that fail."""
    state = abstract_state(config, mesh)
    check_batch(config, mesh, layout_of(config.mesh, mesh))
    names = jax.tree.leaves(stored_axes(config), is_leaf=lambda node: isinstance(node, tuple))
    rows = [("parameter", "shape", "axes", "split over", "bytes per device")]
    for path, leaf, axes in zip(paths(state.params), jax.tree.leaves(state.params), names, strict=True):
        split = [" x ".join((part,) if isinstance(part, str) else part or ("-",)) for part in leaf.sharding.spec]
        rows.append((".".join(path), _shape(leaf), ", ".join(axes), ", ".join(split), f"{_bytes(leaf):,}"))
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    moments = sum(map(_bytes, jax.tree.leaves(state.opt_state)))
    lines = [
        *_table(rows),
        "",
        f"mesh                   {sizes}, {mesh.size} devices",
        f"parameters             {sum(map(_bytes, jax.tree.leaves(state.params))):,} bytes per device",
        f"optimizer state        {moments:,} bytes per device, in the memory of the {config.train.optimizer_memory}",
    ]
    return "\n".join(lines)


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _shape(leaf: jax.ShapeDtypeStruct) -> str:
    return " x ".join(map(str, leaf.shape))


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
