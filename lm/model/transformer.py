"""The decoder-only transformer: embeddings, a scan over stacked layers, and the output projection."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lm.kernels.attention import Places
from lm.model.attention import Attention, KeyValues
from lm.model.config import ModelConfig
from lm.model.feed_forward import FeedForward
from lm.model.initialization import Initializer
from lm.model.norms import Norm
from lm.model.positions import sinusoidal
from lm.model.remat import NO_REMAT, Remat, apply
from lm.parallel.layout import LOCAL, Layout
from lm.parallel.pipeline import pipeline

Cache = dict[str, KeyValues | None]


class Block(nnx.Module):
    """One layer: attention, then feed-forward, each with its norms around it."""

    def __init__(self, config: ModelConfig, key: jax.Array, *, window: int):
        key_attention, key_feed_forward = jax.random.split(key)
        self.placement, self.dropout = config.norm_placement, config.dropout
        self.attention = Attention(config, key_attention, window=window)
        self.feed_forward = FeedForward(config, key_feed_forward)
        self.attention_norm = Norm(config, config.width, "features")
        self.feed_forward_norm = Norm(config, config.width, "features")
        sandwich = config.norm_placement == "sandwich"
        self.attention_output_norm = Norm(config, config.width, "features") if sandwich else None
        self.feed_forward_output_norm = Norm(config, config.width, "features") if sandwich else None

    def __call__(
        self,
        x: jax.Array,
        places: Places,
        layout: Layout = LOCAL,
        key: jax.Array | None = None,
        cache: KeyValues | None = None,
    ) -> tuple[jax.Array, KeyValues | None]:
        keys = (None, None) if key is None else (_fold_in(key, 0), _fold_in(key, 1))
        y, cache = self.attention(self._read(x, self.attention_norm), places, layout, cache)
        y = checkpoint_name(y, "attention_output")
        x = self._add(x, y, self.attention_norm, self.attention_output_norm, keys[0])
        y = self.feed_forward(self._read(x, self.feed_forward_norm), layout)
        x = self._add(x, y, self.feed_forward_norm, self.feed_forward_output_norm, keys[1])
        return x, cache

    def queries_and_keys(self, x: jax.Array, places: Places) -> tuple[jax.Array, jax.Array]:
        """Of a whole residual stream: see `Attention`."""
        return self.attention.queries_and_keys(self._read(x, self.attention_norm), places)

    def _read(self, x: jax.Array, norm: Norm) -> jax.Array:
        return norm(x) if self.placement in ("pre", "sandwich") else x

    def _add(
        self, x: jax.Array, y: jax.Array, norm: Norm, output_norm: Norm | None, key: jax.Array | None
    ) -> jax.Array:
        if output_norm is not None:
            y = output_norm(y)
        elif self.placement == "output":
            y = norm(y)
        x = x + dropout(y, self.dropout, key)
        return norm(x) if self.placement == "post" else x


class Transformer(nnx.Module):
    """Tokens to hidden states [B, S, D]; `logits` or the loss (lm/model/loss.py) take it from there.

    Layers are stacked for `lax.scan`: with a pattern of p windows, `layers["i"]` holds layers i, i + p, i + 2p, …
    along a leading axis. Layers left over when p does not divide L are in `last_layers`, not stacked.
    """

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.config = config
        init = Initializer(config)
        key_embed, key_positions, key_output, key_layers = jax.random.split(key, 4)
        self.embedding = nnx.Param(init.embedding(key_embed, config.vocab_size), axes=("vocab", "embed"))
        table = init.embedding(key_positions, config.context) if config.positions == "learned" else None
        self.positions = None if table is None else nnx.Param(table, axes=("positions", "embed"))
        rest = config.layers % len(config.pattern)
        keys = jax.random.split(key_layers, config.layers)
        stacked, last = keys[: config.layers - rest], keys[config.layers - rest :]
        self.layers = nnx.Dict(
            {
                str(i): _stack(functools.partial(Block, config, window=window), stacked[i :: len(config.pattern)])
                for i, window in enumerate(config.pattern)
            }
        )
        self.last_layers = nnx.Dict(
            {str(i): Block(config, k, window=w) for i, (w, k) in enumerate(zip(config.pattern, last, strict=False))}
        )
        self.final_norm = None if config.norm_placement == "post" else Norm(config, config.width, "features")
        shape = (config.vocab_size, config.width)
        untied = config.embeddings == "untied"
        output = init.matrix(key_output, shape, fan_in=config.width) if untied else None
        self.output = None if output is None else nnx.Param(output, axes=("vocab", "embed"))

    def __call__(
        self,
        tokens: jax.Array,
        places: Places,
        *,
        dtype: jnp.dtype,
        layout: Layout = LOCAL,
        key: jax.Array | None = None,
        cache: Cache | None = None,
        remat: Remat = NO_REMAT,
        unroll: int = 1,
    ) -> tuple[jax.Array, Cache | None]:
        """Hidden states and the cache written to, from tokens and places, int32 [B, S].

        On a mesh: from the whole sequences of this device's rows, its part of the hidden states, that of the residual
        stream. `key`, one for each row [B], turns dropout on. `unroll` layers (or groups of them) stand in the body of
        the loop: faster on a CPU, longer to compile.
        """
        config = self.config
        keys = None
        if key is not None and config.dropout:
            columns = layout.residual(layout.sequence(jnp.arange(tokens.shape[1])[None]))[0]
            keys = jax.vmap(lambda row: jax.vmap(lambda column: jax.random.fold_in(row, column))(columns))(key)
        x = self.embed(tokens, places, dtype, layout)
        x = dropout(x, config.dropout, None if keys is None else _fold_in(keys, config.layers))

        if layout.stages > 1:
            x = self._pipelined(x, places, keys, layout, remat, unroll)
            return x if self.final_norm is None else self.final_norm(x), None
        x, cache = self._all_layers(x, places, keys, layout, cache, remat, unroll)
        return x if self.final_norm is None else self.final_norm(x), cache

    def embed(self, tokens: jax.Array, places: Places, dtype: jnp.dtype, layout: Layout = LOCAL) -> jax.Array:
        """What the first layer reads, but for dropout."""
        x = layout.look_up(self.embedding[...], layout.sequence(tokens), dtype)
        here = layout.residual(layout.sequence(places.positions))
        if self.positions is not None:
            table = layout.whole(self.positions[...], self.positions.get_metadata()["axes"], jnp.float32)
            return x + table[here].astype(dtype)
        if self.config.positions == "sinusoidal":
            return x + sinusoidal(here, self.config.width).astype(dtype)
        return x

    def _all_layers(
        self,
        x: jax.Array,
        places: Places,
        keys: jax.Array | None,
        layout: Layout,
        cache: Cache | None,
        remat: Remat,
        unroll: int,
    ) -> tuple[jax.Array, Cache | None]:
        config, period = self.config, len(self.config.pattern)
        groups = config.layers // period
        graphs, states = split_all(self.layers)
        stacked_cache = {i: None if cache is None else cache[i] for i in graphs}
        x, stacked_cache = _scan(graphs, states, x, 0, places, keys, layout, stacked_cache, remat, unroll)

        last_graphs, last_states = split_all(self.last_layers)
        last_cache: dict[str, KeyValues | None] = {}
        for i in map(str, range(len(last_graphs))):
            name, layer = f"last_{i}", jnp.int32(groups * period + int(i))
            call = _one_layer(last_graphs[i], layout, remat, in_loop=False)
            before = None if cache is None else cache[name]
            x, last_cache[name] = call(last_states[i], x, places, keys, layer, before)
        return x, None if cache is None else {**stacked_cache, **last_cache}

    def _pipelined(
        self, x: jax.Array, places: Places, keys: jax.Array | None, layout: Layout, remat: Remat, unroll: int
    ) -> jax.Array:
        """All layers as a pipeline: from all rows of this device, the same on each stage, to the rows that this
        stage computes the loss of (`Layout.loss_rows`)."""
        graphs, states = split_all(self.layers)

        def stage(part: Any, x: jax.Array, rows: tuple[Places, jax.Array | None], first: jax.Array) -> jax.Array:
            places, keys = rows
            return _scan(graphs, part, x, first, places, keys, layout, dict.fromkeys(graphs), remat, unroll)[0]

        return pipeline(stage, states, x, (places, keys), layout=layout, layers=self.config.layers)

    @property
    def output_weights(self) -> tuple[jax.Array, tuple[str, ...]]:
        """float32 [V, D], one row per id, as stored; and the names of its axes."""
        param = self.embedding if self.output is None else self.output
        return param[...], param.get_metadata()["axes"]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 [..., V] from hidden states [..., D]."""
        weights = self.output_weights[0].astype(hidden.dtype)
        logits = jnp.einsum("...d,vd->...v", hidden, weights, preferred_element_type=jnp.float32)
        cap = self.config.output_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)

    def empty_cache(self, batch: int, length: int, dtype: jnp.dtype) -> Cache:
        """Room for `length` tokens of `batch` sequences."""
        config = self.config
        shape = (batch, length, config.key_value_heads, config.head_width)
        groups = config.layers // len(config.pattern)

        def zeros(*leading: int) -> KeyValues:
            return KeyValues(jnp.zeros((*leading, *shape), dtype), jnp.zeros((*leading, *shape), dtype))

        stacked: Cache = {i: zeros(groups) for i in self.layers}
        return stacked | {f"last_{i}": zeros() for i in self.last_layers}


