"""What the backward pass finds saved of a layer, and what it computes again."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax


class Remat(NamedTuple):
    kind: Literal["none", "full", "names"] = "none"
    """none: all that is needed is saved; full: only the input of each layer; names: that, and results by name."""
    saved: tuple[str, ...] = ()
    """On the device."""
    offloaded: tuple[str, ...] = ()
    """In the memory of the host."""


NO_REMAT = Remat()


def apply(remat: Remat, layer: Callable[..., Any], *, in_loop: bool) -> Callable[..., Any]:
    """`layer`, whose backward pass finds saved what `remat` says. `in_loop`: it is the body of a scan."""
    if remat.kind == "none":
        return layer
    policies = jax.checkpoint_policies
    if remat.kind == "full":
        policy = policies.nothing_saveable
    elif remat.offloaded:
        policy = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=list(remat.saved),
            names_which_can_be_offloaded=list(remat.offloaded),
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        policy = policies.save_only_these_names(*remat.saved)
    # From one loop to another XLA merges nothing; elsewhere a barrier keeps the second computation from the first.
    return jax.checkpoint(layer, policy=policy, prevent_cse=not in_loop)
