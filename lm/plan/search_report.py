"""What a search found: the ten best with reasons, and the winner as config lines; or the same as JSON."""

import json
import math
from typing import Any

from lm.chips import GIB
from lm.experiment import Config
from lm.plan.report import BOUNDS
from lm.plan.search import Candidate, Result, settings

SHORT = {
    "query": "q",
    "key": "k",
    "value": "v",
    "attention": "attn",
    "attention_output": "attn_out",
    "feed_forward_up": "up",
    "feed_forward_gate": "gate",
}


def print_search(result: Result, base: Config, *, as_object: bool) -> None:
    print(json.dumps(as_json(result, base)) if as_object else as_text(result, base))


def as_json(result: Result, base: Config) -> dict[str, Any]:
    """The winner as `lm plan --json` has it, and under `search` how it was found. Without a winner, only the latter,
    and under `fits` false when none that was compiled does, null when none was."""
    winner = result.winner
    none: dict[str, Any] = {"fits": False if result.rejected else None}
    return (winner.compiled or none if winner else none) | {
        "search": {
            "considered": result.considered,
            "fitting": result.fitting,
            "ranking_seconds": result.ranking_seconds,
            "compile_seconds": result.compile_seconds,
            "interrupted": result.interrupted,
            "winner": settings(winner.config, base) if winner else None,
            "best": [_values(one, base) for one in result.best],
            "rejected": [_values(one, base) for one in result.rejected],
        }
    }


def _values(one: Candidate, base: Config) -> dict[str, Any]:
    compiled = one.compiled
    return {
        "settings": settings(one.config, base),
        "mesh": dict(one.sizes),
        "predicted_step_seconds": one.prediction.step_seconds,
        "predicted_memory_bytes": one.prediction.memory.total,
        "step_seconds": compiled["step_seconds"] if compiled else None,
        "memory_bytes": compiled["memory"]["total_bytes"] if compiled else None,
        "mfu": compiled["mfu"] if compiled else one.prediction.estimate.mfu,
        "compile_seconds": compiled["compile_seconds"] if compiled else None,
    }


def as_text(result: Result, base: Config) -> str:
    """A table and what to write into the config."""
    head = (
        f"{result.considered:,} candidates, {result.fitting:,} of them fit m; ranked in {result.ranking_seconds:.1f} "
        f"s, compiled in {result.compile_seconds:.0f} s"
    )
    lines = [
        head + ("; interrupted: what was compiled is kept, the same command goes on" if result.interrupted else "")
    ]
    lines += ["", f"{'':>3} {'step s':>8} {'GiB':>6} {'MFU':>6}   {'setting':<52} why"]
    for place, one in enumerate(result.best, 1):
        lines.append(_line(f"{place:>2}", one, result.best[0]))
    lines += [_line(" -", one, result.best[0] if result.best else one) for one in result.rejected]
    winner = result.winner
    if winner is None:
        why = "none that was compiled fits" if result.rejected else "none of them was compiled: m is a model's figure"
        return "\n".join([*lines, "", why, LEGEND])
    changes = settings(winner.config, base)
    lines += ["", "best, as config lines:" if changes else "best: the config as it is"]
    lines += [f"  {change}" for change in changes]
    return "\n".join([*lines, "", LEGEND])


LEGEND = "c: compiled for this machine  m: by the analytic model only, neither compiled nor checked"


def _line(name: str, one: Candidate, best: Candidate) -> str:
    compiled, mark = one.compiled, "c" if one.compiled else "m"
    seconds, mfu, total = one.seconds, one.prediction.estimate.mfu, one.prediction.memory.total
    if compiled:
        mfu, total = compiled["mfu"] or 0.0, compiled["memory"]["total_bytes"]
    shown = f"{seconds:8.4g}" if math.isfinite(seconds) else f"{'-':>8}"
    return f"{name:>3} {shown} {total / GIB:6.1f} {mfu:6.1%} {mark} {_setting(one.config):<52} {_reason(one, best)}"


def _setting(config: Config) -> str:
    """In short: mesh, accumulation, remat."""
    mesh, train = config.mesh, config.train
    words = [f"{axis} {size}" for axis, size in mesh.sizes.items() if size > 1] or ["one device"]
    if mesh.stage > 1:
        words.append(f"micro {mesh.pipeline_microbatches}" + (f" x{mesh.repeats}" if mesh.repeats > 1 else ""))
    if train.accumulation > 1:
        words.append(f"acc {train.accumulation}")
    if train.remat != "names":
        words.append(f"remat {train.remat}")
    if train.saved:
        words.append("save " + "+".join(SHORT[name] for name in train.saved))
    if train.offloaded:
        words.append("offload " + "+".join(SHORT[name] for name in train.offloaded))
    if train.optimizer_memory == "host":
        words.append("opt on host")
    return ", ".join(words)


def _reason(one: Candidate, best: Candidate) -> str:
    """What bounds the best; for others, what costs more than there."""
    if one.compiled and not one.compiled["fits"]:
        return "needs more memory than there is"
    mine, parts = _parts(one), _parts(best)
    if one is best:
        first = max(mine, key=lambda part: mine[part])
        return f"bound by {BOUNDS.get(first, first)}, {mine[first] / sum(mine.values()):.0%} of the step"
    if (one.compiled is None) != (best.compiled is None):  # figures of different kinds: compare the models
        mine, parts = one.prediction.estimate.times.parts, best.prediction.estimate.times.parts
    more = {part: mine[part] - parts[part] for part in mine}
    worst = max(more, key=lambda part: more[part])
    if more[worst] < 0.001 * sum(parts.values()):
        return "as fast by the model"
    word = "recomputes or idles" if worst == "compute" else BOUNDS.get(worst, worst)
    return f"+{more[worst]:.3g} s {word}"


def _parts(one: Candidate) -> dict[str, float]:
    return one.compiled["seconds"] if one.compiled and one.compiled["fits"] else one.prediction.estimate.times.parts
