"""The update rule, and which rule each parameter gets."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from lm.optim.config import OptimConfig

Group = Literal["matrix", "embedding", "vector"]


def parameter_group(path: tuple[str, ...]) -> Group:
    """What kind of parameter stands at this path of the tree: stacking over layers does not change it."""
    name = path[-1]
    if name == "scale" or name.endswith("bias"):
        return "vector"
    return "embedding" if name in ("embedding", "positions") else "matrix"


def decays(config: OptimConfig, path: tuple[str, ...]) -> bool:
    """Whether weight decay applies to the parameter at this path."""
    group = parameter_group(path)
    return group == "matrix" or (group == "embedding" and config.decayed == "matrices_and_embeddings")


def paths(tree: Any) -> list[tuple[str, ...]]:
    """The path of each leaf of a nested dict, in the order of `jax.tree.leaves`."""
    return [tuple(k.key for k in path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def optimizer(config: OptimConfig) -> optax.GradientTransformationExtraArgs:
    """From gradients, and their norm as `grad_norm`, to the change of each parameter at a learning rate of -1: the
    caller scales by the schedule.

    So the rate is a function of the step alone, also after a step that was not applied. The update needs the
    parameters; its state is two float32 trees like them and a count of the steps that were applied.
    """

    def mask(params: Any) -> Any:
        return jax.tree.unflatten(jax.tree.structure(params), [decays(config, p) for p in paths(params)])

    clip = [] if config.clip_norm is None else [_clip(config.clip_norm)]
    return optax.chain(
        *clip,
        optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
        optax.add_decayed_weights(config.weight_decay, mask),
    )


def _clip(most: float) -> optax.GradientTransformationExtraArgs:
    """`optax.clip_by_global_norm` of a norm that is known: gradients are not read once more for it."""

    def update(
        gradients: Any, state: optax.EmptyState, params: Any = None, *, grad_norm: jax.Array, **_: Any
    ) -> tuple[Any, optax.EmptyState]:
        clipped = jax.tree.map(lambda g: jnp.where(grad_norm < most, g, g / grad_norm * most), gradients)
        return clipped, state

    return optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
