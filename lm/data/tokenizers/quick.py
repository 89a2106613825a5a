"""Byte-level BPE by `tiktoken`, several times as fast as the `tokenizers` library, where both give the same ids.

tiktoken merges, of all neighbours that together are a token, those of the lowest rank first; the library merges listed
pairs only. The two are the same when merging each token's own bytes gives that token (why: see `Llama3Tokenizer`),
which is checked. Their regular expressions are the same in all that the known patterns use, which the tests check on
every character.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_KNOWN = (GPT2_PATTERN, LLAMA3_PATTERN)
Encode = Callable[[str], np.ndarray]


def quick_encoder(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], pattern: str, to_bytes: Callable[[str], bytes]
) -> Encode | None:
    """int32 ids of a text; None where tiktoken is not installed, or could give others than the library.

    `vocab` and `merges` are in printable characters, of which `to_bytes` gives the bytes.
    """
    try:
        import tiktoken
        from tokenizers.models import BPE
    except ImportError:
        return None
    made = ["".join(merge) for merge in merges]
    if pattern not in _KNOWN or len({*made}) < len(made):
        return None
    words = [*(word for word in vocab if len(word) == 1), *made]
    alone = BPE(dict(vocab), list(merges))
    if any(len(word) > 1 and len(alone.tokenize(word)) > 1 for word in vocab) or len(words) < len(vocab):
        return None
    ids = np.array([vocab[word] for word in words], np.int32)
    ranks = {to_bytes(word): rank for rank, word in enumerate(words)}
    encoding = tiktoken.Encoding("lm", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    return lambda text: ids[encoding.encode_to_numpy(text, disallowed_special=())]


def of_json(content: str, to_bytes: Callable[[str], bytes]) -> Encode | None:
    """The same for a `tokenizer.json`; None also where it does more to a text than to split and to merge."""
    stored = json.loads(content)
    model, pattern = stored["model"], _pattern(stored.get("pre_tokenizer"))
    options = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback")
    plain = model.get("type", "BPE") == "BPE" and not any(model.get(option) for option in options)
    added = stored.get("added_tokens") or []
    if not plain or pattern is None or stored.get("normalizer") or not all(token["special"] for token in added):
        return None
    specials = {token["content"] for token in added}
    vocab = {word: i for word, i in model["vocab"].items() if word not in specials}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return quick_encoder(vocab, [(left, right) for left, right in pairs], pattern, to_bytes)


def _pattern(node: Any) -> str | None:
    """By which a pre-tokenizer splits, if it does that and nothing else but to write bytes as characters."""
    if not isinstance(node, dict):
        return None
    parts = node["pretokenizers"] if node["type"] == "Sequence" else [node]
    last = parts[-1] if parts else {}
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        return None
    splits = last.get("use_regex", True)
    if len(parts) == 1 and splits:
        return GPT2_PATTERN
    first = parts[0]
    if len(parts) != 2 or splits or first.get("type") != "Split":
        return None
    if first.get("behavior") != "Isolated" or first.get("invert"):
        return None
    return first["pattern"].get("Regex")
