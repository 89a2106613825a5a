"""Whether a run directory may be continued with the config at hand."""

import dataclasses
import json
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import numpy as np

from lm import config as configs
from lm.checkpoint.checkpoints import list_checkpoints, read_attachment
from lm.checkpoint.local import local_directory, steps_of_run
from lm.config import Difference, diff, format_diff
from lm.errors import ConfigError, StorageError
from lm.experiment import Config
from lm.optim.schedules import learning_rate
from lm.train import journal, provenance
from lm.train.run_directory import RunDirectory


def refuse_other_run(
    directory: RunDirectory,
    config: Config,
    facts: Mapping[str, Any],
    allow: Collection[str],
    say: Callable[[str], None],
) -> None:
    """Raises ConfigError when the directory holds another run than that of `config`, one that other code has trained
    (and `allow` does not say "code" or "versions"), one that is further, or one whose checkpoints are gone; with
    `train.deterministic`, also one whose sums had another order. `facts`: of the machine, as in the journal."""
    journal.refuse_lost_checkpoints(directory)
    places = {info.step: directory.checkpoints for info in list_checkpoints(directory.checkpoints) if not info.problem}
    events = journal.read(directory.journal)
    if config.checkpoint.local_dir:
        local = local_directory(config.checkpoint, directory.path)
        run = journal.run_of(events)
        places |= dict.fromkeys(steps_of_run(local, run), local)
    if not places:
        return
    done = max(places)
    try:
        saved = json.loads(read_attachment(places[done], done, "config.json"))
    except StorageError as error:  # damaged: restoring will set it aside and say so
        say(str(error))
        return
    before = configs.from_dict(Config, saved)
    refuse_if_changed(before, config, done=done)
    if config.train.deterministic:
        refuse_other_sums(before, config, journal.facts_of_last(events, facts), facts)
    if done > config.train.steps:
        raise ConfigError(
            f"{directory.path} has {done} steps done, more than --train.steps {config.train.steps}; "
            "choose another --run.dir"
        )
    try:
        code = read_attachment(places[done], done, provenance.FILE)
    except StorageError as error:  # damaged, or from before it was kept
        say(str(error))
        return
    for line in provenance.refuse_if_other(code, done, allow):
        say(f"not as it was up to checkpoint {done}: {line}")


def refuse_if_changed(saved: Config, config: Config, *, done: int) -> None:
    """Raises ConfigError, with the differences, when continuing after `done` steps would be another run.

    What is marked free in the config may change. So may the number of steps and the schedule where the learning
    rate of the steps already done would have been the same; and the sources of a mixture, of which `ledger` judges.
    """
    differences = [d for d in diff(saved, config) if not d.free]
    if saved.data.sources and config.data.sources:
        differences = [d for d in differences if not d.key.startswith(("data.sources", "data.mixture"))]
    schedule = [d for d in differences if _is_schedule(d)]
    if schedule and _same_rates(saved, config, done):
        differences = [d for d in differences if not _is_schedule(d)]
    if differences:
        raise ConfigError(
            f"{config.run.dir} holds a run with {done} steps done and another config:\n"
            f"{format_diff(differences)}\n"
            "to go on with it, take the values it was started with; for a new run, choose another --run.dir"
        )


def refuse_other_sums(saved: Config, config: Config, before: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Raises ConfigError, with the differences, when a step would be summed in another order than before: the same
    experiment, but not the same bits. `before`: the facts of the machine that the run was on."""
    here = ("mesh.", "model.", "train.")
    lines = format_diff(
        [
            dataclasses.replace(one, free=False)
            for one in diff(saved, config)
            if one.free and one.key.startswith(here) and one.key != "train.deterministic"
        ]
    ).splitlines()
    lines += [
        f"{name}: {before[name]} -> {facts[name]}" for name in facts if before.get(name, facts[name]) != facts[name]
    ]
    if lines:
        listed = "\n".join(lines)
        raise ConfigError(
            f"{config.run.dir} was trained otherwise, so that it would not go on with the same bits:\n{listed}\n"
            "take what it was trained with, or write --train.deterministic false"
        )


def _is_schedule(difference: Difference) -> bool:
    return difference.key == "train.steps" or difference.key in {
        f"optim.{name}" for name in ("schedule", "warmup_steps", "decay_steps", "final_fraction")
    }


def _same_rates(saved: Config, config: Config, done: int) -> bool:
    if done == 0:
        return True
    # Schedules are made of a few pieces: a thousand samples and the last step tell them apart.
    steps = np.array([*range(0, done, max(done // 1000, 1)), done - 1], np.int32)
    before, after = (jax.vmap(learning_rate(c.optim, c.train.steps))(steps) for c in (saved, config))
    return bool((before == after).all())
