"""Built files to packed batches on one core: speed, what a late step and many hosts cost, the first batch, memory.

    python tests/benchmarks/data_path.py [DIRECTORY ...] [--tokens 60] [--short]

DIRECTORY is what `lm data build` made, each a source; by default documents are made up, --tokens millions of them. The
caches hold 16 million of them, so a step reads most of what it needs from the files, which the system has in memory.

tokens/s    of batches of 16 rows that follow each other, one after the other
of copying  that, to the speed of merely copying as many tokens out of one array: does not depend on the machine
step 0 ...  ms of CPU for a batch of 16 rows from there on
of 1,024    the same for the 16 rows of one host of 1,024, whose batches have 16,384 rows
first       ms of CPU in a fresh process from opening the files to the batch of step 1,000,000 (imports left out)
memory      MiB that batches took beyond what the process had before

Each line is a process of its own.
"""

import argparse
import itertools
import tempfile
from pathlib import Path

import numpy as np
from data_made import alone, cpu_seconds, memory, open_made, per_step, write_sources

from lm.data.batches import Batches
from lm.data.config import DataConfig, SourceConfig
from lm.data.corpus import Corpus, open_corpus
from lm.data.manifest import read_manifest

ROWS, HOSTS = 16, 1024
STEPS = (0, 10**6, 10**9)
VOCABULARIES = {"uint16": 50_000, "uint32": 128_000}
TITLES = (
    "packing",
    "S",
    "ids",
    "sources",
    "tokens/s",
    "of copying",
    "step 0",
    "10^6",
    "10^9",
    "of 1,024",
    "first",
    "memory",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directories", nargs="*", type=Path)
    parser.add_argument("--tokens", type=float, default=60, help="millions to make up")
    parser.add_argument("--short", action="store_true", help="2048 tokens a row and uint16 only")
    options = parser.parse_args()
    lengths = (2048,) if options.short else (2048, 8192)
    print("  ".join(f"{title:>10}" for title in TITLES))
    with tempfile.TemporaryDirectory() as name:
        if options.directories:
            made = {
                (read_manifest(options.directories[0]).tokenizer.kind, len(options.directories)): options.directories
            }
        else:
            kinds = itertools.product(("uint16",) if options.short else VOCABULARIES, (1, 100))
            made = {
                (ids, sources): write_sources(
                    Path(name, f"{ids}-{sources}"), int(options.tokens * 1e6), sources, VOCABULARIES[ids]
                )
                for ids, sources in kinds
            }
        for ((ids, sources), folders), packing, length in itertools.product(
            made.items(), ("split", "best_fit"), lengths
        ):
            values = alone(measure, folders, packing, length, bool(options.directories))
            line = (packing, f"{length}", ids, f"{sources}", *values)
            print("  ".join(f"{value:>10}" for value in line), flush=True)


def measure(folders: list[Path], packing: str, length: int, built: bool) -> list[str]:
    before = memory("VmRSS")
    found: list[Batches] = []

    def begin() -> None:
        found.append(Batches(opened(folders, packing, built), ROWS, length, seed=0))
        found[0].batch(STEPS[1])

    first = cpu_seconds(begin)
    batches = found[0]
    steps = [per_step(batches.batch, step) for step in STEPS]
    took = memory() - before
    many = Batches(batches.corpus, ROWS * HOSTS, length, seed=0)
    mine = slice(ROWS * (HOSTS // 2), ROWS * (HOSTS // 2) + ROWS)
    of_many = per_step(lambda step: many.batch(step, mine), 10**5)
    rate = ROWS * length / min(steps)
    return [
        f"{rate / 1e6:.1f} M",
        f"{rate * copying(length):.3f}",
        *(f"{1e3 * seconds:.2f}" for seconds in (*steps, of_many)),
        f"{1e3 * first:.0f}",
        f"{took / 2**20:.0f}",
    ]


def opened(folders: list[Path], packing: str, built: bool) -> Corpus:
    if not built:
        return open_made(folders, packing=packing)
    if len(folders) == 1:
        return open_corpus(folders[0], DataConfig(packing=packing))
    sources = tuple(SourceConfig(f"s{number}", dir=str(one)) for number, one in enumerate(folders))
    return open_corpus(folders[0], DataConfig(sources=sources, packing=packing))


def copying(length: int) -> float:
    """Seconds for a token."""
    flat = np.arange(30_000_000, dtype=np.int32)
    starts = np.random.default_rng(0).integers(0, len(flat) - length, 4_000_000 // length).tolist()
    seconds = min(cpu_seconds(lambda: [flat[start : start + length].copy() for start in starts]) for _ in range(5))
    return seconds / (len(starts) * length)


if __name__ == "__main__":
    main()
