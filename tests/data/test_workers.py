import os
import time

import pytest

from lm.data import workers
from lm.errors import DataError


def test_a_process_that_is_killed_is_said_to_be() -> None:
    with pytest.raises(DataError, match="one of its processes was killed"):
        list(workers.run(os._exit, [1, 1], 2))


def test_jobs_are_yielded_as_they_are_done() -> None:
    assert list(workers.run(time.sleep, [3.0, 0.0], 2)) == [0.0, 3.0]
    assert list(workers.run(time.sleep, [0.1, 0.0], 1)) == [0.1, 0.0]


def test_what_a_job_raises_is_raised() -> None:
    with pytest.raises(TypeError):
        list(workers.run(time.sleep, ["", ""], 2))  # type: ignore[list-item]
