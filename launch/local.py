"""`python -m launch.local --processes N [--devices M] [--port P] -- train CONFIG …`: many processes on this machine.

Starts N times `lm train CONFIG …`, each with M simulated CPU devices, joined over loopback as the hosts of a cluster
are. What they print is prefixed with their number. When one ends with an error, all end, and its exit code is the
exit code; Ctrl-C and SIGTERM are passed on, so that the run saves and can go on.

As a target of `lm launch` the same processes run in the background of this machine, supervised.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from lm.errors import LostProcessError

if TYPE_CHECKING:
    from launch.background import Background
    from launch.commands import Commands

ENDING_SECONDS = 10.0
"""What the others have to end by themselves when one has failed; then SIGTERM, and as long again later SIGKILL."""
_USAGE = 2


@dataclasses.dataclass(frozen=True)
class Local:
    """This machine. Relative paths of the config start where `lm launch` is run."""

    processes: int = 1
    devices: int = 0
    """Simulated CPU devices of each process; 0, for a single process: what the machine has."""
    port: int = 0
    """Of the first process; 0: one that follows from the name."""
    folder: str = "~/lm-launches"
    """For the logs and a copy of the code."""

    def check(self) -> Iterator[tuple[str, str]]:
        if self.processes < 1:
            yield "processes", f"must be at least 1, got {self.processes}"
        if self.devices < (self.processes > 1):
            yield "devices", f"of each of several processes must be at least 1, got {self.devices}"
        if not 0 <= self.port < 65536:
            yield "port", f"must be below 65536, got {self.port}"
        if not self.folder.startswith(("/", "~/")):
            yield "folder", f"must start with / or ~/, got {self.folder!r}"


def target(name: str, local: Local, commands: "Commands") -> "Background":
    """The launch of this name on this machine."""
    from launch.background import Background
    from launch.hosts import THIS, Host

    port = local.port or 20000 + zlib.crc32(name.encode()) % 10000
    return Background(
        name,
        commands,
        [Host(str(i), THIS.argv) for i in range(local.processes)],
        local.folder,
        lambda i: _place(i, local.processes, local.devices, port) if local.devices else {},
        os.getcwd(),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns the exit code: 0 when all processes ended with 0."""
    parser = argparse.ArgumentParser("python -m launch.local", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--processes", type=_positive, required=True, metavar="N")
    parser.add_argument("--devices", type=_positive, default=1, metavar="M", help="CPU devices of each; default: 1")
    parser.add_argument("--port", type=int, metavar="P", help="of the first process; default: a free one")
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- VERB …", help="what follows `lm`")
    options = parser.parse_args(arguments)
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("what is to run is missing; write -- train CONFIG")
    try:
        port = _checked(options.port) if options.port is not None else free_port()
    except OSError as error:
        print(f"launch.local: port {options.port} is not free: {error.strerror or error}", file=sys.stderr)
        return _USAGE
    environments = [environment(index, options.processes, options.devices, port) for index in range(options.processes)]
    return run([sys.executable, "-m", "lm", *command], environments)


def run(command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> int:
    """Runs the command once in each environment, until all have ended."""
    asked: list[int] = []
    handled = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda number, _: asked.append(number)) for number in handled}
    children: list[subprocess.Popen[bytes]] = []
    try:
        for environment in environments:
            # In sessions of their own: Ctrl-C on a terminal would reach them a second time.
            child = subprocess.Popen(
                command,
                env=dict(environment),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
            children.append(child)
        mutex = threading.Lock()
        readers = [
            threading.Thread(target=copy_lines, args=(str(index), source, target, mutex), daemon=True)
            for index, child in enumerate(children)
            for source, target in ((child.stdout, sys.stdout.buffer), (child.stderr, sys.stderr.buffer))
        ]
        for reader in readers:
            reader.start()
        code = _wait(children, asked)
        for reader in readers:
            reader.join()
        return code
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
                child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(children: Sequence[subprocess.Popen[bytes]], asked: list[int]) -> int:
    """The code of the first that did not end with 0, and not because of another one."""
    deadline, passed, steps = float("inf"), 0, [signal.SIGTERM, signal.SIGKILL]
    ended: list[int] = []  # in order
    left = list(children)
    while left:
        time.sleep(0.05)
        codes = [child.returncode for child in left if child.poll() is not None]
        left = [child for child in left if child.returncode is None]
        if any(codes) and not any(ended):
            deadline = time.monotonic() + ENDING_SECONDS
        ended += codes
        if time.monotonic() > deadline and steps:
            _signal(children, steps.pop(0))
            deadline = time.monotonic() + ENDING_SECONDS
        if len(asked) > passed:
            _signal(children, asked[0] if passed == 0 else signal.SIGKILL)
            passed = len(asked)
    failed = [code for code in ended if code]
    first = next((code for code in failed if code != LostProcessError.exit_code), failed[0] if failed else 0)
    return first if first >= 0 else 128 - first  # as a shell reports a signal


def _signal(children: Sequence[subprocess.Popen[bytes]], number: int) -> None:
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(number)


def copy_lines(name: str, source: IO[bytes], target: IO[bytes], mutex: threading.Lock) -> None:
    """Copies whole lines, with a name before each, until the source ends."""
    noise = False
    for line in source:
        # Two threads may break each other's lines: then a part of one, perhaps a number alone, is a line.
        noise = _NOISE.fullmatch(line) is not None and (noise or line.strip(b" \n0123456789") != b"")
        if noise:
            continue
        with mutex, contextlib.suppress(OSError, ValueError):  # a reader that went away ends no run
            target.write(f"[{name}] ".encode() + line.rstrip(b"\n") + b"\n")
            target.flush()


_NOISE = re.compile(
    rb"(\[Gloo\] Rank|is connected to|peer ranks\.|Expected number of connected peer ranks is :|[\d ])*\s*"
)
"""What the collectives on CPU say of each connection."""


def environment(index: int, count: int, devices: int, port: int) -> dict[str, str]:
    """Of one of `count` processes with so many devices each."""
    # The code beside this file is what runs, wherever it runs.
    here = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | _place(index, count, devices, port) | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _place(index: int, count: int, devices: int, port: int) -> dict[str, str]:
    return {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_PLATFORMS": "cpu",
    }


def free_port() -> int:
    """Nobody listens there now, and hardly anybody soon: the system hands such ports out in turn."""
    return _checked(0)


def _checked(port: int) -> int:
    """Raises OSError when the port is taken."""
    if not 0 <= port < 65536:
        raise OSError(f"a port is a number below 65536, got {port}")
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
        number: int = sock.getsockname()[1]
        return number


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def _end_with_parent() -> None:
    """Nothing is left behind when this program is killed in a way that it cannot handle."""
    if sys.platform.startswith("linux"):
        set_death_signal = 1
        ctypes.CDLL(None).prctl(set_death_signal, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
