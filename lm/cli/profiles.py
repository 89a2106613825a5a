"""The verb of profiles."""

import argparse
import json
import os
from typing import Any

from lm.cli.common import add, run_directory
from lm.errors import ConfigError


def add_verbs(verbs: Any) -> None:
    verb = add(verbs, "profile", _profile, "where the time of some steps went, by kind of operation, and what to try")
    verb.add_argument("trained", metavar="RUN")
    verb.add_argument("--trace", metavar="NAME", help="which one; default: the newest")
    verb.add_argument("--now", action="store_true", help="ask the run, which is going on, for a trace, and wait for it")
    verb.add_argument("--steps", type=int, metavar="N", help="with --now: how many; default: 5")
    verb.add_argument("--json", action="store_true", help="print one JSON object")


def _profile(options: argparse.Namespace) -> None:
    if options.steps is not None and not options.now:
        raise ConfigError("--steps is for --now; `lm train … --profile.steps 20:25` traces steps of a run that starts")
    if options.now and options.trace is not None:
        raise ConfigError("--now takes another trace, and --trace reads one that is there: give one of them")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # the devices that are here may be those of the run
    run = run_directory(options)
    name = options.trace
    if options.now:
        from lm.profile.now import take

        name = take(run, steps=options.steps)
    from lm.profile.read import load
    from lm.profile.report import lines, values

    profile = load(run, name)
    print(json.dumps(values(profile)) if options.json else "\n".join(lines(profile)))
