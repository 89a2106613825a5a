"""The tokenizer that a config asks for: loaded, or trained on a sample of the training text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from lm.data.config import DataConfig
from lm.data.sources import Piece
from lm.data.splits import Tally, split_pieces, text_hash
from lm.data.tokenizers import Tokenizer, chunks, load_tokenizer, train_sentencepiece

_STRETCH = 4096  # characters
_HASHES = 2**64

Parts = Sequence[Sequence[Piece]]


def make_tokenizer(config: DataConfig, parts: Parts, holdout_below: int, progress: Callable[[str], None]) -> Tokenizer:
    """Depends on `config` and the text of `parts` alone.

    Raises:
        DataError: its file cannot be used, or the text does not do to train one.
    """
    wanted = config.tokenizer
    if not _is_trained(config):
        return load_tokenizer(wanted.kind, wanted.path or b"")
    progress("training the tokenizer")
    sample = list(_sample(config, parts, holdout_below))
    tokenizer = train_sentencepiece(sample, model_type=wanted.model_type, vocab_size=wanted.vocab_size)
    if tokenizer.vocab_size < wanted.vocab_size and wanted.model_type != "char":
        progress(f"the text supports a vocabulary of {tokenizer.vocab_size}, not {wanted.vocab_size}")
    return tokenizer


def unseen_text(config: DataConfig, parts: Parts, holdout_below: int, size: int) -> Iterator[tuple[str, str]]:
    """(source, text) in short stretches that no tokenizer made here was trained on, about `size` bytes of them.

    From the documents held out; where a config holds out none, what the sample leaves. Each source has its share.
    """
    split = "heldout" if config.holdout_paths or config.holdout_fraction else "train"
    sampled_below = _sampling(config, parts)[1] if split == "train" and _is_trained(config) else 0
    if sampled_below == _HASHES:
        return
    pieces = [piece for part in parts for piece in part if piece.file.heldout or not config.holdout_paths]
    share = size / max(1, sum(piece.stop - piece.start for piece in pieces))
    owed: dict[str, float] = defaultdict(float)  # by source; what one piece gave too much, the next need not give
    for piece in pieces:
        source = piece.file.source
        owed[source] += share * (piece.stop - piece.start)
        texts = split_pieces([piece], config, holdout_below, Tally()) if owed[source] > 0 else ()
        stretches = (stretch for found, _, text, _ in texts if found == split for stretch in chunks(text, _STRETCH))
        for stretch in stretches:
            raw = stretch.encode()
            if text_hash(raw) >= sampled_below:
                owed[source] -= len(raw)
                yield source, stretch
            if owed[source] <= 0:
                break


def _is_trained(config: DataConfig) -> bool:
    return config.tokenizer.kind == "sentencepiece" and config.tokenizer.path is None


def _sample(config: DataConfig, parts: Parts, holdout_below: int) -> Iterator[str]:
    """About `training_bytes` of training text in short stretches, chosen by hash, from every part."""
    share, below = _sampling(config, parts)
    for part in parts:
        left = share * sum(piece.stop - piece.start for piece in part)
        for split, _, text, _ in split_pieces(part, config, holdout_below, Tally()):
            if left <= 0 and share < 1:
                break
            for stretch in chunks(text, _STRETCH) if split == "train" else ():
                raw = stretch.encode()
                if share >= 1 or text_hash(raw) < below:
                    left -= len(raw)
                    yield stretch


def _sampling(config: DataConfig, parts: Parts) -> tuple[float, int]:
    """The share of the text to sample, and the hash below which a stretch may be in the sample."""
    share = config.tokenizer.training_bytes / max(1, sum(p.stop - p.start for part in parts for p in part))
    # Of huge inputs only the first sixteenth that yields enough is read, part by part.
    return share, int(min(1.0, max(share, 1 / 16)) * _HASHES)
