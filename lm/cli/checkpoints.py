"""Verbs of checkpoints."""

import argparse
import contextlib
import json
from typing import Any

from lm.cli.common import add, add_group, run_directory
from lm.errors import StorageError


def add_verbs(verbs: Any) -> None:
    checkpoints = add_group(verbs, "checkpoint", "look at checkpoints, copy one, remove some")
    verb = add(checkpoints, "list", _checkpoint_list, "each step: its status, size, age, and the digest of its state")
    verb.add_argument("trained", metavar="RUN")
    verb.add_argument("--json", action="store_true", help="print one JSON list")
    verb = add(checkpoints, "verify", _checkpoint_verify, "read all files, and compare checksums; 5 if one is bad")
    verb.add_argument("trained", metavar="RUN")
    verb.add_argument("--step", type=int, help="only that of this step; default: all")
    verb = add(checkpoints, "show", _checkpoint_show, "what one holds: arrays, versions, data")
    verb.add_argument("trained", metavar="RUN")
    verb.add_argument("--step", type=int, help="default: the newest")
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    verb = add(checkpoints, "copy", _checkpoint_copy, "make a run of one checkpoint, to go on from there or to keep")
    verb.add_argument("trained", metavar="RUN")
    verb.add_argument("target", metavar="DEST", help="a directory that is new or empty")
    verb.add_argument("--step", type=int, required=True, metavar="K")
    verb = add(checkpoints, "prune", _checkpoint_prune, "remove older ones, of a run that is not going on")
    verb.add_argument("trained", metavar="RUN")
    verb.add_argument("--keep-last", type=int, required=True, metavar="N", help="the newest ones to keep")
    verb.add_argument("--keep-every", type=int, default=0, metavar="N", help="and those at multiples of N steps")
    verb.add_argument("--dry-run", action="store_true", help="only say what would be removed")


def _checkpoint_list(options: argparse.Namespace) -> None:
    from lm.checkpoint.commands import list_lines, listed
    from lm.train.journal import read, run_of

    run, local_dir = run_directory(options), ""
    with contextlib.suppress(ValueError, LookupError, TypeError):  # without its config, a run has checkpoints still
        local_dir = json.loads(run.config.read_bytes())["checkpoint"]["local_dir"]
    rows = listed(run.checkpoints, local_dir=local_dir, run=run_of(read(run.journal)))
    print(json.dumps(rows) if options.json else "\n".join(list_lines(rows)))


def _checkpoint_verify(options: argparse.Namespace) -> None:
    from lm.checkpoint.commands import verified

    bad = 0
    for step, problem in verified(run_directory(options).checkpoints, options.step):
        print(f"{step:>10}  {'good' if problem is None else f'bad: {problem}'}", flush=True)
        bad += problem is not None
    if bad:
        raise StorageError(f"{bad} of the checkpoints in {options.trained} cannot be used: see above")


def _checkpoint_show(options: argparse.Namespace) -> None:
    from lm.checkpoint.commands import show_lines, shown

    facts = shown(run_directory(options).checkpoints, options.step)
    print(json.dumps(facts) if options.json else "\n".join(show_lines(facts)))


def _checkpoint_copy(options: argparse.Namespace) -> None:
    from etils import epath

    from lm.checkpoint.commands import copy

    run = run_directory(options)
    copy(run.checkpoints, options.step, run.path, epath.Path(options.target), print)


def _checkpoint_prune(options: argparse.Namespace) -> None:
    from lm.checkpoint.commands import prune

    with run_directory(options) as run:
        prune(
            run.checkpoints,
            keep_last=options.keep_last,
            keep_every=options.keep_every,
            dry_run=options.dry_run,
            say=print,
        )
