"""Hosts with a network of their own, which is cut: nobody closes a connection, and all end in time all the same."""

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import lm as package
from launch.local import environment

PROGRAM = """
import time
from lm.parallel.processes import joined

with joined({}) as processes:
    processes.gather("all are there", None)
    print("there", flush=True)
    if processes.index == 1:
        time.sleep(1000)  # as in a collective that never ends
    processes.gather("for ever", None)
"""
PORT = 8476


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with a wire between them: 10.9.0.1 in the first, 10.9.0.2 in the second."""
    if not sys.platform.startswith("linux") or shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("needs the network namespaces of Linux, `ip`, and root")
    first, second = names = (f"lm{os.getpid()}a", f"lm{os.getpid()}b")
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "wire", "netns", first, "type", "veth", "peer", "name", "wire", "netns", second)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine lets nobody make network namespaces: {error.stderr.decode().strip()}")
        for number, name in enumerate(names, 1):
            ip("-n", name, "addr", "add", f"10.9.0.{number}/24", "dev", "wire")
            for device in ("wire", "lo"):
                ip("-n", name, "link", "set", device, "up")
        yield first, second
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.parametrize("lone", [0, 2])
def test_a_host_that_vanishes_ends_all(lone: int, hosts: tuple[str, str]) -> None:
    """That of process 0, which coordinates, and that of another one."""
    silence = 4
    variables = {
        "JAX_COORDINATOR_ADDRESS": f"10.9.0.{2 if lone == 0 else 1}:{PORT}",
        "JAX_COORDINATOR_BIND_ADDRESS": "",
        "LM_HEARTBEAT_SECONDS": str(silence),
        "PYTHONPATH": str(Path(package.__file__).parent.parent),
    }
    started = [
        subprocess.Popen(
            ["ip", "netns", "exec", hosts[index == lone], sys.executable, "-c", PROGRAM],
            env=environment(index, 3, 1, PORT) | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(3)
    ]
    try:
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "there\n", process.communicate()
        cut = time.monotonic()
        ip("-n", hosts[1], "link", "set", "wire", "down")
        said = [process.communicate(timeout=60)[1] for process in started]
        assert [process.returncode for process in started] == [6, 6, 6], said
        assert time.monotonic() - cut < silence + 20
    finally:
        for process in started:
            process.kill()
            process.communicate()
    near = [text for index, text in enumerate(said) if index != lone]
    assert all(f"lm: process {lone} on {socket.gethostname()}" in text for text in near), said
    assert "has ended, and so does the run: it was killed, or it crashed, or its host or network failed" in said[lone]
    assert not any("Traceback" in text for text in said), said
