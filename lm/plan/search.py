"""`lm plan --search`: the best mesh, accumulation, remat and offload for an experiment on a machine.

The analytic model ranks all candidates, the best few are compiled, and the compiled step decides. What is computed
never changes: batch, sequence length and every other setting of the experiment stay as they are.
"""

import dataclasses
import heapq
import itertools
import math
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from lm.errors import ConfigError, LmError
from lm.experiment import Config
from lm.kernels.attention.splash import LANES
from lm.model.config import ModelConfig
from lm.parallel.mesh import AXES, MeshConfig, abstract_mesh
from lm.parallel.sharding import LARGE_BYTES, Rules, check_table, rules
from lm.plan.analytic import Prediction, predict, stored_sizes
from lm.plan.kept import kept
from lm.plan.machine import Machine
from lm.plan.plan import check_run, plan
from lm.plan.report import as_json, for_run
from lm.plan.topology import topology
from lm.train.config import TrainConfig

SHOWN = 10
FINALISTS = 3
"""Candidates that are compiled and fit; the compiler's order decides among them."""
ATTEMPTS = 6
"""Candidates that are compiled at most, those that do not fit included."""
MESHES = 30
"""Meshes for which every way of saving and offloading is tried: the best of all with full remat."""
SAME = 0.002
"""Candidates whose times differ by this share are taken to be as fast."""
MARGIN = 0.9
"""Share of the memory that the analytic model may fill: it is less exact than the compiler, which takes very long for
programs that hardly fit."""
MOST_PARTS = {"tensor": 16, "context": 64, "stage": 32}
MOST_ACCUMULATION = 64

