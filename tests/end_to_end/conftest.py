"""A tiny run, the processes that train it, and what they leave behind."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import lm as package

Lm = Callable[..., subprocess.CompletedProcess[str]]
Logged = Callable[[Path], list[dict[str, float]]]

CONFIG = """
from lm.data.config import DataConfig, TokenizerConfig
from lm.experiment import Config, RunConfig
from lm.model.config import ModelConfig
from lm.optim.config import OptimConfig
from lm.checkpoint.config import CheckpointConfig
from lm.train.config import EvalConfig, LogConfig, SampleConfig, TrainConfig

config = Config(
    run=RunConfig(dir="run"),
    model=ModelConfig(vocab_size=258, layers=1, width=16, heads=2),
    data=DataConfig(
        paths=("text",), tokenizer=TokenizerConfig(kind="bytes"), holdout_fraction=0.2, workers=1
    ),
    optim=OptimConfig(warmup_steps=3),
    train=TrainConfig(steps=12, batch_size=4, sequence_length=32),
    checkpoint=CheckpointConfig(every=3, keep_last=3, patience_seconds=60),  # steps are sooner done than saves
    eval=EvalConfig(every=4, batches=2),
    sample=SampleConfig(tokens=0),
    log=LogConfig(every=1),
)
"""

# As `python -m lm`, but the process gets a signal when it has logged so many steps: then one more is under way.
SIGNALLED = """
import os, signal, sys
from lm.cli import main
from lm.train.progress import Progress

update = Progress.update

def update_and_signal(self, step, values):
    update(self, step, values)
    if step == {step}:
        os.kill(os.getpid(), {number})

Progress.update = update_and_signal
sys.exit(main())
"""

# As `python -m lm`, but a read for step 7 never ends, or fails: each time, or once.
STALLS = """
import os, sys, threading
from lm.cli import main
from lm.data import reading
from lm.data.batches import Batches

reading.SAY_SECONDS, reading.WAITS = 1.0, (0.1, 0.2)
happens, batch = os.environ["HAPPENS"], Batches.batch

def read():
    global happens
    if happens == "hangs":
        threading.Event().wait()
    if happens == "fails once":
        happens = ""
        raise OSError("no route to host")
    if happens == "fails":
        raise OSError("no route to host")

def batch_and_happen(self, step, *rows):
    if step == 7 and os.environ.get("WHERE") == os.environ.get("JAX_PROCESS_ID"):
        self.reads("source web: shard 7: record 3", read)
    return batch(self, step, *rows)

Batches.batch = batch_and_happen
sys.exit(main())
"""


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each workplace begins as; and the runs that all share."""
    folder = tmp_path_factory.mktemp("template")
    # The processes run there, and run the code that is tested, not another that is installed.
    os.environ["PYTHONPATH"] = str(Path(package.__file__).parent.parent)
    (folder / "tiny.py").write_text(CONFIG)
    (folder / "text").mkdir()
    draw = random.Random(0)
    words = ["the", "cat", "saw", "a", "dog", "on", "mat", "and", "ran", "to", "old", "tree"]
    for number in range(40):
        text = " ".join(draw.choice(words) for _ in range(50))
        (folder / "text" / f"{number}.txt").write_text(text + "\n")
    return folder


@pytest.fixture(scope="module")
def workplace(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a config, tiny.py, and the folder of text files that it names."""
    folder = tmp_path_factory.mktemp("workplace")
    shutil.copy(template / "tiny.py", folder)
    shutil.copytree(template / "text", folder / "text")
    return folder


def lm_in(folder: Path) -> Lm:
    """Runs `python -m lm …` there; `after` and `number` send that signal when so many steps are logged."""

    def run(
        *arguments: str | Path, code: int = 0, after: int | None = None, number: int = signal.SIGTERM, text: str = ""
    ) -> subprocess.CompletedProcess[str]:
        program = ["-m", "lm"] if after is None else ["-c", SIGNALLED.format(step=after, number=int(number))]
        command = [sys.executable, *program, *map(str, arguments)]
        ended = subprocess.run(command, cwd=folder, input=text, capture_output=True, text=True, timeout=300)
        assert ended.returncode == code, ended.stdout + ended.stderr
        return ended

    return run


@pytest.fixture(scope="module")
def lm(workplace: Path) -> Lm:
    return lm_in(workplace)


@pytest.fixture(scope="session")
def template_undisturbed(template: Path) -> Path:
    assert lm_in(template)("train", "tiny.py", "--run.dir", "undisturbed").stderr == ""
    return template / "undisturbed"


@pytest.fixture(scope="session")
def template_stopped(template: Path) -> Path:
    lm_in(template)("train", "tiny.py", "--run.dir", "stopped", code=75, after=7)
    return template / "stopped"


@pytest.fixture(scope="module")
def undisturbed(template_undisturbed: Path, workplace: Path) -> Path:
    """A finished run that nothing happened to. Not to be changed."""
    (workplace / "undisturbed").symlink_to(template_undisturbed)
    return workplace / "undisturbed"


@pytest.fixture(scope="module")
def stopped(template_stopped: Path, workplace: Path) -> Path:
    """The same run, stopped by SIGTERM with 8 steps done. Not to be changed."""
    (workplace / "stopped").symlink_to(template_stopped)
    return workplace / "stopped"


@pytest.fixture
def in_workplace(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """For tests that run `main` in their own process: there, on one device."""
    import jax

    devices = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.chdir(workplace)
    return workplace


SPEED = {
    "tokens_per_second",
    "step_seconds",
    "expected_step_seconds",
    "model_flops_per_second",
}


def of_this_start(name: str) -> bool:
    """Whether the value of a metric depends on the clock, or on when the run was started."""
    return name in SPEED or name.startswith(("step_seconds/", "goodput/", "save_", "saves", "checkpoint_", "local_"))


@pytest.fixture(scope="session")
def logged() -> Logged:
    """The lines of metrics.jsonl without what depends on the clock."""

    def read(run: Path) -> list[dict[str, float]]:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if not of_this_start(name)} for line in lines]

    return read
