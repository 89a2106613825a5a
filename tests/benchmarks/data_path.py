"""Speed of the data path on one core: text to built files, and built files to packed batches.

    python tests/benchmarks/data_path.py [--megabytes 40]

Prints tokens/s of batches of 16 rows against those of merely copying as many tokens out of one array in
memory (the ratio does not depend on the machine), what a step costs at step 0 and at step 1,000,000, and
MB/s of `lm data build`. Times are CPU seconds, so that other work on the machine counts little.
"""

import argparse
import functools
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from lm.data.batches import Batches
from lm.data.build import build
from lm.data.config import DataConfig, TokenizerConfig

BATCH_SIZE = 16
LENGTHS = (64, 256, 1024, 2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=40, help="of text to make and read")
    megabytes = parser.parse_args().megabytes
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = make_text(folder / "text", megabytes * 1_000_000)
        for tokenizer in (TokenizerConfig(), TokenizerConfig(kind="bytes")):
            config = DataConfig((str(folder / "text"),), tokenizer=tokenizer, workers=1)
            started = time.process_time()
            build(config, folder / tokenizer.kind, lambda message: None)
            rate = size / (time.process_time() - started)
            print(f"build, {tokenizer.kind:13}  {rate / 1e6:6.1f} MB/s, training of the tokenizer included")
        print(f"\n{'S':>5} {'tokens/s':>12} {'of copying':>10} {'step 0':>10} {'step 1,000,000':>15}")
        for length in LENGTHS:
            report(folder / "bytes", length)


def report(directory: Path, length: int) -> None:
    batches = Batches(directory, "train", BATCH_SIZE, length, seed=0)
    flat, _ = batches.stream.read(0, batches.stream.tokens)
    near, far = per_step(batches, 0), per_step(batches, 1_000_000)
    draw = np.random.default_rng(0)
    starts = draw.integers(0, len(flat) - length, 20_000).tolist()
    copying = cpu_seconds(lambda: [flat[start : start + length].copy() for start in starts])
    rate = BATCH_SIZE * length / near
    ratio = rate / (len(starts) * length / copying)
    print(f"{length:5} {rate:12,.0f} {ratio:10.3f} {near * 1e6:7.0f} µs {far * 1e6:12.0f} µs")


def per_step(batches: Batches, start: int, steps: int = 100) -> float:
    """CPU seconds of one step, the best of ten stretches that follow each other."""

    def stretch(first: int) -> None:
        for step in range(first, first + steps):
            batches.batch(step)

    return min(cpu_seconds(functools.partial(stretch, start + i * steps)) for i in range(10)) / steps


def cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def make_text(folder: Path, size: int) -> int:
    """Files of made-up words with the frequencies of a language. Gives their bytes."""
    folder.mkdir()
    draw = random.Random(0)
    letters = "etaoinshrdlucmfwypvbgkqjxz"
    words = ["".join(draw.choices(letters, range(26, 0, -1), k=draw.randrange(1, 10))) for _ in range(20_000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    written = 0
    while written < size:
        text = " ".join(draw.choices(words, weights, k=draw.randrange(100, 5000))) + ".\n"
        (folder / f"{written:012}.txt").write_text(text)
        written += len(text)
    return written


if __name__ == "__main__":
    main()
