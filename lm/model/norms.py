"""RMSNorm (Zhang & Sennrich 2019) and LayerNorm (Ba et al. 2016), computed in float32."""

import jax
import jax.numpy as jnp
from flax import nnx

from lm.kernels.normalize import normalize
from lm.model.config import ModelConfig


class Norm(nnx.Module):
    """Normalises the last axis of x [..., size]; returns the dtype of x."""

    def __init__(self, config: ModelConfig, size: int, axis: str):
        self.kind, self.epsilon = config.norm, config.norm_epsilon
        scale, bias = config.norm_parameters != "none", config.norm_parameters == "scale_and_bias"
        self.scale = nnx.Param(jnp.ones(size, jnp.float32), axes=(axis,)) if scale else None
        self.bias = nnx.Param(jnp.zeros(size, jnp.float32), axes=(axis,)) if bias else None

    def __call__(self, x: jax.Array, over: tuple[str, ...] = ()) -> jax.Array:
        """`over`: mesh axes that split the last axis of x."""
        scale = None if self.scale is None else self.scale[...]
        y = normalize(x.astype(jnp.float32), scale, center=self.kind == "layer", epsilon=self.epsilon, over=over)
        if self.bias is not None:
            y = y + self.bias[...]
        return y.astype(x.dtype)
