"""Text to token ids and back: bytes, sentencepiece and Hugging Face `tokenizer.json` files.

Every tokenizer is a table from id to the bytes that the id stands for, plus a way to encode. All
decoding goes through the table, so a token that is half a character is no special case.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
from etils import epath

from lm.errors import DataError

Kind = Literal["bytes", "sentencepiece", "huggingface"]

_CHUNK = 2048  # sentencepiece's BPE slows down with the length of what it gets at once


class Tokenizer:
    """What all kinds share. `bos_id` begins and `eos_id` ends every document."""

    kind: Kind
    file_name: str
    bos_id: int
    eos_id: int

    def __init__(self, table: Sequence[bytes], serialized: bytes) -> None:
        self._table = list(table)
        self._serialized = serialized
        self._strip = b""
        self.token_bytes = np.array([len(raw) for raw in table], np.int32)
        """int32 [V]: bytes of text that each id stands for; 0 for ids that stand for none."""

    @property
    def vocab_size(self) -> int:
        return len(self._table)

    @property
    def fingerprint(self) -> str:
        """Equal exactly for tokenizers of the same kind and file content."""
        return hashlib.sha256(self.kind.encode() + b"\0" + self._serialized).hexdigest()

    def serialize(self) -> bytes:
        """The content of a file from which `load_tokenizer` makes the same tokenizer."""
        return self._serialized

    def encode(self, text: str) -> np.ndarray:
        """The int32 [n] ids of the text alone, without begin or end of document."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text; quicker than one by one where the library can."""
        return [np.array(self._ids(valid_text(text)), np.int32) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; what is no valid UTF-8 comes out as U+FFFD."""
        return "".join(self.decode_stream(ids))

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text that each id completes, possibly "", and at the end what was left incomplete.

        A character made of several tokens appears with the last of them.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        first = True
        for token in ids:
            raw = self._table[token]
            if first and raw:
                raw, first = raw.removeprefix(self._strip), False
            yield decoder.decode(raw)
        yield decoder.decode(b"", final=True)

    def piece(self, token: int) -> str:
        """The id as a person wants to see it: its text, or its name where it has none."""
        return self._table[token].decode("utf-8", "backslashreplace") or self._name(token)

    def _ids(self, text: str) -> Sequence[int]:
        raise NotImplementedError

    def _name(self, token: int) -> str:
        raise NotImplementedError


class BytesTokenizer(Tokenizer):
    """One token for each byte of UTF-8, then begin (256) and end (257) of document."""

    kind = "bytes"
    file_name = "tokenizer.bytes"
    bos_id, eos_id = 256, 257

    def __init__(self) -> None:
        super().__init__([bytes([i]) for i in range(256)] + [b"", b""], b"bytes, bos 256, eos 257\n")

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(valid_text(text).encode(), np.uint8).astype(np.int32) for text in texts]

    def _name(self, token: int) -> str:
        return "<bos>" if token == self.bos_id else "<eos>"


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


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`: byte-level BPE (GPT-2, Llama 3) or pieces with byte fallback (Llama 2)."""

    kind = "huggingface"
    file_name = "tokenizer.json"

    _BOS = ("<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>", "[CLS]")
    _EOS = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "[SEP]")

    def __init__(self, content: bytes, origin: str = "tokenizer.json") -> None:
        """Raises DataError when the file is no tokenizer that can be used, or the library is missing."""
        try:
            import tokenizers
        except ImportError:
            raise DataError(
                "data.tokenizer.kind 'huggingface' needs the tokenizers library: pip install 'lm[huggingface]'"
            ) from None
        try:
            self._model = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises nothing narrower
            raise DataError(f"{origin}: not a Hugging Face tokenizer: {error}") from None
        self._model.encode_special_tokens = True  # a document that spells <|endoftext|> must not end there
        decoder = _types(json.loads(content).get("decoder"))
        if not decoder & {"ByteLevel", "ByteFallback", "Metaspace"}:
            raise DataError(f"{origin}: only byte-level tokenizers and those with byte fallback can be used")
        added = self._model.get_added_tokens_decoder()
        unspaced = "ByteLevel" not in decoder
        vocab: dict[str, int] = self._model.get_vocab()
        table = []
        for i in range(max(vocab.values()) + 1):
            piece = self._model.id_to_token(i) or ""
            if i in added:
                table.append(b"" if added[i].special else piece.encode())
            else:
                table.append(_metaspace_bytes(piece) if unspaced else _byte_level_bytes(piece))
        super().__init__(table, content)
        begin, end = ([vocab[n] for n in names if n in vocab] for names in (self._BOS, self._EOS))
        if not begin + end:
            raise DataError(f"{origin}: none of {', '.join(self._BOS + self._EOS)} is in its vocabulary")
        self.bos_id, self.eos_id = (begin + end)[0], (end + begin)[0]
        adds_space = unspaced and self._table[self.encode("a")[0]].startswith(b" ")
        self._strip = b" " if adds_space else b""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        batch = self._model.encode_batch([valid_text(text) for text in texts], add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in batch]

    def _name(self, token: int) -> str:
        return self._model.id_to_token(token) or f"<unused {token}>"


FILE_NAMES: dict[str, str] = {
    c.kind: c.file_name for c in (BytesTokenizer, SentencePieceTokenizer, HuggingFaceTokenizer)
}


def load_tokenizer(kind: str, source: bytes | epath.PathLike = b"") -> Tokenizer:
    """The tokenizer from the content of its file, or from a path or URL.

    Raises:
        DataError: the file is missing or is not of this kind.
    """
    if kind == "bytes":
        return BytesTokenizer()
    if isinstance(source, bytes):
        content, origin = source, f"{kind} tokenizer"
    else:
        origin = str(source)
        try:
            content = epath.Path(source).expanduser().read_bytes()
        except OSError as error:
            raise DataError(f"{origin}: cannot read the tokenizer: {error.strerror or error}") from None
    if kind == "sentencepiece":
        return SentencePieceTokenizer(content, origin)
    if kind == "huggingface":
        return HuggingFaceTokenizer(content, origin)
    raise DataError(f"unknown kind of tokenizer {kind!r}; known: {', '.join(FILE_NAMES)}")


def train_sentencepiece(
    texts: Sequence[str], *, model_type: Literal["bpe", "unigram", "char"], vocab_size: int
) -> SentencePieceTokenizer:
    """Trains a model that gives back any text exactly: no normalisation, unknown characters as bytes.

    `char` has one token for each character of the texts and none for others. A vocabulary larger than
    the texts support becomes as large as they do. The same texts give the same model.

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


def valid_text(text: str) -> str:
    """The text itself, or with U+FFFD for lone surrogates, which no UTF-8 can hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def chunks(text: str, size: int) -> Iterator[str]:
    """Cuts the text into parts of at most `size` characters, after a newline where there is one."""
    start = 0
    while start < len(text):
        stop = min(len(text), start + size)
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop


def _types(node: Any) -> set[str]:
    """All values of "type" in a nested JSON value."""
    if isinstance(node, dict):
        own = {node["type"]} if isinstance(node.get("type"), str) else set()
        return own.union(*map(_types, node.values()))
    return set().union(*map(_types, node)) if isinstance(node, list) else set()


def _metaspace_bytes(piece: str) -> bytes:
    if re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("\u2581", " ").encode()


def _byte_level_alphabet() -> dict[str, int]:
    """The character that GPT-2's vocabulary writes for each byte: itself if printable, else 256 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_ALPHABET = _byte_level_alphabet()


def _byte_level_bytes(piece: str) -> bytes:
    return bytes(_ALPHABET[character] for character in piece)
