"""Training, to be read from top to bottom.

The order of things in a run is a contract:
  1. the run directory is locked, and the config agrees with what the directory holds;
  2. the data is built, or found built, and the tokenizer fits the model;
  3. the newest good checkpoint is restored, or the state is drawn from the seed;
  4. for each step: the step itself, metrics of the step before, held-out loss if due, a save if due;
  5. the last save is waited for, then all held-out text is evaluated and a sample is written.

In a run of many processes all of them go through this order. Each reads its rows of the batches and writes its part of
the checkpoints; what else is written or printed comes from one of them, the primary. The others hear from it what only
it can know: that the data is built, which checkpoint is restored, whether a save succeeded.

Steps are counted from 0: step k takes the state with k steps done, and batch k, to k + 1 steps done. What is
logged for step k, and `lm data show --step k`, belong together; held-out values logged for step k are of the state
after it. A checkpoint is named by the steps done.
"""

import contextlib
import json
import resource
import shlex
import sys
import time
from typing import TextIO

import jax
import numpy as np
from jax.sharding import Mesh

from lm import config as configs
from lm.checkpoint.checkpoints import Checkpoints, list_checkpoints, read_attachment
from lm.data.batches import Batches, Evaluation
from lm.data.corpus import build_corpus, manifest_files, open_corpus
from lm.data.loader import Loader
from lm.data.reading import in_time, said_by
from lm.data.report import report
from lm.errors import ConfigError, DataError, DivergedError, Stopped, StorageError
from lm.experiment import Config
from lm.files import write_atomically
from lm.model.flops import flops_per_token, parameter_count, peak_flops
from lm.model.loss import Batch
from lm.parallel.layout import layout_of
from lm.parallel.mesh import make_mesh
from lm.parallel.processes import ALONE, Processes
from lm.parallel.rows import local_rows, whole_batch
from lm.parallel.sharding import batch_sharding, rules
from lm.parallel.wire import say as say_here
from lm.train import ledger
from lm.train.forecast import Expect, Expected, Forecast
from lm.train.heldout import HeldOut, held_out_loss
from lm.train.host_memory import keep_freed_memory
from lm.train.meter import Meter
from lm.train.progress import Progress, human_count, human_seconds
from lm.train.resume import refuse_if_changed
from lm.train.run_directory import RunDirectory
from lm.train.sample import sample_text
from lm.train.signals import StopRequest, stop_signals
from lm.train.state import TrainState, abstract_state, in_one_stack, init_state
from lm.train.step import Metrics, check_batch, jit_train_step, make_eval_step
from lm.train.summaries import NoSummaries, Summaries, verbatim

SHARED_SECONDS = 60.0
"""How long a shared file system may take to show to one host what another one has written."""


def train(config: Config, *, stream: TextIO | None, processes: Processes = ALONE, expect: Expect | None = None) -> None:
    """Runs, or goes on with, the run in `config.run.dir` until all steps are done.

    Progress is printed to `stream`; what `expect` predicts is logged beside what is measured.
    Raises LmError, whose exit code says how the run ended: Stopped when a signal ended it after a save,
    DivergedError, DataError, StorageError, or ConfigError before anything happened.
    All of the `processes` call this with the same config.
    """
    run = RunDirectory(config.run.dir)
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    mesh = make_mesh(config.mesh)
    abstract = abstract_state(config, mesh)
    check_batch(config, mesh, layout_of(config.mesh, mesh))
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
    ):
        _Run(config, mesh, abstract, directory, progress, stop, processes, expect).go()


