"""Runs in the background of this machine: the verbs, and what is refused."""

import contextlib
import getpass
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.local import free_port

from .conftest import Launch, command, environment, interrupted, losses, undisturbed

MACHINES = """
import sys
from launch.config import Machines
from launch.local import Local

config = Machines(
    name="tiny",
    local=Local(processes=2, devices=1, port={port}),
    python=sys.executable,
    environment=("JAX_DISABLE_MOST_OPTIMIZATIONS=true",),
)
"""


@pytest.fixture
def machines(folder: Path) -> Iterator[Path]:
    path = folder / "machines.py"
    path.write_text(MACHINES.format(port=free_port()))
    yield path
    subprocess.run(command("stop", path), cwd=folder, env=environment(folder), capture_output=True)


def name() -> str:
    return f"{getpass.getuser()}@{socket.gethostname()}"


def steps_reach(folder: Path, count: int) -> None:
    until = time.monotonic() + 90
    path = folder / "run" / "metrics.jsonl"
    while time.monotonic() < until and not (path.exists() and len(losses(folder / "run")) >= count):
        time.sleep(0.2)
    assert time.monotonic() < until


def test_from_nothing_to_a_run_that_is_stopped_and_goes_on(launch: Launch, machines: Path, folder: Path) -> None:
    up = ("up", machines, "config.py", "--train.steps=100000")
    assert f"tiny is running: lm launch logs --follow {machines}" in launch(*up).stdout
    steps_reach(folder, 1)
    assert "0: running" in launch("status", machines).stdout
    assert "running already" in launch(*up).stdout
    refused = launch("up", machines, "config.py", code=8).stderr
    assert f"with another config, other code or other machines; first lm launch stop {machines}" in refused
    assert "still runs there" in launch("delete", machines, "--yes", code=8).stderr
    stopped = launch("stop", machines).stdout
    assert stopped.count("ended with 75: stopped and saved") == 2
    assert "[0] " in launch("logs", machines).stdout

    done = len(losses(folder / "run"))
    launch(*up)
    steps_reach(folder, done + 3)
    launch("stop", machines)
    launch("delete", machines, "--yes")
    assert not (folder / "lm-launches" / "tiny").exists()
    assert len(losses(folder / "run")) > done, "what the run has written stays"


@pytest.mark.slow
def test_the_losses_are_those_of_one_process(launch: Launch, machines: Path, folder: Path) -> None:
    launch("up", machines, "config.py", "--follow", "--local.processes=4")
    found, expected = losses(folder / "run"), undisturbed(folder)
    assert found.keys() == expected.keys()
    assert all(abs(found[step] - expected[step]) < 2e-5 * expected[step] for step in expected)


def test_what_is_followed_gives_its_exit_code(launch: Launch, machines: Path, folder: Path) -> None:
    (folder / "run").write_text("a file where the run's folder should be")
    assert "lm: tiny ended with 2: config or usage\n" in launch("up", machines, "config.py", "--follow", code=2).stderr


def test_a_name_that_somebody_else_has(launch: Launch, machines: Path, folder: Path) -> None:
    own = folder / "lm-launches" / "tiny"
    own.mkdir(parents=True)
    (own / "owner").write_text("0123 eve@laptop\n")
    said = launch("up", machines, "config.py", code=8).stderr
    assert "a launch of this name is there, of eve@laptop: take another name" in said
    for verb in (("stop", machines), ("delete", machines, "--yes")):
        assert "a launch of this name is there, of eve@laptop" in launch(*verb, code=8).stderr
    assert (own / "owner").read_text() == "0123 eve@laptop\n"
    assert not (folder / "run").exists()
    launch("up", machines, "config.py", "--take-over", "--follow")
    assert (own / "owner").read_text() == f"{(folder / '.config/lm/id').read_text().strip()} {name()}\n"
    launch("delete", machines, "--yes")
    assert not own.exists()


@pytest.mark.slow
def test_one_is_oneself_under_another_host_name(launch: Launch, machines: Path, folder: Path) -> None:
    launch("up", machines, "config.py", "--follow")
    own = folder / "lm-launches" / "tiny"
    (own / "owner").write_text(f"{(folder / '.config/lm/id').read_text().strip()} ann@old-name\n")
    launch("delete", machines, "--yes")
    assert not own.exists()


def test_setup_that_takes_long(launch: Launch, machines: Path, folder: Path) -> None:
    """It runs from the start on, and can be stopped."""
    setup = """setup=('[ -z "$own" ] || sleep 15',),"""  # in the run itself, not where Python is looked at
    machines.write_text(machines.read_text().replace("    python=", f"    {setup}\n    python="))
    assert "is running: " in launch("up", machines, "config.py").stdout
    assert "0: running" in launch("status", machines).stdout
    assert launch("stop", machines).stdout.count("ended with 75") == 2
    assert not (folder / "run").exists()


@pytest.mark.slow
def test_processes_of_another_number_do_not_mix(launch: Launch, machines: Path, folder: Path) -> None:
    up = ("up", machines, "config.py", "--train.steps=100000")
    launch(*up, "--local.processes=1")
    refused = launch(*up, code=8).stderr
    assert "    0: it is running there with another config, other code or other machines" in refused
    launch("stop", machines, "--local.processes=1")
    launch(*up)
    (folder / "lm-launches" / "tiny" / "0" / "pid").read_text()
    refused = launch(*up, "--local.processes=1", code=8).stderr
    assert "other machines; first lm launch stop" in refused
    launch("stop", machines)


