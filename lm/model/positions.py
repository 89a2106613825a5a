"""Positions that are computed: rotary (Su et al. 2021) and sinusoidal (Vaswani et al. 2017)."""

import jax
import jax.numpy as jnp


def rotary(x: jax.Array, positions: jax.Array, theta: float, *, platform: str = "cpu") -> jax.Array:
    """Turns x [B, S, heads, head_dim] by its positions [B, S]; dimension i pairs with i + head_dim / 2.

    Angles and products are float32; returns the dtype of x.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    if platform != "tpu":
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
    # Halves of a head leave half of a TPU's lanes empty. The product that swaps them is exact, and nearly free.
    sin, cos = jnp.concatenate([sin, sin], axis=-1), jnp.concatenate([cos, cos], axis=-1)
    eye, zero = jnp.eye(half, dtype=x.dtype), jnp.zeros((half, half), x.dtype)
    swap = jnp.block([[zero, eye], [-eye, zero]])
    swapped = jnp.einsum("bshi,ij->bshj", x, swap, precision="highest", preferred_element_type=jnp.float32)
    return (x.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype)


def sinusoidal(positions: jax.Array, width: int) -> jax.Array:
    """float32 [B, S, width] from positions [B, S]: sines in the first half, cosines in the second."""
    half = -(-width // 2)
    frequencies = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)[..., :width]