ATTENTION = ("query", "key", "value", "attention")
HIDDEN = ("feed_forward_up", "feed_forward_gate")
Way = tuple[str, tuple[str, ...], tuple[str, ...]]
"""What is saved for the backward pass: kind of remat, names saved on the device, on the host."""
REMAT: tuple[Way, ...] = (
    ("full", (), ()),
    ("names", ("attention",), ()),
    ("names", ATTENTION, ()),
    ("names", (*ATTENTION, "attention_output"), ()),
    ("names", ("attention", *HIDDEN), ()),
    ("names", (*ATTENTION, *HIDDEN), ()),
    ("names", (*ATTENTION, "attention_output", *HIDDEN), ()),
    ("names", (), ("attention",)),
    ("names", (), ATTENTION),
    ("names", ATTENTION, HIDDEN),
    ("names", (), (*ATTENTION, *HIDDEN)),
    ("none", (), ()),
)
"""The ways that are tried; ones between these save less time for their memory."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    config: Config
    sizes: tuple[tuple[str, int], ...]
    prediction: Prediction
    compiled: dict[str, Any] | None = None
    """What `lm plan --json` says of it, when it was compiled."""

    @property
    def seconds(self) -> float:
        """Of a step: as compiled, or else as predicted."""
        if self.compiled is None:
            return self.prediction.step_seconds
        return self.compiled["step_seconds"] or math.inf


@dataclasses.dataclass(frozen=True)
class Result:
    """`best`: the ten best, compiled ones that fit first. Interrupted: what there was until then."""

    best: tuple[Candidate, ...]
    rejected: tuple[Candidate, ...]
    """Compiled, but in need of more memory than there is."""
    considered: int
    fitting: int
    """By the analytic model."""
    ranking_seconds: float
    compile_seconds: float
    interrupted: bool

    @property
    def winner(self) -> Candidate | None:
        first = self.best[0] if self.best else None
        return first if first is not None and first.compiled is not None else None


def search_on(
    config: Config, name: str, *, slices: int = 1, tokens: float | None = None, price: float | None = None
) -> Result:
    """Searches for the slices called `name`, telling on standard error how it goes. What is compiled is kept, so that
    a search that was interrupted goes on. Raises as `plan` and `search` do."""
    total = check_run(config, tokens, price)
    where = topology(name, slices=slices)

    def compile_one(chosen: Config) -> dict[str, Any]:
        found = kept(chosen, name, slices, lambda: as_json(plan(chosen, name, slices=slices, advise=False)))
        return for_run(found, total, price)

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    return search(config, where.machine, compile_one, say)


def search(
    config: Config, machine: Machine, compile_one: Callable[[Config], dict[str, Any]], say: Callable[[str], None]
) -> Result:
    """Ranks, then compiles with `compile_one`, which gives what `as_json` does. Ctrl-C ends it with what it has.

    Raises ConfigError when no mesh divides model and batch, or nothing fits by far; and what `compile_one` raises when
    it does so for every candidate.
    """
    start = time.monotonic()
    considered, ranked = rank(config, machine)
    ranking = time.monotonic() - start
    if not ranked:
        raise ConfigError(_nothing_fits(config, machine, considered))
    say(f"{considered:,} candidates ranked in {ranking:.1f} s, {len(ranked):,} fit by the analytic model")
    done: dict[int, Candidate] = {}
    failed: dict[int, LmError] = {}
    interrupted = False
    try:
        for place, candidate in enumerate(ranked):
            fitting = [one for one in done.values() if one.compiled is not None and one.compiled["fits"]]
            if len(fitting) >= FINALISTS or len(done) + len(failed) >= ATTEMPTS:
                break
            if any(_alike(candidate, one) for one in fitting):
                continue
            number, changes = len(done) + len(failed) + 1, settings(candidate.config, config)
            say(f"compiling {number}: {' '.join(changes) or 'the config as it is'}")
            try:
                compiled = _interruptible(compile_one, candidate.config)
            except LmError as error:  # the others may still be compiled
                failed[place] = error
                say(f"  not possible: {str(error).splitlines()[0]}")
                continue
            done[place] = dataclasses.replace(candidate, compiled=compiled)
            verdict = f"{compiled['step_seconds']:.4g} s a step" if compiled["fits"] else "does not fit"
            say(f"  {verdict}; predicted {candidate.prediction.step_seconds:.4g}; {compiled['compile_seconds']:.0f} s")
    except KeyboardInterrupt:
        interrupted = True
    if failed and not done and not interrupted:
        raise next(iter(failed.values()))
    fit = [one for one in done.values() if one.compiled is not None and one.compiled["fits"]]
    rest = [one for place, one in enumerate(ranked) if place not in done and place not in failed]
    return Result(
        best=tuple([*sorted(fit, key=lambda one: one.seconds), *rest][:SHOWN]),
        rejected=tuple(one for one in done.values() if one not in fit),
        considered=considered,
        fitting=len(ranked),
        ranking_seconds=ranking,
        compile_seconds=time.monotonic() - start - ranking,
        interrupted=interrupted,
    )


def rank(config: Config, machine: Machine) -> tuple[int, list[Candidate]]:
    """How many candidates there were, and those that fit, fastest first.

    Every mesh is looked at with full remat; the fastest of them in every way of `REMAT`.
    """
    considered, meshes = 0, defaultdict(list)
    for mesh, sizes, accumulation in meshes_for(config, machine):
        considered += 1
        one = _candidate(config, machine, mesh, sizes, accumulation, REMAT[0])
        if one is not None:
            meshes[mesh].append(one)
    fitting: list[Candidate] = []
    ways = _ways(config.model)
    for found in heapq.nsmallest(MESHES, meshes.values(), key=lambda found: min(one.seconds for one in found)):
        for first in found:
            considered += len(ways) - 1
            sizes, accumulation = dict(first.sizes), first.config.train.accumulation
            others = [_candidate(config, machine, first.config.mesh, sizes, accumulation, way) for way in ways]
            fitting += [one for one in others if one is not None]
    return considered, sorted(fitting, key=_order)


def _order(one: Candidate) -> tuple[int, int, int]:
    """The fastest first; of those that are as fast, what needs least of the host, then of the device."""
    memory = one.prediction.memory
    return round(math.log(one.prediction.step_seconds) / SAME), memory.host, memory.total


def _alike(a: Candidate, b: Candidate) -> bool:
    """Whether they differ in nothing but what is saved where, and by the model are as fast: one of them is enough."""
    accumulation = a.config.train.accumulation == b.config.train.accumulation
    return a.config.mesh == b.config.mesh and accumulation and _order(a)[0] == _order(b)[0]


def meshes_for(config: Config, machine: Machine) -> Iterator[tuple[MeshConfig, dict[str, int], int]]:
    """Meshes with their sizes by axis, and accumulations, that divide model and batch."""
    model, train, table = config.model, config.train, rules(config.mesh)
    stored = stored_sizes(model)
    expert = max(1, config.mesh.expert)
    if machine.devices % expert:
        return
    for tensor, context, stage, data in itertools.product(
        *(_divisors(machine.devices // expert, MOST_PARTS.get(axis)) for axis in ("tensor", "context", "stage", "data"))
    ):
        fsdp, left = divmod(machine.devices, tensor * context * stage * data * expert)
        if left or not fsdp:
            continue
        sizes = dict(zip(AXES, (stage, data, fsdp, expert, context, tensor), strict=True))
        if machine.slices > 1 and (data * stage) % machine.slices:
            continue
        if config.mesh.rules and not _allowed(sizes, table):
            continue
        parts = {name: math.prod(sizes[axis] for axis in axes) for name, axes in table.items()}
        if any(size % parts[name] for axes, shape in stored for name, size in zip(axes, shape, strict=True)):
            continue
        if data < machine.devices and any(  # `tree_shardings` refuses it
            4 * math.prod(shape) > LARGE_BYTES and all(parts[name] == 1 for name in axes) for axes, shape in stored
        ):
            continue
        least = (2 * context if context > 1 else 1) * tensor
        if train.sequence_length % least or (context > 1 and train.sequence_length % (context * LANES)):
            continue  # the second: the attention kernel takes no part of a tile
        for accumulation in _divisors(train.batch_size, MOST_ACCUMULATION):
            rows, uneven = divmod(train.batch_size // accumulation, parts["batch"])
            if uneven or not rows:
                continue
            for microbatches, repeats in _pipelines(model, stage, rows):
                mesh = MeshConfig(**sizes, microbatches=microbatches, repeats=repeats, rules=config.mesh.rules)
                yield mesh, sizes, accumulation


def _allowed(sizes: dict[str, int], table: Rules) -> bool:
    """Whether rules that are not the default work on a mesh of these sizes."""
    try:
        check_table(abstract_mesh(MeshConfig(**sizes)), table)  # type: ignore[arg-type]
    except ConfigError:
        return False
    return True


def settings(config: Config, base: Config) -> list[str]:
    """The overrides that make `config` of `base`: only mesh and train are looked at."""
    found = []
    for section in ("mesh", "train"):
        new, old = getattr(config, section), getattr(base, section)
        for field in dataclasses.fields(new):
            value = getattr(new, field.name)
            if value != getattr(old, field.name):
                found.append(f"--{section}.{field.name} {_written(value)}")
    return found


def _written(value: object) -> str:
    return ",".join(map(str, value)) or "'()'" if isinstance(value, tuple) else str(value)


def _candidate(
    config: Config, machine: Machine, mesh: MeshConfig, sizes: dict[str, int], accumulation: int, way: Way
) -> Candidate | None:
    """With the optimizer's state on the device or, only where that is too much, on the host; None where both are."""
    for where in ("device", "host"):
        chosen = _chosen(config, mesh, accumulation, way, where)
        prediction = predict(chosen, machine, sizes)
        memory = prediction.memory
        on_host = memory.host <= MARGIN * machine.chip.host_bytes or not memory.host
        if memory.total <= MARGIN * memory.capacity and on_host:
            return Candidate(chosen, tuple(sizes.items()), prediction)
    return None


