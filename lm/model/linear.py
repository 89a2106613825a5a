"""Products of activations with weights."""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from lm.parallel.layout import GATHERED, Layout


def linear(x: jax.Array, weight: nnx.Param, layout: Layout, bias: nnx.Param | None = None) -> jax.Array:
    """x [B, S, n] times weight in the dtype of x: [B, S, …], where the first dimensions of the weight make n.

    The weight is gathered for the product, and again for its gradients: only x is kept in between. The gradient of
    the weight is float32 before it is summed over devices.
    """
    # Tokens are one axis: with two, XLA on a CPU copies whole activations for the gradient of the weight.
    y = _product(x.reshape(-1, x.shape[-1]), weight[...], weight.get_metadata()["axes"], layout)
    y = y.reshape(*x.shape[:-1], *y.shape[1:])
    return y if bias is None else y + bias[...].astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: jax.Array, weight: jax.Array, axes: tuple[str, ...], layout: Layout) -> jax.Array:
    stored = _Stored(weight.shape, axes, layout)
    whole = stored.whole(weight, x.dtype)
    y = jnp.einsum("ti,oi->to" if stored.transposed else "ti,io->to", x, whole)
    return y.reshape(x.shape[0], *stored.outer)


def _forward(
    x: jax.Array, weight: jax.Array, axes: tuple[str, ...], layout: Layout
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _product(x, weight, axes, layout), (x, weight)


def _backward(
    axes: tuple[str, ...], layout: Layout, kept: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, weight = kept
    stored = _Stored(weight.shape, axes, layout)
    dy = dy.reshape(x.shape[0], -1)
    whole = stored.whole(weight, x.dtype)
    dx = jnp.einsum("to,oi->ti" if stored.transposed else "to,io->ti", dy, whole)
    pair = (dy, x) if stored.transposed else (x, dy)
    gradient = jnp.einsum("ta,tb->ab", *pair, preferred_element_type=jnp.float32)
    return dx, stored.part(gradient)


_product.defvjp(_forward, _backward)


class _Stored:
    """A stored weight as the matrix that a product uses, and its gradient back.

    What is gathered, and scattered, is the first axis of the matrix: that of the inputs, or transposed, that of the
    outputs. Along another one, the devices would exchange it in pieces, or with all of it copied before.
    """

    def __init__(self, shape: tuple[int, ...], axes: tuple[str, ...], layout: Layout):
        self.shape, self.layout = shape, layout
        to_residual = axes[-1] in GATHERED
        self.transposed = to_residual and bool(layout.over(axes[-1]))
        self.gathered = (axes[-1] if self.transposed else axes[0],)
        # Weights read the residual stream, their first dimension, or write to it, their last; that may be in parts.
        inner = len(shape) - 1 if to_residual else 1
        self.local = (math.prod(shape[:inner]), math.prod(shape[inner:]))
        self.outer = (*shape[inner:-1], shape[-1] * layout.gathered_parts(axes[-1]))

    def whole(self, weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """[inputs, outputs], or the other way round."""
        matrix = weight.astype(dtype).reshape(self.local)
        return self.layout.whole(matrix.T if self.transposed else matrix, self.gathered, dtype)

    def part(self, gradient: jax.Array) -> jax.Array:
        part = self.layout.scatter(gradient, self.gathered)
        return (part.T if self.transposed else part).reshape(self.shape)
