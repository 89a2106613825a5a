"""Training, to be read from top to bottom.

The order of things in a run is a contract:
  1. the run directory is locked, and the config agrees with what the directory holds;
  2. the data is built, or found built, and the tokenizer fits the model;
  3. the newest good checkpoint is restored, or the state is drawn from the seed;
  4. for each step: the step itself, metrics of the step before, held-out loss if due, a save if due; when too many
     steps in a row could not be applied, back to a checkpoint, to go on without the batches that led there;
  5. the last save is waited for, then all held-out text is evaluated and a sample is written.

In a run of many processes all of them go through this order. Each reads its rows of the batches and writes its part of
the checkpoints; what else is written or printed comes from one of them, the primary. The others hear from it what only
it can know: that the data is built, which checkpoint is restored, whether a save succeeded.

Steps are counted from 0: step k takes the state with k steps done, and batch k, to k + 1 steps done. What is
logged for step k, and `lm data show --step k`, belong together; held-out values logged for step k are of the state
after it. A checkpoint is named by the steps done.
"""

import contextlib
import resource
import shlex
import sys
import time
import traceback
from collections.abc import Collection, Iterator
from typing import TextIO

import jax
from jax.sharding import Mesh

from lm import config as configs
from lm.checkpoint.checkpoints import Checkpoints, list_checkpoints
from lm.checkpoint.local import LocalCheckpoints, restore_newest
from lm.data.loader import Loader
from lm.data.reading import said_by
from lm.errors import DivergedError, Stopped, StorageError
from lm.experiment import Config
from lm.files import write_unless_there
from lm.model.flops import flops_per_token, parameter_count, peak_flops
from lm.parallel.layout import layout_of
from lm.parallel.mesh import make_mesh
from lm.parallel.processes import ALONE, Processes
from lm.parallel.wire import say as say_here
from lm.train import ledger, provenance
from lm.train.bad_steps import BadSteps, Seen
from lm.train.corruption import Verification
from lm.train.evaluator import Evaluator
from lm.train.feed import Feed, build_data
from lm.train.forecast import Expect, Expected, Forecast
from lm.train.groups import groups_of
from lm.train.health import Health
from lm.train.host_memory import keep_freed_memory
from lm.train.journal import Journal
from lm.train.ledger import Ledger
from lm.train.meter import Meter
from lm.train.now import Now
from lm.train.profiler import Profiler
from lm.train.progress import Progress, human_count, human_seconds
from lm.train.resume import refuse_other_run
from lm.train.run_directory import RunDirectory
from lm.train.signals import StopRequest, stop_signals
from lm.train.slowest import slowest
from lm.train.state import TrainState, abstract_state, forget, init_state
from lm.train.step import Metrics, check_batch, jit_train_step
from lm.train.summaries import NoSummaries, Summaries, verbatim
from lm.train.trackers import Trackers
from lm.train.watchdog import Watchdog

SLOWEST_SECONDS = 600.0
"""Between two lines that name the process that holds the others up."""


def train(
    config: Config,
    *,
    stream: TextIO | None,
    processes: Processes = ALONE,
    expect: Expect | None = None,
    allow: Collection[str] = (),
    began: float | None = None,
) -> None:
    """Runs, or goes on with, the run in `config.run.dir` until all steps are done.

    Progress is printed to `stream`; what `expect` predicts is logged beside what is measured. `allow` is what may be
    another one than a run to go on with was trained by, of `provenance.ALLOWED`; `began` is when the process did, by
    time.monotonic.
    Raises LmError, whose exit code says how the run ended: Stopped when a signal ended it after a save,
    DivergedError, DataError, StorageError, or ConfigError before anything happened.
    All of the `processes` call this with the same config.
    """
    began = time.monotonic() if began is None else began
    run = RunDirectory(config.run.dir)
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    mesh = make_mesh(config.mesh)
    abstract = abstract_state(config, mesh)
    check_batch(config, mesh, layout_of(config.mesh, mesh))
    trackers = Trackers(config.log.trackers if processes.primary else ())
    with (
        stop_signals() as stop,
        run if processes.primary else contextlib.nullcontext(run) as directory,
        (
            Progress(config.train.steps, stream=stream, log=directory.log)
            if processes.primary
            else Progress(config.train.steps, stream=None)
        ) as progress,
        said_by(
            progress.say
            if processes.primary
            else lambda line: say_here(f"lm: {processes.name(processes.index)}: {line}")
        ),
        trackers,  # around the journal, so that they are told how the run has ended
    ):
        facts = {"processes": processes.count, "devices": mesh.size, "kind": jax.devices()[0].device_kind}
        if processes.primary:
            refuse_other_run(directory, config, facts, allow, progress.say)
        path, now = (directory.journal, directory.now) if processes.primary else (None, None)
        with (
            Journal(path, facts=facts, began=began, report=progress.say) as journal,
            Watchdog(config.watchdog, directory.path, processes, on_hang=journal.hung) as watchdog,
            Now(now, start=journal.start, look=lambda: _doing(journal, watchdog)),
        ):
            progress.watch(lambda: _doing(journal, watchdog))
            _Run(config, mesh, abstract, directory, progress, journal, watchdog, stop, processes, expect, trackers).go()