@pytest.mark.slow
def test_a_view_that_is_lost_is_no_end(launch: Launch, machines: Path, folder: Path) -> None:
    launch("up", machines, "config.py", "--train.steps=100")
    process = subprocess.Popen(
        command("logs", machines, "--follow"), cwd=folder, env=environment(folder), stdout=subprocess.PIPE, text=True
    )
    steps_reach(folder, 5)
    ended = 0
    while ended < 2 and process.poll() is None:  # both views
        tails = subprocess.run(["pgrep", "-f", f"tail .*{folder}|tail -n 100 -F --pid"], capture_output=True, text=True)
        for pid in map(int, tails.stdout.split()):
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{pid}/cwd") == str(folder / "lm-launches" / "tiny"):
                    os.kill(pid, signal.SIGKILL)
                    ended += 1
        time.sleep(0.05)
    assert ended == 2
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "all 100 steps are done" in out


def test_two_at_once_start_one_run(machines: Path, folder: Path, launch: Launch) -> None:
    both = [
        subprocess.Popen(
            command("up", machines, "config.py", "--train.steps=100000"),
            cwd=folder,
            env=environment(folder),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    said = [one.communicate(timeout=120)[0] for one in both]
    assert 0 in [one.returncode for one in both], said
    held = subprocess.run(
        ["pgrep", "-fc", f"train {folder}/lm-launches/tiny/0/config.json --supervise"], capture_output=True
    )
    launch("stop", machines)
    assert int(held.stdout) <= 2, "one supervisor, and perhaps its child in between"


def test_a_dry_run_does_nothing(launch: Launch, machines: Path, folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    said = launch("up", machines, "config.py", "--dry-run").stdout
    assert "-m lm train" in said
    assert "setsid flock" in said
    for verb in ("status", "logs", "stop", "delete"):
        assert "+ bash -c" in launch(verb, machines, "--dry-run").stdout
    assert sorted(folder.rglob("*")) == before


def test_written_for_others(launch: Launch, machines: Path, folder: Path) -> None:
    launch("write", machines, "config.py", "--out", "out", "--allow=code", "--allow", "versions")
    program = (folder / "out" / "1" / "run.sh").read_text()
    assert "config.json --supervise --allow=code --allow=versions" in program
    assert "export JAX_PROCESS_ID=1\n" in (folder / "out" / "1" / "run.sh").read_text()
    assert '"steps": 12' in (folder / "out" / "config.json").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("up", "machines.py", "config.py", "--local.proceses=3"), "did you mean 'local.processes'?"),
        (("up", "machines.py", "config.py", "--train.stpes=3"), "did you mean 'train.steps'?"),
        (("up", "machines.py", "config.py", "--ssh.hosts=a"), "one target must be given, of local, "),
        (("up", "machines.py", "config.py", "--local.devices=0"), "local.devices: of each of several processes"),
        (("up", "nothing.py", "config.py"), "nothing.py: no such file"),
        (("status", "machines.py", "--train.steps=3"), "unknown key 'train.steps'"),
        (("delete", "machines.py"), "Nobody is there to answer: say --yes"),
    ],
)
def test_what_cannot_be_asked(
    launch: Launch, machines: Path, folder: Path, arguments: tuple[str, ...], said: str
) -> None:
    assert said in launch(*arguments, code=2).stderr
    assert not (folder / "lm-launches").exists()


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("python=sys.executable", 'python="python-of-old"', "python-of-old: command not found"),
        ("python=sys.executable", 'python=sys.executable, setup=("module load jax",)', "setup failed: module load jax"),
        ('name="tiny"', 'name="Tiny_1"', "name: must be small letters"),
        ('environment=("', 'environment=("A B=1", "', "environment.0: must be NAME=VALUE, got 'A B=1'"),
    ],
)
def test_machines_that_cannot_be(launch: Launch, machines: Path, old: str, new: str, said: str) -> None:
    assert old in MACHINES
    machines.write_text(machines.read_text().replace(old, new))
    ended = launch("up", machines, "config.py", code=None)
    assert ended.returncode in (2, 8)
    assert said in ended.stderr


@pytest.mark.parametrize(
    ("slow", "verb", "said"),
    [
        ("command -v", "up", "interrupted while looking at 2 host(s): nothing was changed anywhere"),
        ("mkdir -p", "up", "interrupted while looking for another launch of this name: nothing was started"),
        ("tar -xzf", "up", "interrupted while copying the code ("),
        (
            "find_spec",
            "up",
            "interrupted while looking at Python there: nothing was started; what was copied goes with",
        ),
        ("setsid flock", "up", "interrupted while starting: it may run on some hosts: `lm launch stop "),
        ("kill -TERM", "stop", "interrupted while stopping, which saves first: it was asked to stop"),
        (
            "rm -rf",
            "delete",
            "interrupted while removing tiny: some hosts may still have files of it: `lm launch delete ",
        ),
    ],
)
def test_ctrl_c_tells_what_is_left(machines: Path, folder: Path, slow: str, verb: str, said: str) -> None:
    arguments = {"up": ["config.py"], "delete": ["--yes"]}.get(verb, [])
    assert said in interrupted(folder, slow, verb, str(machines), *arguments)
    assert not (folder / "run").exists()
