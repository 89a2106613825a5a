"""What a run was trained on, from which step on, and what it left out when it was rewound: kept with every checkpoint.

Steps are those of a run that never went back: each takes the batch of its number.
"""

import dataclasses
import json
import os
from typing import Any

from lm.checkpoint.checkpoints import read_attachment
from lm.data.corpus import Corpus
from lm.data.skips import Skip, Skips
from lm.errors import ConfigError, StorageError

FILE = "data.json"

Entry = dict[str, Any]
"""`from_step`; `sources`: the fingerprint of each by its name; `phases`: [first step, weights by name], ascending."""


@dataclasses.dataclass(frozen=True)
class Rewind:
    """The run went back to the checkpoint `step`, and left out `batches` from there: what led to step `until`."""

    step: int
    until: int
    batches: int
    attempt: int
    """How often it had gone back, this time included, without getting beyond where it first had to."""


@dataclasses.dataclass(frozen=True)
class Ledger:
    entries: tuple[Entry, ...]
    rewinds: tuple[Rewind, ...] = ()
    """Those that are still seen in the batches, in order of their steps."""
    times: int = 0
    """How often the run has gone back in all, also where that is no longer seen."""

    @property
    def skips(self) -> Skips:
        return Skips(tuple(Skip(one.step, one.batches) for one in self.rewinds))

    def rewound(self, step: int, until: int, attempt: int) -> "Ledger":
        """This, of a run that goes back to `step` and leaves out all that was taken before step `until`."""
        kept = tuple(one for one in self.rewinds if one.step < step)
        left_out = self.skips.rewound(step, until).all[-1].batches
        return dataclasses.replace(self, rewinds=(*kept, Rewind(step, until, left_out, attempt)), times=self.times + 1)


def entry(corpus: Corpus, from_step: int) -> Entry:
    """What applies from a step on."""
    return {
        "from_step": from_step,
        "sources": {one.name: one.manifest.fingerprint for one in corpus.sources},
        "phases": [[step, dict(sorted(weights.items()))] for step, weights in corpus.phases],
    }


def read(contents: bytes) -> Ledger:
    """What `write` wrote. Raises StorageError for anything else."""
    try:
        found = json.loads(contents)
        # A list: of when no run had gone back.
        body: dict[str, Any] = {"data": found, "rewinds": []} if isinstance(found, list) else found
        rewinds = tuple(Rewind(**one) for one in body["rewinds"])
        entries = tuple({key: one[key] for key in ("from_step", "sources", "phases")} for one in body["data"])
        return Ledger(entries, rewinds, body.get("times", sum(one.attempt for one in rewinds)))
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{FILE} of the checkpoint cannot be read: {error!r}") from None


def write(ledger: Ledger) -> bytes:
    rewinds = [dataclasses.asdict(one) for one in ledger.rewinds]
    return (json.dumps({"data": ledger.entries, "rewinds": rewinds, "times": ledger.times}, indent=1) + "\n").encode()


def of_checkpoint(directory: str | os.PathLike[str], step: int) -> Ledger:
    """The ledger that a checkpoint holds. Raises StorageError when it is not as it was written."""
    try:
        return read(read_attachment(directory, step, FILE))
    except StorageError as problem:
        try:  # the first checkpoints knew one source, by its fingerprint alone
            fingerprint = read_attachment(directory, step, "data_fingerprint.txt").decode()
        except StorageError:
            raise problem from None
        return Ledger(({"from_step": 0, "sources": {"": fingerprint}, "phases": None},))


def extended(ledger: Ledger, corpus: Corpus, done: int) -> Ledger:
    """The ledger of a run that goes on after `done` batches, those left out included.

    Other sources and weights may come from step `done` on. Raises ConfigError when a step before that would be another
    one than it was.
    """
    before, now = ledger.entries[-1], entry(corpus, done)
    if before["phases"] is None:
        before = {**before, "phases": now["phases"]}
        ledger = Ledger((before,))
    if {**before, "from_step": done} == now:
        return ledger
    old, new = _until(before, done), _until(now, done)
    if old != new:  # also where the shares are the same: sums that round otherwise can deal other rows
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
    kept = tuple(one for one in ledger.entries if one["from_step"] < done)
    return dataclasses.replace(ledger, entries=(*kept, now))


def describe(found: Entry) -> str:
    """One line for the log."""
    phases = ", ".join(
        f"from step {step} {' '.join(f'{name} {share:.1%}' for name, share in _shares(weights).items())}"
        for step, weights in found["phases"]
    )
    return f"data from step {found['from_step']}: {phases}"


def _until(found: Entry, done: int) -> list[tuple[int, dict[str, float]]]:
    """The phases of steps before `done`, with the weights of what is read."""
    return [
        (step, {name: weight for name, weight in weights.items() if weight > 0})
        for step, weights in found["phases"]
        if step < done
    ]


def _shares(weights: dict[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    return {name: weight / total for name, weight in sorted(weights.items()) if weight > 0}
