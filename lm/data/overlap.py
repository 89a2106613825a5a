"""Training documents that share 13 words in a row with an evaluation set, as GPT-3 and PaLM looked for them.

GPT-3 (arXiv:2005.14165, appendix C) compares runs of 13 words in lower case and without punctuation, so here too (see
`lm.data.words`); where it cut the run and its surroundings out, here the document is left out as a whole, or only
counted. All texts in the records of an evaluation set are looked for, whatever their field; one of fewer than 13 words
cannot be found, and is counted as short.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from lm.data import files, sources
from lm.data.config import DataConfig
from lm.data.progress import Progress
from lm.data.sources import File
from lm.data.splits import Found
from lm.data.tokenizers import Tokenizer
from lm.data.words import runs, word_hashes
from lm.errors import DataError

INDEX = "overlap.npz"
OVERLAP = "overlap"
RUN = 13  # words

_MOST_RUNS = 20_000_000  # 160 MB in each process
_BATCH_RUNS = 1 << 20
_WORST = 10
_FILTER_BITS = 24


@dataclass(frozen=True)
class EvaluationFile:
    """What is known of one file of an evaluation set. `texts` were looked for, `short` ones could not be."""

    name: str
    sha256: str
    texts: int
    short: int
    runs: int


def index_evaluation_sets(config: DataConfig, path: epath.Path, progress: Progress) -> None:
    """Writes what is looked for to `path`.

    Raises:
        DataError: files that are missing, broken, without text or too large.
    """
    progress("reading the evaluation sets")
    described: list[EvaluationFile] = []
    found, total = [], 0
    for number, file in enumerate(_listed(config)):
        one, hashes = _read(file, total)
        total += len(hashes)
        described.append(one)
        found.append((hashes, np.full(len(hashes), number, np.uint32)))
    if not total:
        raise DataError(f"data.overlap_paths: no text of {RUN} words or more in {', '.join(config.overlap_paths)}")
    hashes, numbers = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
    order = np.argsort(hashes, kind="stable")
    content = io.BytesIO()
    np.savez(
        content,
        hashes=hashes[order],
        files=numbers[order],
        described=np.frombuffer(json.dumps([dataclasses.asdict(one) for one in described]).encode(), np.uint8),
    )
    files.write_atomically(path, content.getvalue())


class Overlap:
    """The runs of words of the evaluation sets, and which training documents have some."""

    def __init__(self, path: epath.Path) -> None:
        with np.load(io.BytesIO(path.read_bytes())) as arrays:
            self._hashes, self._numbers = arrays["hashes"], arrays["files"]
            self.files = [EvaluationFile(**one) for one in json.loads(arrays["described"].tobytes())]
        self._filter = np.zeros(1 << _FILTER_BITS, bool)  # most runs are in no set: one look says so
        self._filter[self._hashes >> np.uint64(64 - _FILTER_BITS)] = True

    def shared(self, text: str) -> dict[str, int]:
        """By file, how many different runs of words the text shares with it."""
        hashes = runs(word_hashes(text), RUN)
        hashes = np.unique(hashes[self._filter[hashes >> np.uint64(64 - _FILTER_BITS)]])
        first, stop = (np.searchsorted(self._hashes, hashes, side) for side in ("left", "right"))
        numbers = Counter(number for a, b in zip(first, stop, strict=True) for number in self._numbers[a:b].tolist())
        return {self.files[number].name: count for number, count in sorted(numbers.items())}


class OverlapReview:
    """Looks at all documents of a part and counts. Gives a reason only where they are to be left out."""

    def __init__(self, overlap: Overlap, tokenizer: Tokenizer, *, remove: bool) -> None:
        self._overlap, self._tokenizer, self._remove = overlap, tokenizer, remove
        self._documents: dict[str, Counter[str]] = {}
        self._worst: list[dict[str, Any]] = []

    def __call__(self, found: Found) -> str | None:
        shared: Counter[str] = Counter()
        for split, text, _ in found.ends:
            if split == "train":
                shared.update(self._overlap.shared(text if isinstance(text, str) else self._tokenizer.decode(text)))
        if not shared:
            return None
        self._documents.setdefault(found.piece.file.source, Counter()).update(shared.keys())
        start = f", of what begins at byte {found.piece.start}" if found.piece.start else ""
        for file, count in shared.items():
            self._worst.append({"document": found.document.name + start, "file": file, "runs": count})
        if len(self._worst) > 100 * _WORST:
            self._worst = _worst(self._worst)
        return OVERLAP if self._remove else None

    def record(self) -> dict[str, Any]:
        """For the record of the part."""
        files = [dataclasses.asdict(one) for one in self._overlap.files]
        return {"files": files, "documents": self._documents, "worst": _worst(self._worst)}


def collect_overlap(records: Sequence[dict[str, Any]], *, removed: bool) -> dict[str, Any]:
    """For the manifest, from the records of all parts: by source and file the number of documents, and the worst."""
    documents: dict[str, Counter[str]] = {}
    worst: list[dict[str, Any]] = []
    for record in records:
        for source, counts in record["documents"].items():
            documents.setdefault(source, Counter()).update(counts)
        worst = _worst(worst + record["worst"])
    plain = {source: dict(counts) for source, counts in documents.items()}
    return {"run": RUN, "removed": removed, "files": records[0]["files"], "documents": plain, "worst": worst}


def overlap_lines(overlap: dict[str, Any]) -> Iterator[str]:
    """What to say of it: of each file, and of the worst few documents."""
    removed = ", left out" if overlap["removed"] else ""
    for file in overlap["files"]:
        name = file["name"]
        counts = {source: counts[name] for source, counts in overlap["documents"].items() if name in counts}
        yield (
            f"{sum(counts.values()):,} training documents share {RUN} words in a row with {name}{removed} "
            f"({file['texts']:,} texts looked for, {file['short']:,} too short)"
        )
    for one in overlap["worst"][:3]:
        yield f"  {one['document']}: {one['runs']:,} runs of {RUN} words that are in {one['file']}"


def _worst(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(found, key=lambda one: (-one["runs"], one["document"], one["file"]))[:_WORST]


def _listed(config: DataConfig) -> list[File]:
    try:
        return sources.list_files(config.overlap_paths)
    except DataError as error:
        raise DataError(str(error).replace("data.paths", "data.overlap_paths")) from None


def _read(file: File, before: int) -> tuple[EvaluationFile, np.ndarray]:
    digest, texts = hashlib.sha256(), _Texts(before)
    for _ in sources.documents(sources.whole(file), "", Counter(), digest, texts.look):
        pass
    hashes = texts.hashes()
    if texts.too_many:
        raise DataError(
            f"data.overlap_paths: {file.name}: more than {_MOST_RUNS:,} runs of {RUN} words, which are held in memory: "
            "name evaluation sets, not training text"
        )
    return EvaluationFile(file.name, digest.hexdigest(), texts.count, texts.short, len(hashes)), hashes


class _Texts:
    def __init__(self, before: int) -> None:
        self._room = _MOST_RUNS - before
        self._found, self._waiting = [np.zeros(0, np.uint64)], 0
        self.count = self.short = 0
        self.too_many = False

    def look(self, record: dict[str, Any]) -> bool:
        """Takes the place of a filter, which is given all fields of a record and keeps none."""
        for text in () if self.too_many else _strings(record):
            found = runs(word_hashes(text), RUN)
            self.count, self.short = self.count + bool(len(found)), self.short + (not len(found))
            self._found.append(found)
            self._waiting += len(found)
        if self._waiting > _BATCH_RUNS:
            self.hashes()
        return False

    def hashes(self) -> np.ndarray:
        """The different ones, ascending."""
        self._found, self._waiting = [np.unique(np.concatenate(self._found))], 0
        self.too_many |= len(self._found[0]) > self._room
        return self._found[0]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _strings(one)
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)
