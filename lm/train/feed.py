"""What a run is fed: built data, the rows of each batch that this process reads, a ledger of what applied when."""

import time
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from lm.checkpoint.local import Restored
from lm.data.batches import Batches, Evaluation
from lm.data.corpus import build_corpus, manifest_files, open_corpus
from lm.data.loader import Loader
from lm.data.reading import in_time
from lm.data.report import report
from lm.errors import ConfigError, DataError
from lm.experiment import Config
from lm.model.loss import Batch
from lm.parallel.processes import Processes
from lm.parallel.rows import local_rows, whole_batch
from lm.parallel.sharding import batch_sharding, rules
from lm.train import ledger
from lm.train.bad_steps import BadSteps
from lm.train.ledger import Ledger
from lm.train.state import TrainState

SHARED_SECONDS = 60.0
"""How long a shared file system may take to show to one host what another one has written."""


def build_data(config: Config, processes: Processes, say: Callable[[str], None]) -> None:
    """The primary builds what is not built; returns when this process can see it. Raises DataError."""
    if processes.primary:
        build_corpus(config.data, config.data_dir, say)
    processes.broadcast("data is built")
    until = time.monotonic() + SHARED_SECONDS
    for path in manifest_files(config.data, config.data_dir):
        while not path.exists():
            if time.monotonic() > until:
                raise DataError(
                    f"{path}: built, but not to be seen by this process; choose a --data.dir (or --run.dir) that "
                    "all hosts share, or build the same data on each"
                )
            time.sleep(0.2)


class Feed:
    """The built data in one start of a run. All of its processes make one, and call `take` together.

    Raises ConfigError when data and config do not fit together, or processes see other data, and DataError.
    """

    ledger: Ledger
    """What the batches follow, from `take` on."""

    def __init__(self, config: Config, mesh: Mesh, processes: Processes, say: Callable[[str], None]):
        self._config, self._processes, self._say = config, processes, say
        corpus = open_corpus(config.data_dir, config.data)
        processes.agree("data", {f"the fingerprint of {config.data_dir}": corpus.fingerprint[:12]})
        self.tokenizer = corpus.tokenizer
        if self.tokenizer.vocab_size != config.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size is {config.model.vocab_size}, but the tokenizer in {config.data_dir} has "
                f"{self.tokenizer.vocab_size} ids: write --model.vocab_size {self.tokenizer.vocab_size}"
            )
        size, length = config.train.batch_size, config.train.sequence_length
        self.sharding = batch_sharding(mesh, rules(config.mesh))
        self.rows = local_rows(self.sharding, size)
        self.batches = Batches(corpus, size, length, config.run.seed)
        self.batches.check_epochs(config.train.steps)
        self.held_out = Evaluation(corpus, "heldout", size, length) if corpus.tokens("heldout") else None

    @property
    def training_tokens(self) -> int:
        return self.batches.corpus.tokens("train")

    def shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Of the whole batch on the devices."""
        shapes = self.batches.shapes()
        return {k: jax.ShapeDtypeStruct(v.shape, v.dtype, sharding=self.sharding) for k, v in shapes.items()}

    def held_out_begin(self, rows: int) -> dict[str, np.ndarray]:
        """The first rows of the held-out text, the same in each process."""
        assert self.held_out is not None
        evaluation, limit = self.held_out, self._config.data.stall_seconds
        return in_time(lambda: evaluation.batch(0, slice(0, rows)), "held-out text", limit, evaluation.reads)

    def held_out_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """As `shapes`, of a held-out batch."""
        rows = jax.ShapeDtypeStruct((self._config.train.batch_size,), np.int32, sharding=self.sharding)
        return {name: x for name, x in self.shapes().items() if name != "prefix"} | {"source": rows}

    def from_step(self, first: int) -> Loader:
        data, steps = self._config.data, range(first, self._config.train.steps)
        return Loader(self.batches, steps, self.rows, workers=data.loader_workers, stall_seconds=data.stall_seconds)

    def held_out_batches(self, which: list[int]) -> Loader:
        assert self.held_out is not None
        return Loader(self.held_out, which, self.rows, stall_seconds=self._config.data.stall_seconds)

    def put(self, batch: dict[str, np.ndarray]) -> Batch:
        """On its way to the devices, from the rows of this process."""
        return whole_batch(batch, self.rows, self._config.train.batch_size, self.sharding)

    def report(self, first: int) -> None:
        """Says what a person can judge before the first step is done; of rows that are read in a moment anyway."""
        if self._processes.primary and first < self._config.train.steps:
            steps, limit = self._config.train.steps, self._config.data.stall_seconds
            lines = report(self.batches, first, steps, self.rows)
            for line in in_time(lambda: list(lines), "first rows", limit, self.batches.reads):
                self._say(line)

    def noted(self, restored: Restored[TrainState] | None) -> Ledger:
        """What the run is fed from here on; refuses to go on with other data."""
        corpus = self.batches.corpus
        if restored is None or not restored.step:
            return Ledger((ledger.entry(corpus, 0),))
        before = ledger.of_checkpoint(restored.directory, restored.step)
        found = ledger.extended(before, corpus, before.skips.batch(restored.step))
        if found != before:
            self._say(ledger.describe(found.entries[-1]))
        return found

    def take(self, found: Ledger | None) -> bytes:
        """Follows this from now on, which the primary gives and says to the others; as it is kept in checkpoints."""
        text = ledger.write(found).decode() if found else None
        contents = str(self._processes.broadcast("data", text)).encode()
        self.ledger = ledger.read(contents)
        self.batches.skips = self.ledger.skips
        return contents

    def documents_of(self, bad_steps: BadSteps) -> list[str]:
        """What the first step that was not applied read; that it cannot be read again changes nothing here."""
        if not self._processes.primary:
            return []
        limit = self._config.data.stall_seconds
        try:
            return in_time(lambda: list(bad_steps.documents(self.batches)), "documents", limit, self.batches.reads)
        except DataError as error:
            return [f"what it read is not known: {error}"]
