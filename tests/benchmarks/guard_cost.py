"""What the guard of the train step costs in a healthy run: the step as it is, against one that applies every update.

    python tests/benchmarks/guard_cost.py [CONFIG] [--pairs 20] [--steps 5] [--topology v5e:2x4] [--train.…]

On a CPU both take turns in blocks, each on its own state; printed is the ratio of CPU seconds of neighbouring blocks.
With a topology both are compiled for that TPU slice, and the compiler's estimated cycles and its collectives compared.
"""

import argparse
import contextlib
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp

from lm import config as configs
from lm.experiment import Config
from lm.parallel.mesh import make_mesh
from lm.plan.compile import compile_train_step
from lm.plan.program import read_program
from lm.plan.topology import topology
from lm.train import step
from lm.train.guard import Guard
from lm.train.host_memory import keep_freed_memory
from lm.train.state import init_state


@contextlib.contextmanager
def unguarded() -> Iterator[None]:
    """Nothing is selected, and no statistics are kept."""
    with (
        mock.patch.object(step, "_select", lambda accepted, new, old: new),
        mock.patch.object(Guard, "add", lambda self, loss, grad_norm: self),
        mock.patch.object(Guard, "accepts", return_value=jnp.bool_(True)),
    ):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    quickstart = Path(__file__).parents[2] / "configs" / "quickstart.py"
    parser.add_argument("config", nargs="?", default=str(quickstart))
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=5, help="in a block")
    parser.add_argument("--topology")
    arguments, overrides = parser.parse_known_args()
    config = configs.load(arguments.config, Config, overrides)
    if arguments.topology:
        compare_programs(config, arguments.topology)
    else:
        compare_speed(config, arguments.pairs, arguments.steps)


def compare_programs(config: Config, name: str) -> None:
    devices = topology(name).devices
    for label, context in (("as it is", contextlib.nullcontext()), ("without", unguarded())):
        with context:
            compiled = compile_train_step(config, devices)
        program = read_program(compiled.compiled, compiled.mesh)
        kinds = {kind: sum(one.times for one in program.collectives if one.kind == kind) for kind in ("all-reduce",)}
        print(f"{label}: {program.total_cycles:,} cycles, {kinds['all-reduce']} all-reduces", flush=True)


def compare_speed(config: Config, pairs: int, steps: int) -> None:
    keep_freed_memory()
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    shape = config.train.batch_size, config.train.sequence_length
    tokens = jax.random.randint(jax.random.key(0), shape, 0, config.model.vocab_size)
    ones = jnp.ones(shape, jnp.int32)
    batch = {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, 1),
        "positions": jnp.broadcast_to(jnp.arange(shape[1]), shape).astype(jnp.int32),
        "segments": ones,
        "loss_mask": ones.astype(jnp.float32),
        "bytes": jnp.full(shape[0], 3 * shape[1], jnp.int32),
    }
    sides = []
    for context in (contextlib.nullcontext(), unguarded()):
        state = jax.tree.map(jnp.array, init_state(config, jax.random.key(0)))  # each its own: they are donated
        with context:
            sides.append((step.jit_train_step(config, mesh).lower(state, batch).compile(), [state]))

    def block(run: Any, held: list[Any]) -> float:
        start = time.process_time()
        for _ in range(steps):
            held[0], metrics = run(held[0], batch)
        jax.block_until_ready((held[0], metrics))
        return (time.process_time() - start) / steps

    for side in sides:
        block(*side)
    ratios, seconds = [], []
    for pair in range(pairs):
        order = sides if pair % 2 else sides[::-1]
        times = {id(run): block(run, held) for run, held in order}
        guarded, plain = (times[id(run)] for run, _ in sides)
        ratios.append(guarded / plain)
        seconds.append(guarded)
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"CPU seconds a step: {statistics.median(seconds):.4f}")
    print(f"over those of a step without the guard: {middle:.4f} (quartiles {low:.4f}, {high:.4f})")


if __name__ == "__main__":
    main()
