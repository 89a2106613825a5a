"""The launcher, with small programs in place of a run."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

LAUNCH = """
import sys
from launch import local
from launch.local import environment, run
local.ENDING_SECONDS = 1.0
count = int(sys.argv[1])
sys.exit(run([sys.executable, "-c", sys.argv[2]], [environment(i, count, 2, 1234) for i in range(count)]))
"""


def start(count: int, program: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCH, str(count), program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def launch(count: int, program: str) -> tuple[int, str, str]:
    process = start(count, program)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_lines_are_whole_and_say_whose_they_are() -> None:
    program = """
import os, sys
me = os.environ["JAX_PROCESS_ID"]
for k in range(200):
    print(f"line {k} of {me} " + me * 3000)
print("to stderr", file=sys.stderr)
print()
print("without an end", end="")
"""
    code, out, err = launch(3, program)
    assert code == 0
    assert sorted(err.splitlines()) == [f"[{i}] to stderr" for i in range(3)]
    lines = out.splitlines()
    for i in range(3):
        mine = [line for line in lines if line.startswith(f"[{i}] ")]
        assert mine[:200] == [f"[{i}] line {k} of {i} " + str(i) * 3000 for k in range(200)]
        assert mine[200:] == [f"[{i}] ", f"[{i}] without an end"]
    assert len(lines) == 3 * 202


def test_each_process_is_told_its_place() -> None:
    names = ["COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID", "NUM_CPU_DEVICES", "PLATFORMS"]
    code, out, _ = launch(2, f"import os; print(*(os.environ['JAX_' + name] for name in {names}))")
    assert code == 0
    assert sorted(out.splitlines()) == [f"[{i}] 127.0.0.1:1234 2 {i} 2 cpu" for i in range(2)]


@pytest.mark.parametrize(
    ("end", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137), ("os.kill(os.getpid(), 15)", 143)]
)
def test_one_that_dies_ends_all_with_its_code(end: str, code: int) -> None:
    began = time.monotonic()
    program = f"""
import os, sys, time
if os.environ["JAX_PROCESS_ID"] == "1":
    {end}
time.sleep(300)
"""
    assert launch(3, program.replace("time.sleep(300)", "time.sleep(300); print('late')"))[:2] == (code, "")
    assert time.monotonic() - began < 50


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on_once(number: int) -> None:
    process = start(
        2,
        """
import signal, sys, time
got = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: got.append(number))
print("ready", flush=True)
while not got:
    time.sleep(0.01)
time.sleep(0.5)
print(got, flush=True)
sys.exit(75)
""",
    )
    assert process.stdout is not None
    for _ in range(2):
        assert process.stdout.readline().endswith("ready\n")
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert sorted(out.splitlines()) == [f"[{i}] [{int(number)}]" for i in range(2)]
    assert process.returncode == 75


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="others have no death signal")
def test_nothing_is_left_of_a_killed_launcher() -> None:
    process = start(2, "import os, time; print(os.getpid(), flush=True); time.sleep(300)")
    assert process.stdout is not None
    numbers = [int(process.stdout.readline().split()[1]) for _ in range(2)]
    process.kill()
    process.wait()
    until = time.monotonic() + 20
    while time.monotonic() < until and any(_lives(number) for number in numbers):
        time.sleep(0.05)
    assert not any(_lives(number) for number in numbers)


def _lives(number: int) -> bool:
    try:
        os.kill(number, 0)
        return re.search(r"State:\s+Z", Path(f"/proc/{number}/status").read_text()) is None
    except (ProcessLookupError, FileNotFoundError):
        return False


def cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launch.local", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--processes", "2"], "write -- train CONFIG"),
        (["--processes", "0", "--", "train"], "must be at least 1"),
        (["--processes", "2", "--devices", "x", "--", "train"], "must be at least 1"),
        (["--processes", "2", "--port", "99999", "--", "train"], "port 99999 is not free"),
        (["--", "train"], "--processes"),
    ],
)
def test_usage(arguments: list[str], said: str) -> None:
    ended = cli(*arguments)
    assert ended.returncode == 2
    assert said in ended.stderr


def test_a_port_that_is_taken() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        ended = cli("--processes", "2", "--port", port, "--", "train", "tiny.py")
    assert ended.returncode == 2
    assert f"port {port} is not free: Address already in use" in ended.stderr


def test_any_verb() -> None:
    ended = cli("--processes", "2", "--", "config", "diff", "configs/quickstart.py", "configs/quickstart.py")
    assert ended.returncode == 0, ended.stderr
    assert sorted(ended.stdout.splitlines()) == ["[0] no difference", "[1] no difference"]
