"""The short form of kill.py: runs that are killed where it hurts most."""

import subprocess
import sys
from pathlib import Path

KILL = Path(__file__).parent / "kill.py"

ALONE = [
    "journal:exit",
    "data build",
    "compile",
    "save: begin",
    "save: write:exit",
    "save: list",
    "save: manifest",
    "save: manifest:exit",
    "restore: load",
    "prune: remove",
    "evaluation:exit:2",
    "metrics: amend",
]
GOING_BACK = ["rewind: rename", "rewind: ledger", "save: read back:enter:9"]


def kill(*arguments: str) -> str:
    ended = subprocess.run([sys.executable, KILL, *arguments], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_at_points_of_a_run() -> None:
    assert kill(*(f"--at={point}" for point in ALONE)).endswith(
        f"{len(ALONE)} by point; 0 kills came too late; 1 runs ended, of {len(ALONE) + 1} lives\n"
    )


def test_while_it_goes_back() -> None:
    said = kill("--rewinds", *(f"--at={point}" for point in GOING_BACK))
    assert said.endswith("3 by point; 0 kills came too late; 1 runs ended, of 4 lives\n")
