import concurrent.futures
import errno
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import fsspec
import numpy as np
import pytest

import lm as package
from lm.data import files, reading, records, remote, stream
from lm.data.batches import Batch, Batches, Evaluation
from lm.data.config import DataConfig, SourceConfig
from lm.data.corpus import Corpus, open_corpus
from lm.data.loader import Loader
from lm.errors import DataError

Write = Callable[..., Path]

HANGS = """
import sys
from lm.data.batches import Batches
from lm.data.config import DataConfig
from lm.data.corpus import open_corpus
from lm.data.loader import Loader

batches = Batches(open_corpus(sys.argv[1], DataConfig(packing="best_fit")), 4, 8, seed=0)
with Loader(batches, range(10**9), workers=2) as loader:
    next(loader)
    print(*[worker._process.pid for worker in loader._workers], flush=True)
    for _ in loader:
        pass
"""
"""A program with two processes that make batches, which it names, and reads them for ever."""


def same(one: Batch, other: Batch) -> None:
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert np.array_equal(one[name], other[name]), name


def several(write_data: Write, count: int, shards: int = 3, tokens: int = 100) -> Corpus:
    """A corpus of so many sources."""
    folders = [
        write_data([[np.full(tokens, i % 250)] for _ in range(shards)], [[np.arange(9)]], f"{i:03}")
        for i in range(count)
    ]
    sources = tuple(SourceConfig(name=f"source{i:03}", dir=str(folder)) for i, folder in enumerate(folders))
    return open_corpus(folders[0].parent, DataConfig(sources=sources))


def gone(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def fifo(path: Path) -> None:
    """Whoever reads it waits for ever."""
    path.unlink()
    os.mkfifo(path)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_the_same_from_any_step_with_any_number_of_workers(write_data: Write, workers: int) -> None:
    batches = Batches(several(write_data, 2), 4, 8, seed=0)
    for first in (0, 1_000_003):
        rows = slice(1, 3) if first else np.array([0, 3])
        steps = range(first, first + 11)
        with Loader(batches, steps, rows, workers=workers) as loader:
            got = list(loader)
        assert [step for step, _ in got] == list(steps)
        for step, batch in got:
            same(batch, batches.batch(step, rows))
            assert all(array.flags.writeable for array in batch.values())


def test_a_loader_that_is_closed_early_leaves_nothing(write_data: Write) -> None:
    batches = Batches(several(write_data, 2), 4, 8, seed=0)
    for workers in (0, 2):
        loader = Loader(batches, range(10**12), workers=workers)
        assert [next(loader)[0], next(loader)[0]] == [0, 1]
        processes = [worker._process.pid for worker in loader._workers]
        loader.close()
        assert list(loader) == []
        assert within(2, lambda: not any(t.name.startswith(("loader", "grain")) for t in threading.enumerate()))
        assert all(gone(process) for process in processes)


def test_any_steps_in_any_order(write_data: Write) -> None:
    evaluation = Evaluation(several(write_data, 3), "heldout", 2, 4)
    with Loader(evaluation, []) as loader:
        assert list(loader) == []
    with Loader(evaluation, [0, 3, 1]) as loader:
        for step, batch in loader:
            same(batch, evaluation.batch(step))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_shard_is_named_with_its_source(write_data: Write, workers: int) -> None:
    corpus = several(write_data, 2)
    (Path(corpus.sources[1].directory) / "train-00001.array_record").write_bytes(b"")
    batches = Batches(corpus, 4, 8, seed=0)
    with (
        pytest.raises(DataError, match=r"source source001: .*train-00001\.array_record: damaged \(0 records"),
        Loader(batches, range(1000), workers=workers) as loader,
    ):
        list(loader)


def test_a_shard_that_is_gone_may_come_back(write_data: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "WAITS", (0.01, 0.02))
    corpus = several(write_data, 2)
    wanted = [Batches(corpus, 4, 8, seed=0).batch(step) for step in range(30)]
    shard = Path(corpus.sources[1].directory) / "train-00001.array_record"
    hidden = shard.rename(shard.with_suffix(".hidden"))
    said: list[str] = []
    with reading.said_by(said.append), pytest.raises(DataError, match=r"source source001: .*no such file; bring it"):
        list(Loader(Batches(corpus, 4, 8, seed=0), range(30)))
    assert [line.partition("trying again in ")[2] for line in said] == ["0.01 s", "0.02 s"]
    with reading.said_by(lambda line: hidden.rename(shard) if hidden.exists() else None):
        for step, batch in Loader(Batches(corpus, 4, 8, seed=0), range(30)):
            same(batch, wanted[step])
    assert shard.exists()


def test_a_worker_that_is_killed_ends_the_loader(write_data: Write) -> None:
    batches = Batches(several(write_data, 2), 4, 8, seed=0)
    with Loader(batches, range(10**9), workers=1) as loader:
        process = loader._workers[0]._process
        assert next(loader)[0] == 0
        for number in (signal.SIGINT, signal.SIGTERM):  # which all processes of a job may get: the parent decides
            os.kill(process.pid, number)
        assert [next(loader)[0] for _ in range(50)] == list(range(1, 51))
        process.kill()
        with pytest.raises(DataError, match="killed, perhaps for lack of memory"):
            list(loader)


class Mistaken:
    """Batches that have a mistake in their code."""

    reads = reading.Reads()

    def batch(self, step: int, rows: slice) -> Batch:
        raise ValueError(f"step {step}")


@pytest.mark.parametrize(("workers", "error"), [(0, ValueError), (1, RuntimeError)])
def test_a_mistake_is_not_said_to_be_of_the_data(
    workers: int, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # where the process finds Mistaken
    with pytest.raises(error, match="step 0"), Loader(Mistaken(), range(3), workers=workers) as loader:
        next(loader)


class Flaky:
    """Readers of shards, of which the next `failures` reads fail."""

    failures = 0
    text = "Input/output error"
    opened = 0
    original = records.array_record_module.ArrayRecordReader

    def __init__(self, *arguments: str) -> None:
        Flaky.opened += 1
        self.file = Flaky.original(*arguments)
        self.failed = False

    def num_records(self) -> int:
        return self.file.num_records()

    def read(self, first: int, last: int) -> list[bytes]:
        if Flaky.failures:
            Flaky.failures, self.failed = Flaky.failures - 1, True
            raise RuntimeError(Flaky.text)
        assert not self.failed, "a reader that failed is used again"
        return self.file.read(first, last)


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Flaky]]:
    monkeypatch.setattr(records.array_record_module, "ArrayRecordReader", Flaky)
    monkeypatch.setattr(reading, "WAITS", (0.01, 0.02))
    Flaky.failures, Flaky.opened, Flaky.text = 0, 0, "Input/output error"
    return Flaky