def _one_layer(graph: Any, layout: Layout, remat: Remat, *, in_loop: bool) -> Any:
    """The function of one layer's parameters, the residual stream, and what else it reads."""

    def layer(
        part: nnx.State,
        x: jax.Array,
        places: Places,
        keys: jax.Array | None,
        number: jax.Array,
        cache: KeyValues | None,
    ) -> tuple[jax.Array, KeyValues | None]:
        layer_keys = None if keys is None else _fold_in(keys, number)
        return nnx.merge(graph, part)(x, places, layout, layer_keys, cache)

    return apply(remat, layer, in_loop=in_loop)


def _scan(
    graphs: dict[str, Any],
    states: dict[str, nnx.State],
    x: jax.Array,
    first: jax.Array | int,
    places: Places,
    keys: jax.Array | None,
    layout: Layout,
    caches: dict[str, KeyValues | None],
    remat: Remat,
    unroll: int,
) -> tuple[jax.Array, dict[str, KeyValues | None]]:
    """A loop over stacked layers, of which `first` is the number of the first."""
    period = len(graphs)
    in_loop = unroll < jax.tree.leaves(states)[0].shape[0]
    calls = {i: _one_layer(graph, layout, remat, in_loop=in_loop) for i, graph in graphs.items()}

    def group(x: jax.Array, inputs: tuple) -> tuple[jax.Array, dict]:
        parts, number, caches = inputs
        for i in map(str, range(period)):  # not the order of the dicts, which is that of the strings
            x, caches[i] = calls[i](parts[i], x, places, keys, number + int(i), caches[i])
        return x, caches

    groups = jax.tree.leaves(states)[0].shape[0]
    numbers = first + jnp.arange(groups, dtype=jnp.int32) * period
    return jax.lax.scan(group, x, (states, numbers, caches), unroll=unroll)


