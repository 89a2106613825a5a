"""A shuffle of [0, size) that needs no memory: where index i goes is computed, not looked up."""

from __future__ import annotations

import hashlib

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

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Maps int64 [...] indices in [0, size) to int64 [...] values in [0, size)."""
        value = self._mix(np.asarray(index).astype(np.uint64).reshape(-1))
        outside = np.flatnonzero(value >= self.size)
        while outside.size:
            value[outside] = self._mix(value[outside])
            outside = outside[value[outside] >= self.size]
        return value.astype(np.int64).reshape(np.shape(index))

    def inverse(self, value: int) -> int:
        """The index that is mapped to `value`."""
        index = self._unmix(value)
        while index >= self.size:
            index = self._unmix(index)
        return index

    def _mix(self, value: np.ndarray) -> np.ndarray:
        low_mask, high_mask = self._masks
        low, high = value & low_mask, value >> self._low_bits
        for key in self._keys:
            # The halves trade places, widths included, so that odd bit counts work as well.
            low, high = (high ^ scramble(low ^ key)) & high_mask, low
            low_mask, high_mask = high_mask, low_mask
        return low | (high << self._low_bits)  # as before all rounds, whose number is even

    def _unmix(self, value: int) -> int:
        low_mask, high_mask = self._masks
        one = np.array([value], np.uint64)
        low, high = one & low_mask, one >> self._low_bits
        for key in reversed(self._keys):
            low_mask, high_mask = high_mask, low_mask
            low, high = high, (low ^ scramble(high ^ key)) & high_mask
        return int((low | (high << self._low_bits))[0])


def _mask(bits: int) -> np.uint64:
    return np.uint64((1 << bits) - 1)


_SHIFT, _FIRST, _SECOND = np.uint64(33), np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)


def scramble(x: np.ndarray) -> np.ndarray:
    """A bijection of the uint64 numbers in which every bit depends on all: the finaliser of MurmurHash3."""
    x = (x ^ (x >> _SHIFT)) * _FIRST
    x = (x ^ (x >> _SHIFT)) * _SECOND
    return x ^ (x >> _SHIFT)
