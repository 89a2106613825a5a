"""What LayerNorm and RMSNorm share, with a gradient that keeps the input and one or two numbers per row.

`reference_normalize` is the oracle: autodiff of it keeps several arrays of the size of x.
"""

import functools

import jax
import jax.numpy as jnp


def reference_normalize(
    x: jax.Array, scale: jax.Array | None, *, center: bool, epsilon: float, over: tuple[str, ...] = ()
) -> jax.Array:
    """See `normalize`."""

    def mean(x: jax.Array) -> jax.Array:
        local = jnp.mean(x, axis=-1, keepdims=True)
        return jax.lax.pmean(local, over) if over else local

    if center:
        x = x - mean(x)
    y = x * jax.lax.rsqrt(mean(jnp.square(x)) + epsilon)
    return y if scale is None else y * scale


def normalize(
    x: jax.Array, scale: jax.Array | None, *, center: bool, epsilon: float, over: tuple[str, ...] = ()
) -> jax.Array:
    """x [..., n] float32 over its root mean square along the last axis, after its mean is taken off if `center`,
    times scale [n]. `over`: mesh axes (of a shard_map) over which the last axis is split, each part as long."""
    if over:
        return reference_normalize(x, scale, center=center, epsilon=epsilon, over=over)
    scale = jnp.ones(x.shape[-1], x.dtype) if scale is None else scale
    return _normalize(x, scale, center, epsilon)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _normalize(x: jax.Array, scale: jax.Array, center: bool, epsilon: float) -> jax.Array:
    return _forward(x, scale, center, epsilon)[0]


def _forward(
    x: jax.Array, scale: jax.Array, center: bool, epsilon: float
) -> tuple[jax.Array, tuple[jax.Array, jax.Array | None, jax.Array, jax.Array]]:
    mean = jnp.mean(x, axis=-1, keepdims=True) if center else None
    y = x if mean is None else x - mean
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + epsilon)
    return y * inverse * scale, (x, mean, inverse, scale)


def _backward(
    center: bool,
    epsilon: float,
    kept: tuple[jax.Array, jax.Array | None, jax.Array, jax.Array],
    dy: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    x, mean, inverse, scale = kept
    y = (x if mean is None else x - mean) * inverse
    d = dy * scale
    dx = d - y * jnp.mean(d * y, axis=-1, keepdims=True)
    if center:
        dx = dx - jnp.mean(d, axis=-1, keepdims=True)
    return dx * inverse, jnp.sum(dy * y, axis=tuple(range(dy.ndim - 1)))


_normalize.defvjp(_forward, _backward)
