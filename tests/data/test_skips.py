"""Batches that are left out when a run goes back."""

import pickle
import random

from lm.data.skips import Skip, Skips


def taken(skips: Skips, steps: int) -> list[int]:
    return [skips.batch(step) for step in range(steps)]


def test_without_any_a_step_takes_its_own() -> None:
    assert taken(Skips(), 5) == [0, 1, 2, 3, 4]
    assert [Skips().step(batch) for batch in range(5)] == [0, 1, 2, 3, 4]


def test_rewound_twice() -> None:
    once = Skips().rewound(3, 5)
    assert once.all == (Skip(3, 2),)
    assert taken(once, 6) == [0, 1, 2, 5, 6, 7]
    assert [once.step(batch) for batch in range(8)] == [0, 1, 2, None, None, 3, 4, 5]
    later = once.rewound(5, 6)
    assert taken(later, 7) == [0, 1, 2, 5, 6, 8, 9]
    further = later.rewound(2, 7)  # over the others, which are left out with all that was taken since
    assert taken(further, 5) == [0, 1, 10, 11, 12]


def test_no_batch_is_taken_twice_or_lost() -> None:
    draw = random.Random(0)
    for _ in range(200):
        skips, history = Skips(), []
        at = 0
        for _ in range(6):
            until = at + draw.randrange(1, 9)
            history = history[:at] + [skips.batch(step) for step in range(at, until)]
            assert history == taken(skips, until)
            assert history == sorted(set(history))
            most = max(history)
            at = draw.randrange(until + 1)
            if at < until:
                skips = skips.rewound(at, until)
                assert skips.batch(at) == most + 1  # nothing of what was taken comes again
        for batch in range(most + 20):
            step = skips.step(batch)
            assert (batch if step is None else skips.batch(step)) == batch
            assert (step is None) == (batch not in taken(skips, most + 20))
        assert pickle.loads(pickle.dumps(skips)).all == skips.all
