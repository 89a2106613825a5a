"""Results that the host reads, in runs where several processes hold the arrays that they come from."""

from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec


def replicated(tree: Any) -> NamedSharding | None:
    """On every device of the mesh that holds the arrays of `tree`: where each process can read a result.

    None when this process holds all of them, and can read everything as it is.
    """
    for x in jax.tree.leaves(tree):
        sharding = getattr(x, "sharding", None)  # of a jax.Array, or of a ShapeDtypeStruct
        if isinstance(sharding, NamedSharding) and not sharding.is_fully_addressable:
            return NamedSharding(sharding.mesh, PartitionSpec())
    return None
