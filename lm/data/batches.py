"""The batch of step k as a pure function of (data, seed, k).

The stream of N tokens is taken as a circle. Epoch e cuts it, from an offset drawn for that epoch, into
W = ceil(N / S) windows of S tokens; sample g is window permutation(g % W) of epoch g // W; step k holds the
samples k*B to k*B + B - 1. No state, so any step is reached at once and on any number of hosts.
"""

from __future__ import annotations

import functools
import hashlib
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from lm.data.manifest import read_manifest, read_tokenizer
from lm.data.permutation import Permutation
from lm.data.stream import TokenStream, unmark

Batch = dict[str, np.ndarray]

Rows = slice | np.ndarray
"""Some of the rows of a batch, the array by index."""

ALL_ROWS = slice(None)

_BLOCK = 2048  # windows whose places are computed at once: numpy is slow on a batch of 16


class Batches:
    """Shuffled batches of a split.

    A batch holds, for B rows of S tokens:
        tokens     int32 [B, S]
        targets    int32 [B, S]    the tokens that follow
        segments   int32 [B, S]    1, 2, ... by document within the row; 0 for padding
        positions  int32 [B, S]    from 0 in each document, and from 0 at the start of the row
        loss_mask  float32 [B, S]  1 where the target continues the document of the token, else 0
        bytes      int32 [B]       bytes of text that the targets in the mask stand for
    Each token is a target exactly once in an epoch; where it begins a document it is masked. Not for
    use by several threads at once: make one for each.
    """

    def __init__(self, directory: epath.PathLike, split: str, batch_size: int, sequence_length: int, seed: int) -> None:
        """Raises DataError if the directory or the split cannot be used."""
        self._windows = _Windows(directory, split, sequence_length)
        self._batch_size = batch_size
        self._seed = seed
        self._block = functools.lru_cache(maxsize=8)(self._draw_block)

    @property
    def stream(self) -> TokenStream:
        return self._windows.stream

    @property
    def windows_per_epoch(self) -> int:
        return self._windows.count

    def epoch_of(self, step: int) -> int:
        """The epoch that the first row of the step belongs to."""
        return step * self._batch_size // self.windows_per_epoch

    def batch(self, step: int, rows: Rows = ALL_ROWS) -> Batch:
        """The batch of the step, or the `rows` of it that this host needs."""
        return self._windows.pack(*self.places(step, rows))

    def shapes(self) -> Batch:
        """Zeros in the shapes and types of a whole batch, without memory of their size: nothing is read."""
        one = self._windows.pack(np.zeros(1, np.int64), np.zeros(1, np.int64))
        return {name: np.broadcast_to(x[0] * 0, (self._batch_size, *x.shape[1:])) for name, x in one.items()}

    def places(self, step: int, rows: Rows = ALL_ROWS) -> tuple[np.ndarray, np.ndarray]:
        """int64 [B] positions in the stream where the rows begin, int64 [B] tokens in each."""
        turn, window = divmod(step * self._batch_size, self.windows_per_epoch)
        found = []
        missing = self._batch_size
        while missing:
            block, skip = divmod(window, _BLOCK)
            places = self._block(turn, block)[:, skip : skip + missing]
            found.append(places)
            missing -= places.shape[1]
            window += places.shape[1]
            if window == self.windows_per_epoch:
                turn, window = turn + 1, 0
        start, length = np.concatenate(found, axis=1)[:, rows]
        return start, length

    def loader(self, start_step: int, stop_step: int, rows: Rows = ALL_ROWS, ahead: int = 4) -> Loader:
        """The batches of the steps from `start_step` up to `stop_step`, made ahead in another thread."""
        return Loader(self, start_step, stop_step, rows, ahead)

    def _draw_block(self, epoch: int, block: int) -> np.ndarray:
        """int64 [2, n] starts and lengths of windows `block * _BLOCK` and on, in the epoch's order."""
        size, length, tokens = self.windows_per_epoch, self._windows.length, self.stream.tokens
        key = f"{self._seed}/{epoch}"
        drawn = hashlib.sha256(f"offset/{key}".encode()).digest()
        offset = int.from_bytes(drawn[:8], "big") % length
        order = Permutation(size, f"order/{key}")
        begin = order(np.arange(block * _BLOCK, min((block + 1) * _BLOCK, size))) * length
        return np.stack([(offset + begin) % tokens, np.minimum(length, tokens - begin)])


