"""From `data.paths` to documents: files in a fixed order, and the texts in each.

A text file is one document, a line of a .jsonl file another. Files may be compressed (.gz, .zst).
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import stat
import sysconfig
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Protocol

import zstandard
from etils import epath

from lm.data.files import is_remote
from lm.data.tokenizers import valid_text
from lm.errors import DataError

STDLIB = "python-stdlib"

_BLOCK = 1 << 18


class Hash(Protocol):
    """What hashlib makes."""

    def update(self, data: bytes, /) -> None: ...


@dataclass(frozen=True)
class File:
    """An input file. `name` is what users see; it holds no more of the path than they wrote."""

    source: str
    name: str
    path: str
    size: int
    modified: int
    heldout: bool = False


@dataclass(frozen=True)
class Piece:
    """A file or a range of bytes of it that begins and ends at a line."""

    file: File
    start: int
    stop: int


class Document(NamedTuple):
    name: str
    text: str
    raw: bytes
    """`text` in UTF-8."""


def list_files(paths: Iterable[str], holdout_paths: Iterable[str] = ()) -> list[File]:
    """All input files, each once, in an order that depends on names alone.

    A file that is named by both is held out. Hidden files (.name) in folders are left out.

    Raises:
        DataError: a path is missing, or there is no file in it.
    """
    found: dict[str, File] = {}
    for entry, heldout in [(p, True) for p in holdout_paths] + [(p, False) for p in paths]:
        for name, path in _stdlib() if entry == STDLIB else _expand(entry):
            if path not in found:
                size, modified = _stat(name, path)
                found[path] = File(entry, name, path, size, modified, heldout)
    return sorted(found.values(), key=lambda file: (file.heldout, file.name))


def present(entry: str) -> bool:
    """Whether an entry of `data.paths` is on this machine."""
    try:
        return entry == STDLIB or next(_expand(entry), None) is not None
    except DataError:
        return False


def whole(file: File) -> Piece:
    return Piece(file, 0, file.size)


def cut(file: File, limit: int) -> list[Piece]:
    """The file in ranges of about `limit` bytes; whole unless it is an uncompressed .jsonl file."""
    if not file.name.endswith(".jsonl") or file.size <= limit:
        return [whole(file)]
    bounds = [0]
    with epath.Path(file.path).open("rb") as stream:
        for position in range(limit, file.size, limit):
            stream.seek(position)
            stream.readline()
            if bounds[-1] < stream.tell() < file.size:
                bounds.append(stream.tell())
    return [Piece(file, *bound) for bound in zip(bounds, [*bounds[1:], file.size], strict=True)]


def documents(piece: Piece, text_field: str, skipped: Counter[str], digest: Hash | None = None) -> Iterator[Document]:
    """The documents of the piece. Counts in `skipped` what was left out: "empty" or "not UTF-8".

    `digest` is given the stored bytes as they pass, as `content_hash` would see them.

    Raises:
        DataError: text that is not UTF-8 (but for the standard library's own tests of that), a broken
            compressed file, a line that is not JSON or lacks the text; each with its place.
    """
    name = piece.file.name
    base = name.removesuffix(".gz").removesuffix(".zst")
    if base.endswith(".jsonl"):
        yield from _json_documents(piece, text_field, skipped, digest)
        return
    raw = b"".join(_blocks(piece, digest))
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        if piece.file.source != STDLIB:
            raise _not_utf8(name, error.start, raw[error.start]) from None
        skipped["not UTF-8"] += 1
        return
    if text:
        yield Document(name, text, raw)
    else:
        skipped["empty"] += 1


def content_hash(piece: Piece) -> str:
    """sha256 of the bytes of the piece as stored."""
    digest = hashlib.sha256()
    for _ in _stored_blocks(piece, digest):
        pass
    return digest.hexdigest()


def _stdlib() -> Iterator[tuple[str, str]]:
    """(name, path) of the modules of the running interpreter's library."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "__pycache__"}
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - left_out)
        for name in sorted(names):
            path = Path(folder) / name
            if name.endswith(".py") and path.is_file():  # distributions leave links to what is not installed
                yield f"{STDLIB}/{path.relative_to(root).as_posix()}", str(path)


def _expand(entry: str) -> Iterator[tuple[str, str]]:
    """(name, path) of the files that an entry of `data.paths` stands for."""
    path = epath.Path(entry).expanduser()
    try:
        is_folder = path.is_dir()
    except ImportError as error:  # of what reads this kind of bucket
        raise DataError(f"data.paths: {entry}: {error}") from None
    if is_folder:
        found = [os.fspath(path / relative) for relative in _walk(path)]
    elif path.exists():
        found = [os.fspath(path)]
    elif any(c in entry for c in "*?["):
        found = sorted(_glob(os.fspath(path)))
    else:
        raise DataError(f"data.paths: {entry}: no such file or folder")
    if not found:
        raise DataError(f"data.paths: {entry}: no files there (hidden ones are left out)")
    yield from zip(found, found, strict=True)


