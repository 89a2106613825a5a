from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from lm.data import manifest, reading, stream
from lm.data.stream import TokenStream
from lm.errors import DataError

Write = Callable[..., Path]


def random_shards(seed: int, shards: int, documents: int, longest: int) -> list[list[np.ndarray]]:
    draw = np.random.default_rng(seed)
    return [
        [draw.integers(0, 258, draw.integers(1, longest + 1)) for _ in range(draw.integers(1, documents + 1))]
        for _ in range(shards)
    ]


@pytest.mark.usefixtures("small_records")
@pytest.mark.parametrize("longest", [1, 3, 16, 17, 100])
def test_every_stretch_is_read_as_written(write_data: Write, longest: int) -> None:
    for seed in range(5):
        shards = random_shards(seed, shards=4, documents=8, longest=longest)
        documents = [document for shard in shards for document in shard]
        tokens = np.concatenate(documents)
        begins = np.concatenate([np.arange(len(document)) == 0 for document in documents])
        owner = np.repeat(np.arange(len(documents)), [len(document) for document in documents])
        opened = TokenStream(write_data(shards, name=str(seed)), "train")
        assert opened.tokens == len(tokens)
        for start in range(len(tokens)):
            assert opened.document(start) == owner[start]
        for start in range(0, len(tokens), 3):
            for count in {0, 1, 15, 16, 17, 40, len(tokens) - start}:
                if start + count <= len(tokens):
                    found, found_begins = opened.read(start, count)
                    assert found.tolist() == tokens[start : start + count].tolist()
                    assert found_begins.tolist() == begins[start : start + count].tolist()
        opened.verify()


def test_full_size_records(write_data: Write) -> None:
    draw = np.random.default_rng(0)
    documents = [draw.integers(0, 258, n) for n in (8191, 1, 8192, 1, 1, 30_000, 2, 8190)]
    tokens = np.concatenate(documents)
    opened = TokenStream(write_data([documents]), "train")
    found, begins = opened.read(0, len(tokens))
    assert (found == tokens).all()
    assert np.flatnonzero(begins).tolist() == [0, *np.cumsum([len(d) for d in documents])[:-1].tolist()]
    with pytest.raises(IndexError):
        opened.read(len(tokens) - 1, 2)


@pytest.mark.usefixtures("small_records")
def test_few_files_and_records_are_kept(write_data: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_OPEN_SHARDS", 2)
    monkeypatch.setattr(stream, "_RECORDS_KEPT", 2)
    shards = random_shards(0, shards=6, documents=5, longest=40)
    opened = TokenStream(write_data(shards), "train")
    tokens = np.concatenate([document for shard in shards for document in shard])
    for start in np.random.default_rng(0).integers(0, len(tokens) - 5, 200).tolist():
        assert opened.read(start, 5)[0].tolist() == tokens[start : start + 5].tolist()


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("train-*.array_record"))


def test_missing_and_truncated_shards_are_seen_at_once(write_data: Write) -> None:
    folder = write_data(random_shards(0, shards=3, documents=3, longest=50))
    middle = shards_of(folder)[1]
    content = middle.read_bytes()
    middle.write_bytes(content[:-100])
    with pytest.raises(DataError, match=r"train-00001\.array_record: .* bytes instead of"):
        TokenStream(folder, "train").check_files()
    middle.unlink()
    with pytest.raises(DataError, match=r"train-00001\.array_record: shard cannot be read"):
        TokenStream(folder, "train").check_files()


def test_changed_bytes_are_errors(write_data: Write) -> None:
    folder = write_data([[np.full(100_000, 5)]])
    (shard,) = shards_of(folder)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    opened = TokenStream(folder, "train")
    with pytest.raises(DataError, match=r"train-00000\.array_record: record \d+ cannot be read"):
        opened.read(0, 100_000)
    with pytest.raises(DataError, match=r"train-00000\.array_record"):
        opened.verify()


def test_a_consistent_shard_of_other_content_is_found_by_verify(write_data: Write) -> None:
    folder = write_data([[np.full(1000, 5)]])
    other = write_data([[np.full(1000, 6)]], name="other")
    shards_of(folder)[0].write_bytes(shards_of(other)[0].read_bytes())
    opened = TokenStream(folder, "train")
    with pytest.raises(DataError, match="changed since it was built"):
        opened.verify()


def lengths_of(shard: Path) -> Path:
    return shard.with_suffix(".lengths")


@pytest.mark.usefixtures("small_records")
def test_lengths_are_known_without_their_file(write_data: Write) -> None:
    folder = write_data(random_shards(0, shards=3, documents=8, longest=40))
    whole = TokenStream(folder, "train")
    wanted = whole.document_starts(0, whole.tokens).tolist()
    for shard in shards_of(folder):
        lengths_of(shard).unlink()
    opened = TokenStream(folder, "train")
    assert opened.document_starts(0, opened.tokens).tolist() == wanted
    opened.verify()


@pytest.mark.parametrize("change", ["cut", "longer", "other", "empty"])
def test_damaged_lengths_are_named(write_data: Write, change: str) -> None:
    folder = write_data([[np.arange(7), np.arange(5)]])
    path = lengths_of(shards_of(folder)[0])
    content = path.read_bytes()
    changed = {"cut": content[:-1], "longer": content + b"\0", "other": content[:4] * 2, "empty": b""}
    path.write_bytes(changed[change])
    with pytest.raises(DataError, match=r"train-00000\.lengths: damaged or of another build; delete it"):
        TokenStream(folder, "train").document(0)


def test_lengths_of_other_documents_are_found_by_verify(write_data: Write) -> None:
    folder = write_data([[np.arange(7), np.arange(5)]])
    path = lengths_of(shards_of(folder)[0])
    path.write_bytes(path.read_bytes()[::-1][3:] + b"\0" * 3)  # 5 and 7
    with pytest.raises(DataError, match=r"train-00000\.lengths: not the lengths of the documents in .*array_record"):
        TokenStream(folder, "train").verify()


def test_a_shard_that_vanishes_is_named(write_data: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "WAITS", (0.01, 0.02))
    folder = write_data(random_shards(0, shards=2, documents=3, longest=50))
    opened = TokenStream(folder, "train")
    shards_of(folder)[1].unlink()
    with pytest.raises(DataError, match=r"train-00001\.array_record cannot be read: there is no such file"):
        opened.read(0, opened.tokens)


def test_bad_directories(write_data: Write, tmp_path: Path) -> None:
    folder = write_data([[np.arange(10)]])
    with pytest.raises(DataError, match="unknown split 'valid'"):
        TokenStream(folder, "valid")
    with pytest.raises(DataError, match="the heldout split is empty"):
        TokenStream(folder, "heldout")
    with pytest.raises(DataError, match="no built data here"):
        TokenStream(tmp_path / "nowhere", "train")
    path = folder / manifest.FILE
    good = path.read_text()
    for bad, message in [
        (good[:100], "unreadable"),
        ("[]", "unreadable"),
        (good.replace('"format": 1', '"format": 99'), "format 99"),
        (good.replace('"tokens": 10', '"tokens": 11'), "changed since"),
    ]:
        path.write_text(bad)
        with pytest.raises(DataError, match=message):
            TokenStream(folder, "train")
