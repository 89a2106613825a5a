"""Verbs that tell of runs: one, several compared, their curves."""

import argparse
import json
import sys
from collections.abc import Iterable
from typing import Any

from lm.cli.common import add


def add_verbs(verbs: Any) -> None:
    verb = add(verbs, "status", _status, "where a run stands, what it is doing, or how it has ended")
    verb.add_argument("trained", metavar="RUN")
    verb.add_argument("--json", action="store_true", help="print one JSON object")


def _status(options: argparse.Namespace) -> None:
    from lm.report.facts import read_facts
    from lm.report.status import status, status_lines

    facts = read_facts(options.trained)
    _print([json.dumps(status(facts))] if options.json else status_lines(facts))


def _print(lines: Iterable[str]) -> None:
    """Also on a terminal that knows fewer characters."""
    encoding = sys.stdout.encoding or "utf-8"
    for line in lines:
        print(line.encode(encoding, errors="replace").decode(encoding))
