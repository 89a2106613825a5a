"""Products of activations with weights."""

import math

import jax


def linear(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """x [B, S, n] times weight [n, …] in the dtype of x: [B, S, …].

    Tokens are one axis in the product: with two, XLA on a CPU copies whole activations for the gradient of the weight.
    """
    inner, outer = weight.shape[0], weight.shape[1:]
    y = x.reshape(-1, inner) @ weight.reshape(inner, math.prod(outer)).astype(x.dtype)
    y = y.reshape(*x.shape[:-1], *outer)
    return y if bias is None else y + bias.astype(x.dtype)