def _chosen(config: Config, mesh: MeshConfig, accumulation: int, way: Way, optimizer_memory: str) -> Config:
    kind, saved, offloaded = way
    train: TrainConfig = dataclasses.replace(
        config.train,
        accumulation=accumulation,
        remat=kind,  # type: ignore[arg-type]
        saved=saved,
        offloaded=offloaded,
        optimizer_memory=optimizer_memory,  # type: ignore[arg-type]
    )
    return dataclasses.replace(config, mesh=mesh, train=train)


def _ways(model: ModelConfig) -> list[Way]:
    """REMAT, without names that the model has not."""

    def there(names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in names if model.gated or name != "feed_forward_gate")

    return [(kind, there(saved), there(offloaded)) for kind, saved, offloaded in REMAT]


def _pipelines(model: ModelConfig, stage: int, rows: int) -> Iterator[tuple[int, int]]:
    """Microbatches and repeats that divide rows of one part of the batch, and layers."""
    if stage == 1:
        yield 0, 1
        return
    for rounds in (1, 2, 4, 8, 16):
        if rows % (rounds * stage):
            break
        for repeats in (1, 2, 4):
            if model.layers % (stage * repeats * len(model.pattern)) == 0:
                yield rounds * stage, repeats


def _divisors(number: int, most: int | None = None) -> list[int]:
    return [n for n in range(1, min(number, most or number) + 1) if number % n == 0]


def _interruptible(work: Callable[[Config], dict[str, Any]], config: Config) -> dict[str, Any]:
    """What `work` gives. The compiler cannot be interrupted, so it runs in another thread, which Ctrl-C leaves."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(work(config))
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def _nothing_fits(config: Config, machine: Machine, considered: int) -> str:
    if machine.devices % max(1, config.mesh.expert):
        return f"mesh.expert = {config.mesh.expert} does not divide {machine.devices} devices, and a search keeps it"
    if not considered:
        return (
            f"no mesh of {machine.devices} devices divides the model and a batch of {config.train.batch_size} x "
            f"{config.train.sequence_length}: make train.batch_size a multiple of {machine.devices}, or take another "
            "topology"
        )
    least = min(
        predict(_chosen(config, mesh, accumulation, REMAT[0], "host"), machine, sizes).memory.total
        for mesh, sizes, accumulation in meshes_for(config, machine)
    )
    times = math.ceil(least / (MARGIN * machine.chip.hbm_bytes))
    return (
        f"none of {considered:,} candidates fits: the least needs about {least / 2**30:.1f} GiB of the "
        f"{machine.chip.hbm_bytes / 2**30:.1f} on each chip, of which a search fills {MARGIN:.0%}. "
        f"About {times} times as many chips would do"
    )
