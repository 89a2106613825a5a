"""`up --follow` of Cloud TPU VMs, with a stand-in for gcloud: what is lost is got again, and what costs is not left."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from launch.tpu_follow import over

from .cloud import Cloud, steps_reach
from .conftest import losses, undisturbed


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
