"""What a run was trained on, from which step on: kept with every checkpoint."""

import json
from typing import Any

from lm.data.corpus import Corpus
from lm.errors import ConfigError, StorageError

FILE = "data.json"

Entry = dict[str, Any]
"""`from_step`; `sources`: the fingerprint of each by its name; `phases`: [first step, weights by name], ascending."""


def entry(corpus: Corpus, from_step: int) -> Entry:
    """What applies from a step on."""
    return {
        "from_step": from_step,
        "sources": {one.name: one.manifest.fingerprint for one in corpus.sources},
        "phases": [[step, dict(sorted(weights.items()))] for step, weights in corpus.phases],
    }


def read(contents: bytes) -> list[Entry]:
    """What `write` wrote. Raises StorageError for anything else."""
    try:
        found = json.loads(contents)
        return [{key: one[key] for key in ("from_step", "sources", "phases")} for one in found]
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{FILE} of the checkpoint cannot be read: {error!r}") from None


def write(ledger: list[Entry]) -> bytes:
    return (json.dumps(ledger, indent=1) + "\n").encode()


def extended(ledger: list[Entry], corpus: Corpus, done: int) -> list[Entry]:
    """The ledger of a run that goes on after `done` steps.

    Other sources and weights may come from step `done` on. Raises ConfigError when a step before that would be another
    one than it was.
    """
    before, now = ledger[-1], entry(corpus, done)
    if {**before, "from_step": done} == now:
        return ledger
    old, new = _until(before, done), _until(now, done)
    if [one for one, _ in old] != [one for one, _ in new] or any(
        _shares(a) != _shares(b) for (_, a), (_, b) in zip(old, new, strict=True)
    ):
        phases = ", ".join(f"PhaseConfig({step}, {tuple(weights.items())})" for step, weights in old)
        raise ConfigError(
            f"data.mixture is another one for steps that are done ({done} are). What they were made with:\n"
            f"    mixture=({phases},)\n"
            f"keep that, and add a phase from step {done} or a later one"
        )
    for name in dict.fromkeys(name for _, weights in old for name in weights):
        was, found = before["sources"].get(name), now["sources"].get(name)
        if was != found:
            which = f"source {name} in {corpus.directory}" if name else corpus.directory
            raise ConfigError(
                f"checkpoint {done} was trained on other data than {which} holds now (fingerprints {str(was)[:12]} and "
                f"{str(found)[:12]}); for a new run, choose another --run.dir"
            )
    return [*(one for one in ledger if one["from_step"] < done), now]


def describe(found: Entry) -> str:
    """One line for the log."""
    phases = ", ".join(
        f"from step {step} {' '.join(f'{name} {share:.1%}' for name, share in _shares(weights).items())}"
        for step, weights in found["phases"]
    )
    return f"data from step {found['from_step']}: {phases}"


def _until(found: Entry, done: int) -> list[tuple[int, dict[str, float]]]:
    """The phases of steps before `done`."""
    return [(step, weights) for step, weights in found["phases"] if step < done]


def _shares(weights: dict[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in sorted(weights.items()) if weight > 0}
