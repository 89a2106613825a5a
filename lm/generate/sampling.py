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
    """Keeps the fewest most likely tokens whose probabilities sum to at least this, and those as likely as the
    last of them (Holtzman et al. 2020)."""
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
        probabilities = jax.nn.softmax(logits, axis=-1)
        logits = jnp.where(probabilities < _nucleus(probabilities, sampling.top_p), -jnp.inf, logits)
    if sampling.min_p > 0:
        logits = jnp.where(logits < math.log(sampling.min_p), -jnp.inf, logits)
    return logits


def _nucleus(probabilities: jax.Array, mass: float) -> jax.Array:
    """[B, 1]: the largest number such that probabilities [B, V] no smaller than it sum to `mass` or more.

    Found bit by bit, as floats from 0 up are ordered as their bits are: sorting a vocabulary is far slower.
    """

    def step(i: jax.Array, bits: jax.Array) -> jax.Array:
        trial = bits | (1 << (30 - i))
        least = jax.lax.bitcast_convert_type(trial, jnp.float32)
        enough = jnp.sum(probabilities, axis=-1, keepdims=True, where=probabilities >= least) >= mass
        return jnp.where(enough, trial, bits)

    bits = jax.lax.fori_loop(0, 31, step, jnp.zeros((probabilities.shape[0], 1), jnp.int32))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
