"""Which documents are copies of others, or nearly: found in bounded memory, the same by any number of machines.

1. `hash_part` writes for each document of a part its sha256 and, for near duplicates, LSH bands of a MinHash signature
   of its runs of five words (Broder 1997; in bands: Leskovec, Rajaraman and Ullman, Mining of Massive Datasets,
   section 3.4), sorted by hash.
2. `join` takes one range of hashes at a time out of the files of all parts. What has the same hash there is a copy, or
   alike in one band.
3. `_decide` follows likeness from document to document (A like B, B like C), as Lee et al. do (arXiv:2107.06499). Of
   each such group the first is kept: held-out documents first, then in the order of the parts. Only here does memory
   grow, with the number of documents that are nearly like others: some 250 bytes for each.

Two documents of Jaccard similarity s share a band with probability 1 - (1 - s^r)^b, of b bands of r slots; r is the
largest with which that is at least 0.9 at `near_similarity`. For 0.8: r = 10, b = 25, so 0.94 at 0.8, 1.00 at 0.9, but
0.51 at 0.7, 0.14 at 0.6 and 0.02 at 0.5. Nothing else is compared.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from lm.data import files, workers
from lm.data.config import DataConfig
from lm.data.manifest import FILE
from lm.data.plan import Plan
from lm.data.progress import Meter, Progress
from lm.data.shares import Share, wait_until
from lm.data.sources import Piece
from lm.data.splits import Found, Review, Tally, split_pieces
from lm.data.tokenizers import FILE_NAMES, load_tokenizer
from lm.data.words import mix, runs, word_hashes
from lm.errors import ConfigError

FOLDERS = "duplicates-*"
COPY, NEAR = "duplicate", "near duplicate"

_RUN = 5  # words
_SLOTS, _SEED = 256, 1
_FOUND = 0.9

_PREFIX_BITS = 12  # of hashes: what a bucket is at least
_PREFIXES = 1 << _PREFIX_BITS
_SPILL_BYTES = 8 << 20  # sorting, joining and deciding take five times as much memory as this, or about that
_BUCKET_BYTES = 16 << 20
_PENDING_PAIRS = 1 << 19
_STRETCH_BYTES = 256 << 20
_BATCH_RUNS = 1 << 20
_BATCH_DOCUMENTS = 1 << 12  # the library gives some 10 KB for each

_ROW = np.dtype([("key", "<u8"), ("text", "<u8"), ("document", "<u4"), ("heldout", "u1")])
_TRAINED = np.uint64(1 << 63)  # in the place of a document: what is trained on comes after what is held out
_COPIES = np.uint64(1)  # in a key: of the whole text, not of a band


class LeftOut(NamedTuple):
    """Of one part: the ascending uint32 numbers of its documents that are left out, and which are not exact copies."""

    documents: np.ndarray
    near: np.ndarray
    hashes: list[str]
    """Of its pieces, as they were when this was found."""

    def review(self) -> Review:
        """To be asked about all documents of the part in turn."""
        reasons = iter([(int(d), NEAR if n else COPY) for d, n in zip(self.documents, self.near, strict=True)])
        following = next(reasons, None)

        def review(found: Found) -> str | None:
            nonlocal following
            if following is None or found.number != following[0]:
                return None
            reason, following = following[1], next(reasons, None)
            return reason

        return review


def bands(similarity: float) -> tuple[int, int]:
    """(number of bands, slots in each) for documents that are alike by so much."""
    shapes = [(_SLOTS // rows, rows) for rows in range(1, _SLOTS + 1)]
    fitting = [(count, rows) for count, rows in shapes if 1 - (1 - similarity**rows) ** count >= _FOUND]
    return max(fitting, key=lambda shape: shape[1], default=shapes[0])


def check_library(config: DataConfig) -> None:
    """Raises ConfigError where the library for MinHash is needed and not installed."""
    if config.duplicates == "near":
        _library()


def find_duplicates(
    config: DataConfig, folder: epath.Path, plan: Plan, share: Share, progress: Progress
) -> epath.Path | None:
    """The folder with what `read_left_out` reads, for the parts of the share. None: meanwhile others have built all.

    Each machine looks at the parts of its share, and the first one joins what all of them found.

    Raises:
        DataError: bad input.
        StorageError: the files cannot be written.
    """
    where = _folder(config, folder, plan)
    parts = range(len(plan.parts))
    _hash_parts(config, folder, where, plan, [part for part in parts if share.has(part)], progress)

    def wait(file: Callable[[epath.Path, int], epath.Path], of: Iterable[int], what: str) -> bool:
        missing = list(of)

        def there() -> bool:
            while missing and file(where, missing[-1]).exists():
                missing.pop()
            return not missing or (folder / FILE).exists()

        wait_until(there, what, progress)
        return not missing

    if share.first:
        machines = f"{share.count - 1} of {share.count} machines"
        if not wait(_hashes_file, parts, f"the other {machines} to look for duplicates"):
            return None
        _join_parts(config, where, len(plan.parts))
    what = f"share 1/{share.count} to join what all machines found of duplicates"
    return where if wait(_left_out_file, filter(share.has, parts), what) else None


def read_left_out(where: epath.Path, part: int) -> LeftOut:
    """What `find_duplicates` found in a part."""
    with np.load(io.BytesIO(_left_out_file(where, part).read_bytes())) as arrays:
        hashes = json.loads(_hashes_file(where, part).read_text())["hashes"]
        return LeftOut(arrays["documents"], arrays["near"], hashes)


# 1. Hashes of the documents of each part


@dataclass(frozen=True)
class HashJob:
    config: DataConfig
    folder: str
    where: str
    part: int
    pieces: list[Piece]
    holdout_below: int


def hash_part(job: HashJob) -> None:
    """Writes the hashes of the documents of a part, in as many files as memory asks for, and then one that says so."""
    where = epath.Path(job.where)
    tally, rows = Tally(), _Rows(job.config, where, job.part)
    tokenizer, kind = None, job.config.tokenizer.kind
    if job.config.tokens:
        tokenizer = load_tokenizer(kind, epath.Path(job.folder) / FILE_NAMES[kind])

    def review(found: Found) -> str:
        rows.add(found, heldout=any(split == "heldout" for split, _, _ in found.ends))
        workers.report(tally.bytes_read)
        return "seen"

    for _ in split_pieces(job.pieces, job.config, job.holdout_below, tally, review, tokenizer):
        pass
    rows.spill()
    files.write_json(_hashes_file(where, job.part), {"files": rows.files, "bytes": rows.bytes, "hashes": tally.hashes})


class _Rows:
    """What is known of the documents up to now; what does not fit in memory is in files."""

    def __init__(self, config: DataConfig, where: epath.Path, part: int) -> None:
        self._shape = bands(config.near_similarity) if config.duplicates == "near" else None
        self._where, self._part = where, part
        self._documents: list[tuple[int, int, int, int]] = []
        self._runs: list[np.ndarray] = []
        self._arrays: list[np.ndarray] = []
        self._waiting = 0
        self.files = 0
        self.bytes = 0

    def add(self, found: Found, *, heldout: bool) -> None:
        key, text = (int.from_bytes(found.sha256[i : i + 8], "big") for i in (8, 16))
        self._documents.append((key, text, found.number, heldout))
        if self._shape is not None:
            tokens = found.document.tokens
            words = word_hashes(found.document.text) if tokens is None else mix(tokens.astype(np.uint64))
            self._runs.append(runs(words, min(_RUN, max(1, len(words)))))
            self._waiting += len(self._runs[-1])
        if self._waiting >= _BATCH_RUNS or len(self._documents) >= _BATCH_DOCUMENTS:
            self._flush()
            if sum(rows.nbytes for rows in self._arrays) >= _SPILL_BYTES:
                self.spill()

    def spill(self) -> None:
        """Writes what is in memory to a file."""
        self._flush()
        if not self._arrays:
            return
        rows = np.concatenate(self._arrays)
        rows = rows[np.argsort(rows["key"], kind="stable")]
        prefixes = rows["key"] >> np.uint64(64 - _PREFIX_BITS)
        starts = np.searchsorted(prefixes, np.arange(_PREFIXES + 1, dtype=np.uint64)).astype("<u4")
        path = _rows_file(self._where, self._part, self.files)
        files.write_atomically(path, starts.tobytes() + rows.tobytes())
        self.files += 1
        self.bytes += rows.nbytes
        self._arrays = []

    def _flush(self) -> None:
        if self._documents:
            self._arrays += list(_rows(self._documents, self._runs, self._shape))
            self._documents, self._runs, self._waiting = [], [], 0


def _rows(
    documents: list[tuple[int, int, int, int]], grams: list[np.ndarray], shape: tuple[int, int] | None
) -> Iterator[np.ndarray]:
    whole = np.array(documents, _ROW)
    whole["key"] |= _COPIES
    yield whole
    present = [i for i, some in enumerate(grams) if len(some)]
    if shape is None or not present:
        return
    count, width = shape
    ends = np.cumsum([0] + [len(grams[i]) for i in present], dtype=np.uint64)
    matrix = _library().digest_matrix_from_flat_token_hashes(
        np.concatenate([grams[i] for i in present]), ends, _SLOTS, _SEED
    )
    slots = np.array(matrix.to_rows(), np.uint64)[:, : count * width].reshape(-1, width)
    numbers = np.tile(np.arange(count, dtype=np.uint64), len(present))
    keys = np.zeros(len(slots), np.uint64)
    for column in (numbers, *slots.T):
        keys = mix(keys + column + np.uint64(1))
    near = np.repeat(whole[present], count)
    near["key"] = keys & ~_COPIES
    yield near


def _hash_parts(
    config: DataConfig, folder: epath.Path, where: epath.Path, plan: Plan, parts: list[int], progress: Progress
) -> None:
    jobs = [
        HashJob(config, str(folder), str(where), part, plan.parts[part], plan.holdout_below)
        for part in parts
        if not _hashes_file(where, part).exists()
    ]
    if not jobs:
        return
    meter = Meter("looking for duplicates", sum(p.stop - p.start for job in jobs for p in job.pieces), progress)
    for _ in workers.run(hash_part, jobs, config.workers, meter):
        pass
    meter.finish()


# 2. What has the same hash


@dataclass(frozen=True)
class JoinJob:
    where: str
    bucket: int
    buckets: int
    files: list[int]
    """Of hashes, by part."""


def join(job: JoinJob) -> None:
    """Writes the places of copies but for the first of each, and pairs of places that share a band."""
    where = epath.Path(job.where)
    rows, places = _bucket(where, job)
    order = np.lexsort((places, rows["text"], rows["key"]))
    keys, texts, places = rows["key"][order], rows["text"][order], places[order]
    same_key = keys[1:] == keys[:-1]
    repeated = np.concatenate(([False], same_key & (texts[1:] == texts[:-1])))
    exact = (keys & _COPIES).astype(bool)
    copies = np.sort(places[repeated & exact])
    # Copies share every band of the first of them, which stands for all.
    keys, places = keys[~repeated & ~exact], places[~repeated & ~exact]
    begins = np.concatenate(([True], keys[1:] != keys[:-1]))[: len(keys)]
    # The first of a band, in the order of places, stands for it.
    order = np.lexsort((places, keys))
    keys, places = keys[order], places[order]
    firsts = places[begins][np.cumsum(begins) - 1] if len(keys) else places
    pairs = np.stack([firsts, places], 1)[~begins]
    _save(_joined_file(where, job.bucket, job.buckets), copies=copies, pairs=np.unique(pairs, axis=0))


def _bucket(where: epath.Path, job: JoinJob) -> tuple[np.ndarray, np.ndarray]:
    """The rows of a range of keys, and the places of their documents: (held out or not, part, document) in one."""
    width = _PREFIXES // job.buckets
    first, last = job.bucket * width, (job.bucket + 1) * width
    found, places = [np.zeros(0, _ROW)], [np.zeros(0, np.uint64)]
    for part, count in enumerate(job.files):
        for number in range(count):
            with _rows_file(where, part, number).open("rb") as file:
                starts = np.frombuffer(file.read(4 * (_PREFIXES + 1)), "<u4")
                file.seek(starts.nbytes + int(starts[first]) * _ROW.itemsize)
                rows = np.frombuffer(file.read(int(starts[last] - starts[first]) * _ROW.itemsize), _ROW)
            found.append(rows)
            place = np.uint64(part << 32) | rows["document"].astype(np.uint64)
            places.append(place | np.where(rows["heldout"], np.uint64(0), _TRAINED))
    return np.concatenate(found), np.concatenate(places)


def _join_parts(config: DataConfig, where: epath.Path, count: int) -> None:
    if all(_left_out_file(where, part).exists() for part in range(count)):
        return
    records = [json.loads(_hashes_file(where, part).read_text()) for part in range(count)]
    size = sum(record["bytes"] for record in records)
    buckets = 1
    while buckets < _PREFIXES and buckets * _BUCKET_BYTES < size:
        buckets *= 2
    written = [record["files"] for record in records]
    jobs = [
        JoinJob(str(where), bucket, buckets, written)
        for bucket in range(buckets)
        if not _joined_file(where, bucket, buckets).exists()
    ]
    for _ in workers.run(join, jobs, config.workers):
        pass
    _decide(config, where, count, buckets)


# 3. Who is left out


def _decide(config: DataConfig, where: epath.Path, count: int, buckets: int) -> None:
    near = _joined(_load(where, bucket, buckets, "pairs") for bucket in range(buckets))[:, 1]
    sizes = [len(_load(where, bucket, buckets, "copies")) for bucket in range(buckets)]
    stretches = min(count, 1 + 8 * (sum(sizes) + len(near)) // _STRETCH_BYTES)
    for bounds in np.array_split(np.arange(count), stretches):
        first, stop = int(bounds[0]), int(bounds[-1]) + 1
        copies = [_between(_load(where, bucket, buckets, "copies"), first, stop, config) for bucket in range(buckets)]
        places = [np.concatenate(copies), _between(near, first, stop, config)]
        # A copy of what is itself nearly another one counts as a copy.
        documents, index = np.unique(np.concatenate(places), return_index=True)
        is_near = index >= len(places[0])
        edges = np.searchsorted(documents, np.arange(first, stop + 1, dtype=np.uint64) << np.uint64(32))
        for part, (start, end) in enumerate(itertools.pairwise(edges), first):
            _save(
                _left_out_file(where, part),
                documents=(documents[start:end] & np.uint64(0xFFFFFFFF)).astype("<u4"),
                near=is_near[start:end],
            )


def _joined(found: Iterable[np.ndarray]) -> np.ndarray:
    """uint64 [n, 2]: of the places that pairs join, each but the smallest of its group, after that smallest."""
    groups = np.zeros((0, 2), np.uint64)
    pending, waiting = [groups], 0
    for pairs in found:
        pending.append(pairs)
        waiting += len(pairs)
        if waiting > max(_PENDING_PAIRS, 2 * len(groups)):  # the same two places are found in many buckets
            groups = _grouped(np.concatenate([groups, *pending]))
            pending, waiting = [], 0
    return _grouped(np.concatenate([groups, *pending]))


def _grouped(pairs: np.ndarray) -> np.ndarray:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not len(pairs):
        return pairs
    places, ends = np.unique(pairs, return_inverse=True)
    ends = ends.reshape(-1, 2)
    graph = coo_array((np.ones(len(ends), bool), (ends[:, 0], ends[:, 1])), (len(places), len(places)))
    groups = connected_components(graph, directed=False)[1]
    firsts = np.unique(groups, return_index=True)[1][groups]  # places ascend
    others = firsts != np.arange(len(places))
    return np.stack([places[firsts], places], 1)[others]


def _between(places: np.ndarray, first: int, stop: int, config: DataConfig) -> np.ndarray:
    """(part, document) of the places in some parts; what `holdout_paths` names is held out as it is."""
    if config.holdout_paths:
        places = places[places >= _TRAINED]
    places = places & ~_TRAINED
    return places[(places >= np.uint64(first << 32)) & (places < np.uint64(stop << 32))]


# Files


def _folder(config: DataConfig, folder: epath.Path, plan: Plan) -> epath.Path:
    version = _library().ALGORITHM_VERSION if config.duplicates == "near" else None
    content = json.dumps([plan.identity, _ROW.descr, _RUN, _SLOTS, _SEED, version])
    return folder / FOLDERS.replace("*", hashlib.sha256(content.encode()).hexdigest()[:12])


def _hashes_file(where: epath.Path, part: int) -> epath.Path:
    return where / f"hashes-{part:05d}.json"


def _rows_file(where: epath.Path, part: int, number: int) -> epath.Path:
    return where / f"hashes-{part:05d}-{number:03d}.bin"


def _joined_file(where: epath.Path, bucket: int, buckets: int) -> epath.Path:
    return where / f"joined-{bucket:04d}-of-{buckets:04d}.npz"


def _left_out_file(where: epath.Path, part: int) -> epath.Path:
    return where / f"left-out-{part:05d}.npz"


def _save(path: epath.Path, **arrays: np.ndarray) -> None:
    content = io.BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    files.write_atomically(path, content.getvalue())


def _load(where: epath.Path, bucket: int, buckets: int, name: str) -> np.ndarray:
    with np.load(io.BytesIO(_joined_file(where, bucket, buckets).read_bytes())) as arrays:
        return arrays[name]


def _library() -> Any:
    try:
        from rensa import RMinHash
    except ImportError:
        raise ConfigError("data.duplicates: 'near' needs the library rensa: pip install 'lm[dedup]'") from None
    return RMinHash
