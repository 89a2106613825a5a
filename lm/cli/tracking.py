"""The verb of trackers."""

import argparse
import contextlib
import os
import sys
from typing import Any

from lm.cli.common import add, run_directory
from lm.train.config import TRACKERS


def add_verbs(verbs: Any) -> None:
    verb = add(verbs, "track", _track, "send what is new of a run to Weights & Biases or MLflow")
    verb.add_argument("trained", metavar="RUN")
    verb.add_argument("--to", required=True, choices=TRACKERS)
    verb.add_argument(
        "--follow",
        action="store_true",
        help="go on until standard input ends, as for `lm train`",
    )


def _track(options: argparse.Namespace) -> None:
    from lm.track.follow import catch_up, follow

    run = run_directory(options)
    if not options.follow:
        catch_up(run, options.to, print)
        return
    messages = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print much, into the log

    def say(line: str) -> None:
        with contextlib.suppress(OSError):  # training may be gone
            print(line, file=messages, flush=True)

    code = follow(run, options.to, say)
    sys.stdout.flush()
    os._exit(code)  # libraries may have more to do at the end, for ever
