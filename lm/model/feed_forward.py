"""The feed-forward layer: plain (GELU, squared ReLU) or gated (SwiGLU, GeGLU; Shazeer 2020)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from lm.kernels.gelu import gelu
from lm.model.config import ModelConfig
from lm.model.initialization import Initializer
from lm.model.linear import linear
from lm.parallel.layout import LOCAL, Layout

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "swiglu": jax.nn.silu,
    "geglu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": gelu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "squared_relu": lambda x: jnp.square(jax.nn.relu(x)),
}


class FeedForward(nnx.Module):
    """x [B, S, D] to [B, S, D] through a hidden layer of F. Takes and gives the residual stream's part of S."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        d, f, init = config.width, config.hidden_width, Initializer(config)
        key_in, key_gate, key_out = jax.random.split(key, 3)
        self.activation = config.activation
        self.up = nnx.Param(init.matrix(key_in, (d, f), fan_in=d), axes=("embed", "mlp"))
        gate = init.matrix(key_gate, (d, f), fan_in=d) if config.gated else None
        self.gate = None if gate is None else nnx.Param(gate, axes=("embed", "mlp"))
        self.down = nnx.Param(init.residual(key_out, (f, d), fan_in=f), axes=("mlp", "embed"))
        bias = config.bias == "all"
        self.up_bias = nnx.Param(jnp.zeros(f, jnp.float32), axes=("mlp",)) if bias else None
        self.down_bias = nnx.Param(jnp.zeros(d, jnp.float32), axes=("features",)) if bias else None

    def __call__(self, x: jax.Array, layout: Layout = LOCAL) -> jax.Array:
        x = layout.enter(x)
        up = checkpoint_name(linear(x, self.up, layout, self.up_bias), "feed_forward_up")
        activation = _ACTIVATIONS[self.activation]
        if self.gate is None:
            hidden = activation(up)
        else:
            hidden = activation(checkpoint_name(linear(x, self.gate, layout), "feed_forward_gate")) * up
        y = layout.leave(linear(hidden, self.down, layout), "mlp")
        return y if self.down_bias is None else y + self.down_bias[...].astype(y.dtype)
