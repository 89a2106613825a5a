"""What a model does with a few short texts, seen from inside: attention, layer by layer, and the loss of each token."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lm.kernels.attention import Places
from lm.kernels.attention.reference import masked_scores, visible_keys
from lm.model.loss import Batch
from lm.model.transformer import Block, Transformer, split_all

MAPS = 4
"""Layers, and heads in each of them, of which the attention is shown whole."""


class Observed(NamedTuple):
    """float32; L layers, H heads, B texts, S tokens."""

    entropy: jax.Array
    """[L, H], of the weights of a token, mean over tokens, in nats."""
    largest_logit: jax.Array
    """[L], of attention, before the softmax and after a cap."""
    maps: jax.Array
    """[min(L, MAPS), min(H, MAPS), S, S], weights of the first text: of layers from the first to the last."""
    likelihoods: jax.Array
    """[B, S], negative logarithms, of the targets, in nats."""
    largest_output_logit: jax.Array
    """[], of all tokens of the vocabulary, after a cap."""


def observe(model: Transformer, batch: Batch, dtype: jnp.dtype) -> Observed:
    """A forward pass without kernels and dropout, in which all scores are held: for texts of a few hundred tokens."""
    config = model.config
    places = Places(batch["segments"], batch["positions"])
    real = batch["segments"] > 0
    heads = min(config.heads, MAPS)

    def look(block: Block, x: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        q, k = block.queries_and_keys(x, places)
        visible = visible_keys(*places[:2], *places[:2], block.attention.window)
        scores = masked_scores(q, k, visible, block.attention.softcap)
        weights = jax.nn.softmax(scores, axis=-1)
        entropy = -jnp.sum(jnp.where(weights > 0, weights * jnp.log(jnp.maximum(weights, 1e-30)), 0.0), axis=-1)
        entropy = jnp.sum(entropy * real[:, None], axis=(0, 2)) / jnp.maximum(jnp.sum(real), 1)
        seen = (visible & real[:, :, None])[:, None]
        return block(x, places)[0], (entropy, jnp.max(jnp.where(seen, scores, -jnp.inf)), weights[0, :heads])

    graphs, states = split_all(model.layers)
    period = len(graphs)

    def group(x: jax.Array, parts: dict[str, nnx.State]) -> tuple[jax.Array, Any]:
        found = []
        for i in map(str, range(period)):
            x, one = look(nnx.merge(graphs[i], parts[i]), x)
            found.append(one)
        return x, jax.tree.map(lambda *ones: jnp.stack(ones), *found)

    x, stacked = jax.lax.scan(group, model.embed(batch["tokens"], places, dtype), states)
    layers = jax.tree.map(lambda one: one.reshape(-1, *one.shape[2:]), stacked)  # [groups, period, …]
    for i in map(str, range(len(model.last_layers))):
        x, one = look(model.last_layers[i], x)
        layers = jax.tree.map(lambda all_of, last: jnp.concatenate([all_of, last[None]]), layers, one)
    hidden = x if model.final_norm is None else model.final_norm(x)
    logits = model.logits(hidden)
    of_target = jnp.take_along_axis(logits, batch["targets"][..., None], axis=-1)[..., 0]
    entropy, largest, maps = layers
    return Observed(
        entropy,
        largest,
        maps[jnp.array(shown_layers(config.layers))],
        jax.nn.logsumexp(logits, axis=-1) - of_target,
        jnp.max(jnp.where(real[..., None], logits, -jnp.inf)),
    )


def shown_layers(layers: int) -> list[int]:
    """Those of `Observed.maps`."""
    count = min(layers, MAPS)
    return [i * (layers - 1) // max(count - 1, 1) for i in range(count)]
