"""What a person should know of the data when a run starts: a few lines, for which a few rows are read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from lm.data.batches import Batch, Batches
from lm.data.passages import passages
from lm.data.show import decode, one_line
from lm.data.tokenizers import FIM_NAMES
from lm.errors import some

_DECODED = 2  # rows
_CHARACTERS = 200
_SOURCES = 5  # that have a line of their own
_ROWS = 32  # that are looked at,
_TOKENS = 1 << 17  # or fewer of long ones
_EPOCHS = 4
_NO_TEXT = 0.001  # of the tokens: less is not worth a line
_TRAINED = 0.5  # of the places: more is not


def report(batches: Batches, step: int, steps: int, rows: np.ndarray | slice) -> Iterator[str]:
    """Lines for the log of a run of `steps` steps that starts at `step` and reads these rows of its batches here."""
    here = np.arange(batches.batch_size)[rows]
    here = here[: max(_DECODED, min(_ROWS, _TOKENS // batches.sequence_length))]
    batch = batches.batch(step, here)
    where = batches.rows(step, here)
    sources = batches.corpus.sources
    for row in range(min(_DECODED, len(here))):
        name = sources[where[row].source].name
        tokens = batch["tokens"][row][batch["segments"][row] > 0]
        yield f"step {step} row {here[row]}{f', {name}' if name else ''}: {_text(batches, tokens)}"
    yield from _planned(batches, steps)
    for warning in _warnings(batches, batch, [(row.source, row.spans) for row in where], steps):
        yield f"warning: {warning}"


def _text(batches: Batches, tokens: np.ndarray) -> str:
    shown = one_line(decode(batches.corpus.tokenizer, tokens[:_CHARACTERS].tolist()))
    return shown if len(shown) <= _CHARACTERS else shown[:_CHARACTERS] + "…"


def _planned(batches: Batches, steps: int) -> Iterator[str]:
    """Rows, tokens and epochs of the sources that most is read of."""
    corpus, rows = batches.corpus, steps * batches.batch_size
    counts, epochs = batches.mixture.counts(rows), batches.epochs(steps)
    order = sorted(range(len(corpus.sources)), key=lambda i: -counts[corpus.sources[i].name])
    for i in order[:_SOURCES]:
        one = corpus.sources[i]
        share = f"{counts[one.name] / rows:.1%} of all rows, " if len(order) > 1 else ""
        manifest = one.manifest
        yield (
            f"{one.title}: {share}{epochs[i]:.3g} epochs in {steps:,} steps, of {manifest.tokens('train'):,} tokens in "
            f"{manifest.documents('train'):,} documents"
        )
    if rest := order[_SOURCES:]:
        of_rest, most = sum(counts[corpus.sources[i].name] for i in rest) / rows, max(epochs[i] for i in rest)
        yield f"and {len(rest)} more sources: {of_rest:.1%} of all rows, at most {most:.3g} epochs"


def _warnings(
    batches: Batches, batch: Batch, where: list[tuple[int, list[tuple[int, int]]]], steps: int
) -> Iterator[str]:
    tokenizer, sources = batches.corpus.tokenizer, batches.corpus.sources
    trained = batch["loss_mask"] > 0
    inside = batch["segments"] > 0
    looked = f"in the first {len(where)} rows"
    # Documents of more than one token that end in a row in which they have a token before the last.
    ended = sum(
        one.ends and one.tokens > 1
        for source, spans in where
        for start, length in spans
        for one in passages(batches.streams[source], start, length)
    )
    if ended and not (trained & (batch["targets"] == tokenizer.eos_id)).any():
        yield (
            f"the end of a document, {tokenizer.piece(tokenizer.eos_id)}, is never a target {looked}, in which {ended} "
            "documents end: the model will not learn to stop"
        )
    ids, counts = np.unique(batch["tokens"][inside], return_counts=True)
    unknown = {
        name: count / inside.sum()
        for token, count in zip(ids.tolist(), counts.tolist(), strict=True)
        if tokenizer.token_bytes[token] == 0
        and token not in (tokenizer.bos_id, tokenizer.eos_id)
        and (name := tokenizer.piece(token)) not in _marks(batches)
    }
    if sum(unknown.values()) > _NO_TEXT:
        worst = [f"{one_line(name)} {unknown[name]:.1%}" for name in sorted(unknown, key=lambda name: -unknown[name])]
        yield f"tokens {looked} that stand for no text: {some(worst, 5)}"
    if trained.sum() < _TRAINED * trained.size:
        padding = (~inside).sum() / trained.size
        yield f"only {trained.mean():.1%} of the places {looked} are trained on; {padding:.1%} are padding"
    epochs = dict(zip((one.title for one in sources), batches.epochs(steps), strict=True))
    if often := [f"{name} {count:.1f} times" for name, count in epochs.items() if count > _EPOCHS]:
        yield (
            f"read again and again: {some(often, 5)}; from about {_EPOCHS} times on, "
            "repeated text is worth less than new text (Muennighoff et al. 2023)"
        )
    if never := [name for name, count in epochs.items() if count == 0]:
        yield f"never read in {steps:,} steps: {some(never, 5)}"


def _marks(batches: Batches) -> set[str]:
    """What stands for no text in documents whose middle was moved, as it should."""
    known = {name for names in FIM_NAMES for name in names}
    return known | {*(batches.corpus.data.fim_tokens or ())}
