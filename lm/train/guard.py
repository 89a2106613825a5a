"""Which steps are accepted: what a step is held against, from the accepted steps before it.

A step is accepted when it is finite and, from the 129th step on that was counted, neither the loss nor the logarithm
of the gradient's norm is above

    mean + clip(sigmas * standard deviation, low, high)

Mean and variance are those of the accepted steps: plain ones over the first 128, so nothing is biased by where they
start, then exponential ones. With the share a = 1 / min(n, 128) of the n-th value x (West 1979, Finch 2009),

    mean' = mean + a (x - mean)        variance' = (1 - a) (variance + a (x - mean)²)

Below `low` is what a healthy run does now and then; above `high` is what none does, however noisy it was. The norm is
judged by its logarithm, since it varies by factors.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

WINDOW = 128
"""Accepted steps that the statistics are over, and without which nothing is held against them."""

LOSS_LIMITS = (1.0, 10.0)
"""low and high, nats per token."""
NORM_LIMITS = (float(np.log(10.0)), float(np.log(1e5)))
"""low and high, of the logarithm: factors of 10 and 10^5."""
MOST_LOSS = 100.0
"""What a larger loss counts as: one that is accepted before anything can be held against it would stay for long."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["mean", "variance"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Statistics:
    """Of one quantity, float32."""

    mean: jax.Array
    variance: jax.Array

    def add(self, value: jax.Array, share: jax.Array) -> "Statistics":
        change = value - self.mean
        return Statistics(self.mean + share * change, (1 - share) * (self.variance + share * change**2))

    def limit(self, sigmas: float, limits: tuple[float, float]) -> jax.Array:
        return self.mean + jnp.clip(sigmas * jnp.sqrt(self.variance), *limits)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["counted", "loss", "log_grad_norm"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Guard:
    """What the accepted steps were like."""

    counted: jax.Array
    """int32, steps in the statistics since these began."""
    loss: Statistics
    log_grad_norm: Statistics

    def accepts(self, loss: jax.Array, grad_norm: jax.Array, sigmas: float) -> jax.Array:
        """Whether a finite step is none that spikes, bool []. `sigmas` of 0 accepts all."""
        if not sigmas:
            return jnp.bool_(True)
        usual = (loss <= self.loss.limit(sigmas, LOSS_LIMITS)) & (
            _log(grad_norm) <= self.log_grad_norm.limit(sigmas, NORM_LIMITS)
        )
        return usual | (self.counted < WINDOW)

    def add(self, loss: jax.Array, grad_norm: jax.Array) -> "Guard":
        """With one more step. What comes of a step that is not finite is for the caller to throw away."""
        counted = self.counted + 1
        share = 1 / jnp.minimum(counted, WINDOW).astype(jnp.float32)
        return Guard(
            counted, self.loss.add(jnp.minimum(loss, MOST_LOSS), share), self.log_grad_norm.add(_log(grad_norm), share)
        )


def fresh_guard() -> Guard:
    """Before any step: all zeros."""
    zero = jnp.zeros((), jnp.float32)
    return Guard(jnp.zeros((), jnp.int32), Statistics(zero, zero), Statistics(zero, zero))


def _log(grad_norm: jax.Array) -> jax.Array:
    return jnp.log(jnp.maximum(grad_norm, np.finfo(np.float32).tiny))
