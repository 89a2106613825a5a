"""Cloud TPU VMs, with `stand_in/gcloud` in place of gcloud: its hosts are folders here, and runs on them are real."""

import json
import os
import platform
import runpy
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from launch.commands import Commands, Interrupted
from launch.tpu_follow import over
from launch.tpu_vm import TpuVm, target

from .conftest import environment, losses, undisturbed

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


@pytest.fixture
def cloud(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    made = Cloud(folder)
    monkeypatch.setenv("LM_STAND_IN", str(made.here))
    yield made
    for name in made.state["nodes"]:
        made.functions["lose_disks"](name)


def steps_reach(folder: Path, count: int, process: subprocess.Popen[str] | None = None) -> None:
    until = time.monotonic() + 90
    path = folder / "run" / "metrics.jsonl"
    while not (path.exists() and len(losses(folder / "run")) >= count):
        if time.monotonic() > until or (process and process.poll() is not None):
            if process:
                process.kill()
            raise AssertionError(process and process.communicate())
        time.sleep(0.1)


def test_from_nothing_to_a_finished_run_and_nothing_left(cloud: Cloud, folder: Path) -> None:
    cloud.behave(polls=3)
    said = cloud.up("--follow")
    assert "fits v5e:1x1" in said
    assert "1 chips (v5e:1x1, spot, us-east5-a) at $1.5 a chip and hour: $1.50 an hour; 0.0 hours of training" in said
    assert f"run.dir is {folder}/run, no bucket" in said
    assert "    CREATING\n" in said
    assert "all 12 steps are done" in said
    assert "0: ended with 0: done" in said
    assert said.rstrip().endswith("deleted; nothing costs")
    assert cloud.state == {"nodes": {}, "queued": {}}
    (created,) = cloud.asked("create")
    assert "--spot" in created
    assert "--accelerator-type=v5litepod-1" in created
    assert "--version=v2-alpha-tpuv5-lite" in created
    assert losses(folder / "run") == undisturbed(folder)


def test_preempted_it_is_created_again_and_ends_the_same(cloud: Cloud, folder: Path) -> None:
    cloud.behave(polls=1)
    process = cloud.start("up", cloud.machines, "config.py", "--yes", "--follow", "--train.steps=150")
    steps_reach(folder, 20, process)
    cloud.behave(refuse='There is no more capacity in the zone "us-east5-a"', refuse_times=2)
    cloud.preempt("tiny")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert "the machines are PREEMPTED: getting them again" in out
    assert out.count("no more capacity") == 2
    assert out.count("another zone may have some, or a queue: --tpu_vm.request=queued") == 2
    assert "all 150 steps are done" in out
    assert len(cloud.asked("create")) == 4
    assert cloud.state["nodes"] == {}
    found = losses(folder / "run")
    assert len(found) == 150
    assert found == undisturbed(folder, "--train.steps=150")


@pytest.mark.slow
def test_every_verb_may_be_asked_again(cloud: Cloud, folder: Path) -> None:
    assert "there are no machines of tiny in us-east5-a; nothing costs" in cloud.launch("status", cloud.machines)
    assert "are not there: `lm launch up" in cloud.launch("logs", cloud.machines, code=8)
    assert "nothing costs" in cloud.launch("delete", cloud.machines)
    up = ("--train.steps=100000", "--tpu_vm.labels", "team=a,cost=b")
    said = cloud.up(*up)
    assert "what is there costs $1.50 an hour, until `lm launch delete" in said
    steps_reach(folder, 1)
    assert "is running already" in cloud.up(*up)
    assert len(cloud.asked("create")) == 1
    assert (cloud.here / "disks" / "tiny" / "0" / "i").read_text() == "one\n"
    said = cloud.launch("status", cloud.machines)
    assert "tiny: READY; what is there costs $1.50 an hour" in said
    assert "0: running" in said
    assert "The machines stay: what is there costs" in cloud.launch("stop", cloud.machines)
    assert "0: ended with 75: stopped and saved" in cloud.launch("status", cloud.machines)
    assert "Nobody is there to answer: say --yes" in cloud.launch("delete", cloud.machines, code=2)
    assert cloud.state["nodes"]["tiny"]["labels"]["team"] == "a"
    assert "deleted; nothing costs" in cloud.launch("delete", cloud.machines, "--yes")
    assert cloud.state["nodes"] == {}


@pytest.mark.slow
def test_two_hosts(cloud: Cloud, folder: Path) -> None:
    said = cloud.up("--follow", "--tpu_vm.topology=v5p:2x2x2", "--train.batch_size=8", "--tpu_vm.when_done=keep")
    assert "all 12 steps are done" in said
    assert "[1] " in said
    assert "1: ended with 0: done" in said
    assert "until `lm launch delete" in said.splitlines()[-1]
    (created,) = cloud.asked("create")
    assert "--accelerator-type=v5p-16" in created
    found, expected = losses(folder / "run"), undisturbed(folder, "--train.batch_size=8")
    assert found.keys() == expected.keys()
    assert all(abs(found[step] - expected[step]) < 2e-5 * expected[step] for step in expected)


@pytest.mark.slow
def test_several_slices_are_queued_and_preempted_together(cloud: Cloud, folder: Path) -> None:
    cloud.behave(polls=2)
    arguments = ("--yes", "--follow", "--tpu_vm.slices=2", "--mesh.data=2", "--train.steps=60")
    process = cloud.start("up", cloud.machines, "config.py", *arguments)
    steps_reach(folder, 8, process)
    cloud.preempt("tiny-1")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert "2 chips (2 x v5e:1x1, spot, us-east5-a)" in out
    for state in ("PROVISIONING", "the machines are SUSPENDED: getting them again", "all 60 steps are done"):
        assert state in out
    assert "[tiny-1/0] " in out
    first, second = cloud.asked("create")
    assert first == second
    assert {"--node-count=2", "--node-prefix=tiny", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"} < set(first)
    assert cloud.state == {"nodes": {}, "queued": {}}
    assert len(losses(folder / "run")) == 60


@pytest.mark.slow
def test_a_host_that_was_started_anew_goes_on(cloud: Cloud, folder: Path) -> None:
    more = ("--yes", "--follow", "--train.steps=60", "--tpu_vm.preemptions=1")
    process = cloud.start("up", cloud.machines, "config.py", *more)
    steps_reach(folder, 8, process)
    disk = cloud.here / "disks" / "tiny"
    disk.rename(cloud.here / "kept")
    cloud.functions["lose_disks"]("tiny")
    (cloud.here / "kept").rename(disk)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert "the machines are not running: getting them again" in out
    assert "all 60 steps are done" in out
    assert len(cloud.asked("create")) == 1


@pytest.mark.slow
def test_one_failure_of_each_kind_ends_nothing(cloud: Cloud, folder: Path) -> None:
    """At the first start, after a preemption, and in the end."""
    cloud.behave(ssh_fails="echo one")
    process = cloud.start("up", cloud.machines, "config.py", "--yes", "--follow", "--train.steps=60")
    steps_reach(folder, 8, process)
    cloud.behave(ssh_fails="echo one", refuse_delete="503: The service is currently unavailable", refuse_delete_times=3)
    cloud.preempt("tiny")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert out.count("what lm needs could not be installed") == 2
    assert out.count("503: The service") == 3
    assert "all 60 steps are done" in out
    assert out.rstrip().endswith("deleted; nothing costs")
    assert cloud.state["nodes"] == {}


def test_what_never_starts_is_given_up_and_removed(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIVE_UP_SECONDS", "1")
    said = cloud.up("--follow", "--tpu_vm.install=false", code=8)
    assert "given up, as nothing has started for so long; the machines were deleted. `lm launch up" in said
    assert cloud.state["nodes"] == {}
    cloud.up("--tpu_vm.install=false", code=8)
    assert "tiny" in cloud.state["nodes"], "without --follow somebody is there"


def test_the_code_of_a_run_that_failed_is_not_lost_when_its_machines_stay(
    cloud: Cloud, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIVE_UP_SECONDS", "1")
    (folder / "run").write_text("a file where the run's folder should be")
    cloud.behave(refuse_delete="503: The service is currently unavailable", refuse_delete_times=1000)
    assert "lm: tiny ended with 2: config or usage" in cloud.up("--follow", code=2)
    assert "tiny" in cloud.state["nodes"]


def test_a_request_does_not_outlive_up(cloud: Cloud) -> None:
    cloud.behave(polls=10**6)
    said = cloud.up("--tpu_vm.request=queued", "--tpu_vm.wait_seconds=1", code=8)
    assert "WAITING_FOR_RESOURCES: `lm launch up" in said or "they are FAILED. its time is over" in said
    assert "The request was deleted" in said
    assert cloud.state == {"nodes": {}, "queued": {}}
    assert "--valid-until-duration=1s" in cloud.asked("create")[0]


@pytest.mark.slow
def test_followed_it_is_asked_again_when_its_time_is_over(cloud: Cloud) -> None:
    cloud.behave(polls=10**6)
    more = ("--tpu_vm.request=queued", "--tpu_vm.wait_seconds=3")
    process = cloud.start("up", cloud.machines, "config.py", "--yes", "--follow", *more)
    until = time.monotonic() + 60
    while len(cloud.asked("create")) < 2:
        assert time.monotonic() < until
        time.sleep(0.1)
    cloud.behave(polls=1)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert "all 12 steps are done" in out
    assert cloud.state == {"nodes": {}, "queued": {}}


def test_what_costs_in_another_zone_is_told(cloud: Cloud) -> None:
    cloud.up("--train.steps=100000")
    cloud.behave(zones=json.loads((cloud.here / "behave.json").read_text())["zones"] | {"us-east1-b": [V5E]})
    for verb in ("status", "delete"):
        said = cloud.launch(verb, cloud.machines, "--tpu_vm.zone=us-east1-b")
        assert "there are no machines of tiny in us-east1-b; but of this launch there is, and costs money" in said
        assert "tiny in us-east5-a" in said
        assert "nothing costs" not in said


@pytest.mark.slow
def test_a_host_that_never_answers_again_is_replaced(cloud: Cloud, folder: Path) -> None:
    more = ("--tpu_vm.topology=v5p:2x2x2", "--train.batch_size=8", "--train.steps=40")
    process = cloud.start("up", cloud.machines, "config.py", "--yes", "--follow", *more)
    steps_reach(folder, 5, process)
    cloud.behave(ssh_refused=["tiny/1"])
    for worker in ("0", "1"):
        disk = cloud.here / "disks" / "tiny" / worker
        pid = (disk / "lm-launches" / "tiny" / worker / "pid").read_text()
        os.kill(int(pid), signal.SIGKILL)
    until = time.monotonic() + 60
    while len(cloud.asked("create")) < 2:
        assert time.monotonic() < until
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    cloud.behave(ssh_refused=[])
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert "no answer from 1: asking again" in out
    assert "the machines are not answering: getting them again" in out
    assert "all 40 steps are done" in out


def test_stopped_by_somebody_else_the_machines_stay(cloud: Cloud, folder: Path) -> None:
    process = cloud.start("up", cloud.machines, "config.py", "--yes", "--follow", "--train.steps=100000")
    steps_reach(folder, 5, process)
    assert "The machines stay" in cloud.launch("stop", cloud.machines)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, out + err
    assert "The machines stay: what is there costs $1.50 an hour" in out
    assert "tiny" in cloud.state["nodes"]


@pytest.mark.slow
def test_stopped_by_the_machine_the_run_goes_on(cloud: Cloud, folder: Path) -> None:
    process = cloud.start("up", cloud.machines, "config.py", "--yes", "--follow", "--train.steps=60")
    steps_reach(folder, 5, process)
    pid = cloud.here / "disks" / "tiny" / "0" / "lm-launches" / "tiny" / "0" / "pid"
    os.kill(int(pid.read_text()), signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, out + err
    assert "the machines are not running: getting them again" in out
    assert "all 60 steps are done" in out


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        (["0", "0"], True),
        (["0", "running"], False),
        (["6", ""], False),
        (["0", ""], True),
        (["4", ""], True),
        (["stopped", ""], True),
        (["75", "75"], False),
        (["75", "6"], False),
        (["6", "1"], True),
        (["0", "none"], False),
        ([""], False),
    ],
)
def test_when_a_run_is_over(ends: list[str], said: bool) -> None:
    assert over(ends) is said


def test_a_dry_run_asks_nothing_of_the_cloud(cloud: Cloud, folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    said = cloud.launch("up", cloud.machines, "config.py", "--dry-run", "--follow", "--tpu_vm.topology=v5p:2x2x2",
                        "--train.batch_size=8")  # fmt: skip
    assert (
        "+ gcloud compute tpus tpu-vm create tiny --version=v2-alpha-tpuv5 --zone=us-east5-a --accelerator-type=v5p-16"
        in said
    )
    assert "--labels=lm-launch=tiny,lm-owner=" in said
    assert "+ gcloud compute tpus tpu-vm ssh tiny --zone=us-east5-a --worker=1 " in said
    for verb in ("status", "logs", "stop", "delete"):
        assert "+ gcloud compute tpus tpu-vm " in cloud.launch(verb, cloud.machines, "--dry-run")
    assert sorted(folder.rglob("*")) == before


def test_written_for_others(cloud: Cloud, folder: Path) -> None:
    cloud.launch("write", cloud.machines, "config.py", "--out", "out", "--tpu_vm.slices=2", "--mesh.data=2")
    assert "queued-resources \\\n    create" in (folder / "out" / "create.sh").read_text()
    program = (folder / "out" / "1" / "run.sh").read_text()
    assert "-m lm train" in program
    assert program.index("export JAX_PLATFORMS=tpu,cpu\n") < program.index("export JAX_PLATFORMS=cpu\n")
    assert cloud.calls == []


@pytest.mark.parametrize(
    ("behave", "more", "said"),
    [
        ({"account": ""}, (), "nobody is logged in to gcloud on this machine: gcloud auth login"),
        (
            {"refuse": "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPreemptible' has been exceeded. Limit: 0"},
            (),
            "Limit: 0\nask for quota (console: IAM, Quotas), or take another zone",
        ),
        ({"refuse": "PERMISSION_DENIED: tpu.nodes.create"}, (), "needs the role TPU Admin"),
        ({}, ("--tpu_vm.zone=us-east1-b",), "us-east1-b has no v5e:1x1. TPUs there: none"),
        ({}, ("--tpu_vm.zone=mars-north1-a",), "Permission denied on 'locations/mars-north1-a' (or it may not exist)"),
        ({}, ("--tpu_vm.topology=v6e:1x1",), "us-east5-a has no v6e:1x1. TPUs there: v5litepod, v5p. Zones: "),
        ({}, ("--tpu_vm.topology=v5p:2x2x1",), "us-east5-a has no v5p:2x2x1. TPUs there: v5p-16. Zones: "),
    ],
)
def test_what_is_refused_before_anything_costs(
    cloud: Cloud, behave: dict[str, Any], more: tuple[str, ...], said: str
) -> None:
    cloud.behave(**behave)
    assert said in cloud.up(*more, code=8)
    assert cloud.state == {"nodes": {}, "queued": {}}


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--tpu_vm.topology=v5p-128",), "there is no TPU topology 'v5p-128'; the nearest: v5p:4x4x4"),
        (("--tpu_vm.topology=tpu7x:2x2x1",), "tpu_vm.topology: tpu7x is not to be had as Cloud TPU VMs"),
        (("--tpu_vm.zone=here",), "tpu_vm.zone: must be a zone, such as us-east5-a, got 'here'"),
        (("--tpu_vm.provisioning=cheap",), "tpu_vm.provisioning"),
        (("--tpu_vm.create_options=network=a",), "are flags of gcloud, --NAME=VALUE each; got 'network=a'"),
        (("--tpu_vm.labels=A=b",), "tpu_vm.labels.0: must be KEY=VALUE"),
        (("--train.batch_size=6", "--tpu_vm.topology=v5p:2x2x2"), "batch"),
        (("--model.width=65536", "--model.heads=512", "--train.batch_size=4"), "the config does not fit v5e:1x1"),
        (("--tpu_vm.slices=3",), "3"),
    ],
)
def test_what_cannot_be_asked(cloud: Cloud, more: tuple[str, ...], said: str) -> None:
    assert said in cloud.up(*more, code=2)
    assert cloud.calls == []


def test_a_tree_that_is_too_large_is_refused_before_anything_costs(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LARGEST_BYTES", "1000")
    assert "MiB to send" in cloud.up(code=2)
    assert cloud.calls == []


def test_ctrl_c_between_two_stages_tells_what_costs() -> None:
    machines = target("tiny", TpuVm(zone="us-east5-a", topology="v5e:1x1"), Commands()).machines
    with pytest.raises(Interrupted, match="what is there costs money, until `lm launch delete"), machines.paid():
        raise KeyboardInterrupt


def test_nobody_says_yes(cloud: Cloud) -> None:
    said = cloud.launch("up", cloud.machines, "config.py", code=2)
    assert "Create them? Nobody is there to answer: say --yes" in said
    assert cloud.asked("create") == []


def test_there_is_no_gcloud(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    outside = environment(cloud.folder)
    monkeypatch.setattr(cloud, "environment", lambda: outside | {"PATH": "/nowhere"})
    assert "there is no program 'gcloud' on this machine; install it" in cloud.up(code=8)


@pytest.mark.parametrize("labels", [{}, {"lm-launch": "tiny", "lm-owner": "0123", "lm-owner-name": "eve"}])
def test_a_name_that_exists(cloud: Cloud, labels: dict[str, str]) -> None:
    name = "projects/p/locations/us-east5-a/nodes/tiny"
    state = {"nodes": {"tiny": {"name": name, "state": "READY", "labels": labels, "polls": 0}}, "queued": {}}
    (cloud.here / "state.json").write_text(json.dumps(state))
    for arguments in (("up", cloud.machines, "config.py"), ("delete", cloud.machines)):
        said = cloud.launch(*arguments, "--yes", code=8)
        assert "there is a TPU called tiny in us-east5-a already" in said
        assert ("of the launch tiny of eve" if labels else "not ours") in said
    assert cloud.state["nodes"]["tiny"]["state"] == "READY"
    assert (
        "nothing costs" in cloud.launch("delete", cloud.machines, "--yes", "--take-over", code=0 if labels else 8)
        or not labels
    )


def test_what_is_there_is_something_else(cloud: Cloud) -> None:
    cloud.up("--train.steps=100000")
    said = cloud.up("--tpu_vm.topology=v5p:2x2x2", "--train.batch_size=8", code=8)
    assert "there are 1 x v5litepod:1x1 called tiny, which is not the 1 x v5p:2x2x2 of the machines file" in said
    said = cloud.up("--train.steps=9", code=8)
    assert "    0: it is running there with another config, other code or other machines; first lm launch stop" in said
    (cloud.here / "disks" / "tiny" / "0" / "lm-launches" / "tiny" / "owner").write_text("eve@laptop:/src")
    said = cloud.up("--train.steps=100000", code=8)
    assert "    0: a launch of this name is there, of eve@laptop:/src: take another name" in said


@pytest.mark.parametrize(
    ("behave", "said"),
    [
        ({"polls": 10**6}, "after 1 s (tpu_vm.wait_seconds) the machines of tiny are still CREATING: `lm launch up"),
        ({"ssh_refused": ["tiny/1"]}, "    1: ssh: connect to host 10.0.0.3 port 22: Connection refused"),
        ({"breaks": {"tiny/1": "tar -xzf"}}, "the code could not be copied, and nothing was started:\n    1: "),
    ],
)
def test_a_host_that_does_not_do(cloud: Cloud, behave: dict[str, Any], said: str) -> None:
    cloud.behave(**behave)
    more = ("--tpu_vm.topology=v5p:2x2x2", "--train.batch_size=8")
    found = cloud.up(*more, *(() if "breaks" in behave else ("--tpu_vm.wait_seconds=1",)), code=8)
    assert said in found
    assert "    0: " not in found
    assert "what is there costs $12.00 an hour, until `lm launch delete" in found
    assert not (cloud.folder / "run").exists()
    cloud.behave(polls=1, ssh_refused=[], breaks={})
    if "polls" in behave:
        state = cloud.state
        state["nodes"]["tiny"]["polls"] = 1
        (cloud.here / "state.json").write_text(json.dumps(state))
    assert "tiny is running" in cloud.up(*more)
    assert len(cloud.asked("create")) == 1


def test_no_space_on_one(cloud: Cloud) -> None:
    small = cloud.here / "disks" / "tiny" / "1"
    small.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(small)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs a small disk, which only root can mount")
    try:
        said = cloud.up("--tpu_vm.topology=v5p:2x2x2", "--train.batch_size=8", code=8)
        assert "    1: " in said
        assert "No space left on device" in said
        assert "    0: " not in said
        assert "what is there costs" in said
    finally:
        subprocess.run(["umount", "-l", small], check=True)


def test_a_request_that_fails_says_why(cloud: Cloud) -> None:
    process = cloud.start("up", cloud.machines, "config.py", "--yes", "--tpu_vm.request=queued")
    until = time.monotonic() + 60
    cloud.behave(polls=10**6)
    while not cloud.state["queued"]:
        assert time.monotonic() < until
        time.sleep(0.05)
    state = cloud.state
    state["queued"]["tiny"]["state"] = {"state": "FAILED", "failedData": {"error": {"message": "You are out of luck"}}}
    (cloud.here / "state.json").write_text(json.dumps(state))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 8
    assert "they are FAILED. You are out of luck" in err


def test_the_usual_installation(cloud: Cloud, folder: Path) -> None:
    """Its lines, with a uv that notes what it is asked and makes an environment that leads to this Python."""
    uv = cloud.here / "vm_bin" / "uv"
    uv.write_text(f"""#!/bin/bash
echo "$@" >> ~/asked
[ ! "$UV_CONSTRAINT" ] || grep ^jax== "$UV_CONSTRAINT" >> ~/asked
[ "$1" = venv ] || {{ test -f pyproject.toml; exit; }}
mkdir -p ~/lm-python/bin
ln -s {sys.executable} ~/lm-python/bin/python
echo 'export PATH={Path(sys.executable).parent}:$PATH' > ~/lm-python/bin/activate
""")
    uv.chmod(0o755)
    text = MACHINES.replace(' install=("echo one >> ~/i",),', "").replace("python=sys.executable,", 'python="python",')
    assert "install" not in text
    cloud.machines.write_text(text)
    assert "all 12 steps are done" in cloud.up("--follow", "--tpu_vm.when_done=keep")
    asked = (cloud.here / "disks" / "tiny" / "0" / "asked").read_text()
    assert "venv --quiet --python 3.12" in asked
    assert "-r pyproject.toml --extra gcs --extra huggingface jax[tpu]" in asked
    assert "jax==" not in asked
    cloud.launch("delete", cloud.machines, "--yes")
    said = cloud.up("--train.steps=13", "--tpu_vm.when_done=keep")
    assert "installing what lm needs, in the versions with which this run began" in said
    asked = (cloud.here / "disks" / "tiny" / "0" / "asked").read_text()
    assert f"venv --quiet --python {platform.python_version()} " in asked
    assert f"\njax=={version('jax')}\n" in asked
    cloud.launch("stop", cloud.machines)

    uv.write_text("#!/bin/bash\necho no such package >&2\nexit 2\n")
    said = cloud.up("--train.steps=14", code=8)
    assert "--allow versions takes the newest:\n    0: no such package" in said
    said = cloud.up("--train.steps=14", "--allow=versions", code=8)
    assert "what lm needs could not be installed (tpu_vm.install):\n    0: no such package" in said


@pytest.mark.slow
@pytest.mark.parametrize(
    ("slow", "verb", "said"),
    [
        ({"slow": {"auth list": 60}}, "up", "interrupted while looking for tiny in us-east5-a: nothing was created"),
        ({"slow": {"accelerator-types list": 60}}, "up", "looking whether there is v5e:1x1: nothing was created"),
        (
            {"slow": {"tpu-vm create": 60}},
            "up",
            "interrupted while creating tiny: they may be created nevertheless, and cost money then: `lm launch delete",
        ),
        ({"polls": 10**6}, "up", "interrupted while waiting until the machines are ready"),
        ({"slow": {"tpu-vm ssh": 60}}, "up", "interrupted while waiting until their hosts answer: no run was started"),
        ({"slow_scripts": {"tar -xzf": 60}}, "up", "interrupted while copying the code"),
        ({"slow_scripts": {"echo one": 60}}, "up", "interrupted while installing what lm needs"),
        ({"slow_scripts": {"setsid flock": 60}}, "up", "interrupted while starting"),
        ({"slow_scripts": {"kill -TERM": 60}}, "stop", "interrupted while stopping"),
        ({"slow": {"tpu-vm delete": 60}}, "delete", "they may be there, and cost money: `lm launch delete"),
    ],
)
def test_ctrl_c_tells_what_costs(cloud: Cloud, slow: dict[str, Any], verb: str, said: str) -> None:
    more = ["config.py", "--yes"] if verb == "up" else ["--yes"] if verb == "delete" else []
    if verb != "up":
        cloud.up("--train.steps=100000")
    cloud.behave(**slow)
    before = len(cloud.calls)
    process = cloud.start(verb, cloud.machines, *more)
    word = next(iter(slow.get("slow", slow.get("slow_scripts", {"tpu-vm list": 0}))))
    until = time.monotonic() + 60
    while word not in " ".join(" ".join(call) for call in cloud.calls[before:]):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1.5 if word == "tpu-vm list" else 0.5)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert said in err
    if word == "tpu-vm create":
        assert "tiny" in cloud.state["nodes"], "what was asked for is made all the same"
    elif cloud.state["nodes"] and verb != "delete":
        assert "what is there costs $1.50 an hour, until `lm launch delete" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_ctrl_c_while_following(cloud: Cloud, folder: Path) -> None:
    process = cloud.start("up", cloud.machines, "config.py", "--yes", "--follow", "--train.steps=100000")
    steps_reach(folder, 5, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 0, err
    assert "The run goes on; after a preemption only `lm launch up" in out
    assert "what is there costs $1.50 an hour, until `lm launch delete" in out
    assert "0: running" in cloud.launch("status", cloud.machines)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("compute tpus tpu-vm create a --zone=us-east5-a", "--version: must be specified"),
        ("compute tpus tpu-vm create a --zone=us-east5-a --version=v --spott", "unrecognized arguments: --spott"),
        ("compute tpus tpu-vm create a --version=v --type=v4 --topology=2x2x2", "--zone: must be specified"),
        ("compute tpus tpu-vm create a --zone=us-east5-a --version=v --type=v4", "exactly one of"),
        (
            "compute tpus tpu-vm create a --zone=us-east5-a --version=v --type=v5p --topology=2x2x2",
            "Invalid choice: 'v5p'",
        ),
        ("compute tpus tpu-vm ssh a --zone=us-east5-a --worker=x --command true", "Bad value [x]"),
        ("compute tpus tpu-vm start a --zone=us-east5-a", "Invalid choice"),
        ("compute tpus queued-resources delete --zone=us-east5-a --force", "must be specified"),
        (
            "compute tpus queued-resources create a --zone=us-east5-a --runtime-version=v --accelerator-type=v6e-4",
            "exactly one of ( --node-id",
        ),
    ],
)
def test_the_stand_in_is_strict(cloud: Cloud, arguments: str, said: str) -> None:
    ended = subprocess.run(
        [STAND_IN / "gcloud", *arguments.split()], env=cloud.environment(), capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert said in ended.stderr
