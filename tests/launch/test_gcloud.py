"""What is asked of gcloud, read by the gcloud of this machine: it looks at all flags before at who is logged in."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.commands import Commands
from launch.owner import Owner
from launch.tpu_slices import Found, Slices
from launch.tpu_vm import TpuVm

OWNER = Owner("0123456789abcdef", "ann@laptop")
Ask = Callable[[list[str]], subprocess.CompletedProcess[str]]


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """Asks as somebody who is not logged in."""
    if not shutil.which("gcloud"):
        pytest.skip("needs gcloud: https://cloud.google.com/sdk/docs/install")
    kept = {name: value for name, value in os.environ.items() if not name.startswith("CLOUDSDK_")}
    own = {
        "CLOUDSDK_CONFIG": str(tmp_path),
        "CLOUDSDK_CORE_PROJECT": "no-such-project",
        "CLOUDSDK_CORE_CHECK_GCE_METADATA": "false",
        "CLOUDSDK_CORE_DISABLE_PROMPTS": "true",
    }
    environment = {name: value for name, value in (kept | own).items() if not name.startswith("GOOGLE_")}

    def run(command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    return run


def takes(ask: Ask, command: list[str]) -> None:
    done = ask(command)
    assert (done.returncode, "do not currently have an active account" in done.stderr) == (1, True), done.stderr


@pytest.mark.parametrize(
    ("topology", "provisioning"),
    [
        ("v4:4x4x4", "on-demand"),
        ("v5e:2x2", "reserved"),
        ("v5p:2x2x2", "spot"),
        ("v5p:4x8x8", "spot"),
        ("v6e:16x16", "on-demand"),
    ],
)
@pytest.mark.parametrize("slices", [1, 2])
def test_creation(ask: Ask, topology: str, slices: int, provisioning: str) -> None:
    spec = TpuVm(
        zone="us-east5-a",
        topology=topology,
        slices=slices,
        provisioning=provisioning,
        labels=("a=b",),
        create_options=("--network=other", "--internal-ips"),
    )
    takes(ask, ["gcloud", *Slices("tiny", spec, Commands(), OWNER).creation()])


class Asked(Commands):
    """Keeps what is asked."""

    def __init__(self) -> None:
        super().__init__(dry_run=True, say=lambda line: None)
        self.asked: list[list[str]] = []

    def show(self, argv, given=None) -> None:
        self.asked.append(list(argv))


def test_all_others(ask: Ask) -> None:
    commands = Asked()
    slices = Slices("tiny", TpuVm(zone="us-east5-a", topology="v5e:2x2"), commands, OWNER)
    slices.check_offered()
    slices.find()
    slices.elsewhere()
    slices.delete(Found("ready", nodes=(("tiny", 1),)))
    slices.delete(Found("ready", queued=True))
    asked = [*commands.asked, [*slices.ssh("tiny", 0), "true"]]
    assert len(asked) == 8
    for command in asked:
        takes(ask, command)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--type=v5p", "--topology=2x2x2"], "Invalid choice: 'v5p'"),
        (["--accelerator-type=v5p-16", "--spott"], "unrecognized arguments: --spott"),
    ],
)
def test_that_it_can_refuse(ask: Ask, flags: list[str], said: str) -> None:
    done = ask(["gcloud", "compute", "tpus", "tpu-vm", "create", "a", "--zone=us-east5-a", "--version=v", *flags])
    assert done.returncode == 2
    assert said in done.stderr
