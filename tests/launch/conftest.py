"""A tiny run, and `lm launch` on it."""

import getpass
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import lm as package

if TYPE_CHECKING:
    from .cloud import Cloud

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
    kept = {name: value for name, value in os.environ.items() if name not in ("JAX_NUM_CPU_DEVICES", "XDG_CONFIG_HOME")}
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


# As `python -m lm`, where each host takes long for what the argument names.
SLOW = """
import sys
from launch.hosts import Host

command, slow = Host.command, sys.argv.pop(1)

def slowly(self, script):
    return command(self, "sleep 60\\n" + script if slow in script else script)

Host.command = slowly
from lm.cli import main
sys.exit(main())
"""


def interrupted(folder: Path, slow: str, *arguments: str) -> str:
    """What `lm launch …` says when it gets Ctrl-C while a host is at the script that has `slow` in it."""
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, slow, "launch", *arguments],
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    listed, until = "", time.monotonic() + 60
    while time.monotonic() < until and "sleep 60" not in listed:
        time.sleep(0.1)
        shown = subprocess.run(["ps", "-o", "args=", "--ppid", str(process.pid)], capture_output=True, text=True)
        listed = shown.stdout
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    return err


SSHD = shutil.which("sshd") or "/usr/sbin/sshd"


class Servers:
    """sshd processes; each has a home of its own, and takes the key of the test."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.key = folder / "key"
        self.sockets = Path(tempfile.mkdtemp(prefix="s", dir="/tmp"))  # the path of a socket has to be short
        self._started: list[subprocess.Popen[bytes]] = []
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.key], check=True)

    def start(self, name: str, address: str, port: int, *more: str, inside: tuple[str, ...] = ()) -> Path:
        """Starts one, in a network namespace if the command `inside` enters it. Returns its home."""
        home = self.folder / name
        home.mkdir(exist_ok=True)
        lines = [
            f"ListenAddress {address}:{port}",
            f"HostKey {self.key}",
            f"AuthorizedKeysFile {self.key}.pub",
            f"PidFile {self.folder / name}.pid",
            f"SetEnv HOME={home}",
            "StrictModes no",
            "UsePAM no",
            "PermitRootLogin yes",
            *more,
        ]
        (self.folder / f"{name}.conf").write_text("\n".join(lines) + "\n")
        command = [*inside, SSHD, "-D", "-e", "-f", str(self.folder / f"{name}.conf")]
        with open(self.folder / f"{name}.log", "wb") as log:
            self._started.append(subprocess.Popen(command, stderr=log))
        return home

    @property
    def options(self) -> tuple[str, ...]:
        """For ssh to them."""
        return (
            f"IdentityFile={self.key}",
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "LogLevel=ERROR",
            "ServerAliveInterval=1",
            f"ControlPath={self.sockets}/%C",
            "ConnectTimeout=3",
        )

    def end(self) -> None:
        for one in self.sockets.glob("*"):
            subprocess.run(["ssh", "-o", f"ControlPath={one}", "-O", "exit", "any"], capture_output=True)
        shutil.rmtree(self.sockets, ignore_errors=True)
        for process in self._started:
            process.terminate()
            process.wait()


@pytest.fixture
def servers(folder: Path) -> Iterator[Servers]:
    if not os.path.exists(SSHD) or not shutil.which("ssh"):
        pytest.skip("needs ssh and sshd: apt-get install openssh-server openssh-client")
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where it goes before somebody has logged in
    running = Servers(folder)
    yield running
    running.end()


@pytest.fixture
def two(servers: Servers) -> tuple[Callable[..., str], Servers]:
    """Starts a host on a port of this machine, and waits until it answers."""

    def host(name: str, *more: str) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        servers.start(name, "127.0.0.1", port, *more)
        until = time.monotonic() + 20
        while time.monotonic() < until:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    return f"ssh://{getpass.getuser()}@127.0.0.1:{port}"
            time.sleep(0.05)
        raise AssertionError((servers.folder / f"{name}.log").read_text())

    return host, servers


@pytest.fixture
def cloud(folder: Path, monkeypatch: pytest.MonkeyPatch) -> "Iterator[Cloud]":
    """A cloud of this machine."""
    from .cloud import Cloud

    made = Cloud(folder)
    monkeypatch.setenv("LM_STAND_IN", str(made.here))
    yield made
    for name in made.state["nodes"]:
        made.functions["lose_disks"](name)
