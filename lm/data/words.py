"""Words and runs of words as 64-bit numbers: the same for the same text, on every machine.

A word is a longest run of letters, marks and digits, in lower case; of scripts that are written without spaces, each
character is one. All else only separates words. This is how texts are compared in GPT-3 (arXiv:2005.14165,
appendix C) and PaLM (arXiv:2204.02311, section 8): case and punctuation do not count.
"""

from __future__ import annotations

import functools
import unicodedata

import numpy as np

_BLOCK = 1 << 18  # characters that are looked at together: some 50 bytes of memory for each
_LONGEST = 1 << 12  # that all characters of a word count with their place, up to here
_SEPARATE, _LETTER, _WORD = 0, 1, 2

# Thai to Lao, Burmese, Khmer, kana, and the ideographs.
_SPACELESS = (
    (0x0E00, 0x0F00),
    (0x1000, 0x10A0),
    (0x1780, 0x1800),
    (0x3040, 0x3100),
    (0x3400, 0x4DC0),
    (0x4E00, 0xA000),
    (0xF900, 0xFB00),
    (0x20000, 0x40000),
)


def word_hashes(text: str) -> np.ndarray:
    """The uint64 [n] numbers of the words of the text, in its order."""
    found = []
    start = 0
    while start < len(text):
        stop = min(len(text), start + _BLOCK)
        if stop < len(text):
            stop = max(text.rfind(" ", start, stop), text.rfind("\n", start, stop)) + 1 or stop
        found.append(_hashes(text[start:stop]))
        start = stop
    return np.concatenate(found) if found else np.zeros(0, np.uint64)


def runs(words: np.ndarray, length: int) -> np.ndarray:
    """The uint64 [n - length + 1] numbers of all runs of `length` of the uint64 [n] words; none if they are fewer."""
    count = max(0, len(words) - length + 1)
    total = np.zeros(count, np.uint64)
    for i, power in enumerate(_powers(0x9E3779B97F4A7C15, length)):
        total += words[i : i + count] * power
    return mix(total)


def mix(numbers: np.ndarray) -> np.ndarray:
    """Spreads what differs in any bit of uint64 numbers over all of them: the last steps of splitmix64."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _hashes(text: str) -> np.ndarray:
    kinds, numbers, powers = _tables()
    codes = np.frombuffer(text.lower().encode("utf-32-le", "surrogatepass"), "<u4")
    kind = kinds[codes]
    within = kind != _SEPARATE
    begins = kind == _WORD
    begins[1:] |= kind[1:] != kind[:-1]  # to the left of a letter is none
    begins[:1] = True
    starts = np.flatnonzero(begins[within])
    if not len(starts):
        return np.zeros(0, np.uint64)
    codes = codes[within]
    places = np.arange(len(codes)) - np.repeat(starts, np.diff(starts, append=len(codes)))
    return mix(np.add.reduceat(numbers[codes] * powers[places & (_LONGEST - 1)], starts))


def _powers(base: int, count: int) -> np.ndarray:
    return np.array([pow(base, i, 1 << 64) for i in range(count)], np.uint64)


@functools.cache
def _tables() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each code point what it is and a number; of each place in a word a factor."""
    letters = (unicodedata.category(chr(code))[0] in "LMN" for code in range(0x110000))
    kinds = np.fromiter((_LETTER if letter else _SEPARATE for letter in letters), np.uint8, 0x110000)
    for first, stop in _SPACELESS:
        kinds[first:stop] *= _WORD
    return kinds, mix(np.arange(1, 0x110001, dtype=np.uint64)), _powers(0xD6E8FEB86659FD93, _LONGEST)
