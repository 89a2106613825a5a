"""Verbs that tell of runs: one, several compared, their curves."""

import argparse
import json
import shutil
import sys
from collections.abc import Iterable
from typing import Any

from lm.cli.common import add


def add_verbs(verbs: Any) -> None:
    verb = add(verbs, "status", _status, "where a run stands, what it is doing, or how it has ended")
    verb.add_argument("trained", metavar="RUN")
    verb.add_argument("--json", action="store_true", help="print one JSON object")

    verb = add(verbs, "runs", _runs, "a table of the runs below folders, with what differs in their configs")
    verb.add_argument("folders", metavar="DIR", nargs="+")
    verb.add_argument("--sort", metavar="NAME", help="a column or a key of the config, such as loss; smallest first")
    verb.add_argument("--json", action="store_true", help="print one JSON list")


def _status(options: argparse.Namespace) -> None:
    from lm.report.facts import read_facts
    from lm.report.status import status, status_lines

    facts = read_facts(options.trained)
    _print([json.dumps(status(facts))] if options.json else status_lines(facts))


def _runs(options: argparse.Namespace) -> None:
    from lm.report.runs import compare, table

    rows = compare(options.folders, options.sort)
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    _print([json.dumps(rows)] if options.json else table(rows, width))


def _print(lines: Iterable[str]) -> None:
    """Also on a terminal that knows fewer characters."""
    encoding = sys.stdout.encoding or "utf-8"
    for line in lines:
        print(line.encode(encoding, errors="replace").decode(encoding))
