"""Hosts with a real sshd each: on ports of this machine, and in networks of their own, one of which is cut."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .conftest import ROOT, Launch, Servers, environment, losses

MACHINES = """
import sys
from launch.config import Machines
from launch.ssh import Ssh

config = Machines(
    name="tiny",
    ssh=Ssh(
        hosts={hosts!r},
        options={options!r},
    ),
    python=sys.executable,
    environment=("JAX_PLATFORMS=cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS=true", "LM_HEARTBEAT_SECONDS=4"),
)
"""
BREAKS = """#!/bin/bash
# A connection that breaks while the code is being copied.
case "$SSH_ORIGINAL_COMMAND" in
    *tar\\ -xzf*) (head -c 50000; kill -9 $PPID) | bash -c "$SSH_ORIGINAL_COMMAND" ;;
    *) exec bash -c "$SSH_ORIGINAL_COMMAND" ;;
esac
"""


def machines_file(servers: Servers, *hosts: str) -> Path:
    path = servers.folder / "machines.py"
    path.write_text(MACHINES.format(hosts=hosts, options=servers.options))
    return path


def test_trains_on_two_hosts_and_is_removed(launch: Launch, folder: Path, two: tuple) -> None:
    host, servers = two
    machines = machines_file(servers, host("a"), host("b"))
    followed = launch("up", machines, "config.py", "--follow").stdout
    assert "all 12 steps are done" in followed
    assert "[ssh://" in followed
    assert launch("status", machines).stdout.count("ended with 0: done") == 2
    assert len(losses(folder / "run")) == 12
    for name in ("a", "b"):
        (code,) = (folder / name / "lm-launches" / "tiny").glob("code-*")
        assert (code / "lm" / "config.py").read_bytes() == (ROOT / "lm" / "config.py").read_bytes()
        assert not (code / ".git").exists()
    launch("delete", machines, "--yes")
    assert not (folder / "a" / "lm-launches" / "tiny").exists()
    assert not (folder / "b" / "lm-launches" / "tiny").exists()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ("ssh://nobody@no-such-host.invalid", "ssh://nobody@no-such-host.invalid: ssh: Could not resolve hostname"),
        ("ssh://root@127.0.0.1:9", "ssh://root@127.0.0.1:9: ssh: connect to host 127.0.0.1 port 9: Connection refused"),
        ("denied", "Permission denied (publickey"),
    ],
)
def test_one_that_cannot_be_reached(launch: Launch, folder: Path, two: tuple, other: str, said: str) -> None:
    host, servers = two
    if other == "denied":
        other = host("b", "DenyUsers *")
    ended = launch("up", machines_file(servers, host("a"), other), "config.py", code=8)
    assert "nothing was started, as these hosts cannot be used:\n    ssh://" in ended.stderr
    assert said in ended.stderr
    assert ended.stderr.count("    ssh://") == 1, "only the one that failed is named"
    assert not (folder / "a" / "lm-launches").exists()


def test_a_sync_that_breaks(launch: Launch, folder: Path, two: tuple) -> None:
    host, servers = two
    wrapper = folder / "breaks"
    wrapper.write_text(BREAKS)
    wrapper.chmod(0o755)
    broken = host("b", f"ForceCommand {wrapper}")
    machines = machines_file(servers, host("a"), broken)
    said = launch("up", machines, "config.py", code=8).stderr
    assert "the code could not be copied, and nothing was started:" in said
    assert broken in said
    until = time.monotonic() + 20
    there = folder / "b" / "lm-launches" / "tiny"
    while [*there.glob("new-*")] and time.monotonic() < until:
        time.sleep(0.1)
    assert not [*there.glob("code-*"), *there.glob("new-*")], "no half of it is left"
    assert not (folder / "a" / "lm-launches" / "tiny" / "0" / "run.sh").exists()
    wrapper.write_text('#!/bin/bash\nexec bash -c "$SSH_ORIGINAL_COMMAND"\n')
    assert "all 12 steps are done" in launch("up", machines, "config.py", "--follow").stdout


def test_no_space_on_one(launch: Launch, folder: Path, two: tuple) -> None:
    host, servers = two
    (folder / "b").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder / "b")]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs a small disk, which only root can mount")
    try:
        full = host("b")
        said = launch("up", machines_file(servers, host("a"), full), "config.py", code=8).stderr
        assert full in said
        assert "No space left on device" in said
        assert said.count("    ssh://") == 1
        assert not [*(folder / "b" / "lm-launches" / "tiny").glob("*-*")]
        assert not (folder / "a" / "lm-launches" / "tiny" / "0" / "run.sh").exists()
    finally:
        servers.end()
        subprocess.run(["umount", "-l", folder / "b"], check=True)


@pytest.mark.slow
def test_hosts_that_are_left_out_are_named(launch: Launch, folder: Path, two: tuple) -> None:
    host, servers = two
    a, b = host("a"), host("b")
    launch("up", machines_file(servers, a, b), "config.py", "--follow")
    said = launch("up", machines_file(servers, b), "config.py", "--follow", "--train.steps=13").stdout
    assert f"tiny was on {a} too, at which is not looked now" in said
    again = launch("up", machines_file(servers, b, a), "config.py", "--follow", "--train.steps=14").stdout
    assert "tiny was on" not in again


def test_no_python_there(launch: Launch, folder: Path, two: tuple) -> None:
    host, servers = two
    machines = machines_file(servers, host("a"))
    machines.write_text(machines.read_text().replace("python=sys.executable", 'python="env -i python3 -S"'))
    said = launch("up", machines, "config.py", code=8).stderr
    assert "not installed there: jax, flax" in said or "Python 3.11 or newer" in said


@pytest.fixture
def networks(folder: Path, servers: Servers) -> Iterator[tuple[str, ...]]:
    """Network namespaces: a hub with a bridge, and the hosts 10.9.1.1 and 10.9.1.2 at its wires, with an sshd each."""
    if not sys.platform.startswith("linux") or shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs the network namespaces of Linux, `ip`, and root")
    hub, *hosts = names = tuple(f"lm{os.getpid()}{letter}" for letter in "hab")
    own = [Path("/etc/netns") / name for name in hosts]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("-n", hub, "link", "add", "bridge", "type", "bridge")
            for i, name in enumerate(hosts, 1):
                ip("link", "add", f"wire{i}", "netns", hub, "type", "veth", "peer", "name", "wire", "netns", name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine lets nobody make network namespaces: {error.stderr.decode().strip()}")
        ip("-n", hub, "addr", "add", "10.9.1.9/24", "dev", "bridge")
        for device in ("bridge", "lo"):
            ip("-n", hub, "link", "set", device, "up")
        for i, (name, etc) in enumerate(zip(hosts, own, strict=True), 1):
            ip("-n", hub, "link", "set", f"wire{i}", "master", "bridge", "up")
            ip("-n", name, "addr", "add", f"10.9.1.{i}/24", "dev", "wire")
            for device in ("wire", "lo"):
                ip("-n", name, "link", "set", device, "up")
            etc.mkdir(parents=True)  # what a host calls itself is where the others reach it
            (etc / "hosts").write_text(f"127.0.0.1 localhost\n10.9.1.{i} {socket.gethostname()}\n")
            servers.start(name[-1], "0.0.0.0", 22, inside=("ip", "netns", "exec", name))
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        for etc in own:
            shutil.rmtree(etc, ignore_errors=True)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.mark.slow
def test_a_host_that_is_cut_off_and_comes_back(folder: Path, servers: Servers, networks: tuple[str, ...]) -> None:
    """The run ends with the losses of one that nobody disturbed, bit for bit."""
    hub, inside = networks[0], ["ip", "netns", "exec", networks[0]]
    machines = machines_file(servers, "root@10.9.1.1", "root@10.9.1.2")
    more = ["--train.steps=100", "--checkpoint.every=20"]

    def lm(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [*inside, sys.executable, "-m", "lm", "launch", *arguments]
        ended = subprocess.run(
            command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=240
        )
        assert ended.returncode == code, ended.stdout + ended.stderr
        return ended

    time.sleep(1)
    lm("up", str(machines), "config.py", *more)
    until = time.monotonic() + 90
    while not (folder / "run" / "metrics.jsonl").exists():
        assert time.monotonic() < until, lm("logs", str(machines)).stdout
        time.sleep(0.05)
    ip("-n", hub, "link", "set", "wire2", "down")
    cut = lm("status", str(machines), code=8)
    assert "root@10.9.1.1: running" in cut.stdout
    assert "root@10.9.1.2: running" not in cut.stdout
    assert "what tiny does on hosts that did not answer cannot be known" in cut.stderr
    stopped = lm("delete", str(machines), "--yes", code=8).stderr
    assert "root@10.9.1.2: " in stopped
    time.sleep(4)
    ip("-n", hub, "link", "set", "wire2", "up")
    followed = lm("logs", str(machines), "--follow").stdout
    while "running" in lm("status", str(machines)).stdout:
        time.sleep(1)
    assert lm("status", str(machines)).stdout.count("ended with 0: done") == 2, followed
    logs = [(folder / name / "lm-launches" / "tiny" / str(i) / "log.txt").read_text() for i, name in enumerate("ab")]
    assert all("ended with exit code 6" in log for log in logs), logs

    overrides = [*more, f"--run.dir={folder / 'same'}", f"--data.dir={folder / 'run' / 'data'}"]
    local = [sys.executable, "-m", "launch.local", "--processes", "2", "--", "train", "config.py", *overrides]
    subprocess.run(local, cwd=folder, env=environment(folder), check=True, capture_output=True, timeout=240)
    assert losses(folder / "run") == losses(folder / "same")
    starts = [json.loads(line) for line in (folder / "run" / "journal.jsonl").read_text().splitlines()]
    assert sum(event["event"] == "start" for event in starts) > 1
