"""The attention layer: projections, query and key norm, positions, cache; the heavy part is in lm/kernels."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lm.kernels.attention import Places, attention
from lm.model.config import ModelConfig
from lm.model.initialization import Initializer
from lm.model.linear import linear
from lm.model.norms import Norm
from lm.model.positions import rotary
from lm.parallel.layout import LOCAL, Layout


class KeyValues(NamedTuple):
    """Keys and values of the tokens read so far, [B, T, K, head_dim] each; slot t holds position t."""

    keys: jax.Array
    values: jax.Array


class Attention(nnx.Module):
    """x [B, S, D] to [B, S, D]; multi-head, grouped-query or multi-query after the number of key/value heads.

    Takes and gives the residual stream's part of S.
    """

    def __init__(self, config: ModelConfig, key: jax.Array, *, window: int):
        d, h, k, w = config.width, config.heads, config.key_value_heads, config.head_width
        init = Initializer(config)
        keys = jax.random.split(key, 4)
        self.window, self.softcap = window, config.attention_softcap
        self.rope_theta = config.rope_theta if config.positions == "rotary" else None
        self.qk_norm = config.qk_norm
        self.query = nnx.Param(init.matrix(keys[0], (d, h, w), fan_in=d), axes=("embed", "heads", "head_dim"))
        self.key = nnx.Param(init.matrix(keys[1], (d, k, w), fan_in=d), axes=("embed", "kv_heads", "head_dim"))
        self.value = nnx.Param(init.matrix(keys[2], (d, k, w), fan_in=d), axes=("embed", "kv_heads", "head_dim"))
        self.output = nnx.Param(init.residual(keys[3], (h, w, d), fan_in=h * w), axes=("heads", "head_dim", "embed"))

        def bias(shape: tuple[int, ...], axes: tuple[str, ...], kinds: tuple[str, ...]) -> nnx.Param | None:
            return nnx.Param(jnp.zeros(shape, jnp.float32), axes=axes) if config.bias in kinds else None

        self.query_bias = bias((h, w), ("heads", "head_dim"), ("qkv", "all"))
        self.key_bias = bias((k, w), ("kv_heads", "head_dim"), ("qkv", "all"))
        self.value_bias = bias((k, w), ("kv_heads", "head_dim"), ("qkv", "all"))
        self.output_bias = bias((d,), ("features",), ("all",))

        def norm(heads: int) -> Norm | None:
            if config.qk_norm == "none":
                return None
            per_head = config.qk_norm == "per_head"
            return Norm(config, w, "head_dim") if per_head else Norm(config, heads * w, "all_heads")

        self.query_norm, self.key_norm = norm(h), norm(k)

    def __call__(
        self, x: jax.Array, places: Places, layout: Layout = LOCAL, cache: KeyValues | None = None
    ) -> tuple[jax.Array, KeyValues | None]:
        """`places` are those of whole sequences, also where a device has a part of x.

        With a cache, x is what follows the tokens in it: keys and values are written at their positions.
        """
        here = jax.tree.map(layout.sequence, places) if layout.over("sequence") else places
        x = layout.enter(x)
        q, k = self.queries_and_keys(x, here, layout)
        v = linear(x, self.value, layout, self.value_bias)
        q, k, v = (checkpoint_name(part, name) for part, name in ((q, "query"), (k, "key"), (v, "value")))
        sources = places
        if cache is not None:
            rows = jnp.arange(x.shape[0])[:, None]
            k = cache.keys.at[rows, places.positions].set(k.astype(cache.keys.dtype))
            v = cache.values.at[rows, places.positions].set(v.astype(cache.values.dtype))
            cache = KeyValues(k, v)
            slots = jnp.broadcast_to(jnp.arange(k.shape[1], dtype=jnp.int32), k.shape[:2])
            sources = Places(jnp.ones_like(slots), slots)
        else:
            k, v = layout.all_columns(k), layout.all_columns(v)
        y = attention(
            q,
            k,
            v,
            queries=here,
            keys=sources,
            window=self.window,
            softcap=self.softcap,
            platform=layout.platform,
            columns=layout.columns(k.shape[1]),
        )
        y = layout.leave(linear(y.reshape(*y.shape[:2], -1), self.output, layout), "heads")
        return y if self.output_bias is None else y + self.output_bias[...].astype(y.dtype), cache

    def queries_and_keys(self, x: jax.Array, places: Places, layout: Layout = LOCAL) -> tuple[jax.Array, jax.Array]:
        """As scores are made of them: [B, S, H, head_dim] and [B, S, K, head_dim], of x and where its columns stand."""
        q = self._norm(linear(x, self.query, layout, self.query_bias), self.query_norm, layout)
        k = self._norm(linear(x, self.key, layout, self.key_bias), self.key_norm, layout)
        if self.rope_theta is not None:
            q = rotary(q, places.positions, self.rope_theta, platform=layout.platform)
            k = rotary(k, places.positions, self.rope_theta, platform=layout.platform)
        return q, k

    def _norm(self, x: jax.Array, norm: Norm | None, layout: Layout) -> jax.Array:
        if norm is None:
            return x
        if self.qk_norm == "per_head":
            return norm(x)
        return norm(x.reshape(*x.shape[:2], -1), layout.over("all_heads")).reshape(x.shape)
