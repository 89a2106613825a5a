"""What is told of steps that were not applied."""

import math

import numpy as np

from lm.train.bad_steps import BadSteps, Seen


def seen(step: int, loss: float, *norms: float) -> Seen:
    return Seen(step, {"loss": loss, "grad_norm": math.hypot(*norms)}, np.array(norms, np.float32))


def test_the_group_that_went_first_is_named_first() -> None:
    found = BadSteps(("embed", "query", "output"))
    assert list(found.report()) == []
    found.see(seen(4, 2.5, 1.0, 2.0, 0.5), applied=True, finite=True)
    found.see(seen(5, 2.5, 1.0, math.inf, 5.0), applied=False, finite=False)
    found.see(seen(6, 2.5, math.nan, math.inf, 5.0), applied=False, finite=False)
    assert found.first == 5
    assert list(found.report()) == [
        "steps 5 to 6 were not applied: 2 not finite",
        "loss 2.5 at step 5, 2.5 at step 4; grad norm inf at step 5, 2.291 at step 4",
        "parameters whose gradients were furthest off, norm: query (inf, before 2); output (5, before 0.5); "
        "embed (1, before 1)",
    ]


def test_a_spike_from_the_start_and_steps_that_are_applied_again() -> None:
    found = BadSteps(("embed", "query"))
    found.see(seen(0, 1e6, 7.0, 30.0), applied=False, finite=True)
    assert list(found.report()) == [
        "steps 0 to 0 were not applied: 1 a spike",
        "loss 1e+06 at step 0; grad norm 30.81 at step 0",
        "parameters whose gradients were furthest off, norm: query (30); embed (7)",
    ]
    found.see(seen(1, 2.0, 1.0, 1.0), applied=True, finite=True)
    assert found.first is None
    assert list(found.report()) == []
