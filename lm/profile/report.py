"""A profile as one screen of text, and as one object for programs."""

import dataclasses
import textwrap
from typing import Any

from lm.profile.advice import advice
from lm.profile.read import Profile
from lm.profile.summary import OperationRow, Row, Summary

TOP = 10
"""Operations in the text; the object has all."""
WIDTH = 120
_WAITS = {"devices": "start of steps and their metrics", "others": "other processes"}


def lines(profile: Profile) -> list[str]:
    """For people."""
    summary = profile.summary
    blocks = [
        _head(profile),
        _table("kind of operation", summary.kinds, summary),
        _exchanges(summary),
        _table("part of the model", summary.parts, summary),
        _operations(summary),
        ["what to try", *(line for text in advice(profile) or ["nothing stands out"] for line in _bullet(text))],
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block).splitlines()


def values(profile: Profile) -> dict[str, Any]:
    """For programs. Seconds are of one device and step."""
    found = dataclasses.asdict(dataclasses.replace(profile, config=None)) | {
        "mfu": profile.mfu,
        "expected_mfu": profile.expected_mfu,
        "products_rate": profile.products_rate,
        "what_to_try": advice(profile),
    }
    del found["config"]
    return found


def _head(profile: Profile) -> list[str]:
    summary = profile.summary
    steps = summary.steps
    which = f"steps {steps[0]} to {steps[-1]}" if len(steps) > 1 else f"step {steps[0]}" if steps else "all of it"
    whole = f" of {profile.devices}" if profile.devices > summary.devices else ""
    step = summary.step_seconds
    beside = [
        f"{name} {_time(seconds)}"
        for name, seconds in (("logged", profile.logged_step_seconds), ("predicted", profile.expected_step_seconds))
        if seconds
    ]
    idle = [f"between steps {summary.between / step:.1%}", f"inside of them {summary.inside / step:.1%}"]
    waits = [
        f"{_WAITS.get(name, name)} {seconds / step:.1%}"
        for name, seconds in sorted(summary.waits.items(), key=lambda item: -item[1])
        if seconds >= 0.001 * step
    ]
    found = [
        f"trace {profile.trace}: {which}, on {summary.devices}{whole} x {profile.device_kind or summary.platform}",
        f"step       {_time(step)}" + (f"   ({', '.join(beside)})" if beside else ""),
        f"busy       {summary.busy / step:.1%}",
        f"idle       {(summary.between + summary.inside) / step:.1%}   {', '.join(idle)}"
        + (f"; the host meanwhile: {', '.join(waits)}" if waits else ""),
    ]
    if profile.mfu is not None:
        expected = f"   (predicted {profile.expected_mfu:.1%})" if profile.expected_mfu is not None else ""
        found.insert(2, f"MFU        {profile.mfu:.1%}{expected}")
    if profile.products_rate is not None:
        found.append(f"products   {profile.products_rate:.1%} of the peak, while they run")
    return found


def _table(title: str, rows: tuple[Row, ...], summary: Summary) -> list[str]:
    made = [f"{title:<32}{'ms a step':>11}{'share':>8}{'times':>9}"]
    made += [
        f"{row.name:<32}{row.seconds * 1e3:>11.3f}{row.seconds / summary.total:>8.1%}{row.times:>9.4g}" for row in rows
    ]
    return [*made, f"{'all':<32}{summary.total * 1e3:>11.3f}"]


def _exchanges(summary: Summary) -> list[str]:
    if not summary.exchanges:
        return []
    made = [f"{'exchanged':<32}{'ms a step':>11}{'exposed':>11}   of the step"]
    made += [
        f"{one.kind:<32}{one.seconds * 1e3:>11.3f}{one.exposed * 1e3:>11.3f}{one.exposed / summary.step_seconds:>14.1%}"
        for one in summary.exchanges
    ]
    return made


def _operations(summary: Summary) -> list[str]:
    made = [f"{'operation':<32}{'ms a step':>11}{'share':>8}{'times':>9}  what it is, and where it comes from"]
    for row in summary.operations[:TOP]:
        name = row.name if len(row.name) < 32 else row.name[:28] + "..."
        made.append(
            f"{name:<32}{row.seconds * 1e3:>11.3f}{row.seconds / summary.total:>8.1%}{row.times:>9.4g}  {_what(row)}"
        )
    return made


def _what(row: OperationRow) -> str:
    direction = " again" if row.again else " backward" if row.backward else ""
    return f"{row.kind}; {row.part}{direction}" + (f", {row.source}" if row.source else "")


def _bullet(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="  - ", subsequent_indent="    ", break_on_hyphens=False)


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
