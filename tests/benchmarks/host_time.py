"""Host time per step at quickstart's size: input, dispatch, metrics, progress, logging.

    python tests/benchmarks/host_time.py [--steps 2000]

Runs the real loop on the real data with the computation of the step taken out (the state passes through), so that what
is left is the time of the host. Also prints the peak memory of the process.
"""

import argparse
import dataclasses
import json
import resource
import statistics
import tempfile
from pathlib import Path
from unittest import mock

import jax.numpy as jnp

from lm import config as configs
from lm.experiment import Config, RunConfig
from lm.train import loop, step
from lm.train.groups import groups_of

NAMES = (
    "loss", "bits_per_byte", "learning_rate", "grad_norm", "param_norm", "update_norm", "targets", "skipped_steps",
    "bad_streak", "finite",
)  # fmt: skip


def without_computation(config, mesh):
    groups = groups_of(config.model)

    def step(state, batch):
        touched = jnp.sum(batch["tokens"][:, 0]) * 0.0
        metrics = dict.fromkeys(NAMES, touched) | {
            "kind_norms": jnp.full(len(groups.kinds), touched),
            "depth_norms": jnp.full((3, len(groups.depths)), touched),
        }
        return dataclasses.replace(state, step=state.step + 1), metrics

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    options = parser.parse_args()
    quickstart = configs.load(str(Path(__file__).parents[2] / "configs" / "quickstart.py"), Config)
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(
            quickstart,
            run=RunConfig(dir=folder + "/run"),
            train=dataclasses.replace(quickstart.train, steps=options.steps),
            checkpoint=dataclasses.replace(quickstart.checkpoint, every=0),
            eval=dataclasses.replace(quickstart.eval, every=0),
            sample=dataclasses.replace(quickstart.sample, tokens=0),
        )
        with mock.patch.object(step, "make_train_step", without_computation):
            loop.train(config, stream=None)
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    seconds = sorted(line["step_seconds"] for line in lines[5:])
    print(
        f"host time per step: median {1e3 * statistics.median(seconds):.2f} ms, "
        f"least {1e3 * seconds[0]:.2f} ms, 90th percentile {1e3 * seconds[int(0.9 * len(seconds))]:.2f} ms"
    )
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")


if __name__ == "__main__":
    main()