def _walk(folder: epath.Path) -> Iterator[PurePosixPath]:
    top = None
    for root, folders, names in folder.walk(on_error=_unreadable):
        here = PurePosixPath(root)
        top = top or here  # of a bucket without its scheme, so only what is below it counts
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (here.relative_to(top) / name for name in sorted(names) if not name.startswith("."))


def _unreadable(error: OSError) -> None:
    raise DataError(f"data.paths: {error.filename}: cannot be read: {error.strerror}")


def _glob(pattern: str) -> list[str]:
    if not is_remote(pattern):
        return [name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)]
    if "**" in pattern:
        raise DataError(f"data.paths: {pattern}: ** is not for buckets; name the folder, all in it is read")
    parts = pattern.split("/")
    fixed = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
    matches = epath.Path("/".join(parts[:fixed])).glob("/".join(parts[fixed:]))
    return [os.fspath(match) for match in matches if not match.is_dir()]


def _stat(name: str, path: str) -> tuple[int, int]:
    """Size and time of change, the latter in any unit."""
    if is_remote(path):
        remote = epath.Path(path).stat()
        return remote.length, int(remote.mtime)
    try:
        local = os.stat(path)
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from None
    if not stat.S_ISREG(local.st_mode):
        raise DataError(f"{name}: not a regular file; leave it out of data.paths")
    return local.st_size, local.st_mtime_ns


def _stored_blocks(piece: Piece, digest: Hash | None = None) -> Iterator[bytes]:
    try:
        with epath.Path(piece.file.path).open("rb") as stream:
            stream.seek(piece.start)
            left = piece.stop - piece.start
            while left and (block := stream.read(min(_BLOCK, left))):
                left -= len(block)
                if digest is not None:
                    digest.update(block)
                yield block
    except OSError as error:
        raise DataError(f"{piece.file.name}: cannot be read: {error.strerror or error}") from None
    if left:
        raise DataError(f"{piece.file.name}: became shorter while it was read")


def _blocks(piece: Piece, digest: Hash | None) -> Iterator[bytes]:
    """The bytes of the piece, decompressed."""
    name = piece.file.name
    if not name.endswith((".gz", ".zst")):
        yield from _stored_blocks(piece, digest)
        return
    gzip = name.endswith(".gz")
    decoder = None
    try:
        for block in _stored_blocks(piece, digest):
            while block:
                if decoder is None:
                    decoder = zlib.decompressobj(31) if gzip else zstandard.ZstdDecompressor().decompressobj()
                yield decoder.decompress(block)
                # A file may hold several compressed streams, one after the other.
                block = decoder.unused_data if decoder.eof else b""
                decoder = None if decoder.eof else decoder
    except (zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"{name}: broken compressed data: {error}") from None
    if decoder is not None:
        raise DataError(f"{name}: the compressed data ends too early; the file seems truncated")


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    rest: list[bytes] = []
    for block in blocks:
        head, *tail = block.split(b"\n")
        rest.append(head)
        if tail:
            yield b"".join(rest)
            yield from tail[:-1]
            rest = [tail[-1]]
    yield b"".join(rest)


def _json_documents(piece: Piece, text_field: str, skipped: Counter[str], digest: Hash | None) -> Iterator[Document]:
    name = piece.file.name
    for number, line in enumerate(_lines(_blocks(piece, digest))):
        try:
            if not line.strip():
                continue
            text = _field(line, text_field)
        except (ValueError, RecursionError) as error:
            where = f"{name}:{number + 1 + _lines_before(piece)}"
            if isinstance(error, UnicodeDecodeError):
                raise _not_utf8(where, error.start, line[error.start]) from None
            raise DataError(f"{where}: {error}") from None
        if text:
            text = valid_text(text)
            yield Document(f"{name}:{number + 1}", text, text.encode())
        else:
            skipped["empty"] += 1


def _field(line: bytes, text_field: str) -> str:
    try:
        row = json.loads(line.decode())
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at character {error.pos}") from None
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got a {type(row).__name__}")
    if text_field not in row:
        raise ValueError(f"no field {text_field!r}; set data.text_field to one of: {', '.join(row)}")
    if not isinstance(row[text_field], str):
        raise ValueError(f"field {text_field!r} holds a {type(row[text_field]).__name__}, not a text")
    return row[text_field]


def _lines_before(piece: Piece) -> int:
    return sum(block.count(b"\n") for block in _stored_blocks(Piece(piece.file, 0, piece.start)))


def _not_utf8(where: str, offset: int, byte: int) -> DataError:
    return DataError(
        f"{where}: not UTF-8: byte 0x{byte:02x} at offset {offset}; convert the file "
        "(for instance iconv -f latin1 -t utf-8) or leave it out of data.paths"
    )
