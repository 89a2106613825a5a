"""What a config amounts to: each parameter with its shape and what the optimizer does to it."""

import math

import jax

from lm.experiment import Config
from lm.model.flops import flops_per_token
from lm.model.transformer import abstract_params
from lm.optim.optimizer import decays, parameter_group, paths


def describe(config: Config) -> str:
    """A table of the parameters, their number, and the FLOPs of training. Allocates nothing."""
    tree = abstract_params(config.model)
    rows = []
    for path, leaf in zip(paths(tree), jax.tree.leaves(tree), strict=True):
        decay = f"decay {config.optim.weight_decay:g}" if decays(config.optim, path) else "no decay"
        shape = " x ".join(map(str, leaf.shape))
        rows.append((".".join(path), shape, parameter_group(path), f"AdamW, {decay}"))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    flops = flops_per_token(config.model, config.train.sequence_length)
    tokens = config.train.batch_size * config.train.sequence_length
    lines += [
        "",
        f"parameters             {count:,}",
        f"tokens per step        {tokens:,}",
        f"tokens in all          {tokens * config.train.steps:,}",
        f"model FLOPs per token  {flops.parameters:.4g} (6 N)  {flops.causal:.4g} (causal, for MFU)  "
        f"{flops.full:.4g} (full attention)",
        f"model FLOPs in all     {flops.causal * tokens * config.train.steps:.4g}",
    ]
    return "\n".join(lines)
