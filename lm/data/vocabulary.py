"""The tokenizer that a config asks for: loaded, or trained on a sample of the training text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from lm.data.config import DataConfig, TokenizerConfig
from lm.data.middle import TRAINED_NAMES
from lm.data.sources import Piece
from lm.data.splits import Tally, split_pieces, text_hash
from lm.data.tokenizers import Tokenizer, chunks, load_tokenizer, train_sentencepiece

_STRETCH = 4096  # characters
_HASHES = 2**64


class Sample(NamedTuple):
    """The text of one source, and what of it is held out."""

    config: DataConfig
    parts: Sequence[Sequence[Piece]]
    holdout_below: int

    @property
    def size(self) -> int:
        return sum(piece.stop - piece.start for part in self.parts for piece in part)


def make_tokenizer(config: DataConfig, samples: Sequence[Sample], progress: Callable[[str], None]) -> Tokenizer:
    """Depends on `config` and the text of `samples` alone.

    Raises:
        DataError: its file cannot be used, or the text does not do to train one.
    """
    wanted = config.tokenizer
    if not is_trained(config):
        return load_tokenizer(wanted.kind, wanted.path or b"")
    return train_tokenizer(wanted, samples, progress)


def train_tokenizer(wanted: TokenizerConfig, samples: Sequence[Sample], progress: Callable[[str], None]) -> Tokenizer:
    """A sentencepiece model of the training text of all `samples`. Raises DataError if that does not do for one."""
    progress("training the tokenizer")
    share, below = _sampling(wanted, samples)
    text = [stretch for sample in samples for stretch in _drawn(sample, share, below)]
    specials = next((s.config.fim_tokens or TRAINED_NAMES for s in samples if s.config.fim_rate), ())
    tokenizer = train_sentencepiece(text, model_type=wanted.model_type, vocab_size=wanted.vocab_size, specials=specials)
    if tokenizer.vocab_size < wanted.vocab_size and wanted.model_type != "char":
        progress(f"the text supports a vocabulary of {tokenizer.vocab_size}, not {wanted.vocab_size}")
    return tokenizer


def is_trained(config: DataConfig) -> bool:
    """Whether the tokenizer is made from the text, not loaded."""
    return config.tokenizer.kind == "sentencepiece" and config.tokenizer.path is None


def unseen_text(samples: Sequence[Sample], size: int) -> Iterator[tuple[str, str]]:
    """(source, text) in short stretches that no tokenizer made here was trained on, about `size` bytes of them.

    From the documents held out; where a config holds out none, what the sample leaves. Each source has its share.
    """
    total = max(1, sum(sample.size for sample in samples))
    for sample in samples:
        config = sample.config
        split = "heldout" if config.holdout_paths or config.holdout_fraction else "train"
        trained = split == "train" and is_trained(config)
        sampled_below = _sampling(config.tokenizer, samples)[1] if trained else 0
        if sampled_below < _HASHES:
            yield from _unseen(sample, split, sampled_below, size * sample.size / total)


def _unseen(sample: Sample, split: str, sampled_below: int, size: float) -> Iterator[tuple[str, str]]:
    config = sample.config
    pieces = [piece for part in sample.parts for piece in part if piece.file.heldout or not config.holdout_paths]
    share = size / max(1, sum(piece.stop - piece.start for piece in pieces))
    owed: dict[str, float] = defaultdict(float)  # by source; what one piece gave too much, the next need not give
    for piece in pieces:
        source = piece.file.source
        owed[source] += share * (piece.stop - piece.start)
        texts = split_pieces([piece], config, sample.holdout_below, Tally()) if owed[source] > 0 else ()
        stretches = (stretch for found, _, text, _ in texts if found == split for stretch in chunks(text, _STRETCH))
        for stretch in stretches:
            raw = stretch.encode()
            if text_hash(raw) >= sampled_below:
                owed[source] -= len(raw)
                yield source, stretch
            if owed[source] <= 0:
                break


def _drawn(sample: Sample, share: float, below: int) -> Iterator[str]:
    """A share of the training text in short stretches, chosen by hash, from every part."""
    for part in sample.parts:
        left = share * sum(piece.stop - piece.start for piece in part)
        for split, _, text, _ in split_pieces(part, sample.config, sample.holdout_below, Tally()):
            if left <= 0 and share < 1:
                break
            for stretch in chunks(text, _STRETCH) if split == "train" else ():
                raw = stretch.encode()
                if share >= 1 or text_hash(raw) < below:
                    left -= len(raw)
                    yield stretch


def _sampling(wanted: TokenizerConfig, samples: Sequence[Sample]) -> tuple[float, int]:
    """The share of the text to sample, and the hash below which a stretch may be in the sample."""
    share = wanted.training_bytes / max(1, sum(sample.size for sample in samples))
    # Of huge inputs only the first sixteenth that yields enough is read, part by part.
    return share, int(min(1.0, max(share, 1 / 16)) * _HASHES)
