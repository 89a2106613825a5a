"""Runs that were never trained, and the environment in which trackers find servers of these tests."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import lm as package

from .servers import Wandb, wandb_server


class Made:
    """A run directory, written here as training writes it."""

    def __init__(self, path: Path, *, steps: int, config: Mapping[str, Any] | None = None):
        self.path = path
        path.mkdir()
        self.metrics = path / "metrics.jsonl"
        (path / "config.json").write_text(
            json.dumps({"run": {"dir": str(path)}, "train": {"steps": steps}} | (config or {}))
        )
        self.note("start", host="trainer")

    def note(self, event: str, **facts: Any) -> None:
        noted = {"event": event, "start": "0123456789ab", "time": 1.0, "done": 0, "saved": None, "milliseconds": {}}
        with open(self.path / "journal.jsonl", "a") as file:
            file.write(json.dumps(noted | facts) + "\n")

    def log(self, step: int, **values: float | str) -> None:
        with open(self.metrics, "a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.metrics.read_text().splitlines()]


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Made]:
    return lambda **options: Made(tmp_path / "made", **options)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is MLflow's, in place of a server."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/store")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return tmp_path / "store"


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Wandb]:
    """What plays Weights & Biases."""
    with wandb_server() as service:
        monkeypatch.setenv("WANDB_BASE_URL", service.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
        monkeypatch.setenv("WANDB_MODE", "online")
        yield service


@pytest.fixture
def track(tmp_path: Path) -> Callable[..., str]:
    """`lm track RUN --to NAME`, which must end with `code`; what it said."""

    def run(path: Path, name: str, *, code: int = 0) -> str:
        ended = subprocess.run(
            [sys.executable, "-m", "lm", "track", str(path), "--to", name],
            env=os.environ | {"PYTHONPATH": str(Path(package.__file__).parent.parent)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert ended.returncode == code, ended.stdout + ended.stderr
        return ended.stdout if code == 0 else ended.stderr

    return run
