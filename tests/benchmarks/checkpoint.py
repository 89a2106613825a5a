"""What a save costs training, durable and local, beside Orbax's CheckpointManager as it comes: same arrays, disk and
process, in turn.

    python tests/benchmarks/checkpoint.py [--gigabytes 2] [--pairs 3] [--dir FOLDER]

Each save is followed by a step that reads and writes all of the state, donated: the least that a step of training does.
Printed are how long the call blocks, how much longer than without a save that step takes (buffers that a save holds
cannot be written over), and how long until the checkpoint is complete: here read back and compared too. The memory is
that of a process that saves once, above what it had before.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from lm.checkpoint.checkpoints import Checkpoints
from lm.checkpoint.config import CheckpointConfig
from lm.checkpoint.local import LocalCheckpoints
from lm.train.host_memory import keep_freed_memory

ARRAYS, LAYERS = 12, 12
"""Kinds of parameters and layers: that many arrays, three times, as of a model and Adam."""


class Ours:
    def __init__(self, folder: Path, state: object):
        self.checkpoints = Checkpoints(folder / "ours", CheckpointConfig(keep_last=1), {}, print)
        self.checkpoints.compile(state)

    def save(self, state: object, step: int) -> None:
        assert self.checkpoints.save(state, step)

    def wait(self) -> None:
        self.checkpoints.wait()


class Local:
    """What a host keeps by itself, as training does with `checkpoint.local_dir`: on the same disk here."""

    def __init__(self, folder: Path, state: object):
        config = CheckpointConfig(local_dir=str(folder / "local"))
        self.checkpoints = LocalCheckpoints(config, folder, "benchmark", print)

    def save(self, state: object, step: int) -> None:
        self.checkpoints.save(state, step, {})

    def wait(self) -> None:
        self.checkpoints.wait()


class Orbax:
    def __init__(self, folder: Path, state: object):
        options = ocp.CheckpointManagerOptions(max_to_keep=1)
        self.manager = ocp.CheckpointManager(folder / "orbax", options=options)

    def save(self, state: object, step: int) -> None:
        assert self.manager.save(step, args=ocp.args.StandardSave(state))

    def wait(self) -> None:
        self.manager.wait_until_finished()


SIDES = {"ours": Ours, "local": Local, "orbax": Orbax}


def make_state(gigabytes: float) -> dict:
    width = int((gigabytes * 1e9 / 4 / 3 / ARRAYS / LAYERS) ** 0.5)

    def make(seed: int) -> dict:
        keys = jax.random.split(jax.random.key(seed), ARRAYS)
        return {str(i): jax.random.normal(key, (LAYERS, width, width)) for i, key in enumerate(keys)}

    shardings = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    draw = jax.jit(
        lambda: {"params": make(0), "mu": make(1), "nu": make(2), "step": jnp.int32(0)}, out_shardings=shardings
    )
    return jax.block_until_ready(draw())


def make_step(state: dict):
    def step(state):
        return jax.tree.map(lambda x: x + 1 if x.dtype == jnp.int32 else x * 0.999, state)

    return jax.jit(step, donate_argnums=0).lower(state).compile()


def timed_step(step, state: dict) -> tuple[float, dict]:
    start = time.perf_counter()
    state = jax.block_until_ready(step(state))
    return time.perf_counter() - start, state


def compare(gigabytes: float, pairs: int, folder: Path) -> None:
    keep_freed_memory()  # as training does
    state = make_state(gigabytes)
    step = make_step(state)
    sides = {name: side(folder, state) for name, side in SIDES.items()}
    found: dict[str, dict[str, list[float]]] = {name: {"blocked": [], "step": [], "complete": []} for name in SIDES}
    plain: list[float] = []
    for number in range(pairs + 1):
        for name in list(SIDES)[:: 1 if number % 2 else -1]:
            for _ in range(3):
                seconds, state = timed_step(step, state)
            start = time.perf_counter()
            sides[name].save(state, number)
            blocked = time.perf_counter() - start
            after, state = timed_step(step, state)
            sides[name].wait()
            if number:  # the first one compiles, and gets memory that later ones find
                plain.append(seconds)
                for kind, value in ("blocked", blocked), ("step", after), ("complete", time.perf_counter() - start):
                    found[name][kind].append(value)
    least = statistics.median(plain)
    print(f"a pass over {gigabytes:g} GB takes {least:.2f} s; medians of {pairs} saves each, and (least to most):")
    for name, kinds in found.items():
        for kind, values in kinds.items():
            values = [value - least for value in values] if kind == "step" else values
            said = {"blocked": "blocked", "step": "longer step", "complete": "complete"}[kind]
            print(f"  {name:<6} {said:<12} {statistics.median(values):7.2f} s ({min(values):.2f} to {max(values):.2f})")


def memory(side: str, gigabytes: float, folder: Path) -> None:
    state = make_state(gigabytes)
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    step = make_step(state)
    _, state = timed_step(step, state)
    saver = SIDES[side](folder, state)
    before = peak = resident()
    ended = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not ended.wait(0.005):
            peak = max(peak, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    saver.save(state, 1)
    for _ in range(3):
        _, state = timed_step(step, state)
    saver.wait()
    ended.set()
    watcher.join()
    print(f"  {side:<6} memory       {(peak - before) / size:.2f} x the state, above {before / size:.2f} x before it")


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--dir", help="where to write; default: where temporary files are")
    parser.add_argument("--memory", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.dir) as folder:
        if options.memory:
            memory(options.memory, options.gigabytes, Path(folder))
            return
        compare(options.gigabytes, options.pairs, Path(folder))
    for side in SIDES:
        subprocess.run([sys.executable, __file__, "--memory", side, *sys.argv[1:]], check=True)


if __name__ == "__main__":
    main()
