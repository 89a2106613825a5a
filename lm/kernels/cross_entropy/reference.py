"""Cross-entropy as it is defined: all logits at once. The oracle for the chunked one."""

import jax
import jax.numpy as jnp


def reference_cross_entropy(
    hidden: jax.Array,
    output: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    z_loss: float,
    softcap: float | None,
) -> tuple[jax.Array, jax.Array]:
    """See `lm.kernels.cross_entropy.cross_entropy`. Holds float32 [B, S, V]."""
    logits = jnp.einsum("bsd,vd->bsv", hidden, output.astype(hidden.dtype), preferred_element_type=jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    nll = log_normalizer - target_logit
    total = nll + z_loss * jnp.square(log_normalizer)
    return jnp.sum(total * mask), jax.lax.stop_gradient(jnp.sum(nll * mask))
