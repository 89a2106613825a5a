"""`lm status RUN`: where a run stands, or how it has ended."""

import math
import time
from collections.abc import Iterator
from typing import Any

from lm.checkpoint.folder import saved_steps
from lm.checkpoint.manifest import BadCheckpoint, Manifest
from lm.errors import StorageError, some
from lm.report.facts import STATES, Facts, one_line
from lm.train.goodput import Goodput, goodput
from lm.train.metrics import plain
from lm.train.now import WORDS
from lm.train.progress import human_count, human_seconds

STUCK_SECONDS, STUCK_STEPS = 300.0, 10
"""Without progress, a step is conspicuous after so long, and after so many times what steps take."""
IN_STEP = ("step", "replay", "input")
LONG_SECONDS = 1800.0
"""The same for all else, but for building data, which may take days."""


def status(facts: Facts) -> dict[str, Any]:
    """All that is known as plain values: seconds, nats, bits, tokens; times in seconds since 1970. What is not known,
    or does not apply, is None; a value that is not finite is a string, as in metrics.jsonl."""
    end, start, now, heldout = facts.end, facts.start or {}, facts.now, facts.heldout
    running = facts.state == "running"
    accounts, said = facts.goodput, facts.supervisor or {}
    checkpoint, bad = _checkpoint(facts)
    return {
        "run": str(facts.directory.path),
        "state": facts.state,
        "doing": facts.doing,
        "doing_seconds": max(now["time"] - now["since"], 0.0) if now and facts.doing == now["doing"] else None,
        "exit_code": (end or said).get("code"),
        "reason": end.get("reason") if end else None,
        "supervisor": said.get("then"),
        "ended": end["time"] if end else None,
        "heard": facts.heard,
        "step": facts.done,
        "steps": facts.steps,
        "seconds_left": _seconds_left(facts) if running else None,
        "tokens": facts.value("tokens"),
        "loss": plain(facts.value("loss")),
        "bits_per_byte": plain(facts.value("bits_per_byte")),
        "heldout_step": heldout.step + 1 if heldout else None,
        "heldout_loss": plain(heldout.values["heldout_loss"]) if heldout else None,
        "heldout_bits_per_byte": plain(heldout.values.get("heldout_bits_per_byte")) if heldout else None,
        "tokens_per_second": plain(facts.median("tokens_per_second")),
        "step_seconds": plain(facts.median("step_seconds")),
        "mfu": plain(facts.median("mfu")),
        "checkpoint": checkpoint,
        "restarts": max(accounts.starts - 1, 0),
        "goodput": accounts.values() if facts.events else None,
        "wall_seconds": facts.wall_seconds,
        "host": (now or start).get("host"),
        "pid": (now or start).get("pid"),
        "started": start.get("time"),
        "command": start.get("command"),
        "processes": start.get("processes"),
        "devices": start.get("devices"),
        "device_kind": start.get("kind"),
        "warnings": [*facts.problems, *bad, *_warnings(facts)],
        "at": facts.at,
    }


def status_lines(facts: Facts) -> Iterator[str]:
    """The same for people."""
    found = status(facts)
    yield f"{one_line(found['run'])}: {one_line(_headline(found))}"
    for name, parts in {
        "step": _step(found),
        "loss": _loss(found),
        "speed": _speed(found),
        "checkpoint": _saved(found),
        "goodput": [facts.goodput.line().removeprefix("goodput ")] if facts.goodput.total else [],
        "restarts": _restarts(facts),
        "process": _process(found),
    }.items():
        if parts:
            yield f"  {name:<11} {one_line(', '.join(parts))}"
    for warning in found["warnings"]:
        yield f"  {'warning':<11} {one_line(warning)}"


def _headline(found: dict[str, Any]) -> str:
    state, doing, at = found["state"], found["doing"], found["at"]
    if state == "running":
        spent = found["doing_seconds"]
        lasts = f" for {human_seconds(spent)}" if spent is not None and (doing not in IN_STEP or spent > 60) else ""
        return f"running, {WORDS.get(doing, doing)}{lasts}" if doing else "running"
    ended = f", {human_seconds(max(at - found['ended'], 0))} ago" if found["ended"] is not None else ""
    code = found["exit_code"]
    if state == "failed":
        return f"failed with exit code {code}{ended}: {found['reason'] or 'no reason is known'}"
    if state in ("killed", "silent"):
        heard = "" if found["heard"] is None else f"; last heard of {human_seconds(max(at - found['heard'], 0))} ago"
        code = "" if code is None else f" (exit code {code})"
        return f"{state}{code}: {STATES[state]}{heard}"
    if state == "restarting":
        return f"restarting: ended with exit code {code}{ended}, and its supervisor {found['supervisor']}"
    return f"{state}{ended}: {STATES[state]}"


def _step(found: dict[str, Any]) -> list[str]:
    step, steps = found["step"], found["steps"]
    parts = [f"{step:,} of {steps:,} ({math.floor(1000 * step / steps) / 10:g}%)" if steps else f"{step:,}"]
    if found["tokens"] is not None:
        parts.append(f"{human_count(found['tokens'])} tokens")
    if found["seconds_left"] is not None:
        parts.append(f"{human_seconds(found['seconds_left'])} left")
    return parts


