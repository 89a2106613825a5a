"""Layers as a pipeline: microbatches move from stage to stage, all of which run the same program."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lm.parallel.layout import Layout


def pipeline(
    stage: Callable[[Any, jax.Array, Any, jax.Array], jax.Array],
    weights: Any,
    x: jax.Array,
    rows: Any,
    *,
    layout: Layout,
    layers: int,
) -> jax.Array:
    """All layers, applied to x [B, …]: the same on each stage; the rows of it that `Layout.loss_rows` gives this one.

    `stage(weights, x, rows, first)` computes layers of one stage, the first of which has this number, on one
    microbatch. `weights` are this stage's, [repeats, layers per stage, …] each, without the first axis when that is 1;
    `rows`, like x, has a leading
    axis of rows, the same on each stage.

    Microbatch m, in its r-th round (of `repeats`) of all stages, is computed by stage s at time r M + m + s, for M
    microbatches: the circular schedule of Megatron (Narayanan et al. 2021). Stages idle stages - 1 of
    repeats M + stages - 1 times. M is at least the number of stages, so what the last stage gives back has arrived
    when the first one needs it.
    """
    count, stages = layout.microbatches, layout.stages
    repeats = layout.repeats
    if repeats == 1:
        weights = jax.tree.map(lambda w: w[None], weights)
    per_stage = layers // (stages * repeats)
    index = lax.axis_index("stage")
    flow = split_rows(x, count)
    rows = jax.tree.map(lambda leaf: split_rows(leaf, count), rows)
    ring = [(i, (i + 1) % stages) for i in range(stages)]

    def step(carry: tuple[jax.Array, jax.Array], time: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        flow, received = carry
        # What was received now left the last stage one step ago. Before it has worked, that is nothing.
        back = time - stages
        waiting = lax.dynamic_index_in_dim(flow, back % count, keepdims=False)
        returned = jnp.where(back >= 0, received, waiting)
        flow = lax.dynamic_update_index_in_dim(flow, returned, back % count, axis=0)
        work = jnp.clip(time - index, 0, repeats * count - 1)
        microbatch, turn = work % count, work // count
        x = jnp.where(index == 0, lax.dynamic_index_in_dim(flow, microbatch, keepdims=False), received)
        part = jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, turn, keepdims=False), weights)
        own = jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, microbatch, keepdims=False), rows)
        y = stage(part, x, own, (turn * stages + index) * per_stage)
        return (flow, lax.ppermute(y, "stage", ring)), None

    times = jnp.arange(repeats * count + stages - 1)
    (flow, received), _ = lax.scan(step, (flow, jnp.zeros_like(flow[0])), times)
    flow = lax.dynamic_update_index_in_dim(flow, received, count - 1, axis=0)
    # The first stage holds all results: each stage takes its part of the loss.
    flow = jnp.where(index == 0, flow, jnp.zeros_like(flow))
    flow = lax.psum_scatter(flow, "stage", scatter_dimension=0, tiled=True)
    return flow.reshape(-1, *flow.shape[2:])


def split_rows(x: jax.Array, count: int) -> jax.Array:
    """[B, …] to [count, B / count, …]."""
    return x.reshape(count, -1, *x.shape[1:])