class _Run:
    """One start of a run. The phases are methods, in the order in which `go` calls them."""

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        abstract: TrainState,
        directory: RunDirectory,
        progress: Progress,
        stop: StopRequest,
        processes: Processes,
        expect: Expect | None,
    ):
        self.config, self.mesh, self.abstract = config, mesh, abstract
        self.directory, self.progress, self.stop = directory, progress, stop
        self.sharding = batch_sharding(mesh, rules(config.mesh))
        self.processes, self.expect = processes, expect
        self.stopped_by: str | None = None
        self.say = progress.say
        self.started = time.monotonic()

    def go(self) -> None:
        if self.processes.primary:
            self.agree_with_directory()
        self.open_data()
        first, state = self.restore_or_draw()
        self.report_data(first)
        self.summaries = (
            Summaries(self.directory, first_step=first, report=self.say) if self.processes.primary else NoSummaries()
        )
        self.compile()
        try:
            state = self.steps(first, state)
            self.finish(state)
        finally:
            self.checkpoints.close()
            self.summaries.close()

    # 1. The run directory

    def agree_with_directory(self) -> None:
        found = [c.step for c in list_checkpoints(self.directory.checkpoints) if c.problem is None]
        if not found:
            return
        done = max(found)
        try:
            saved = json.loads(read_attachment(self.directory.checkpoints, done, "config.json"))
        except StorageError as error:  # damaged: restoring will set it aside and say so
            self.say(str(error))
            return
        refuse_if_changed(configs.from_dict(Config, saved), self.config, done=done)
        if done > self.config.train.steps:
            raise ConfigError(
                f"{self.directory.path} has {done} steps done, more than --train.steps {self.config.train.steps}; "
                "choose another --run.dir"
            )

    # 2. The data

    def open_data(self) -> None:
        config, length = self.config, self.config.train.sequence_length
        if self.processes.primary:
            build_corpus(config.data, config.data_dir, self.say)
        self.processes.broadcast("data is built")
        self.wait_for_data()
        corpus = open_corpus(config.data_dir, config.data)
        self.processes.agree("data", {f"the fingerprint of {config.data_dir}": corpus.fingerprint[:12]})
        size, seed = config.train.batch_size, config.run.seed
        self.rows = local_rows(self.sharding, size)
        self.batches = Batches(corpus, size, length, seed)
        self.batches.check_epochs(config.train.steps)
        self.held_out = Evaluation(corpus, "heldout", size, length) if corpus.tokens("heldout") else None
        self.tokenizer = corpus.tokenizer
        if self.tokenizer.vocab_size != config.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size is {config.model.vocab_size}, but the tokenizer in {config.data_dir} has "
                f"{self.tokenizer.vocab_size} ids: write --model.vocab_size {self.tokenizer.vocab_size}"
            )

    def wait_for_data(self) -> None:
        """Returns when this process can see what the primary has built."""
        until = time.monotonic() + SHARED_SECONDS
        for path in manifest_files(self.config.data, self.config.data_dir):
            while not path.exists():
                if time.monotonic() > until:
                    raise DataError(
                        f"{path}: built, but not to be seen by this process; choose a --data.dir (or --run.dir) that "
                        "all hosts share, or build the same data on each"
                    )
                time.sleep(0.2)

    def report_data(self, first: int) -> None:
        """What a person can judge before the first step is done; of rows that are read in a moment anyway."""
        if self.processes.primary and first < self.config.train.steps:
            steps, limit = self.config.train.steps, self.config.data.stall_seconds
            lines = report(self.batches, first, steps, self.rows)
            for line in in_time(lambda: list(lines), "first rows", limit, self.batches.reads):
                self.say(line)

    # 3. The state

    def restore_or_draw(self) -> tuple[int, TrainState]:
        config = self.config
        attachments = {
            "config.json": configs.to_json(config).encode(),
            self.tokenizer.file_name: self.tokenizer.serialize(),
        }
        self.checkpoints = Checkpoints(
            self.directory.checkpoints, config.checkpoint, attachments, self.say, self.processes
        )
        restored = self.checkpoints.restore_newest(self.abstract)
        if restored is None:
            draw = jax.jit(
                lambda key: init_state(config, key),
                out_shardings=jax.tree.map(lambda leaf: leaf.sharding, self.abstract),
            )
            first, state = 0, draw(jax.random.key(config.run.seed))
        else:
            first, state = restored
            self.say(f"goes on from checkpoint {first}")
        if self.processes.primary:
            self.note_data(first)
            write_atomically(self.directory.config, attachments["config.json"])
        return first, state

    def note_data(self, first: int) -> None:
        """Notes what the run is trained on from step `first`, or refuses to go on with other data."""
        corpus = self.batches.corpus
        if first:
            before = ledger.read(read_attachment(self.directory.checkpoints, first, ledger.FILE))
            found = ledger.extended(before, corpus, first)
            if found != before:
                self.say(ledger.describe(found[-1]))
        else:
            found = [ledger.entry(corpus, 0)]
        self.checkpoints.attach(ledger.FILE, ledger.write(found))

    def compile(self) -> None:
        """Compiles the train and evaluation steps, so that no later step can be compiled by surprise."""
        config, start = self.config, time.monotonic()
        example = self.batches.shapes()
        batch = {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=self.sharding) for k, v in example.items()}
        step = jit_train_step(config, self.mesh)
        self.train_step = step.lower(self.abstract, batch).compile()
        batch.pop("prefix", None)  # text that is held out has none
        self.eval_step = jax.jit(make_eval_step(config, self.mesh)).lower(self.abstract.params, batch).compile()
        self.summaries.config(configs.to_json(config))
        flops = flops_per_token(config.model, config.train.sequence_length)
        peak = peak_flops(jax.devices()[0].device_kind)
        self.meter = Meter(
            tokens_per_step=config.train.batch_size * config.train.sequence_length,
            flops_per_token=flops.causal,
            peak_flops=None if peak is None else peak * self.mesh.size,
        )
        tokens = self.batches.corpus.tokens("train")
        self.say(
            f"{human_count(parameter_count(config.model))} parameters, {human_count(flops.causal)} FLOP per token "
            f"(causal), {human_count(tokens)} training tokens, "
            f"{self.meter.tokens_per_step * config.train.steps / tokens:.2f} epochs; "
            f"{self.mesh.size} x {jax.devices()[0].device_kind}; "
            f"compiled in {human_seconds(time.monotonic() - start)}, "
            f"ready after {human_seconds(time.monotonic() - self.started)}"
        )
        self.forecast = Forecast(self.expected(), self.train_step, self.mesh.local_devices[0])

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
        data = self.config.data
        with Loader(
            self.batches,
            range(first, last),
            self.rows,
            workers=data.loader_workers,
            stall_seconds=data.stall_seconds,
        ) as loader:
            state, done = self.run_steps(first, state, loader)
        if done > first or first == 0:
            self.checkpoints.save(state, done, wait=True)
            self.checkpoints.wait()
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
        batch = self.put(next(loader)[1]) if first < last else None
        before: tuple[int, Metrics, dict[str, float]] | None = None
        self.meter.start(first)
        for k in range(first, last):
            self.stopped_by = self.processes.stop_before(k, self.stop.received)
            if self.stopped_by:
                last = k
                break
            state, metrics = self.train_step(state, batch)
            if k + 1 < last:  # the next batch is on its way to the devices while they compute
                with self.meter.waiting():
                    coming = next(loader)[1]
                batch = self.put(coming)
            if before is not None:
                self.log(*before)
            due = self.is_due(config.eval.every, k + 1) and k + 1 < last
            before = (k, metrics, self.evaluate(state, k) if due else {})
            if self.is_due(config.checkpoint.every, k + 1) and k + 1 < last:
                self.log(*before)
                before = None
                with self.meter.paused():
                    self.checkpoints.save(state, k + 1)
        if before is not None:
            self.log(*before)
        return state, last

    def is_due(self, every: int, done: int) -> bool:
        return every > 0 and done % every == 0

    def put(self, batch: dict[str, np.ndarray]) -> Batch:
        return whole_batch(batch, self.rows, self.config.train.batch_size, self.sharding)

    def log(self, k: int, metrics: Metrics, extra: dict[str, float]) -> None:
        """Reads the metrics of step k, which the devices have finished by now or soon will have."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        streak = int(values.pop("bad_streak"))
        if streak:
            self.say(f"step {k}: loss or gradient not finite, not applied ({streak} in a row)")
        if streak >= self.config.train.max_bad_steps:
            raise DivergedError(
                f"diverged: {streak} steps in a row were not finite, the last one step {k}; none of them was "
                f"applied. Checkpoints in {self.directory.checkpoints} are from before; a lower "
                "--optim.learning_rate in a new --run.dir may help"
            )
        values |= extra
        if k % self.config.log.every == 0 or k == self.config.train.steps - 1 or extra or streak:
            values |= self.meter.read(k) | self.forecast.values()
            self.summaries.scalars(k, values)
            if self.meter.intervals == 2:  # the first holds what happens only once
                self.compare()
        self.progress.update(k + 1, values | self.meter.latest)

    def compare(self) -> None:
        seconds = self.meter.mean_step_seconds
        if seconds and (line := self.forecast.compared(seconds)):
            self.say(line)

    def evaluate(self, state: TrainState, k: int) -> dict[str, float]:
        """Held-out loss, and a sample, of the state after step k."""
        if self.held_out is None:
            return {}
        with self.meter.paused():
            count = len(self.held_out)
            wanted = min(self.config.eval.batches or count, count)
            result = self.held_out_on(state, [int(i) for i in np.linspace(0, count - 1, wanted).round()])
            self.say(f"after step {k}: held-out loss {result.loss:.4f}, {result.bits_per_byte:.4f} bits per byte")
            self.sample(state, k)
        return {"heldout_loss": result.loss, "heldout_bits_per_byte": result.bits_per_byte}

    def held_out_on(self, state: TrainState, which: list[int]) -> HeldOut:
        assert self.held_out is not None
        with Loader(self.held_out, which, self.rows, stall_seconds=self.config.data.stall_seconds) as loader:
            return held_out_loss(self.eval_step, state.params, (self.put(batch) for _, batch in loader))

    def sample(self, state: TrainState, k: int) -> str:
        if not self.config.sample.tokens:
            return ""
        text = sample_text(self.config, in_one_stack(state.params, self.config.mesh.repeats), self.tokenizer)
        if text:
            self.summaries.text(k, "sample", verbatim(text))
        return text

    # 5. The end

    def finish(self, state: TrainState) -> None:
        steps = self.config.train.steps
        if self.checkpoints.last_good != steps:
            raise StorageError(f"all {steps} steps are done, but the last state could not be saved: see above")
        if self.meter.intervals != 2:  # else it was just said
            self.compare()
        if self.held_out is not None:
            result = self.held_out_on(state, list(range(len(self.held_out))))
            self.summaries.amend_last(
                steps - 1, {"heldout_loss": result.loss, "heldout_bits_per_byte": result.bits_per_byte}
            )
            self.say(
                f"held-out: {result.bits_per_byte:.4f} bits per byte, loss {result.loss:.4f} nats per token, "
                f"perplexity {result.perplexity:.2f}, over {human_count(result.bytes)} bytes never trained on"
            )
        text = self.sample(state, steps - 1)
        if text:
            self.say("sample:\n" + "\n".join("    " + line for line in text.splitlines()))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        self.say(
            f"all {steps} steps are done, in {self.directory.path} "
            f"({human_seconds(time.monotonic() - self.started)}, peak memory of this process {peak / 1e9:.2f} GB)\n"
            "next:\n"
            f"    tensorboard --logdir {self.directory.path}\n"
            f"    lm generate {self.directory.path} --prompt {shlex.quote(self.config.sample.prompt)}\n"
            f"    lm eval {self.directory.path}\n"
            f"    lm train {self.directory.path}    # a run that was stopped (Ctrl-C) goes on, bit for bit"
        )