def test_a_read_that_fails_is_tried_again(
    write_data: Write, flaky: type[Flaky], caplog: pytest.LogCaptureFixture
) -> None:
    corpus = several(write_data, 1, shards=1)
    wanted = Batches(corpus, 4, 8, seed=0).batch(0)
    flaky.failures = 2
    with Loader(Batches(corpus, 4, 8, seed=0), range(1)) as loader:
        same(next(loader)[1], wanted)
    what = f"source source000: {corpus.sources[0].directory}/train-00000.array_record: record 0 cannot be read"
    assert [record.message for record in caplog.records] == [
        f"{what}: Input/output error; trying again in 0.01 s",
        f"{what}: Input/output error; trying again in 0.02 s",
    ]
    flaky.failures = 3
    with pytest.raises(DataError, match="record 0 cannot be read: Input/output error"):
        Batches(corpus, 4, 8, seed=0).batch(0)
    flaky.failures = 0


def test_what_is_damaged_is_read_once_more(write_data: Write, flaky: type[Flaky]) -> None:
    corpus = several(write_data, 1, shards=1)
    flaky.text = "Corrupted Riegeli/records file: chunk data hash mismatch"
    flaky.failures = 1
    Batches(corpus, 4, 8, seed=0).batch(0)
    assert flaky.opened == 2
    flaky.failures = 5
    with pytest.raises(DataError, match="record 0 cannot be read: Corrupted"):
        Batches(corpus, 4, 8, seed=0).batch(0)
    assert flaky.failures == 3


