"""Steps that were not applied: what is known of them, for the person who has to judge."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lm.data.batches import Batches
from lm.errors import some

_GROUPS = 3
_DOCUMENTS = 8


@dataclasses.dataclass(frozen=True)
class Seen:
    """What was read of a step."""

    step: int
    values: Mapping[str, float]
    group_norms: np.ndarray
    """Of the gradients, float32 [groups]."""


class BadSteps:
    """Those in a row that came last, and the last step that was applied before them.

    `groups` are the names of the groups of parameters whose gradient norms come with each step.
    """

    def __init__(self, groups: Sequence[str]):
        self._groups = tuple(groups)
        self._applied: Seen | None = None
        self._first: Seen | None = None
        self._last: Seen | None = None
        self._finite = 0

    def see(self, seen: Seen, *, applied: bool, finite: bool) -> None:
        """The next step."""
        if applied:
            self._applied, self._first, self._last, self._finite = seen, None, None, 0
            return
        self._first, self._last = self._first or seen, seen
        self._finite += finite

    @property
    def first(self) -> int | None:
        return self._first.step if self._first else None

    def report(self) -> Iterator[str]:
        """Which steps, by what, and which group of parameters went first."""
        first, last, before = self._first, self._last, self._applied
        if first is None or last is None:
            return
        count = last.step - first.step + 1
        how = [f"{count - self._finite} not finite"] * (count > self._finite) + [f"{self._finite} a spike"] * (
            self._finite > 0
        )
        yield f"steps {first.step} to {last.step} were not applied: {', '.join(how)}"
        yield "; ".join(
            f"{name.replace('_', ' ')} {_number(first.values[name])} at step {first.step}"
            + (f", {_number(before.values[name])} at step {before.step}" if before else "")
            for name in ("loss", "grad_norm")
        )
        groups = [
            f"{self._groups[i]} ({_number(first.group_norms[i])}"
            + (f", before {_number(before.group_norms[i])})" if before else ")")
            for i in self._worst()[:_GROUPS]
        ]
        yield f"parameters whose gradients were furthest off, norm: {'; '.join(groups)}"

    def documents(self, batches: Batches) -> Iterator[str]:
        """The documents that the first of them read; reads the data for that."""
        if self._first is None:
            return
        names: dict[str, list[int]] = {}
        for source, _, spans in batches.rows(self._first.step):
            stream, title = batches.streams[source], batches.corpus.sources[source].title
            found = names.setdefault(title, [])
            found += [stream.document(start) for start, _ in spans]
        for title, found in names.items():
            yield f"read in step {self._first.step}, of {title}: documents {some(dict.fromkeys(found), _DOCUMENTS)}"

    def _worst(self) -> list[int]:
        """Groups by how far their gradients were off: those that are not finite, then those that grew most."""
        assert self._first is not None
        norms = np.asarray(self._first.group_norms, np.float64)
        before = np.asarray(self._applied.group_norms, np.float64) if self._applied else np.ones_like(norms)
        growth = np.where(np.isfinite(norms), norms / np.maximum(before, 1e-30), math.inf)
        return [int(i) for i in np.argsort(-growth, kind="stable")]


def _number(value: float) -> str:
    return f"{value:.4g}"
