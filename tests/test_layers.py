"""Imports go downwards only, and what is asked for quickly does not wait for jax."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "lm"

LAYERS: dict[str, set[str]] = {
    "errors": set(),
    "chips": set(),
    "fields": {"errors"},
    "config": {"errors", "fields"},
    "files": {"errors"},
    "kernels": set(),
    "model": {"chips", "kernels", "parallel", "config", "errors"},
    "data": {"files", "config", "errors"},
    "optim": {"config", "errors"},
    "parallel": {"config", "errors"},
    "generate": {"parallel", "model", "kernels", "data", "config", "errors"},
    "checkpoint": {"parallel", "files", "errors"},
    "experiment": {"model", "data", "optim", "parallel", "checkpoint.config", "train.config", "config", "errors"},
    "train": {
        "experiment",
        "checkpoint",
        "files",
        "generate",
        "parallel",
        "model",
        "data",
        "optim",
        "config",
        "errors",
    },
    "report": {"train", "checkpoint", "files", "config", "errors"},
    "track": {"train", "files", "config", "errors"},
    "plan": {"chips", "kernels", "train", "experiment", "parallel", "model", "optim", "data", "config", "errors"},
    "profile": {"chips", "train", "experiment", "model", "files", "config", "errors"},
    "evaluate": {"train", "checkpoint", "experiment", "generate", "parallel", "model", "data", "config", "errors"},
}
"""What each part of lm may import, itself aside; cli may import everything."""


def imported(path: Path) -> set[str]:
    """Modules that a file names in its imports, wherever they stand in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are written in full"
            # `from lm import config` names a module, `from lm.errors import ConfigError` does not.
            found |= {f"lm.{alias.name}" for alias in node.names} if node.module == "lm" else {node.module or ""}
    return found


def part_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


FILES = sorted(path for path in ROOT.rglob("*.py") if part_of(path) not in ("cli", "__main__", "__init__"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_downwards(path: Path) -> None:
    part = part_of(path)
    allowed = {part, *LAYERS[part]}
    for module in imported(path):
        if module == "lm" or module.startswith("lm."):
            name = module.removeprefix("lm.")
            assert any(name == one or name.startswith(f"{one}.") for one in allowed), f"{path} imports {module}"


@pytest.mark.parametrize(
    "path", [path for path in FILES if part_of(path) in ("errors", "fields", "config", "data")], ids=lambda p: p.name
)
def test_configs_and_data_do_without_jax(path: Path) -> None:
    assert not {module.partition(".")[0] for module in imported(path)} & {"jax", "jaxlib", "flax", "optax", "orbax"}


def test_the_config_of_training_stands_below_training() -> None:
    """`experiment` is made of it, so it may know no more than the other configs do."""
    lm = {module for module in imported(ROOT / "train" / "config.py") if module.startswith("lm")}
    assert lm == {"lm.config"}


def test_help_does_not_wait_for_jax() -> None:
    code = """
import sys
from lm.cli import main
try:
    main(["--help"])
except SystemExit as ended:
    assert ended.code == 0
heavy = {"jax", "flax", "numpy", "grain", "etils", "orbax", "tensorboard"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("verb", [["status", "RUN", "--json"], ["runs", "RUN"], ["plot", "RUN"]], ids=lambda v: v[0])
def test_reports_of_runs_do_not_wait_for_jax(verb: list[str], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"run": {}, "train": {"steps": 10}}')
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "loss": 5.0}\n{"step": 1, "loss": 4.0}\n')
    folder = tmp_path / "checkpoints" / "2"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text("{}")
    code = """
import sys
from lm.cli import main
assert main(sys.argv[1:]) == 0
heavy = {"jax", "flax", "numpy", "grain", "orbax", "tensorboard", "matplotlib", "gcsfs"} & set(sys.modules)
assert not heavy, heavy
"""
    arguments = [str(tmp_path) if word == "RUN" else word for word in verb]
    command = [sys.executable, "-c", code, *arguments]
    subprocess.run(command, check=True, cwd=ROOT.parent, stdout=subprocess.DEVNULL)


def test_what_feeds_a_tracker_is_small() -> None:
    code = """
import sys
import lm.cli, lm.track.follow, lm.track.mlflow, lm.track.wandb
heavy = {"jax", "flax", "numpy", "grain", "orbax", "tensorboard", "wandb", "mlflow"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)
