"""Directories of runs, as a real one leaves them behind, made of what a test says."""

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

CONFIG = {"run": {"dir": "run", "seed": 0}, "train": {"steps": 100}, "optim": {"learning_rate": 0.001}}


def made(path: Path, *, config: Any = CONFIG, lines: Any = (), events: Any = (), now: Any = None) -> Path:
    """A folder with these files; None leaves one out, and text is written as it is."""
    path.mkdir(parents=True)
    for name, contents in {"config.json": config, "now.json": now}.items():
        if contents is not None:
            (path / name).write_text(contents if isinstance(contents, str) else json.dumps(contents))
    for name, rows in {"metrics.jsonl": lines, "journal.jsonl": events}.items():
        if rows is not None and len(rows):
            text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
            (path / name).write_text(text)
    return path


def line(step: int, **values: Any) -> dict[str, Any]:
    """Of metrics.jsonl."""
    speed = {"tokens": (step + 1) * 1000, "tokens_per_second": 2000.0, "step_seconds": 0.5}
    return {"step": step, "loss": 5.0, "bits_per_byte": 2.5, **speed, **values}


def event(name: str, *, start: str = "a", ago: float = 0.0, **facts: Any) -> dict[str, Any]:
    """Of journal.jsonl, so many seconds ago."""
    known = {"event": name, "start": start, "time": time.time() - ago, "done": 0, "saved": None, "milliseconds": {}}
    return known | facts


def begun(start: str = "a", *, host: str | None = None, ago: float = 100.0, **facts: Any) -> dict[str, Any]:
    """A start, on this host if no other is given."""
    who = {"pid": os.getpid(), "host": host or socket.gethostname(), "command": "lm train x.py"}
    return event("start", start=start, ago=ago, **who, devices=8, kind="TPU v5p", processes=2, **facts)


def doing(what: str, done: int, *, start: str = "a", since: float = 1.0, ago: float = 1.0, every: float = 5.0) -> Any:
    """now.json."""
    at = time.time()
    return {
        "start": start,
        "pid": os.getpid(),
        "host": "elsewhere",
        "doing": what,
        "done": done,
        "since": at - since,
        "time": at - ago,
        "every": every,
    }
