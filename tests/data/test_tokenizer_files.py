"""Files that are no tokenizer: one error that names the file and says what is wrong with it."""

import base64
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers as hf

from lm.data.tokenizers import FILE_NAMES, HuggingFaceTokenizer, SentencePieceTokenizer, load_tokenizer
from lm.errors import DataError

KINDS = [kind for kind in FILE_NAMES if kind != "bytes"]


@pytest.fixture
def good(
    bpe: SentencePieceTokenizer, byte_level: HuggingFaceTokenizer, gpt2_folder: Path, llama3_file: Path
) -> dict[str, bytes]:
    """The content of a file of each kind."""
    gpt2 = load_tokenizer("gpt2", gpt2_folder)
    return {t.kind: t.serialize() for t in (bpe, byte_level, gpt2, load_tokenizer("llama3", llama3_file))}


@pytest.mark.parametrize("kind", KINDS)
def test_missing_empty_broken_and_cut_off(kind: str, good: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "the.file"
    with pytest.raises(DataError, match=r"the\.file: cannot read the tokenizer: No such file"):
        load_tokenizer(kind, path)
    for content, problem in {
        b"": "empty",
        b"\0\xff\xfe\x80" * 9: "",
        b"not a tokenizer": "",
        b"{}": "",
        b"[1, 2]": "",
        b'{"vocab": 3, "merges": 4}': "",
        b"[" * 100_000: "",
        good[kind][: len(good[kind]) // 2 + 1]: "",
    }.items():
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"the\.file: .*{problem}") as error:
            load_tokenizer(kind, path)
        assert len(str(error.value)) < 500


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_a_file_of_another_kind_says_which(kind: str, other: str, good: dict[str, bytes], tmp_path: Path) -> None:
    path = tmp_path / "the.file"
    path.write_bytes(good[other])
    if kind == other:
        assert load_tokenizer(kind, path).serialize() == good[kind]
        return
    with pytest.raises(DataError, match=rf"the\.file: .*it looks like data\.tokenizer\.kind '{other}'"):
        load_tokenizer(kind, path)


def test_folders(gpt2_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has neither vocab\.json and merges\.txt nor encoder\.json and vocab\.bpe"):
        load_tokenizer("gpt2", tmp_path)
    with pytest.raises(DataError, match="cannot read the tokenizer: Is a directory"):
        load_tokenizer("huggingface", gpt2_folder)
    shutil.copytree(gpt2_folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "merges.txt").write_bytes(b"\xff\xff")
    with pytest.raises(DataError, match=r"merges\.txt: not a list of merges"):
        load_tokenizer("gpt2", tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(DataError, match=r"vocab\.json: not JSON|merges\.txt: not a list"):
        load_tokenizer("gpt2", tmp_path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda vocab, merges: vocab.pop("<|endoftext|>"), r"<\|endoftext\|>.* is not in the vocabulary"),
        (lambda vocab, merges: vocab.update({"a": 399}), r"ids of its 387 tokens must be 0 to 386, each once"),
        (lambda vocab, merges: vocab.update({"a": "1"}), "a whole number for each token"),
        (lambda vocab, merges: vocab.update({"日": len(vocab)}), "'日'.*writes for no byte"),
        (lambda vocab, merges: vocab.update({"AAAA": vocab.pop("A")}), "no token for the byte 0x41"),
        (lambda vocab, merges: merges.insert(2, "r e t"), "merge 3 must be two tokens"),
        (lambda vocab, merges: merges.insert(4, "Q Q"), "merge 5, 'Q' 'Q', needs the token 'QQ'"),
        (lambda vocab, merges: merges.insert(0, 7), "not a GPT-2 tokenizer"),
    ],
)
def test_gpt2_files_that_do_not_fit_together(
    change: Callable[[dict[str, Any], list[Any]], object], problem: str, good: dict[str, bytes]
) -> None:
    content = json.loads(good["gpt2"])
    change(content["vocab"], content["merges"])
    with pytest.raises(DataError, match=problem):
        load_tokenizer("gpt2", json.dumps(content).encode())


def test_ranks_with_mistakes(good: dict[str, bytes]) -> None:
    lines = good["llama3"].splitlines()
    for changed, problem in {
        b"\n".join([*lines[:3], b"?? 3", *lines[4:]]): "line 4 is not a token in base64 and its rank",
        b"\n".join([*lines[:3], lines[3] + b" 1", *lines[4:]]): "line 4 is not",
        b"\n".join([*lines, lines[5]]): "",  # the same line twice says the same
        b"\n".join([*lines, base64.b64encode(b"QQQ") + b" 5"]): "each once",
        b"\n".join(line for line in lines if not line.startswith(base64.b64encode(b"A"))): "each once",
    }.items():
        if problem:
            with pytest.raises(DataError, match=problem):
                load_tokenizer("llama3", changed)
        else:
            load_tokenizer("llama3", changed)


def test_hugging_face_files_that_cannot_be_used(good: dict[str, bytes]) -> None:
    words = hf.Tokenizer(hf.models.WordLevel({"a": 0, "<s>": 1}, "a"))
    with pytest.raises(DataError, match="only byte-level"):
        load_tokenizer("huggingface", words.to_str().encode())
    content = json.loads(good["huggingface"])
    content["model"]["vocab"]["日"] = 500
    with pytest.raises(DataError, match=r"'日'.*writes for no byte"):
        load_tokenizer("huggingface", json.dumps(content).encode())
    nothing = json.loads(good["huggingface"]) | {"added_tokens": []}
    nothing["model"] |= {"vocab": {}, "merges": []}
    with pytest.raises(DataError, match="is in its vocabulary"):
        load_tokenizer("huggingface", json.dumps(nothing).encode())


def test_what_a_file_cuts_or_fills_up_is_neither(library_model: hf.Tokenizer) -> None:
    """Many published files say how long a text may be for their model, and how long it is made."""
    model = hf.Tokenizer.from_str(library_model.to_str())
    model.enable_truncation(16)
    model.enable_padding(length=20)
    texts = ["a", "def function " * 50]
    expected = [HuggingFaceTokenizer(library_model.to_str().encode()).encode(text).tolist() for text in texts]
    tokenizer = HuggingFaceTokenizer(model.to_str().encode())
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts)] == expected


def test_unknown_kind() -> None:
    with pytest.raises(DataError, match="unknown kind of tokenizer 'morse'; known: bytes, sentencepiece"):
        load_tokenizer("morse", b"")


@pytest.mark.parametrize("kind", ["huggingface", "gpt2", "llama3"])
def test_missing_library(kind: str, good: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=rf"kind '{kind}' needs .*pip install 'lm\[huggingface\]'"):
        load_tokenizer(kind, good[kind])
