"""Our predictions beside what others measured and published on TPUs.

    python tests/benchmarks/published.py [--only TEXT] [--write]

For each published step: what the analytic model says of our own step for the same model, chips, batch and sequence,
with the setting that the search ranks first and, where theirs is known, with theirs. No TPU and no compiler is needed.
Prints markdown; --write replaces what is between the markers in lm/plan/README.md.

The systems count FLOPs differently, so what is compared is seconds a step, and the causal MFU that these make by our
count (lm/model/flops.py).
"""

import argparse
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[2]))

from published_steps import NOT_PREDICTED, ROWS, Row

from lm.experiment import Config
from lm.plan.analytic import Prediction, predict
from lm.plan.search import rank
from lm.plan.search_report import SHORT

README = Path(__file__).parents[2] / "lm" / "plan" / "README.md"
MARKERS = "<!-- published: begin -->", "<!-- published: end -->"
LARGE = 10.0
"""Points of MFU; a miss above this is explained."""


class Result(NamedTuple):
    row: Row
    first: Prediction | None
    """With the setting that the search ranks first; None: nothing fits."""
    setting: str
    same: Prediction | None
    """With theirs."""

    @property
    def miss(self) -> float | None:
        """Points of causal MFU, predicted less published."""
        return None if self.first is None else self._miss(self.first)

    @property
    def same_miss(self) -> float | None:
        return None if self.same is None else self._miss(self.same)

    def _miss(self, prediction: Prediction) -> float:
        return self.row.mfu(prediction.step_seconds) - self.row.mfu(self.row.step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose system, model or topology has this in it")
    parser.add_argument("--write", action="store_true", help="replace the table in lm/plan/README.md")
    arguments = parser.parse_args()
    if arguments.only and arguments.write:
        parser.error("--write needs all rows: leave out --only")
    rows = [row for row in ROWS if arguments.only in f"{row.system} {row.name} {row.topology}"]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as workers:
        text = as_markdown(list(workers.map(result, rows)))
    if not arguments.write:
        print(text)
        return
    page = README.read_text()
    before, rest = page.split(MARKERS[0])
    README.write_text(f"{before}{MARKERS[0]}\n{text}\n{MARKERS[1]}{rest.split(MARKERS[1])[1]}")


def result(row: Row) -> Result:
    considered, ranked = rank(row.config(), row.machine)
    same = None
    if row.theirs is not None:
        config = row.config(row.theirs)
        same = predict(config, row.machine, config.mesh.sizes)
    best = ranked[0] if ranked else None
    return Result(
        row,
        best and best.prediction,
        in_short(best.config) if best else "nothing fits" if considered else "no mesh",
        same,
    )


def in_short(config: Config) -> str:
    """Mesh, accumulation and remat."""
    train = config.train
    words = [f"{axis} {size}" for axis, size in config.mesh.sizes.items() if size > 1]
    words += [f"acc {train.accumulation}"] if train.accumulation > 1 else []
    words += [train.remat] if train.remat != "names" else []
    for word, chosen in (("save", train.saved), ("offload", train.offloaded)):
        words += [f"{word} {'+'.join(SHORT[name] for name in chosen)}"] if chosen else []
    words += ["opt on host"] if train.optimizer_memory == "host" else []
    return ", ".join(words)


def as_markdown(results: list[Result]) -> str:
    head = (
        "| system | model | chips | batch x sequence | published: s, MFU % | recounted % | predicted: s, MFU % | miss"
    )
    lines = [head + " | predicted with | with their setting: MFU %, miss | note |", "|" + " --- |" * 11]
    return "\n".join([*lines, *map(_line, results), "", *_summary(results), "", *_explained(results), "", *_left_out()])


def _line(one: Result) -> str:
    row = one.row
    slices = f"{row.slices} x " if row.slices > 1 else ""
    cells = [
        row.system,
        row.name,
        slices + row.topology.replace(":", " "),
        f"{row.batch:,} x {row.length:,}",
        f"{row.step:.3g}" + (f", {row.published}" if row.published else ""),
        f"{row.mfu(row.step):.1f}",
        f"{one.first.step_seconds:.3g}, {row.mfu(one.first.step_seconds):.1f}" if one.first else "-",
        f"{one.miss:+.1f}" if one.miss is not None else "-",
        one.setting,
        f"{row.mfu(one.same.step_seconds):.1f}, {one.same_miss:+.1f}" if one.same else "-",
        "; ".join(filter(None, [row.note, _memory(one)])),
    ]
    return f"| {' | '.join(cells)} |"


def _memory(one: Result) -> str:
    """Whether their setting would fit here."""
    if one.same is None or one.same.fits:
        return ""
    memory = one.same.memory
    return f"their setting would need {memory.total / memory.capacity:.2f} of the memory here"


def _summary(results: list[Result]) -> list[str]:
    lines = ["| chip | rows | mean miss | median absolute miss | the same with their setting |", "|" + " --- |" * 5]
    for chip in [*dict.fromkeys(one.row.machine.chip.name for one in results), "all"]:
        chosen = [one for one in results if chip in ("all", one.row.machine.chip.name)]
        ours = [one.miss for one in chosen if one.miss is not None]
        theirs = [one.same_miss for one in chosen if one.same_miss is not None]
        cells = [_mean(ours), _median(ours), f"{_mean(theirs)}, {_median(theirs)}"]
        lines.append(f"| {chip} | {len(chosen)} | {' | '.join(cells)} |")
    return lines


def _mean(misses: list[float]) -> str:
    return f"{statistics.mean(misses):+.1f}" if misses else "-"


def _median(misses: list[float]) -> str:
    return f"{statistics.median(map(abs, misses)):.1f}" if misses else "-"


def _explained(results: list[Result]) -> list[str]:
    large = [one for one in results if one.miss is None or abs(one.miss) > LARGE]
    lines = [f"Misses of more than {LARGE:.0f} points:", ""] if large else []
    for one in large:
        row, miss = one.row, one.setting if one.miss is None else f"{one.miss:+.1f}"
        if one.same_miss is not None:
            miss += f"; with their setting {one.same_miss:+.1f}"
        slices = f"{row.slices} x " if row.slices > 1 else ""
        where = f"{row.system} {row.name}, {slices}{row.topology.replace(':', ' ')}"
        lines.append(f"- {where} ({miss}): {row.why or 'not explained yet'}")
    return lines


def _left_out() -> list[str]:
    return ["Published, and not predicted:", "", *(f"- {what}: {why}." for what, why in NOT_PREDICTED)]


if __name__ == "__main__":
    main()
