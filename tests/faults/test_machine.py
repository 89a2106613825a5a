"""A machine whose clock jumps, whose memory ends, and whose owner is in a hurry."""

import signal
from pathlib import Path

import pytest

from lm.checkpoint.checkpoints import list_checkpoints

from ..end_to_end.conftest import Lm, Logged
from .conftest import Run

# As `python -m lm`, but the clock is an hour early or late, by turns.
CLOCK = """
import itertools, sys, time
from lm.cli import main

now, off = time.time, itertools.cycle([0.0, 3600.0, -3600.0])
time.time = lambda: now() + next(off)
sys.exit(main())
"""

# As `python -m lm`, but from step 7 on there is no more memory, and much is wanted. No save is under way then: Orbax
# would wait for ever for what had no memory to answer, and training up to checkpoint.give_up_seconds for Orbax.
MEMORY = """
import resource, sys, time
from lm.checkpoint.checkpoints import list_checkpoints
from lm.cli import main
from lm.train.progress import Progress

update = Progress.update

def update_and_fill(self, step, values):
    update(self, step, values)
    if step == 7:
        folder = sys.argv[-1].removeprefix("--run.dir=") + "/checkpoints"
        while not any(info.step == 6 and info.problem is None for info in list_checkpoints(folder)):
            time.sleep(0.1)
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + 2**26, size + 2**26))
        self.hog = [bytearray(2**20) for _ in range(10**6)]

Progress.update = update_and_fill
sys.exit(main())
"""

# As `python -m lm`, but two signals come while step 8 is under way.
HURRY = """
import os, signal, sys
from lm.cli import main
from lm.train.progress import Progress

update = Progress.update

def update_and_interrupt(self, step, values):
    update(self, step, values)
    if step == 7:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

Progress.update = update_and_interrupt
sys.exit(main())
"""


def digest(run: Path) -> str:
    return {info.step: info.digest for info in list_checkpoints(run / "checkpoints")}[12]


def test_a_clock_that_jumps(workplace: Path, undisturbed: Path, logged: Logged) -> None:
    Run(workplace, workplace / "jumps", program=("-c", CLOCK)).wait(code=0)
    assert digest(workplace / "jumps") == digest(undisturbed)
    assert logged(workplace / "jumps") == logged(undisturbed)


@pytest.mark.parametrize(("name", "program", "code"), [("memory", MEMORY, 1), ("hurry", HURRY, -signal.SIGINT)])
def test_ends_at_once_and_goes_on(
    name: str, program: str, code: int, lm: Lm, workplace: Path, undisturbed: Path, logged: Logged
) -> None:
    run = workplace / name
    said = Run(workplace, run, program=("-c", program)).wait(code)
    assert ("MemoryError" in said) == (name == "memory")
    assert 3 <= max(info.step for info in list_checkpoints(run / "checkpoints")) <= 6
    lm("train", run)
    assert digest(run) == digest(undisturbed)
    assert logged(run) == logged(undisturbed)
