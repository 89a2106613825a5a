"""In which steps of a run a text was seen.

Documents are searched as text: it does not matter where records end, or how the text falls into tokens. A special token
in a document ends what is searched in one piece; where a middle was moved, so do its places.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from etils import epath

from lm.data.batches import Batches
from lm.data.manifest import SPLITS
from lm.data.progress import Progress
from lm.data.scan import Place, places, scan
from lm.data.show import one_line
from lm.data.tokenizers import Tokenizer, load_tokenizer
from lm.errors import ConfigError

_RECORDS = 64  # that are searched at once
_CONTEXT = 60  # characters to the left and right of what was found
_STEPS_SHOWN = 12


@dataclass(frozen=True)
class Reading:
    """A row of a batch that held the text, or some of its tokens."""

    step: int
    row: int
    tokens: int


@dataclass(frozen=True)
class Hit:
    """Where the text is in what is trained on."""

    source: str
    document: int
    position: int
    """Of the token, in the stream of the source, in which it begins."""
    tokens: int
    before: str
    found: str
    after: str
    readings: list[Reading]


@dataclass(frozen=True)
class Found:
    """How often the text is there, by split and source, and in how many documents; of the first hits, all."""

    text: str
    steps: int
    """Up to which step was looked."""
    times: dict[str, dict[str, int]]
    documents: dict[str, int]
    hits: list[Hit]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def find(batches: Batches, text: str, steps: int, limit: int, progress: Progress) -> Found:
    """Looks for `text` in both splits, and for the steps before `steps` in which the first `limit` hits were read.

    Hits do not overlap, and lie in one document each. Raises ConfigError for a text or a limit that cannot be.
    """
    needle = text.encode("utf-8", "surrogateescape")  # a byte of the command line that is no UTF-8 is searched as it is
    if not needle:
        raise ConfigError("the text to find is empty")
    if limit < 0:
        raise ConfigError(f"--limit must be at least 0, got {limit}")
    corpus = batches.corpus
    kept = corpus.sources[0]
    file = str(epath.Path(kept.directory) / kept.manifest.tokenizer.file)
    look = functools.partial(_search, needle=needle, kind=corpus.tokenizer.kind, file=file, limit=limit)
    times: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    documents: Counter[str] = Counter()
    first: list[tuple[int, int, int, int]] = []
    for split in SPLITS:
        where = places(corpus, split)
        begun = _documents_before(where)
        for place, result in scan(look, where, corpus.data.workers, f"searching what is {_NAMES[split]}", progress):
            times[split][corpus.sources[place.source].title] += result.times
            documents[split] += result.documents
            if split == "train":
                at = [
                    (place.source, place.begin + position, tokens, begun[place] + document)
                    for position, tokens, document in result.hits
                ]
                first = sorted([*first, *at])[:limit]
    hits = [_hit(batches, steps, *one, needle) for one in first]
    return Found(
        needle.decode("utf-8", "replace"),
        steps,
        {split: dict(+times[split]) for split in SPLITS},
        dict(documents),
        hits,
    )


def lines(found: Found) -> Iterator[str]:
    """What `find` found, as a person reads it."""
    total, heldout = (sum(found.times[split].values()) for split in SPLITS)
    what = f"“{one_line(found.text)}”" if len(found.text) <= 80 else f"“{one_line(found.text[:80])}…”"
    if not total:
        only = f"; it is only in what is held out, {_times(heldout)}" if heldout else ", nor in what is held out"
        yield f"{what} is not in what is trained on{only}"
        return
    by_source = ", ".join(f"{name} {times:,}" for name, times in found.times["train"].items())
    among = f" ({by_source})" if len(found.times["train"]) > 1 else ""
    also = f", and {_times(heldout)} in what is held out" if heldout else ""
    yield f"{what}: {_times(total)} in what is trained on{among}, in {_documents(found.documents['train'])}{also}"
    for hit in found.hits:
        yield f"── {hit.source}, document {hit.document:,}: …{one_line(hit.before)}⟪{one_line(hit.found)}⟫" + (
            f"{one_line(hit.after)}…"
        )
        yield f"   {_steps(hit, found.steps)}"
    if total > len(found.hits):
        yield f"and {total - len(found.hits):,} more; --limit N shows the first N"


_NAMES = {"train": "trained on", "heldout": "held out"}


@dataclass(frozen=True)
class _Result:
    times: int
    documents: int
    hits: list[tuple[int, int, int]]
    """(position in the shard, tokens, document of the shard) of the first."""


def _search(place: Place, needle: bytes, kind: Any, file: str, limit: int) -> _Result:
    """Looks through a shard."""
    tokenizer = _tokenizer(kind, file)
    pieces, sizes = tokenizer.pieces, tokenizer.token_bytes
    reader = place.reader()
    tokens, begins = np.zeros(0, np.int64), np.zeros(0, bool)  # what is in view
    first = offset = gone = resume = 0  # before what is in view: tokens, bytes, documents; where to look from, in bytes
    times, documents = 0, set[int]()
    hits: list[tuple[int, int, int]] = []
    for record in range(0, place.shard.records, _RECORDS):
        read = [reader.read(i) for i in range(record, min(record + _RECORDS, place.shard.records))]
        tokens = np.concatenate([tokens, *(one.tokens for one in read)])
        begins = np.concatenate([begins, *(_marked(one.starts, len(one.tokens)) for one in read)])
        text = b"".join(map(pieces.__getitem__, tokens.tolist()))
        at = text.find(needle, max(0, resume - offset))
        ends = np.cumsum(sizes[tokens]) if at >= 0 or record + _RECORDS < place.shard.records else np.zeros(0)
        while at >= 0:
            left, right = np.searchsorted(ends, (at, at + len(needle) - 1), side="right").tolist()
            split = begins[left + 1 : right + 1].any() or (sizes[tokens[left : right + 1]] == 0).any()
            if split or _is_added(tokenizer, needle, tokens, begins, ends, left, at):
                resume = offset + at + 1  # seen again, it could lack the beginning of its document
                at = text.find(needle, at + 1)
                continue
            document = gone + int(begins[: left + 1].sum()) - 1
            times += 1
            documents.add(document)
            if len(hits) < limit:
                hits.append((first + left, right - left + 1, document))
            resume = offset + at + len(needle)
            at = text.find(needle, at + len(needle))
        if record + _RECORDS < place.shard.records:
            # What a hit may begin in stays in view, and the token before it, with which the document may begin.
            keep = max(0, int(np.searchsorted(ends, len(text) - len(needle) + 1, side="right")) - 1)
            first, gone = first + keep, gone + int(begins[:keep].sum())
            offset += int(ends[keep - 1]) if keep else 0
            tokens, begins = tokens[keep:], begins[keep:]
    return _Result(times, len(documents), hits)


def _is_added(
    tokenizer: Tokenizer, needle: bytes, tokens: np.ndarray, begins: np.ndarray, ends: np.ndarray, left: int, at: int
) -> bool:
    """Whether the byte at `at` is what the tokenizer puts before the text of a document."""
    sizes = tokenizer.token_bytes[tokens[: left + 1]]
    if not tokenizer.added or not needle.startswith(tokenizer.added) or at != ends[left] - sizes[left]:
        return False
    while left > 0 and not begins[left] and sizes[left - 1] == 0:
        left -= 1
    return bool(begins[left])


def _hit(batches: Batches, steps: int, source: int, position: int, tokens: int, document: int, needle: bytes) -> Hit:
    """With the text around it, and the rows in which it was read."""
    stream, pieces = batches.streams[source], batches.corpus.tokenizer.pieces
    first, stop = max(0, position - _CONTEXT), min(stream.tokens, position + tokens + _CONTEXT)
    first = max([first, *stream.document_starts(first, position + 1).tolist()])
    stop = min([stop, *stream.document_starts(position + tokens, stop).tolist()])
    raw = [pieces[token] for token in stream.read(first, stop - first)[0].tolist()]
    begin = len(b"".join(raw[: position - first]))
    text = b"".join(raw)
    begin = text.index(needle, begin)
    before, after = (part.decode("utf-8", "ignore") for part in (text[:begin], text[begin + len(needle) :]))
    return Hit(
        batches.corpus.sources[source].title,
        document,
        position,
        tokens,
        before[-_CONTEXT:],
        needle.decode("utf-8", "replace"),
        after[:_CONTEXT],
        _readings(batches, steps, source, position, tokens),
    )


def _readings(batches: Batches, steps: int, source: int, position: int, tokens: int) -> list[Reading]:
    found: Counter[tuple[int, int]] = Counter()
    for step, row, count in batches.rows_with(source, position, tokens, steps):
        found[step, row] += count
    return [Reading(step, row, count) for (step, row), count in sorted(found.items())]


def _marked(starts: np.ndarray, count: int) -> np.ndarray:
    marked = np.zeros(count, bool)
    marked[starts] = True
    return marked


@functools.lru_cache(maxsize=1)
def _tokenizer(kind: Any, file: str) -> Tokenizer:
    return load_tokenizer(kind, file)


def _documents_before(where: list[Place]) -> dict[Place, int]:
    """How many documents of its source come before each shard."""
    found: dict[Place, int] = {}
    counts: Counter[int] = Counter()
    for place in where:
        found[place] = counts[place.source]
        counts[place.source] += place.shard.documents
    return found


def _steps(hit: Hit, steps: int) -> str:
    if not hit.readings:
        return f"not read before step {steps:,}"
    shown = [
        f"step {one.step:,} row {one.row}"
        + (f" ({one.tokens} of {hit.tokens} tokens)" if one.tokens < hit.tokens else "")
        for one in hit.readings[:_STEPS_SHOWN]
    ]
    more = len(hit.readings) - len(shown)
    return f"read in {', '.join(shown)}" + (f" and {more:,} more" if more else "")


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def _documents(count: int) -> str:
    return "1 document" if count == 1 else f"{count:,} documents"