def _loss(found: dict[str, Any]) -> list[str]:
    parts = [f"{float(found['loss']):.4f}"] if found["loss"] is not None else []
    if found["bits_per_byte"] is not None:
        parts.append(f"{float(found['bits_per_byte']):.4f} bits per byte")
    if found["heldout_loss"] is not None:
        bits = found["heldout_bits_per_byte"]
        bits = "" if bits is None else f", {float(bits):.4f} bits per byte"
        parts.append(f"held-out {float(found['heldout_loss']):.4f}{bits} (step {found['heldout_step']:,})")
    return parts


def _speed(found: dict[str, Any]) -> list[str]:
    if found["tokens_per_second"] is None or found["step_seconds"] is None:
        return []
    parts = [
        f"{human_count(float(found['tokens_per_second']))} tokens/s",
        f"{float(found['step_seconds']):.3g} s a step",
    ]
    return parts if found["mfu"] is None else [*parts, f"MFU {float(found['mfu']):.1%}"]


def _saved(found: dict[str, Any]) -> list[str]:
    saved = found["checkpoint"]
    if saved is None:
        return ["none yet"]
    return [f"step {saved['step']:,}", f"{human_seconds(max(found['at'] - saved['time'], 0))} ago"]


def _restarts(facts: Facts) -> list[str]:
    """How many, and how the start before the newest has ended."""
    starts = [event for event in facts.events if event["event"] == "start"]
    if len(starts) < 2:
        return []
    before = starts[-2]["start"]
    *_, last = (event for event in facts.events if event.get("start") == before)
    how = f"ended with exit code {last.get('code')}" if last["event"] == "end" else "killed"
    reason = last.get("reason")
    return [
        f"{len(starts) - 1}",
        f"the last after it {how} at step {last['done']:,}" + (f": {reason}" if reason else ""),
    ]


def _process(found: dict[str, Any]) -> list[str]:
    if found["pid"] is None:
        return []
    parts = [f"{found['pid']} on {found['host']}"]
    if found["devices"] is not None:
        parts.append(f"{found['devices']} x {found['device_kind']}")
    if (found["processes"] or 1) > 1:
        parts.append(f"in {found['processes']} processes")
    if found["started"] is not None:
        parts.append(f"started {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(found['started']))} UTC")
    if found["state"] == "running" and found["heard"] is not None:
        parts.append(f"last heard of {human_seconds(max(found['at'] - found['heard'], 0))} ago")
    return parts


def _checkpoint(facts: Facts) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest durable one that is good, as far as its manifest shows; and what is wrong with newer ones."""
    directory, bad = facts.directory.checkpoints, list[str]()
    try:
        for step in reversed(saved_steps(directory)):
            try:
                manifest = Manifest.read(directory / str(step), step)
                return {"step": step, "time": manifest.time, "bytes": manifest.bytes}, bad
            except BadCheckpoint as problem:
                bad.append(f"checkpoint {step} is bad: {problem}")
    except StorageError as problem:
        bad.append(str(problem))
    return None, bad


def _seconds_left(facts: Facts) -> float | None:
    """By the usual step of now, and what this start has spent between steps for each second in them."""
    step, steps = facts.median("step_seconds"), facts.steps
    if steps is None or step is None or not math.isfinite(step):
        return None
    spent = _of_this_start(facts).milliseconds
    within = sum(spent[cause] for cause in IN_STEP)
    between = sum(spent[cause] for cause in ("save", "evaluation"))
    return (steps - facts.done) * step * (1 + (between / within if within else 0.0))


def _of_this_start(facts: Facts) -> Goodput:
    start = facts.start
    return goodput(event for event in facts.events if start and event.get("start") == start["start"])


def _warnings(facts: Facts) -> Iterator[str]:
    if facts.lines:
        last = facts.lines[-1]
        bad = [f"{name} is {value}" for name, value in last.values.items() if not math.isfinite(value)]
        if bad:
            yield f"in step {last.step}, {some(bad, 5)}"
    for name, what in {
        "skipped_steps": "steps were not applied: loss or gradient were not finite, or a spike",
        "rewinds": "times the run went back to a checkpoint",
        "saves_failed": "saves of this start have failed",
    }.items():
        if count := facts.value(name):
            yield f"{count:,.0f} {what}"
    if facts.state == "running":
        yield from _stuck(facts)


def _stuck(facts: Facts) -> Iterator[str]:
    heard = math.inf if facts.now is None else facts.at - facts.now["time"]
    if facts.now is None or facts.end:
        return
    if heard > max(STUCK_SECONDS, 5 * facts.now["every"]):
        yield f"nothing heard of it for {human_seconds(heard)}: it is stopped, or cannot write to its directory"
        return
    spent, doing = facts.at - facts.now["since"], facts.now["doing"]
    steps = STUCK_STEPS * (facts.median("step_seconds") or 0.0)
    limit = max(STUCK_SECONDS, steps) if doing in IN_STEP else LONG_SECONDS
    if doing != "data" and spent > limit:
        what = f"{WORDS.get(doing, doing)} after step {facts.now['done']:,}"
        yield f"no progress for {human_seconds(spent)}, while {what}"
