"""What holds for every kind of tokenizer: any text comes back, and a stored one is the same."""

import random
from pathlib import Path

import numpy as np
import pytest

from lm.data.tokenizers import BytesTokenizer, Tokenizer, chunks, load_tokenizer

TEXT = "def function(argument, other):\n    if argument > 7:\n        return other[7]\n\n"

NASTY = [
    "",
    " ",
    "  leading and trailing  ",
    "\n\n\n",
    "\ttabs\t\tand\r\nreturns\r",
    "runs      of        spaces\n        indented",
    "\u2581 is what \u2581\u2581 sentencepiece writes for a space\u2581",
    "\u2585 unknown \u2585",
    "NUL \0 inside \0\0",
    "<s></s><unk><0x0A><|endoftext|>",
    "\ufeffbyte order mark",
    "emoji 😀👩‍👩‍👧‍👦🇩🇪 and combining é ñ",
    "ﬁ ligature, ① circled, Ⅳ roman, ½, fullwidth ＡＢＣ",
    "日本語 中文 한국어 العربية עברית हिन्दी ไทย Ελληνικά",
    "\x01\x1f\x7f\x80\x85\u2028\u2029\u200b\u200e\uffff\U0010ffff",
    "a" * 5000 + " " * 5000 + "é" * 5000,
    "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0)])),
    "e\u0301 \u00e9 o\u0308\u0304 Z\u0351\u036b\u0343 \u1ea1\u0302 \u0301begins",
    "Καλημέρα κόσμε; ὦ ἄνδρες Ἀθηναῖοι, ΣΊΣΥΦΟΣ σίσυφος",
    "Съешь ещё этих мягких французских булок, Ђорђе Ґава",
    "السَّلَامُ عَلَيْكُم ـــ لا ﷽ \u0661\u0662\u0663",
    "שָׁלוֹם עוֹלָם \u200fa\u200e \u202bembedded\u202c \u2067isolated\u2069",
    "नमस्ते दुनिया क्षत्रिय श्री र्\u200dय क्\u200cष",
    "สวัสดีชาวโลก น้ำ เก้าอี้",
    "世界，你好！𠀀𪚥 龘 \u3400 \u2ff0",
    "こんにちは　世界 カタカナ ﾊﾝｶｸ が か\u3099",
    "안녕하세요 \u1112\u1161\u11ab\u1100\u1173\u11af ㅋㅋㅋ",
    "வணக்கம் உலகம் க்ஷௌ",
    "🏳️‍🌈 👩🏽‍🚀 👨‍👩‍👧‍👦 ☺︎☺️ 5️⃣ 🏴\U000e0067\U000e0062\U000e007f 👋🏿",
    "\ue000\uf8ff\U000f0000\U00100000 private, unassigned \u0378\U0003ffff, nonchars \ufdd0\ufffe\U0001fffe",
    "\ufffd \ufffc \ufff9a\ufffab\ufffb \u00ad \u034f \u2060 \ufe00 \U000e0100",
    "\r\n\r\n \r \n\r\t\v\f\u00a0\u2003\u3000 x \r\n",
    "ſ İ ı ß ẞ ǆ K Å Ω ŉ",
    "I'm, I'M, we'Ll, it'ſ 1234567 ½²³ Ⅻ ٣٤",
    "<0xE2><0x96><0x81> <pad> [CLS] <|begin_of_text|><|reserved_special_token_0|>",
    "x" * 30_000,
    "\u2581" * 300 + " " * 300 + "\0" * 300,
]


def random_texts(seed: int, count: int) -> list[str]:
    draw = random.Random(seed)
    alphabets = ["ab \n", " \t\n\u2581", "".join(map(chr, range(0x250))), "日本😀\0\u2585x "]
    wide = "".join(chr(draw.choice([draw.randrange(0xD800), draw.randrange(0xE000, 0x110000)])) for _ in range(64))
    return ["".join(draw.choices(draw.choice([*alphabets, wide]), k=draw.randrange(200))) for _ in range(count)]


@pytest.mark.parametrize("text", NASTY, ids=range(len(NASTY)))
def test_round_trip_of_nasty_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids.tolist())


def test_round_trip_of_random_text(tokenizer: Tokenizer) -> None:
    texts = random_texts(seed=1, count=300)
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
        assert ids.tolist() == tokenizer.encode(text).tolist()


def test_lone_surrogates_become_replacement_characters(tokenizer: Tokenizer) -> None:
    for text, expected in (
        ("a\ud800b\udfff", "a\ufffdb\ufffd"),
        ("\ud83d\ude00", "😀"),
        ("\ude00\ud83d", "\ufffd\ufffd"),
        ("\ud83d\ud83d\ude00 \udc80", "\ufffd😀 \ufffd"),
    ):
        assert tokenizer.decode(tokenizer.encode(text)) == expected


def test_stream_yields_whole_characters_only(tokenizer: Tokenizer) -> None:
    text = "né 😀 日本"
    parts = list(tokenizer.decode_stream(tokenizer.encode(text)))
    assert "".join(parts) == text
    assert "\ufffd" not in "".join(parts)
    emoji = BytesTokenizer().encode("😀")
    assert list(BytesTokenizer().decode_stream(emoji)) == ["", "", "", "😀", ""]
    assert list(BytesTokenizer().decode_stream(emoji[:2])) == ["", "", "\ufffd"]


def test_ids_that_are_no_text_decode_without_error(tokenizer: Tokenizer) -> None:
    everything = list(range(tokenizer.vocab_size))
    random.Random(0).shuffle(everything)
    tokenizer.decode(everything).encode()
    assert tokenizer.decode([tokenizer.bos_id, tokenizer.eos_id]) == ""
    assert tokenizer.token_bytes[[tokenizer.bos_id, tokenizer.eos_id]].tolist() == [0, 0]
    assert all(tokenizer.piece(i) for i in everything)


def test_text_that_spells_a_special_token_stays_text(tokenizer: Tokenizer) -> None:
    for special in {tokenizer.bos_id, tokenizer.eos_id}:
        text = f"a{tokenizer.piece(special)}b"
        ids = tokenizer.encode(text)
        assert special not in ids
        assert tokenizer.decode(ids) == text


def test_serialised_and_loaded_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / tokenizer.file_name
    path.write_bytes(tokenizer.serialize())
    for source in (tokenizer.serialize(), path):
        again = load_tokenizer(tokenizer.kind, source)
        assert again.fingerprint == tokenizer.fingerprint
        assert again.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()
        assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)


def test_chunks_prefer_newlines_and_lose_nothing() -> None:
    assert list(chunks("ab\ncd\nefghij", 5)) == ["ab\n", "cd\n", "efghi", "j"]
    for text in random_texts(seed=2, count=50):
        assert "".join(chunks(text, 7)) == text
