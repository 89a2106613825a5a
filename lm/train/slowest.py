"""Which host holds the others up, found from what each process notes about its own time."""

import statistics
from collections.abc import Callable, Mapping

SHARE = 0.1
"""Of the time of a step that one host must cost the others before it is named."""
TIMES = 3.0
"""What half of the processes need, so many times: a host that is as slow as all others holds nobody up."""
CAUSES = {
    "input": "waits for input",
    "save": "saves",
    "evaluation": "evaluates",
    "profile": "writes traces",
    "host": "computes on the host",
}
"""The seconds that a process notes, each of its own and per step, beside `step_seconds` and `step`. On the host: what
is none of the others, and no waiting for devices or other processes."""


def slowest(notes: Mapping[int, tuple[float, Mapping[str, float]]], name: Callable[[int], str]) -> str | None:
    """A line that names the process that costs the others most; None: none costs them much.

    `notes`: for each process when its note came, and the note: `step`, `step_seconds`, and seconds per step by cause.
    That a note comes late counts too, of those for one and the same step.
    """
    if len(notes) < 2:
        return None
    values = {index: note for index, (_, note) in notes.items()}
    limit = SHARE * statistics.median(note["step_seconds"] for note in values.values())
    found = []
    for cause, what in CAUSES.items():
        seconds = {index: note.get(cause, 0.0) for index, note in values.items()}
        index = max(seconds, key=lambda index: seconds[index])
        usual = statistics.median_low(seconds.values())
        if seconds[index] > max(limit, TIMES * usual):
            line = f"{name(index)} holds the others up: it {what} for {seconds[index]:.3g} s of each step, where half "
            found.append((seconds[index], line + f"of the processes need at most {usual:.3g} s"))
    step = statistics.mode(note["step"] for note in values.values())
    came = {index: when for index, (when, note) in notes.items() if note["step"] == step}
    usual = statistics.median_low(came.values())
    late = {index: when - usual for index, when in came.items()}
    index = max(late, key=lambda index: late[index])
    others = statistics.median_low([abs(seconds) for seconds in late.values()])
    if late[index] > max(limit, TIMES * others):
        line = f"{name(index)} holds the others up: it ended step {step} {late[index]:.3g} s later than half of them"
        found.append((late[index], line))
    return max(found)[1] if found else None