def _doing(journal: Journal, watchdog: Watchdog) -> tuple[str, int]:
    """A cause of time, or "data" while it is built, for which the journal has no cause; and the steps done."""
    cause, done = journal.now()
    return ("data" if watchdog.now[0] == "data" else cause), done


class _NotApplied(Exception):
    """Too many steps in a row were not applied; `step` is the last."""

    def __init__(self, step: int):
        super().__init__(step)
        self.step = step


class _Run:
    """One start of a run. The phases are methods, in the order in which `go` calls them."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        abstract: TrainState,
        directory: RunDirectory,
        progress: Progress,
        journal: Journal,
        watchdog: Watchdog,
        stop: StopRequest,
        processes: Processes,
        expect: Expect | None,
        trackers: Trackers,
    ):
        self.config, self.mesh, self.abstract = config, mesh, abstract
        self.directory, self.progress, self.stop = directory, progress, stop
        self.journal, self.watchdog, self.trackers = journal, watchdog, trackers
        self.shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
        self.processes, self.expect = processes, expect
        self.stopped_by: str | None = None
        self.bad_steps = BadSteps(groups_of(config.model).kinds)
        self.health = Health(config)
        self.say = progress.say
        self.started = time.monotonic()
        self.slowest_said = self.started

    def go(self) -> None:
        self.open_data()
        with self.journal.time("restore"):
            first, state = self.restore_or_draw()
        self.feed.report(first)
        self.open_summaries(first)
        with self.journal.time("compile"):
            self.compile()
        self.journal.note("compiled")
        self.trackers.follow(self.directory.path, self.say)
        self.profiler = Profiler(self.config.profile, self.directory, self.say) if self.processes.primary else None
        try:
            state = self.steps(first, state)
            self.finish(state)
        finally:
            if self.profiler is not None:
                self.profiler.close()
            self.checkpoints.close()
            self.summaries.close()

    # 2. The data

    def open_data(self) -> None:
        self.watchdog.phase("data")
        build_data(self.config, self.processes, self.say)
        self.watchdog.phase("start")
        self.feed = Feed(self.config, self.mesh, self.processes, self.say)

    # 3. The state

    def restore_or_draw(self) -> tuple[int, TrainState]:
        config, tokenizer = self.config, self.feed.tokenizer
        attachments = {
            "config.json": configs.to_json(config).encode(),
            provenance.FILE: provenance.write(provenance.provenance()),
            tokenizer.file_name: tokenizer.serialize(),
        }
        self.checkpoints = Checkpoints(
            self.directory.checkpoints,
            config.checkpoint,
            attachments,
            self.say,
            self.processes,
            fresh=lambda: init_state(config, jax.random.key(config.run.seed)),
        )
        self.local = LocalCheckpoints(
            config.checkpoint, self.directory.path, self.journal.run, self.say, self.processes
        )
        restored = restore_newest(self.checkpoints, self.local, self.directory.checkpoints, self.abstract)
        if restored is None:
            first, state = 0, self.draw()
        else:
            first, state = restored.step, restored.state
            self.say(f"goes on from {'local ' * (restored.tier == 'local')}checkpoint {first}")
            self.journal.restored(first, restored.tier)
        self.durable = first if restored and restored.tier == "durable" else None
        self.take_data(self.feed.noted(restored) if self.processes.primary else None)
        if self.processes.primary:
            write_unless_there(self.directory.config, attachments["config.json"])
        return first, state

    def draw(self) -> TrainState:
        """The state at step 0."""
        draw = jax.jit(lambda key: init_state(self.config, key), out_shardings=self.shardings)
        return draw(jax.random.key(self.config.run.seed))

    def take_data(self, found: Ledger | None) -> None:
        """Trains on this from now on; the primary says it to the others."""
        self.checkpoints.attach(ledger.FILE, self.feed.take(found))

    def open_summaries(self, first: int) -> None:
        self.summaries = (
            Summaries(self.directory, first_step=first, report=self.say) if self.processes.primary else NoSummaries()
        )

    def compile(self) -> None:
        """Compiles the train and evaluation steps, so that no later step can be compiled by surprise."""
        config, start = self.config, time.monotonic()
        batch = self.feed.shapes()
        step = jit_train_step(config, self.mesh)
        lowered = step.lower(self.abstract, batch)
        self.train_step = lowered.compile()
        self.verification = (
            Verification(self.train_step, self.abstract, lowered.out_info[1], self.mesh, self.processes)
            if config.recovery.verify_every
            else None
        )
        # At a new phase of the mixture the loss is another one.
        self.forget = jax.jit(forget, donate_argnums=0, out_shardings=self.shardings).lower(self.abstract).compile()
        self.evaluator = Evaluator(
            config,
            self.mesh,
            self.abstract,
            self.feed,
            say=self.say,
            alive=lambda done: self.watchdog.phase("evaluation", done),
        )
        self.checkpoints.compile(self.abstract)
        flops = flops_per_token(config.model, config.train.sequence_length)
        peak = peak_flops(jax.devices()[0].device_kind)
        self.meter = Meter(
            tokens_per_step=config.train.batch_size * config.train.sequence_length,
            flops_per_token=flops.causal,
            peak_flops=None if peak is None else peak * self.mesh.size,
        )
        tokens = self.feed.training_tokens
        self.say(
            f"{human_count(parameter_count(config.model))} parameters, {human_count(flops.causal)} FLOP per token "
            f"(causal), {human_count(tokens)} training tokens, "
            f"{self.meter.tokens_per_step * config.train.steps / tokens:.2f} epochs; "
            f"{self.mesh.size} x {jax.devices()[0].device_kind}; "
            f"compiled in {human_seconds(time.monotonic() - start)}, "
            f"ready after {human_seconds(time.monotonic() - self.started)}"
        )
        self.forecast = Forecast(self.expected(), self.train_step, self.mesh.local_devices[0])
        self.describe()

    def describe(self) -> None:
        """Shows what does not come from steps: config, plan, and the page of charts."""
        self.summaries.config(self.config, self.journal.run)
        if lines := self.forecast.lines:
            self.summaries.text(0, "plan", verbatim("\n".join(lines)))

    def expected(self) -> Expected | None:
        """What is predicted; a prediction that fails never ends a run."""
        if self.expect is None or not self.processes.primary:
            return None
        try:
            return self.expect(self.config, self.mesh)
        except Exception as error:
            self.say(f"step time and memory could not be predicted: {type(error).__name__}: {error}")
            return None

    # 4. The steps

    def steps(self, first: int, state: TrainState) -> TrainState:
        last = self.config.train.steps
        self.stop.deferred = True
        while True:
            try:
                with self.journal.time("step"), self.feed.from_step(first) as loader:
                    state, done = self.run_steps(first, state, loader)
                break
            except _NotApplied as problem:
                traceback.clear_frames(problem.__traceback__)  # they hold the state, and there is room for one
                until = problem.step + 1
            del state
            self.watchdog.phase("start")
            with self.journal.time("restore"):
                first, state = self.rewind(until)
        if done != self.durable:
            with self.doing("save", done):
                self.checkpoints.save(state, done, wait=True)
                self.checkpoints.wait()
            self.journal.saved(self.checkpoints.last_good)
        if self.checkpoints.last_good == done:
            self.local.remove_all()
        if done < last:
            if self.checkpoints.last_good != done:
                raise StorageError(f"stopped by {self.stopped_by}, and step {done} could not be saved: see above")
            stopped = Stopped(
                f"stopped by {self.stopped_by}: {done} of {last} steps are done and saved; "
                f"`lm train {self.directory.path}` goes on from there"
            )
            stopped.together = True
            raise stopped
        return state

    def run_steps(self, first: int, state: TrainState, loader: Loader) -> tuple[TrainState, int]:
        config, last = self.config, self.config.train.steps
        batch = self.feed.put(next(loader)[1]) if first < last else None
        before: tuple[int, Metrics, dict[str, float]] | None = None
        self.meter.start(first)
        for k in range(first, last):
            self.watchdog.phase("step", k)
            requests = {"stop": self.stop.received}
            if k > first:
                requests |= {"save": self.checkpoints.retry_due(), "local save": self.local.due()}
            with self.meter.spending("others"):
                wanted = self.processes.meet_before(requests)
            self.stopped_by = wanted.get("stop")
            if self.stopped_by:
                last = k
                break
            if before is not None and ("save" in wanted or "local save" in wanted):
                self.log(*before)
                before = None
            if "save" in wanted:
                self.save(state, k)
            if "local save" in wanted:
                with self.doing("save", k):
                    self.local.save(state, k, self.checkpoints.attachments)
            self.profile(k, state)
            if self.feed.batches.begins_phase(k):
                state = self.forget(state)
            verification = self.verification if self.is_due(config.recovery.verify_every, k + 1) else None
            with self.meter.spending("devices"):  # some run a step at once
                if verification:
                    state, metrics = verification.step(k, state, batch)
                else:
                    state, metrics = self.train_step(state, batch)
            if k + 1 < last:  # the next batch is on its way to the devices while they compute
                with self.meter.spending("input"), self.journal.time("input"):
                    coming = next(loader)[1]
                batch = self.feed.put(coming)
            if before is not None:
                self.log(*before)
            due = self.is_due(config.eval.every, k + 1) and k + 1 < last
            before = (k, metrics, self.evaluate(state, k) if due else {})
            if self.checkpoints.due(k + 1) and k + 1 < last:
                self.log(*before)
                before = None
                self.save(state, k + 1)
        self.profile(None, state)
        if before is not None:
            self.log(*before)
        return state, last

    def profile(self, k: int | None, state: TrainState) -> None:
        """Begins or ends a trace before step k, if one is due; None: after the last step."""
        if self.profiler is None:
            return
        if self.profiler.turns(k):
            with self.meter.spending("devices"):  # a trace has whole steps
                jax.block_until_ready(state)
            # Still a step for the watchdog: the other processes wait in theirs.
            with self.meter.spending("profile"), self.journal.time("profile"):
                self.profiler.turn(k)
        self.profiler.mark(k)

    def save(self, state: TrainState, step: int) -> None:
        with self.doing("save", step):
            self.checkpoints.save(state, step)

    @contextlib.contextmanager
    def doing(self, what: str, step: int | None) -> Iterator[None]:
        """For what is no training, "evaluation" or "save", after so many steps."""
        self.watchdog.phase(what, step)
        with self.meter.spending(what), self.journal.time(what):
            yield
        self.watchdog.phase("step", step)

    def is_due(self, every: int, done: int) -> bool:
        return every > 0 and done % every == 0

    def log(self, k: int, metrics: Metrics, extra: dict[str, float]) -> None:
        """Reads the metrics of step k, which the devices have finished by now or soon will have."""
        with self.meter.spending("devices"):
            if self.verification:
                self.verification.check(k)
            fetched = jax.device_get(metrics)
        kinds, depths = fetched.pop("kind_norms"), fetched.pop("depth_norms")
        values = {name: float(value) for name, value in fetched.items()}
        streak, finite = int(values.pop("bad_streak")), bool(values.pop("finite"))
        self.bad_steps.see(Seen(k, values, kinds), applied=not streak, finite=finite)
        self.health.see(values, applied=not streak)
        if streak:
            what = "a spike" if finite else "loss or gradient not finite"
            self.say(f"step {k}: {what}, not applied ({streak} in a row)")
        if streak >= self.config.recovery.max_bad_steps:
            raise _NotApplied(k)
        self.journal.step(k)
        self.journal.saved(self.checkpoints.last_good)
        self.checkpoints.check()
        if rewinds := self.feed.ledger.times:
            values["rewinds"] = rewinds
            values["batches_left_out"] = self.feed.batches.skips.batch(k) - k
        values |= extra
        if k % self.config.log.every == 0 or k == self.config.train.steps - 1 or extra or streak:
            values |= self.meter.read(k) | self.forecast.values() | self.health.values(depths)
            self.name_slowest(k)
            if self.processes.primary:
                values |= self.checkpoints.counts() | self.local.counts() | self.journal.goodput().values()
            self.summaries.scalars(k, values)
            if self.meter.intervals == 2:  # the first holds what happens only once
                self.compare()
        self.progress.update(k + 1, values | self.meter.latest)

    def name_slowest(self, k: int) -> None:
        """Says now and then which process holds the others up, if one does."""
        self.processes.note("speed", {"step": k, "step_seconds": self.meter.latest["step_seconds"], **self.meter.own})
        if time.monotonic() - self.slowest_said > SLOWEST_SECONDS:
            self.slowest_said = time.monotonic()
            self.meter.turn()
            if line := slowest(self.processes.notes("speed"), self.processes.name):
                self.say(line)

    def compare(self) -> None:
        seconds = self.meter.mean_step_seconds
        if seconds and (line := self.forecast.compared(seconds)):
            self.say(line)

    def evaluate(self, state: TrainState, k: int) -> dict[str, float]:
        with self.doing("evaluation", k + 1):
            return self.evaluator.after(k, state, self.summaries)

    def rewind(self, until: int) -> tuple[int, TrainState]:
        """Goes back to a checkpoint of before the steps that were not applied; the batches from there up to step
        `until` are left out from then on.

        What is done follows from the ledger and the checkpoints alone, so that a run killed on the way does the same
        again. Raises DivergedError when `recovery.rewinds` attempts did not get beyond, or there is no checkpoint.
        """
        first_bad, before = self.bad_steps.first, self.feed.ledger.rewinds[-1:]
        assert first_bad is not None
        known = [*self.bad_steps.report(), *self.feed.documents_of(self.bad_steps)]
        for line in known:
            self.say(line)
        again = before[0] if before and first_bad < before[0].until else None
        attempt, at_most = (again.attempt + 1, again.step - 1) if again else (1, first_bad)
        limit = self.config.recovery.rewinds
        self.checkpoints.wait()
        restored = None
        if attempt <= limit and at_most >= 0:
            # Those that are made by step come first: others are there, or not, by chance.
            found = list_checkpoints(self.directory.checkpoints) if self.processes.primary else []
            due = [one.step for one in found if one.step <= at_most and self.checkpoints.due(one.step)]
            at_most = self.processes.broadcast("rewind", max(due, default=at_most))
            restored = self.checkpoints.restore_newest(self.abstract, at_most=at_most)
            self.durable = restored and restored[0]
            if restored is None and self.checkpoints.last_good is None:
                restored = 0, self.draw()
        if restored is None:
            why = f"recovery.rewinds is {limit}" if attempt > limit else f"no checkpoint is older than step {first_bad}"
            more = "".join(f"\n    {line}" for line in known)
            raise DivergedError(
                f"diverged, and rewound {attempt - 1} times ({why}). Checkpoints in {self.directory.checkpoints} are "
                f"from before; a lower --optim.learning_rate in a new --run.dir may help{more}"
            )
        step, state = restored
        self.local.remove_after(step)
        self.checkpoints.set_aside_after(step)
        self.journal.rewind(step)
        self.take_data(self.feed.ledger.rewound(step, until, attempt) if self.processes.primary else None)
        self.bad_steps, self.health = BadSteps(groups_of(self.config.model).kinds), Health(self.config)
        self.summaries.close()
        self.open_summaries(step)
        self.describe()
        self.summaries.text(step, "rewind", verbatim("\n".join(known)))
        self.say(
            f"rewound to {f'checkpoint {step}' if step else 'the start'}; goes on without the "
            f"{self.feed.ledger.rewinds[-1].batches} batches that led to step {until} (attempt {attempt} of {limit})"
        )
        return step, state

    # 5. The end

    def finish(self, state: TrainState) -> None:
        steps = self.config.train.steps
        if self.checkpoints.last_good != steps:
            raise StorageError(f"all {steps} steps are done, but the last state could not be saved: see above")
        if self.meter.intervals != 2:  # else it was just said
            self.compare()
        with self.doing("evaluation", steps):
            self.evaluator.at_the_end(state, self.summaries)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self.say(self.journal.goodput().line())
        self.say(
            f"all {steps} steps are done, in {self.directory.path} "
            f"({human_seconds(time.monotonic() - self.started)}, peak memory of this process {peak / 1e9:.2f} GB)\n"
            "next:\n"
            f"    tensorboard --logdir {self.directory.path}\n"
            f"    lm generate {self.directory.path} --prompt {shlex.quote(self.config.sample.prompt)}\n"
            f"    lm eval {self.directory.path}\n"
            f"    lm train {self.directory.path}    # a run that was stopped (Ctrl-C) goes on, bit for bit"
        )
