"""A cloud of this machine: `stand_in/gcloud` in place of gcloud, whose hosts are folders, and runs on them real."""

import json
import runpy
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .conftest import environment, losses

MACHINES = """
import sys
from launch.config import Machines
from launch.tpu_vm import TpuVm

config = Machines(
    name="tiny",
    tpu_vm=TpuVm(zone="us-east5-a", topology="v5e:1x1", provisioning="spot", price=1.5, install=("echo one >> ~/i",),
                 wait_seconds=20),
    python=sys.executable,
    environment=("JAX_PLATFORMS=cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS=true", "LM_HEARTBEAT_SECONDS=4"),
)
"""
# As `python -m lm`, but the cloud is not asked every 20 s; and the code may change once it was packed.
SOON = """
import os, sys
import launch.tree as tree

tree.LARGEST_BYTES = int(os.environ.get("LARGEST_BYTES", tree.LARGEST_BYTES))
pack, packed = tree.pack, []

def once(*where):
    assert not packed, "packed a second time"
    packed.append(where)
    return pack(*where)

tree.pack = once
import launch.patience
import launch.tpu_bring
import launch.tpu_follow

launch.tpu_bring.POLL_SECONDS = launch.patience.FIRST_SECONDS = 0.1
launch.patience.GIVE_UP_SECONDS = float(os.environ.get("GIVE_UP_SECONDS", 60))
launch.tpu_follow.SILENT_LOOKS = 3
from lm.cli import main
sys.exit(main())
"""
STAND_IN = Path(__file__).parent / "stand_in"
V5E = {"type": "v5litepod-1", "topology": "1x1"}
V5P = {"type": "v5p-16", "topology": "2x2x2"}


class Cloud:
    """The stand-in's world."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.here = folder / "cloud"
        (self.here / "vm_bin").mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.behave(zones={"us-east5-a": [V5E, V5P], "us-east1-b": []}, port=free.getsockname()[1])
        self.machines = folder / "machines.py"
        self.machines.write_text(MACHINES)

    @property
    def functions(self) -> dict[str, Any]:
        """Of the stand-in."""
        return runpy.run_path(str(STAND_IN / "gcloud"), run_name="stand_in")

    def behave(self, **more: Any) -> None:
        path = self.here / "behave.json"
        path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | more))

    @property
    def state(self) -> dict[str, Any]:
        path = self.here / "state.json"
        return json.loads(path.read_text()) if path.exists() else {"nodes": {}, "queued": {}}

    @property
    def calls(self) -> list[list[str]]:
        path = self.here / "calls.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def asked(self, verb: str) -> list[list[str]]:
        return [call for call in self.calls if verb in call[3:5]]

    def preempt(self, name: str) -> None:
        """Takes a node away: its processes end without warning, and its disk is gone."""
        state = self.state
        state["nodes"][name]["state"] = "PREEMPTED"
        for request in state["queued"].values():
            request["state"]["state"] = "SUSPENDED"
        (self.here / "state.json").write_text(json.dumps(state))
        self.functions["lose_disks"](name)

    def environment(self) -> dict[str, str]:
        outside = environment(self.folder)
        path = outside["PATH"]
        return outside | {"PATH": f"{STAND_IN}:{path}", "VM_PATH": path, "LM_STAND_IN": str(self.here)}

    def start(self, *arguments: str | Path) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", SOON, "launch", *map(str, arguments)],
            cwd=self.folder,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def launch(self, *arguments: str | Path, code: int = 0) -> str:
        """What it says: of a failure what was wrong."""
        process = self.start(*arguments)
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, out + err
        return err if code else out

    def up(self, *more: str, code: int = 0) -> str:
        return self.launch("up", self.machines, "config.py", "--yes", *more, code=code)


def steps_reach(folder: Path, count: int, process: subprocess.Popen[str] | None = None) -> None:
    until = time.monotonic() + 90
    path = folder / "run" / "metrics.jsonl"
    while not (path.exists() and len(losses(folder / "run")) >= count):
        if time.monotonic() > until or (process and process.poll() is not None):
            if process:
                process.kill()
            raise AssertionError(process and process.communicate())
        time.sleep(0.1)
