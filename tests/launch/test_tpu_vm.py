"""Cloud TPU VMs, with a stand-in for gcloud: the verbs, what is refused, and what Ctrl-C tells."""

import json
import os
import platform
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from launch.commands import Commands, Interrupted
from launch.tpu_vm import TpuVm, target

from .cloud import MACHINES, STAND_IN, V5E, Cloud, steps_reach
from .conftest import environment, losses, undisturbed


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


def test_what_costs_in_another_zone_is_told(cloud: Cloud) -> None:
    cloud.up("--train.steps=100000")
    cloud.behave(zones=json.loads((cloud.here / "behave.json").read_text())["zones"] | {"us-east1-b": [V5E]})
    for verb in ("status", "delete"):
        said = cloud.launch(verb, cloud.machines, "--tpu_vm.zone=us-east1-b")
        assert "there are no machines of tiny in us-east1-b; but of this launch there is, and costs money" in said
        assert "tiny in us-east5-a" in said
        assert "nothing costs" not in said


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


@pytest.mark.slow
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
