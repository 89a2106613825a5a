"""Next-token cross-entropy from hidden states, without ever holding all logits."""

import jax

from lm.kernels.cross_entropy.chunked import WHOLE, VocabularyParts, chunked_cross_entropy, chunked_likelihoods

__all__ = ["VocabularyParts", "cross_entropy", "likelihoods"]


def cross_entropy(
    hidden: jax.Array,
    output: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
    logits_at_once: int = 2**21,
    parts: VocabularyParts = WHOLE,
) -> tuple[jax.Array, jax.Array]:
    """Sums over all tokens of the loss to minimise and of the negative log-likelihood alone, float32, in nats.

    hidden: [B, S, D]; output: [V, D], one row per id; targets: int32 [B, S]; mask: float32 [B, S], the weight
    of each target. With l the logits and z = logsumexp(l), the loss of a token is z - l[target] + z_loss * z²
    (the second part after PaLM, Chowdhery et al. 2022). `softcap`: l becomes softcap * tanh(l / softcap) first.
    The second sum carries no gradient: it is for reporting. `logits_at_once`: about how many exist at a time.

    `parts`: for a vocabulary that several devices share, see there. Each then returns the sums over all of it, and
    the gradients that its own part causes.
    """
    return chunked_cross_entropy(hidden, output, targets, mask, z_loss, softcap, logits_at_once, parts)


def likelihoods(
    hidden: jax.Array,
    output: jax.Array,
    targets: jax.Array,
    *,
    softcap: float | None = None,
    logits_at_once: int = 2**21,
    parts: VocabularyParts = WHOLE,
) -> jax.Array:
    """The negative log-likelihood of each target, float32 [B, S], in nats; arguments as of `cross_entropy`."""
    return chunked_likelihoods(hidden, output, targets, softcap, logits_at_once, parts)
