"""A tiny run, and `lm launch` on it."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import lm as package

ROOT = Path(package.__file__).parent.parent
Launch = Callable[..., subprocess.CompletedProcess[str]]

CONFIG = """
from lm.checkpoint.config import CheckpointConfig
from lm.data.config import DataConfig, TokenizerConfig
from lm.experiment import Config, RunConfig
from lm.model.config import ModelConfig
from lm.train.config import EvalConfig, LogConfig, SampleConfig, TrainConfig

config = Config(
    run=RunConfig(dir={run!r}),
    model=ModelConfig(vocab_size=258, layers=1, width=16, heads=2),
    data=DataConfig(paths=({text!r},), tokenizer=TokenizerConfig(kind="bytes"), holdout_fraction=0.2, workers=1),
    train=TrainConfig(steps=12, batch_size=4, sequence_length=32),
    checkpoint=CheckpointConfig(every=3, patience_seconds=60),
    eval=EvalConfig(every=0),
    sample=SampleConfig(tokens=0),
    log=LogConfig(every=1),
)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds `config.py`, whose run is in `run`, and the text that it trains on."""
    words = [f"w{i}" for i in range(50)]
    random.seed(1)
    (tmp_path / "text").mkdir()
    for i in range(60):
        (tmp_path / "text" / f"{i:03}.txt").write_text(" ".join(random.choices(words, k=60)))
    config = CONFIG.format(run=str(tmp_path / "run"), text=str(tmp_path / "text"))
    (tmp_path / "config.py").write_text(config)
    return tmp_path


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "lm", "launch", *map(str, arguments)]


def environment(home: Path) -> dict[str, str]:
    """Without this machine's own settings of processes, and with a home that is the test's."""
    kept = {name: value for name, value in os.environ.items() if name not in ("JAX_NUM_CPU_DEVICES",)}
    return kept | {"HOME": str(home), "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}


@pytest.fixture
def launch(folder: Path) -> Launch:
    """Runs `lm launch …` to its end."""

    def run(*arguments: str | Path, code: int | None = 0, seconds: float = 120) -> subprocess.CompletedProcess[str]:
        ended = subprocess.run(
            command(*arguments),
            cwd=folder,
            env=environment(folder),
            capture_output=True,
            text=True,
            timeout=seconds,
            stdin=subprocess.DEVNULL,
        )
        assert code is None or ended.returncode == code, ended.stdout + ended.stderr
        return ended

    return run


def losses(run: Path) -> dict[int, float]:
    """By step. A step that was trained twice must have had the same loss twice."""
    found: dict[int, float] = {}
    text = (run / "metrics.jsonl").read_text()
    for line in text[: text.rfind("\n") + 1].splitlines():  # the last may be being written
        values = json.loads(line)
        if "loss" in values:
            assert found.setdefault(values["step"], values["loss"]) == values["loss"]
    return found


def undisturbed(folder: Path, *more: str) -> dict[int, float]:
    """The losses of the same config, trained in one go by one process."""
    overrides = [*more, f"--run.dir={folder / 'alone'}", f"--data.dir={folder / 'run' / 'data'}"]
    train = [sys.executable, "-m", "lm", "train", "config.py", *overrides]
    subprocess.run(train, cwd=folder, env=environment(folder), check=True, capture_output=True, timeout=120)
    return losses(folder / "alone")
