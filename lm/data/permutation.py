"""A shuffle of [0, size) that needs no memory: where index i goes is computed, not looked up."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

_ROUNDS = 8


class Permutation:
    """A pseudo-random bijection of [0, size), the same on every platform for the same `key`.

    An alternating Feistel network on just enough bits, with cycle walking: a value that lands outside
    [0, size) is mapped again until it is inside, at most twice on average (Black and Rogaway, "Ciphers
    with Arbitrary Finite Domains", CT-RSA 2002). The round function is `scramble`.
    """

    def __init__(self, size: int, key: str) -> None:
        """Raises ValueError unless 1 <= size <= 2**62."""
        if not 1 <= size <= 1 << 62:
            raise ValueError(f"a permutation needs a size between 1 and 2**62, got {size}")
        self.size = size
        bits = max(2, (size - 1).bit_length())
        self._low_bits = np.uint64(bits // 2)
        self._masks = _mask(bits // 2), _mask(bits - bits // 2)
        keys = hashlib.sha512(key.encode()).digest()
        self._keys = np.frombuffer(keys, "<u8", count=_ROUNDS).astype(np.uint64)
        self._parts = np.array([size, self._low_bits, *self._masks, *self._keys], np.uint64)

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Maps int64 [...] indices in [0, size) to int64 [...] values in [0, size)."""
        return permute([self], np.zeros(np.size(index), np.int64), np.reshape(index, -1)).reshape(np.shape(index))

    def inverse(self, value: int) -> int:
        """The index that is mapped to `value`."""
        index = self._unmix(value)
        while index >= self.size:
            index = self._unmix(index)
        return index

    def _unmix(self, value: int) -> int:
        low_mask, high_mask = self._masks
        one = np.array([value], np.uint64)
        low, high = one & low_mask, one >> self._low_bits
        for key in reversed(self._keys):
            low_mask, high_mask = high_mask, low_mask
            low, high = high, (low ^ scramble(high ^ key)) & high_mask
        return int((low | (high << self._low_bits))[0])


def permute(permutations: Sequence[Permutation], which: np.ndarray, index: np.ndarray) -> np.ndarray:
    """Maps each of int64 [n] indices by the permutation number `which`, int64 [n]: as numpy is slow on few, all at
    once, each with the sizes and keys of its own."""
    parts = np.array([one._parts for one in permutations], np.uint64).reshape(-1, 4 + _ROUNDS).T[:, which]
    size, value = parts[0], _mix(index.astype(np.uint64), parts)
    outside = np.flatnonzero(value >= size)
    while outside.size:
        value[outside] = _mix(value[outside], parts[:, outside])
        outside = outside[value[outside] >= size[outside]]
    return value.astype(np.int64)


def _mix(value: np.ndarray, parts: np.ndarray) -> np.ndarray:
    _, low_bits, low_mask, high_mask, *keys = parts
    low, high = value & low_mask, value >> low_bits
    for key in keys:
        # The halves trade places, widths included, so that odd bit counts work as well.
        low, high = (high ^ scramble(low ^ key)) & high_mask, low
        low_mask, high_mask = high_mask, low_mask
    return low | (high << low_bits)  # as before all rounds, whose number is even


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


_SHIFT, _FIRST, _SECOND = np.uint64(33), np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)


def scramble(x: np.ndarray) -> np.ndarray:
    """A bijection of the uint64 numbers in which every bit depends on all: the finaliser of MurmurHash3."""
    x = (x ^ (x >> _SHIFT)) * _FIRST
    x = (x ^ (x >> _SHIFT)) * _SECOND
    return x ^ (x >> _SHIFT)
