"""The train step, compiled for devices that are not here."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import Mesh

from lm.experiment import Config
from lm.parallel.mesh import make_mesh
from lm.parallel.sharding import batch_sharding, rules
from lm.train.state import abstract_state
from lm.train.step import jit_train_step


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    compiled: jax.stages.Compiled
    mesh: Mesh
    lowering_seconds: float
    """From the config to the program handed to the compiler."""
    compile_seconds: float


def compile_train_step(config: Config, devices: Sequence[jax.Device]) -> CompiledStep:
    """The very function that training runs, compiled for `devices`: nothing is allocated, nothing runs.

    Raises ConfigError for a mesh or a batch that does not fit, and what XLA raises when the step needs more memory
    than a device has.
    """
    start = time.monotonic()
    mesh = make_mesh(config.mesh, devices)
    lowered = _lower(config, mesh)
    middle = time.monotonic()
    with uncached():
        compiled = lowered.compile()
    return CompiledStep(compiled, mesh, middle - start, time.monotonic() - middle)


def _lower(config: Config, mesh: Mesh) -> jax.stages.Lowered:
    return jit_train_step(config, mesh).lower(abstract_state(config, mesh), abstract_batch(config, mesh))


def abstract_batch(config: Config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a batch, as the data path makes it."""
    rows, length = config.train.batch_size, config.train.sequence_length
    sharding = batch_sharding(mesh, rules(config.mesh))
    table, row = (rows, length), (rows,)
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        **dict.fromkeys(("tokens", "targets", "segments", "positions"), (table, jnp.int32)),
        "loss_mask": (table, jnp.float32),
        "bytes": (row, jnp.int32),
    }
    if config.data.prefix_rate:
        shapes["prefix"] = (table, jnp.int32)
    return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for name, (shape, dtype) in shapes.items()}


@contextmanager
def uncached() -> Iterator[None]:
    """No persistent compilation cache: a program for devices that are not here cannot be read back from it."""
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    _enable_cache(False)
    try:
        yield
    finally:
        _enable_cache(before)


def _enable_cache(enabled: bool) -> None:
    jax.config.update("jax_enable_compilation_cache", enabled)
    compilation_cache.reset_cache()  # JAX decides once whether it has a cache