class Evaluation:
    """The windows of a split in order, from the start: each token is a target at most once.

    The last batch is filled up with rows of padding, whose loss mask is 0. Batches are as in `Batches`.
    """

    def __init__(self, directory: epath.PathLike, split: str, batch_size: int, sequence_length: int) -> None:
        """Raises DataError if the directory or the split cannot be used."""
        self._windows = _Windows(directory, split, sequence_length)
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-self._windows.count // self._batch_size)

    def batch(self, index: int, rows: Rows = ALL_ROWS) -> Batch:
        """Batch `index` of `len(self)`, or `rows` of it."""
        window = np.arange(index * self._batch_size, (index + 1) * self._batch_size)[rows]
        start = window * self._windows.length
        tokens = self._windows.stream.tokens
        return self._windows.pack(start % tokens, np.clip(tokens - start, 0, self._windows.length))


class Loader:
    """Iterates over (step, batch); `close` ends its thread."""

    def __init__(self, batches: Batches, start_step: int, stop_step: int, rows: Rows, ahead: int) -> None:
        import grain  # takes a second, which looking at data should not

        def make(step: int) -> tuple[int, Batch]:
            return int(step), batches.batch(int(step), rows)

        # More threads are slower: the work is short numpy calls that hold the interpreter's lock.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=ahead)
        dataset = grain.MapDataset.range(start_step, stop_step).map(make).to_iter_dataset(options)
        self._iterator: Any = iter(dataset)

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        return self

    def __next__(self) -> tuple[int, Batch]:
        return next(self._iterator)

    def close(self) -> None:
        self._iterator.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.close()


class _Windows:
    """Reads windows of a split's stream, which is closed to a circle, and packs them."""

    def __init__(self, directory: epath.PathLike, split: str, sequence_length: int) -> None:
        if sequence_length < 1:
            raise ValueError(f"sequence_length must be positive, got {sequence_length}")
        manifest = read_manifest(directory)
        self.stream = TokenStream(directory, split, manifest)
        self.length = sequence_length
        self.count = -(-self.stream.tokens // sequence_length)
        self._token_bytes = read_tokenizer(directory, manifest).token_bytes

    def pack(self, start: np.ndarray, length: np.ndarray) -> Batch:
        """A row for each window: `length` tokens from position `start`, then padding."""
        shape = (len(start), self.length + 1)
        marked = np.zeros(shape, np.int32)
        end = self.stream.tokens
        for row, (first, count) in enumerate(zip(start.tolist(), length.tolist(), strict=True)):
            wanted = count + 1 if count else 0  # the last target too
            here = min(wanted, end - first)
            self.stream.fill(first, marked[row, :here])
            if here < wanted:
                self.stream.fill(0, marked[row, here:wanted])
        tokens, begins = unmark(marked)
        column = np.arange(self.length, dtype=np.int32)
        inside = column < length[:, None]
        mask = inside & ~begins[:, 1:]
        begins[:, 0] = True
        begun = begins[:, :-1]
        segments = np.cumsum(begun, axis=1, dtype=np.int32) * inside
        positions = (column - np.maximum.accumulate(np.where(begun, column, 0), axis=1)) * inside
        targets = np.ascontiguousarray(tokens[:, 1:]) * inside
        return {
            "tokens": np.ascontiguousarray(tokens[:, :-1]) * inside,
            "targets": targets,
            "segments": segments,
            "positions": positions,
            "loss_mask": mask.astype(np.float32),
            "bytes": (self._token_bytes[targets] * mask).sum(axis=1, dtype=np.int32),
        }