def dropout(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    """Zeroes a share `rate` of x [B, S, D] and scales up the rest; the identity without keys [B, S].

    Each token has a key of its own, so that what it loses does not depend on which tokens are computed with it.
    """
    if keys is None or rate == 0:
        return x
    keep = jax.vmap(jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[2:])))(keys)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def _fold_in(keys: jax.Array, number: jax.Array | int) -> jax.Array:
    """Keys [B, S] folded with a number."""
    return jax.vmap(jax.vmap(lambda key: jax.random.fold_in(key, number)))(keys)


def compute_dtype(config: ModelConfig, platform: str) -> jnp.dtype:
    """What products are computed in on devices of this platform."""
    if config.dtype == "auto":
        return jnp.dtype(jnp.float32 if platform == "cpu" else jnp.bfloat16)
    return jnp.dtype(config.dtype)


def init_params(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Draws all parameters: nested dict of float32 arrays. To be jitted by the caller, with its shardings."""
    return nnx.to_pure_dict(nnx.state(Transformer(config, key)))


@functools.cache
def _abstract(config: ModelConfig) -> tuple[Any, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Transformer(config, jax.random.key(0))))


def bind(config: ModelConfig, params: dict[str, Any]) -> Transformer:
    """The module with these parameters in it; params as from `init_params`, arrays or tracers."""
    graph, abstract = _abstract(config)
    state = jax.tree.map(lambda leaf: leaf, abstract)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def abstract_params(config: ModelConfig) -> dict[str, Any]:
    """Shapes and dtypes of the parameters, as `jax.ShapeDtypeStruct`; allocates nothing."""
    return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


def parameter_axes(config: ModelConfig) -> dict[str, Any]:
    """The logical axis names of each parameter, in a tree like the parameters', one tuple per leaf."""
    _, abstract = _abstract(config)
    tree: dict[str, Any] = {}
    for path, variable in nnx.to_flat_state(abstract):
        names = tuple(variable.get_metadata()["axes"])
        node = tree
        for part in path[:-1]:
            node = node.setdefault(str(part), {})
        node[str(path[-1])] = ("layers", *names) if path[0] == "layers" else names
    return tree


def _stack(make: Any, keys: jax.Array) -> nnx.Module:
    """One module whose parameters have a leading axis over keys."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: make(jax.random.key(0))))
    # A loop over the layers, not a batch of them: it compiles in half the time.
    return nnx.merge(graph, jax.lax.map(lambda key: nnx.state(make(key)), keys))


def split_all(blocks: nnx.Dict) -> tuple[dict[str, Any], dict[str, nnx.State]]:
    """What blocks are, and their parameters, which `nnx.merge` puts together again."""
    pairs = {i: nnx.split(block) for i, block in blocks.items()}
    return {i: graph for i, (graph, _) in pairs.items()}, {i: state for i, (_, state) in pairs.items()}
