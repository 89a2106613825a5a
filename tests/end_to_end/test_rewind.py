"""Runs in which steps cannot be applied: they go back, leave out what led there, and go on; or end with a report."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lm.checkpoint.checkpoints import list_checkpoints, read_attachment

from .conftest import Lm, Logged

# As `python -m lm`, but the batches of these numbers have a loss that is not finite.
POISONED = """
import os, sys
import numpy as np
from lm.cli import main
from lm.data.batches import Batches
from lm.data.skips import Skips

poisoned, batch = eval(os.environ["POISONED"]), Batches.batch

def batch_and_poison(self, step, *rows):
    found = batch(self, step, *rows)
    if self.skips.batch(step) in poisoned:
        found["loss_mask"] = np.full_like(found["loss_mask"], np.nan)
    return found

Batches.batch = batch_and_poison
if "LEFT_OUT" in os.environ:
    first, count = eval(os.environ["LEFT_OUT"])
    Skips.batch = lambda self, step: step + (count if step >= first else 0)
sys.exit(main())
"""


def train(workplace: Path, run: str, *options: str, code: int = 0, **environment: str) -> str:
    command = [sys.executable, "-c", POISONED, "train", "tiny.py", "--run.dir", run, *options]
    ended = subprocess.run(
        command, cwd=workplace, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == code, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


def digest(run: Path) -> str:
    return {info.step: info.digest for info in list_checkpoints(run / "checkpoints")}[12]


def test_back_twice_and_on_without_what_led_there(workplace: Path, lm: Lm, logged: Logged) -> None:
    said = train(workplace, "poisoned", "--recovery.max_bad_steps=2", POISONED="range(6, 10)")
    assert "step 7: loss or gradient not finite, not applied (2 in a row)\n" in said
    assert "steps 6 to 7 were not applied: 2 not finite\n" in said
    assert re.search(r"\nparameters whose gradients were furthest off, norm: \S+ \(nan, before [\d.]+\); ", said)
    assert re.search(r"\nread in step 6, of \S+: documents \d+, ", said)
    assert "rewound to checkpoint 6; goes on without the 2 batches that led to step 8 (attempt 1 of 3)\n" in said
    assert "rewound to checkpoint 3; goes on without the 7 batches that led to step 8 (attempt 2 of 3)\n" in said
    assert "checkpoint poisoned/checkpoints/6 is not used any more; it is kept as 6.bad\n" in said
    train(workplace, "left_out", POISONED="()", LEFT_OUT="3, 7")
    run = workplace / "poisoned"
    assert digest(run) == digest(workplace / "left_out")
    lines = logged(run)
    assert [line["step"] for line in lines] == list(range(12))
    assert [(line.get("rewinds"), line.get("batches_left_out")) for line in lines] == [(None, None)] * 3 + [(2, 7)] * 9
    kept = json.loads(read_attachment(run / "checkpoints", 12, "data.json"))
    assert kept["rewinds"] == [{"step": 3, "until": 8, "batches": 7, "attempt": 2}]
    places = (run, "4"), (workplace / "left_out", "11")
    shown, expected = (lm("data", "show", where, "--step", step).stdout.splitlines() for where, step in places)
    assert shown[1:] == expected[1:]


def test_before_the_first_checkpoint(workplace: Path) -> None:
    said = train(workplace, "at_first", "--recovery.max_bad_steps=2", POISONED="(0, 1)")
    assert "rewound to the start; goes on without the 2 batches that led to step 2 (attempt 1 of 3)\n" in said
    board = EventAccumulator(str(workplace / "at_first" / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    assert {"config", "plan", "rewind", "custom_scalars__config__", "_hparams_/session_start_info"} <= {
        *board.Tags()["tensors"]
    }
    train(workplace, "without_two", POISONED="()", LEFT_OUT="0, 2")
    assert digest(workplace / "at_first") == digest(workplace / "without_two")


def test_fewer_than_too_many_are_only_not_applied(workplace: Path, undisturbed: Path, logged: Logged) -> None:
    said = train(workplace, "skipped", POISONED="(1, 5, 6)")
    assert "rewound" not in said
    lines = logged(workplace / "skipped")
    assert [line["skipped_steps"] for line in lines] == [0, 1, 1, 1, 1, 2, 3, 3, 3, 3, 3, 3]
    assert all(line["loss"] == line["loss"] for line in lines if line["step"] not in (1, 5, 6))


def test_attempts_are_bounded(workplace: Path) -> None:
    options = ("--recovery.max_bad_steps=2", "--recovery.rewinds=1")
    said = train(workplace, "hopeless", *options, code=4, POISONED="range(7, 99)")
    assert "diverged, and rewound 1 times (recovery.rewinds is 1). Checkpoints in hopeless/checkpoints are" in said
    assert "    steps 6 to 7 were not applied: 2 not finite\n" in said
    again = train(workplace, "hopeless", *options, code=4, POISONED="range(7, 99)")  # the same, whenever it is started
    assert "diverged, and rewound 1 times" in again
    never = train(workplace, "hopeless", options[0], "--recovery.rewinds=0", code=4, POISONED="range(7, 99)")
    assert "diverged, and rewound 0 times (recovery.rewinds is 0)" in never
    found = list_checkpoints(workplace / "hopeless" / "checkpoints")
    assert [(info.step, info.problem) for info in found] == [(3, None), (6, None)]
