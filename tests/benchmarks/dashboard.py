"""TensorBoard over many runs: size of event files, and seconds from its start to the first curve.

    python tests/benchmarks/dashboard.py [--runs 30] [--steps 10000] [--every 10] [--layers 32] [--sources 5]

Writes, by what a run writes with (all values of a default config, texts, histograms and pictures at its evaluations),
so many runs, starts a real TensorBoard, and asks it as its page does: when does it know all runs, when does it give the
loss of all of them.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from pathlib import Path

import numpy as np

from launch.local import free_port
from lm.experiment import Config, RunConfig
from lm.model.config import ModelConfig
from lm.train import events
from lm.train.config import TrainConfig
from lm.train.dashboard import tag
from lm.train.goodput import CAUSES
from lm.train.groups import groups_of
from lm.train.histograms import BINS
from lm.train.images import attention_maps, token_losses
from lm.train.meter import PARTS
from lm.train.probe import PICTURES, TOKENS
from lm.train.run_directory import RunDirectory
from lm.train.summaries import Summaries, verbatim

PLAIN = (
    *("loss", "bits_per_byte", "learning_rate", "grad_norm", "param_norm", "update_norm", "update_ratio", "targets"),
    *("skipped_steps", "tokens", "tokens_per_second", "step_seconds", "step_seconds/host", "model_flops_per_second"),
    *("mfu", "memory_bytes", "expected_step_seconds", "expected_memory_bytes", "clipped_share", "skipped_share"),
    *("saves", "saves_failed", "saves_skipped", "save_blocked_seconds", "save_seconds", "checkpoint_age_seconds"),
    "goodput/restarts",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in {"runs": 30, "steps": 10_000, "every": 10, "layers": 32, "sources": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = [Path(folder, f"run-{i:02}") for i in range(options.runs)]
        began = time.monotonic()
        for seed, path in enumerate(runs):
            write(path, seed, options)
        spent = (time.monotonic() - began) / options.runs
        sizes = [sum(file.stat().st_size for file in (path / "tensorboard").iterdir()) for path in runs]
        print(f"{options.runs} runs of {options.steps:,} steps, a line each {options.every}, written in {spent:.1f} s")
        lines = (runs[0] / "metrics.jsonl").stat().st_size / 1e6
        print(f"event files: {max(sizes) / 1e6:.1f} MB a run; metrics.jsonl: {lines:.1f} MB")
        print("TensorBoard, seconds from its start:", json.dumps(measure(folder, options.runs)))


def write(path: Path, seed: int, options: argparse.Namespace) -> None:
    config = Config(
        run=RunConfig(dir=str(path), seed=seed),
        model=ModelConfig(layers=options.layers),
        train=TrainConfig(steps=options.steps),
    )
    depths = groups_of(config.model).depths
    names = [
        *PLAIN,
        *(f"goodput/{cause}" for cause in CAUSES),
        *(f"step_seconds/{part}" for part in PARTS.values()),
        *(f"{what}/{depth}" for what in ("grad_norm", "update_ratio") for depth in depths),
    ]
    sources = [f"/source_{i}" for i in range(options.sources)] if options.sources > 1 else []
    held_out = [f"heldout_{what}{part}" for what in ("loss", "bits_per_byte") for part in ("", *sources)]
    looked = ["attention_entropy", "attention_logit", "output_logit"]
    looked += [f"{what}/{d}" for what in ("attention_entropy", "attention_logit") for d in depths if "layer" in d]
    random = np.random.default_rng(seed)
    maps = random.dirichlet(np.ones(TOKENS) / 8, (4, 4, TOKENS)).astype(np.float32)
    losses = token_losses(["word "] * TOKENS, random.exponential(3, TOKENS), np.ones(TOKENS, bool))
    pictures = {"attention": attention_maps(maps, range(4)), "loss of each token": losses}
    every = math.ceil(options.steps / config.eval.every / PICTURES) * config.eval.every
    with RunDirectory(path) as run:
        run.config.write_text("{}")
        log = Summaries(run, first_step=0, report=sys.exit)
        log.config(config, f"{seed:012}")
        for step in range(0, options.steps, options.every):
            loss = 4 * math.exp(-step / 2000) + 2 + 0.1 * seed + 0.02 * float(random.standard_normal())
            values = dict(zip(names, random.random(len(names)).tolist(), strict=True)) | {"loss": loss}
            if step % config.eval.every == 0:
                values |= dict.fromkeys(held_out, loss) | dict.fromkeys(looked, loss)
                log.text(step, "sample", verbatim("some text " * 40))
            if step % every == 0:
                for name, image in pictures.items():
                    log.show(step, events.image(name, image))
                bins = np.stack([np.arange(BINS), np.arange(BINS) + 1, random.random(BINS)], axis=1)
                for what in ("parameters", "mean gradients"):
                    for depth in depths:
                        log.show(step, events.histogram(f"{what}/{depth}", bins))
            log.scalars(step, values)
        log.close()


def measure(folder: str, count: int) -> dict[str, float]:
    port = free_port()
    began = time.monotonic()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--port", str(port), "--host", "127.0.0.1"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def ask(path: str) -> object:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=30) as answer:
            return json.load(answer)

    def when(ready: object) -> float:
        while time.monotonic() - began < 600:
            try:
                if ready():
                    return round(time.monotonic() - began, 1)
            except OSError:
                pass
            time.sleep(0.1)
        sys.exit("TensorBoard did not answer within 10 minutes")

    def curve(run: str) -> int:
        query = urllib.parse.urlencode({"run": run, "tag": tag("loss")})
        return len(ask(f"data/plugin/scalars/scalars?{query}"))

    try:
        found = {"answers": when(lambda: ask("data/runs") is not None)}
        found["first curve"] = when(lambda: any(curve(run) for run in ask("data/runs")[:1]))
        found["all runs"] = when(lambda: len(ask("data/runs")) == count)
        found["all curves, to their ends"] = when(lambda: all(curve(run) >= 500 for run in ask("data/runs")))
        return found
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
