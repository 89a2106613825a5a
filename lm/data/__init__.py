"""From text on disk to the batch of any step: `build` once, then `Batches.batch(step)`.

sources -> tokenizers -> records   what `build` does, once, in parallel, restartable
stream -> permutation -> batches   what training reads: a pure function of (data, seed, step)

Nothing here imports jax, so that the tools that look at data start at once.
"""
