"""Which batch a step takes in a run that went back: the batches that led to where it could not go on are left out."""

from __future__ import annotations

from typing import NamedTuple


class Skip(NamedTuple):
    """Before this step, so many batches are left out."""

    step: int
    batches: int


class Skips:
    """The batches left out, as a map from steps to batches and back. Without any, step k takes batch k."""

    def __init__(self, skips: tuple[Skip, ...] = ()) -> None:
        """`skips` in order of their steps."""
        self.all = tuple(Skip(*one) for one in skips)

    def batch(self, step: int) -> int:
        """The batch that the step takes; of how many have been taken or left out before it."""
        return step + sum(one.batches for one in self.all if one.step <= step)

    def step(self, batch: int) -> int | None:
        """The step that takes the batch; None: it is left out."""
        left_out = 0
        for one in self.all:
            first = one.step + left_out
            if batch < first:
                break
            if batch < first + one.batches:
                return None
            left_out += one.batches
        return batch - left_out

    def rewound(self, step: int, until: int) -> Skips:
        """These, of a run that goes back to `step` and from there on leaves out what was taken before step `until`."""
        kept = Skips(tuple(one for one in self.all if one.step < step))
        return Skips((*kept.all, Skip(step, self.batch(until) - kept.batch(step))))

    def __reduce__(self) -> tuple[type[Skips], tuple[tuple[Skip, ...]]]:
        return Skips, (self.all,)
