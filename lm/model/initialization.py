"""Named schemes of initialisation: the standard deviation of every weight at step 0."""

import math

import jax
import jax.numpy as jnp

from lm.model.config import ModelConfig


class Initializer:
    """Draws float32 weights after `config.init`.

    gpt2: normal 0.02 everywhere; what writes to the residual stream is divided by sqrt(2 L) (Radford et al. 2019).
    lecun: truncated normal 1 / sqrt(fan in), residual writes divided by sqrt(2 L); embeddings normal 1 / sqrt(D).
    small: normal sqrt(2 / 5D) (Nguyen & Salazar 2019), residual writes 2 / (L sqrt(D)) (GPT-NeoX).
    """

    def __init__(self, config: ModelConfig):
        self.config = config

    def embedding(self, key: jax.Array, rows: int) -> jax.Array:
        std = {
            "gpt2": 0.02,
            "lecun": self.config.width**-0.5,
            "small": math.sqrt(2 / (5 * self.config.width)),
        }[self.config.init]
        return std * jax.random.normal(key, (rows, self.config.width), jnp.float32)

    def matrix(self, key: jax.Array, shape: tuple[int, ...], *, fan_in: int) -> jax.Array:
        """A projection that reads the residual stream or feeds an inner layer."""
        return self._draw(key, shape, fan_in, 1.0)

    def residual(self, key: jax.Array, shape: tuple[int, ...], *, fan_in: int) -> jax.Array:
        """A projection whose result is added to the residual stream."""
        if self.config.init == "small":
            std = 2 / (self.config.layers * math.sqrt(self.config.width))
            return std * jax.random.normal(key, shape, jnp.float32)
        return self._draw(key, shape, fan_in, 1 / math.sqrt(2 * self.config.layers))

    def _draw(self, key: jax.Array, shape: tuple[int, ...], fan_in: int, scale: float) -> jax.Array:
        if self.config.init == "lecun":
            # A normal cut at two deviations has 0.8796 of its deviation left.
            std = scale / math.sqrt(fan_in) / 0.87962566103423978
            return std * jax.random.truncated_normal(key, -2, 2, shape, jnp.float32)
        std = 0.02 if self.config.init == "gpt2" else math.sqrt(2 / (5 * self.config.width))
        return std * scale * jax.random.normal(key, shape, jnp.float32)
