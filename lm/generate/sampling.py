"""How the next token is drawn from the logits: greedy, temperature, top-k, top-p and min-p."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from lm.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """Filters apply in this order, each to what the one before left, renormalised (as in Hugging Face).

    Raises ConfigError for values that cannot work.
    """

    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most likely token."""
    top_k: int = 0
    """Keeps the k most likely tokens and those as likely as the k-th; 0 keeps all."""
    top_p: float = 1.0
    """Keeps the fewest tokens whose probabilities sum to at least this (Holtzman et al. 2020)."""
    min_p: float = 0.0
    """Keeps tokens at least this times as likely as the most likely one (Nguyen et al. 2024)."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature must be at least 0 (0 is greedy), got {self.temperature}")
        if self.top_k < 0:
            raise ConfigError(f"top_k must be at least 1, or 0 for all tokens; got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be above 0 and at most 1 (1 keeps all tokens), got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p must be from 0 (keeps all tokens) to 1, got {self.min_p}")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be from 0 to 2^32 - 1, got {self.seed}")


def sample(logits: jax.Array, keys: jax.Array, sampling: Sampling) -> jax.Array:
    """int32 [B] ids from logits float32 [B, V]; row i draws with keys[i] alone. `sampling.seed` is not used.

    Greedy takes the lowest of equally likely ids.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, filter_logits(logits, sampling)).astype(jnp.int32)


def filter_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits [B, V] of the distribution that is drawn from: tempered, -inf where a filter removed a token."""
    # The largest is taken off first, and becomes exactly 0, so that no temperature overflows it.
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    logits = logits / max(sampling.temperature, 1e-30)
    if 0 < sampling.top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, sampling.top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if sampling.top_p < 1:
        order = jnp.argsort(-logits, axis=-1)
        sorted_probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
        before = jnp.cumsum(sorted_probabilities, axis=-1) - sorted_probabilities
        kept = (before < sampling.top_p).at[:, 0].set(True)
        kept = jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
        logits = jnp.where(kept, logits, -jnp.inf)
    if sampling.min_p > 0:
        logits = jnp.where(logits < math.log(sampling.min_p), -jnp.inf, logits)
    return logits
