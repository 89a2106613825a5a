"""sentencepiece models: those that others made, and those that are trained here."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Literal

from lm.data.tokenizers.base import Tokenizer, chunks
from lm.errors import DataError

_CHUNK = 2048  # sentencepiece's BPE slows down with the length of what it gets at once


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model; exact on any text when it has byte fallback and does not normalise."""

    kind = "sentencepiece"
    file_name = "tokenizer.model"

    def __init__(self, model: bytes, origin: str = "sentencepiece model") -> None:
        """Raises DataError when the bytes are no model or it has no begin or end of document."""
        import sentencepiece

        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError, TypeError) as error:
            raise DataError(f"{origin}: not a sentencepiece model: {error}") from None
        super().__init__([self._raw(i) for i in range(self._model.vocab_size())], model)
        self.bos_id, self.eos_id = self._model.bos_id(), self._model.eos_id()
        if min(self.bos_id, self.eos_id) < 0:
            raise DataError(f"{origin}: the model lacks begin or end of document (bos_id, eos_id)")
        adds_space = self._model.encode("a", out_type=str)[0].startswith("\u2581")
        self._strip = b" " if adds_space else b""
        probe = "  \ufb01 \u2460  "  # ligature and circled digit: what a lossy normalisation would change
        exact = self._model.normalize(probe) == probe.replace(" ", "\u2581")
        space = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]
        # Models write a space as U+2581, so the character itself must travel as bytes to come back.
        escapes = exact and all(self._model.is_byte(i) for i in space)
        self._space_ids: list[int] | None = space if escapes else None

    def _ids(self, text: str) -> list[int]:
        if self._space_ids is None or "\u2581" not in text:
            return self._encode(text)
        first, *rest = text.split("\u2581")
        ids = self._ids(first)
        for part in rest:
            ids += self._space_ids
            ids += self._ids(part)
        return ids

    def _encode(self, text: str) -> list[int]:
        if self._strip:
            return self._model.encode(text)  # each chunk would get a space of its own
        return [i for chunk in chunks(text, _CHUNK) for i in self._model.encode(chunk)]

    def _raw(self, token: int) -> bytes:
        if self._model.is_byte(token):
            return bytes([int(self._model.id_to_piece(token)[3:-1], 16)])
        if self._model.is_control(token) or self._model.is_unknown(token):
            return b""
        return self._model.id_to_piece(token).replace("\u2581", " ").encode()

    def _name(self, token: int) -> str:
        return self._model.id_to_piece(token)


def train_sentencepiece(
    texts: Sequence[str],
    *,
    model_type: Literal["bpe", "unigram", "char"],
    vocab_size: int,
    specials: Sequence[str] = (),
) -> SentencePieceTokenizer:
    """Trains a model that gives back any text exactly: no normalisation, unknown characters as bytes.

    `char` has one token for each character of the texts and none for others. A vocabulary larger than
    the texts support becomes as large as they do. The same texts give the same model. `specials` are names of tokens
    that no text becomes.

    Raises:
        DataError: no text, or a vocabulary too small for the characters in it.
    """
    import sentencepiece

    # Newlines stay, so that pieces such as ":\n" are learned. These characters are used by the trainer
    # itself; a tab is made a token by hand, the others are left to byte fallback.
    reserved = re.compile("[\0\t\u2581\u2585]+")
    sentences = [part for text in texts for part in reserved.split(text) if part]
    if not sentences:
        raise DataError("there is no text to train the tokenizer on; raise data.tokenizer.training_bytes")
    chars = model_type == "char"
    symbols = ["\t"] if not chars or any("\t" in text for text in texts) else []
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            use_all_vocab=chars,
            byte_fallback=not chars,
            character_coverage=1.0 if chars else 0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            max_sentence_length=1 << 20,
            user_defined_symbols=symbols,
            control_symbols=list(specials),
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        if needed := re.search(r"required_chars\. \d+ vs (\d+)", str(error)):
            raise DataError(
                f"data.tokenizer.vocab_size {vocab_size} is too small: the text has {needed[1]} characters, "
                f"bytes and specials; choose {needed[1]} or more"
            ) from None
        raise DataError(f"sentencepiece could not train on this text: {error}") from None
    return SentencePieceTokenizer(model.getvalue())
