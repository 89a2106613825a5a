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

    verb = add(verbs, "plot", _plot, "curves of runs, in the terminal or in a file")
    verb.add_argument("trained", metavar="RUN", nargs="+")
    verb.add_argument(
        "--metric", metavar="NAME", action="append", help="of metrics.jsonl; may be repeated; default: loss"
    )
    verb.add_argument("--x", choices=("step", "tokens", "seconds"), default="step", help="seconds: those in steps")
    verb.add_argument("--smooth", metavar="N", type=int, default=1, help="mean of the last N points")
    verb.add_argument("--log", action="store_true", help="logarithmic values")
    verb.add_argument("--out", metavar="FILE", help="a .png or .svg, which needs matplotlib: pip install 'lm[plot]'")


def _status(options: argparse.Namespace) -> None:
    from lm.report.facts import read_facts
    from lm.report.status import status, status_lines

    facts = read_facts(options.trained)
    _print([json.dumps(status(facts))] if options.json else status_lines(facts))


def _runs(options: argparse.Namespace) -> None:
    from lm.report.runs import compare, table

    rows = compare(options.folders, options.sort, lambda line: print(f"lm: {line}", file=sys.stderr))
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    _print([json.dumps(rows)] if options.json else table(rows, width))


def _plot(options: argparse.Namespace) -> None:
    from lm.report.curves import curves

    found = curves(options.trained, options.metric or ["loss"], x=options.x, smooth=options.smooth, log=options.log)
    for note in found.notes:
        print(f"lm: {note}", file=sys.stderr)
    if options.out is None:
        from lm.report.terminal import Canvas, drawn

        _print(drawn(found, Canvas.of(sys.stdout)))
    else:
        from lm.report.figure import write

        write(found, options.out)
        _print([f"written to {options.out}"])


def _print(lines: Iterable[str]) -> None:
    """Also on a terminal that knows fewer characters."""
    encoding = sys.stdout.encoding or "utf-8"
    for line in lines:
        print(line.encode(encoding, errors="replace").decode(encoding))
