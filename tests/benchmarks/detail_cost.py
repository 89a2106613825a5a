"""What it costs to see a run: norms by depth in the step, lines logged, and the look inside, as shares of step time.

    python tests/benchmarks/detail_cost.py [CONFIG] [--layers 4 16 64] [--pairs 15] [--section.key=value …]

For each number of layers: the train step with norms by kind and depth against one that only has the three whole norms
(pairs of three steps each, one after the other); writing one line of all values to metrics.jsonl and TensorBoard; and a
look inside, with and without pictures. Shares are of the time of a step, at `log.every` and `eval.every` of the config.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import optax

from lm import config as configs
from lm.data.tokenizers import BytesTokenizer
from lm.experiment import Config
from lm.parallel.mesh import make_mesh
from lm.train import step
from lm.train.groups import Norms, groups_of
from lm.train.health import Health
from lm.train.meter import Meter
from lm.train.probe import Probe
from lm.train.run_directory import RunDirectory
from lm.train.state import abstract_state, init_state
from lm.train.step import jit_train_step
from lm.train.summaries import Summaries

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=QUICKSTART)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--pairs", type=int, default=15)
    options, overrides = parser.parse_known_args()
    print("layers   step ms   norms (quartiles)     log ms a line   look ms   with pictures ms   all, of a step")
    for layers in options.layers:
        more = [*overrides, f"--model.layers={layers}", "--model.vocab_size=258", "--data.tokenizer.kind=bytes"]
        print(row(configs.load(options.config, Config, more), options.pairs), flush=True)


def row(config: Config, pairs: int) -> str:
    mesh = make_mesh(config.mesh)
    abstract = abstract_state(config, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    draw = jax.jit(lambda key: init_state(config, key), out_shardings=shardings)
    batch = batch_of(config)

    seen = jit_train_step(config, mesh).lower(abstract, batch).compile()
    with mock.patch.object(step, "norms", plain):
        unseen = jit_train_step(config, mesh).lower(abstract, batch).compile()
    ratios, seconds = [], []
    states = {seen: draw(jax.random.key(0)), unseen: draw(jax.random.key(0))}
    for pair in range(pairs + 1):
        took = {}
        for program in (seen, unseen) if pair % 2 else (unseen, seen):
            begin = time.perf_counter()
            for _ in range(3):
                states[program], metrics = program(states[program], batch)
            jax.block_until_ready(metrics)
            took[program] = (time.perf_counter() - begin) / 3
        ratios.append(took[seen] / took[unseen])
        seconds.append(took[seen])
    a_step = statistics.median(seconds[1:])
    low, norms, high = (ratio - 1 for ratio in statistics.quantiles(ratios[1:], n=4))

    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory(folder)
        run.tensorboard.mkdir()
        log = Summaries(run, first_step=0, report=print)
        a_line = line_seconds(config, jax.device_get(metrics), log)
        probe = Probe(config, mesh, abstract, jax.device_get(batch), BytesTokenizer(), print)
        looks = [timed(lambda k=k: probe.look(states[seen], k, log)) for k in (0, 1, 2)][1:]  # no picture is due
        last = config.train.steps
        pictures = [timed(lambda: probe.look(states[seen], last, log)) for _ in range(3)][1:]
        log.close()
    look, picture = min(looks), min(pictures)
    share = norms + (a_line / config.log.every + picture / config.eval.every) / a_step
    return (
        f"{config.model.layers:6}   {a_step * 1e3:7.1f}   {norms:+6.2%} ({low:+.1%} to {high:+.1%})   "
        f"{a_line * 1e3:13.2f}   {look * 1e3:7.1f}   {picture * 1e3:16.1f}   {share:.2%}"
    )


def plain(tree: object, model: object) -> Norms:
    """Only the whole norm, as libraries have it."""
    groups = groups_of(model)
    zeros = [np.zeros(len(names), np.float32) for names in (groups.kinds, groups.depths)]
    return Norms(optax.tree.norm(tree), *map(jax.numpy.asarray, zeros))


def line_seconds(config: Config, metrics: dict, log: Summaries, lines: int = 300) -> float:
    """Of what the host does for one logged line, as in lm/train/loop.py."""
    meter = Meter(tokens_per_step=1, flops_per_token=1, peak_flops=1)
    health, rest = Health(config), {f"goodput/{i}": 0.1 for i in range(20)}
    depths = metrics["depth_norms"]
    scalars = {name: value for name, value in metrics.items() if not np.shape(value)}
    meter.start(0)
    begin = time.perf_counter()
    for k in range(lines):
        values = {name: float(value) for name, value in scalars.items()}
        health.see(values, applied=True)
        log.scalars(k, values | meter.read(k) | health.values(depths) | rest)
    return (time.perf_counter() - begin) / lines


def timed(call: object) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def batch_of(config: Config) -> dict:
    shape = (config.train.batch_size, config.train.sequence_length)
    tokens = np.random.default_rng(0).integers(0, 256, (shape[0], shape[1] + 1)).astype(np.int32)
    return jax.device_put(
        {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segments": np.ones(shape, np.int32),
            "positions": np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
            "loss_mask": np.ones(shape, np.float32),
            "bytes": np.full(shape[0], shape[1], np.int32),
        }
    )


if __name__ == "__main__":
    main()
