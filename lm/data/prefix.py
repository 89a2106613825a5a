"""Prefix language modelling: some segments begin with a prefix, whose tokens see each other in both directions and are
not trained on.

The length of a prefix is drawn evenly from 1 to one less than that of its segment (Raffel et al. 2020; the S-denoiser
of UL2, Tay et al. 2022). What is drawn for a segment depends on the seed, the number of its row in the run and its
first column alone.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np

from lm.data.permutation import scramble


class Prefixes(NamedTuple):
    rate: float
    """The share of segments that have one."""
    seed: int

    def __call__(self, segments: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """bool [B, S]: whether each token is in a prefix, and whether the one that follows is in it as well.

        From int32 [B, S] segments, 0 for padding, and int64 [B] numbers of rows in the run.
        """
        begins = np.ones(segments.shape, bool)
        begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
        row, column = np.nonzero(begins)
        size = np.diff(np.flatnonzero(begins), append=segments.size)
        key = np.frombuffer(hashlib.sha256(f"{self.seed}/prefix".encode()).digest(), "<u8", count=2).astype(np.uint64)
        of_row = scramble(rows.astype(np.uint64) ^ key[0])[row]
        first = scramble(of_row + column.astype(np.uint64))
        has_one, part = _uniform(first), _uniform(scramble(first ^ key[1]))
        length = 1 + (part * np.maximum(size - 1, 1)).astype(np.int32)
        length *= (has_one < self.rate) & (segments[row, column] > 0)

        def beginning(length: np.ndarray) -> np.ndarray:
            stretches = np.stack([length, size - length], axis=1).reshape(-1)
            return np.repeat(np.tile([True, False], len(size)), stretches).reshape(segments.shape)

        return beginning(length), beginning(np.maximum(length - 1, 0))


def _uniform(bits: np.ndarray) -> np.ndarray:
    """float64 [n] in [0, 1)."""
    return (bits >> np.uint64(11)) * 2.0**-53