def test_real_damage_is_found(write_data: Write) -> None:
    corpus = several(write_data, 1, shards=1, tokens=9000)
    path = Path(corpus.sources[0].directory) / "train-00000.array_record"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"source source000: .*00000\.array_record: record 0 cannot be read: Corrupted"):
        Batches(corpus, 64, 8, seed=0).batch(0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_read_that_never_ends_is_named_and_ends_the_loader(
    write_data: Write, workers: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reading, "SAY_SECONDS", 1.0)
    corpus = several(write_data, 2)
    fifo(Path(corpus.sources[1].directory) / "train-00002.array_record")
    began = time.monotonic()
    with (
        pytest.raises(
            DataError, match=r"no answer for . s from source source001: .*train-00002\.array_record, .*stall_seconds"
        ),
        Loader(Batches(corpus, 4, 8, seed=0), range(1000), workers=workers, stall_seconds=4) as loader,
    ):
        list(loader)
    assert time.monotonic() - began < 30
    assert any(record.message.endswith("train-00002.array_record") for record in caplog.records)


def test_reads_that_go_on_are_no_stall(write_data: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a batch takes."""
    stored = records.ShardReader._stored
    monkeypatch.setattr(records.ShardReader, "_stored", lambda *given: (time.sleep(0.3), stored(*given))[1])
    with Loader(Batches(several(write_data, 8, shards=1), 16, 8, seed=0), range(1), stall_seconds=1) as loader:
        next(loader)


def test_a_read_long_ago_is_no_stall() -> None:
    """As after an evaluation that lasts longer than `stall_seconds`."""
    answers: queue.Queue[str] = queue.Queue()
    last = reading.Reading(None, time.monotonic() - 1000)
    threading.Timer(1.2, answers.put, ["batch"]).start()
    assert reading.awaited(answers, "batch 7", 30, lambda: [last]) == "batch"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_no_process_is_left_behind(write_data: Write, number: signal.Signals) -> None:
    """Not even one that hangs in a read, of a parent that is killed or gets Ctrl-C."""
    folder = write_data([[np.arange(40)] * 40] * 4)
    fifo(folder / "train-00003.lengths")
    environment = os.environ | {"PYTHONPATH": str(Path(package.__file__).parent.parent)}
    with subprocess.Popen(
        [sys.executable, "-c", HANGS, str(folder)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as program:
        assert program.stdout is not None
        processes = [int(word) for word in program.stdout.readline().split()]
        assert len(processes) == 2
        time.sleep(0.5)
        if number == signal.SIGINT:
            os.killpg(program.pid, number)  # as a terminal does
        else:
            program.kill()
        _, errors = program.communicate(timeout=20)
    assert within(10, lambda: all(gone(process) for process in processes))
    if number == signal.SIGINT:
        assert errors.count("Traceback") == 1, errors
        assert errors.rstrip().endswith("KeyboardInterrupt")


def test_files_threads_and_memory_are_bounded_whatever_the_number_of_sources(write_data: Write) -> None:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    corpus = several(write_data, 100)
    files, threads = held()
    batches = Batches(corpus, 64, 8, seed=0)
    with Loader(batches, range(60)) as loader:
        most = [held() for _ in loader]
    shelf = batches.streams[0]._shelf
    assert shelf.reader.cache_info().misses >= 300  # all shards were open at some time
    assert max(count for count, _ in most) <= files + stream._OPEN_SHARDS + 4
    assert max(count for _, count in most) <= threads + 2
    assert shelf.record.cache_info().maxsize == stream._RECORDS_KEPT
    assert all(one._shelf is shelf for one in batches.streams)


@pytest.mark.usefixtures("small_records")
def test_a_host_reads_what_its_rows_hold_and_nothing_else(write_data: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[str, int]] = []
    original = records.ShardReader.read

    def counted(self: records.ShardReader, index: int) -> records.Record:
        read.append((self._name, index))
        return original(self, index)

    monkeypatch.setattr(records.ShardReader, "read", counted)
    corpus = open_corpus(write_data([[np.arange(8000) % 250]] * 2))
    hosts, size, steps = 8, 64, range(5, 9)
    whole = Batches(corpus, size, 16, seed=0)
    for step in steps:
        whole.batch(step)
    everything = set(read)
    total, union = 0, set()
    for host in range(hosts):
        read.clear()
        batches = Batches(corpus, size, 16, seed=0)
        rows = slice(host * size // hosts, (host + 1) * size // hosts)
        with Loader(batches, steps, rows) as loader:
            list(loader)
        needed = set()
        for step in steps:
            for row in batches.rows(step, rows):
                for start, length in row.spans:
                    for position in range(start, start + length + 1):
                        shard, inside = divmod(position % 16_000, 8000)
                        needed.add((str(corpus.directory / f"train-{shard:05}.array_record"), inside // 16))
        assert set(read) == needed
        assert len(read) == len(needed)
        assert len(read) < 2.5 * len(everything) / hosts
        total, union = total + len(read), union | needed
    assert union == everything


def test_a_shard_in_a_bucket_is_copied_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when several want it at once; and what is left of a copy that was killed, or found no room, does no harm."""
    fsspec.filesystem("memory").pipe("/loader/shard", b"tokens" * 1000)
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path))
    opened: list[str] = []

    def slowly(path: str, size: int) -> BinaryIO:
        opened.append(path)
        time.sleep(0.3)
        return remote.opened(path, size)

    monkeypatch.setattr(files, "opened", slowly)
    with monkeypatch.context() as failing:
        failing.setattr(files.shutil, "copyfileobj", no_room)
        with pytest.raises(OSError, match="No space left"):
            files.local_copy("memory://loader/shard", 6000, "digest")
    (folder,) = tmp_path.iterdir()
    assert {path.suffix for path in folder.iterdir()} == {".lock"}
    (folder / next(folder.iterdir()).with_suffix(".tmp").name).write_bytes(b"half of")
    opened.clear()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        (copy,) = {*pool.map(lambda _: files.local_copy("memory://loader/shard", 6000, "digest"), range(4))}
    assert Path(copy).read_bytes() == b"tokens" * 1000
    assert opened == ["memory://loader/shard"]


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
