"""What all processes of a run must have alike, and how a difference is told."""

import hashlib
import importlib.metadata
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path

from lm.errors import some

Facts = Mapping[str, Mapping[str, str]]
"""What a process brings: for each section (code, config, …), values by name."""

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
_ABSENT = "missing"
_PROCESSES_TOLD = 3
_VALUES_TOLD = 5


def facts_of(config: Mapping[str, object]) -> dict[str, dict[str, str]]:
    """Of this process: its resolved config, by dotted key, the source of lm, and the versions of what it stands on."""
    return {
        "config": {key: repr(value) for key, value in config.items()},
        "code": _code(),
        "version": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
    }


def disagreement(facts: Mapping[int, Facts], hosts: Mapping[int, str]) -> str | None:
    """How processes differ from process 0, a line for each difference of the first of them; None: they do not."""
    lines = []
    differing = 0
    for index in sorted(facts):
        found = list(_differences(facts[0], facts[index]))
        if not found:
            continue
        differing += 1
        if differing <= _PROCESSES_TOLD:
            lines.append(f"  process {index} on {hosts[index]}:\n    " + some(found, _VALUES_TOLD, "\n    "))
    if not lines:
        return None
    if differing > _PROCESSES_TOLD:
        lines.append(f"  and {differing - _PROCESSES_TOLD} more processes")
    return "\n".join([f"the processes of a run must be alike, and these differ from process 0 on {hosts[0]}:", *lines])


def _differences(expected: Facts, found: Facts) -> Iterator[str]:
    for section in expected:
        ours, theirs = expected[section], found.get(section, {})
        for name in [*ours, *(name for name in theirs if name not in ours)]:
            a, b = ours.get(name, _ABSENT), theirs.get(name, _ABSENT)
            if a != b and section == "code":
                yield f"code: {name} is another file" if _ABSENT not in (a, b) else f"code: {name} is {b}"
            elif a != b:
                yield f"{section}: {name} is {b}, not {a}"


def _code() -> dict[str, str]:
    root = Path(__file__).parent.parent
    return {
        f"lm/{path.relative_to(root)}": hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in sorted(root.rglob("*.py"))
    }
