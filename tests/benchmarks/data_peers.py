"""Built files to packed batches beside grain's own packing and shuffle, and beside MosaicML Streaming, in one run.

    python tests/benchmarks/data_peers.py [--tokens 20]

All read the same made-up documents, --tokens millions of them, in 1 source and in 100, and give batches of 16 rows of
2048 tokens, in one process on one core and without workers:

lm              split and best_fit
grain           one document a record; MapDataset.shuffle and mix, then ConcatThenSplitIterDataset or
                BestFitPackIterDataset with 64 bins: tokens, segments and positions, but neither targets nor a mask;
                best fit drops what a document has beyond a row, and pads
streaming       rows of 2049 tokens that were cut when the files were written, as its users do; StreamingDataset with
                shuffle, tokens and targets alone. `pip install mosaicml-streaming`, which brings torch

tokens/s  in CPU seconds, the best of some stretches, after a first
start     seconds of the clock from opening the files to the first batch, in a fresh process, imports left out
resume    the same to the batch of step 501, from a saved state; lm needs none, and reaches any other step as fast
memory    MiB beyond what the process had before

What is not installed is left out, and named.
"""

import argparse
import functools
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from data_made import alone, cpu_seconds, documents, memory, open_made, write_source

ROWS, LENGTH, VOCABULARY = 16, 2048, 50_000
STEPS, STRETCH = 500, 100
TITLES = ("", "sources", "tokens/s", "start", "resume", "memory")

Begun = tuple[Iterator[Any], Callable[[], Any]]
"""Batches, and what gives the state to go on with."""


def write_lm(folder: Path, tokens: int, seed: int) -> None:
    write_source(folder, tokens, VOCABULARY, seed)


def begin_lm(folders: list[Path], state: Any, packing: str) -> Begun:
    from lm.data.batches import Batches

    batches = Batches(open_made(folders, packing=packing), ROWS, LENGTH, seed=0)
    at = [state or 0]

    def run() -> Iterator[Any]:
        while True:
            at[0] += 1
            yield batches.batch(at[0] - 1)

    return run(), lambda: at[0]


def write_grain(folder: Path, tokens: int, seed: int) -> None:
    from array_record.python import array_record_module

    folder.mkdir(parents=True)
    writer = array_record_module.ArrayRecordWriter(str(folder / "documents.array_record"), "group_size:1")
    for document in documents(tokens, VOCABULARY, seed):
        writer.write(document.astype(np.uint16).tobytes())
    writer.close()


def begin_grain(folders: list[Path], state: Any, packing: str) -> Begun:
    import grain

    def parsed(record: bytes) -> dict[str, np.ndarray]:
        return {"tokens": np.frombuffer(record, np.uint16).astype(np.int32)}

    sources = [grain.sources.ArrayRecordDataSource(str(one / "documents.array_record")) for one in folders]
    each = [grain.MapDataset.source(source).seed(0).shuffle().repeat() for source in sources]
    mixed = each[0] if len(each) == 1 else grain.MapDataset.mix(each, [len(source) for source in sources])
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # the fastest on files that are in memory
    dataset = mixed.map(parsed).to_iter_dataset(options)
    if packing == "split":
        packed = grain.experimental.ConcatThenSplitIterDataset(dataset, length_struct={"tokens": LENGTH})
    else:
        cut = dataset.map(lambda one: {"tokens": one["tokens"][:LENGTH]})  # it takes no document longer than a row
        packed = grain.experimental.BestFitPackIterDataset(cut, length_struct={"tokens": LENGTH}, num_packing_bins=64)
    iterator = iter(packed.batch(ROWS))
    if state is not None:
        iterator.set_state(state)
    return iterator, iterator.get_state


def write_streaming(folder: Path, tokens: int, seed: int) -> None:
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns={"tokens": f"ndarray:uint16:{LENGTH + 1}"}) as writer:
        rest = np.zeros(0, np.uint16)
        for document in documents(tokens, VOCABULARY, seed):
            rest = np.concatenate([rest, document.astype(np.uint16)])
            while len(rest) > LENGTH:
                writer.write({"tokens": rest[: LENGTH + 1]})
                rest = rest[LENGTH:]


def begin_streaming(folders: list[Path], state: Any, packing: str) -> Begun:
    from streaming import Stream, StreamingDataset

    streams = [Stream(local=str(one)) for one in folders]
    dataset = StreamingDataset(streams=streams, shuffle=True, batch_size=ROWS, num_canonical_nodes=1)
    if state is not None:
        dataset.load_state_dict(state)
    read = [0]

    def run() -> Iterator[Any]:
        while True:
            rows = []
            for sample in dataset:
                rows.append(sample["tokens"])
                if len(rows) == ROWS:
                    batch = np.stack(rows).astype(np.int32)
                    read[0] += ROWS
                    rows = []
                    yield {"tokens": batch[:, :-1], "targets": batch[:, 1:]}

    return run(), lambda: dataset.state_dict(read[0] % dataset.size, True)


WAYS = {
    "lm split": ("lm", write_lm, begin_lm, "split"),
    "lm best_fit": ("lm", write_lm, begin_lm, "best_fit"),
    "grain split": ("grain", write_grain, begin_grain, "split"),
    "grain best_fit": ("grain", write_grain, begin_grain, "best_fit"),
    "streaming": ("streaming", write_streaming, begin_streaming, "split"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=float, default=20, help="millions to make up")
    tokens = int(parser.parse_args().tokens * 1e6)
    print("  ".join(f"{title:>14}" for title in TITLES))
    with tempfile.TemporaryDirectory() as name:
        for sources in (1, 100):
            for title, (package, write, _, _) in WAYS.items():
                if importlib.util.find_spec(package) is None:
                    print(f"{title:>14}  not installed")
                    continue
                folders = [Path(name, package, f"{sources}", f"{number:03d}") for number in range(sources)]
                if not folders[0].exists():
                    alone(write_all, write, folders, tokens)
                rate, start, took, state = alone(measure, title, folders, None)
                resume = alone(measure, title, folders, state)
                values = (
                    title,
                    f"{sources}",
                    f"{rate / 1e6:.1f} M",
                    f"{start:.2f} s",
                    f"{resume:.2f} s",
                    f"{took:.0f}",
                )
                print("  ".join(f"{value:>14}" for value in values), flush=True)


def write_all(write: Callable[[Path, int, int], None], folders: list[Path], tokens: int) -> None:
    for number, folder in enumerate(folders):
        write(folder, tokens // len(folders), number)


def measure(title: str, folders: list[Path], state: Any) -> Any:
    package, _, begin, packing = WAYS[title]
    __import__("lm.data.batches" if package == "lm" else package)
    before, started = memory("VmRSS"), time.perf_counter()
    batches, state_now = begin(folders, state, packing)
    next(batches)
    start = time.perf_counter() - started
    if state is not None:
        return start

    def take(count: int) -> None:
        for _ in range(count):
            next(batches)

    take(STRETCH)
    seconds = [cpu_seconds(functools.partial(take, STRETCH)) for _ in range(STEPS // STRETCH - 1)]
    return STRETCH * ROWS * LENGTH / min(seconds), start, (memory() - before) / 2**20, state_now()


if __name__ == "__main__":
    main()
