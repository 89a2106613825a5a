"""The root of a config: everything that one run is."""

import dataclasses
from collections.abc import Iterator
from typing import ClassVar

from lm.checkpoint.config import CheckpointConfig
from lm.config import free
from lm.data.config import DataConfig
from lm.model.config import ModelConfig
from lm.optim.config import OptimConfig
from lm.parallel.mesh import MeshConfig
from lm.train.config import (
    EvalConfig,
    LogConfig,
    ProfileConfig,
    RecoveryConfig,
    SampleConfig,
    TrainConfig,
    WatchdogConfig,
)


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """Where a run lives and what its randomness starts from."""

    dir: str = free("runs/run")
    """Local path or bucket URL."""
    seed: int = 0
    """Decides the initial parameters, the order of the data and dropout."""

    def check(self) -> Iterator[tuple[str, str]]:
        if not self.dir:
            yield "dir", "must name a directory, e.g. runs/first"
        if not 0 <= self.seed < 2**32:
            yield "seed", f"must be from 0 to 2^32 - 1, got {self.seed}"


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. Sizes are global: the number of devices does not change what is computed."""

    RENAMED: ClassVar[dict[str, str]] = {"train.max_bad_steps": "recovery.max_bad_steps"}
    """Keys that older runs have in their config.json."""

    run: RunConfig = RunConfig()
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = free(MeshConfig())
    checkpoint: CheckpointConfig = free(CheckpointConfig())
    recovery: RecoveryConfig = RecoveryConfig()
    watchdog: WatchdogConfig = free(WatchdogConfig())
    eval: EvalConfig = free(EvalConfig())
    sample: SampleConfig = free(SampleConfig())
    log: LogConfig = free(LogConfig())
    profile: ProfileConfig = free(ProfileConfig())

    def check(self) -> Iterator[tuple[str, str]]:
        tokenizer, vocabulary = self.data.tokenizer, self.model.vocab_size
        if tokenizer.kind == "bytes" and vocabulary != 258:
            yield "model.vocab_size", f"the bytes tokenizer has 258 ids, got {vocabulary}: write --model.vocab_size 258"
        trained = tokenizer.kind == "sentencepiece" and tokenizer.path is None and tokenizer.model_type != "char"
        if trained and vocabulary > tokenizer.vocab_size:
            yield (
                "model.vocab_size",
                f"{vocabulary} is more than data.tokenizer.vocab_size = {tokenizer.vocab_size}, what is trained",
            )
        length, context = self.train.sequence_length, self.model.context
        if self.model.positions == "learned" and length > context:
            yield (
                "train.sequence_length",
                f"{length} is more than model.context = {context} learned positions",
            )

        if self.profile.range.stop > self.train.steps:
            yield (
                "profile.steps",
                f"{self.profile.steps} goes beyond train.steps = {self.train.steps}; steps count from 0",
            )

    @property
    def data_dir(self) -> str:
        """Where the built data is: `data.dir`, or a folder of the run."""
        return self.data.dir or self.run.dir.rstrip("/") + "/data"
