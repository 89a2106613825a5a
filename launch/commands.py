"""Running the commands of a launch: a dry run only says them, and a failure tells which it was."""

import contextlib
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

from lm.errors import ConfigError, LaunchError, LmError

NOT_RUN = 124
"""In place of an exit code: the command took longer than it may."""


class Interrupted(LmError):
    """Ctrl-C, with what it has left behind."""

    exit_code = 130


@dataclasses.dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str = ""
    err: str = ""

    @property
    def why(self) -> str:
        """The line of its output that tells most of why it failed: the last."""
        lines = (self.err.strip() or self.out.strip()).splitlines()
        return lines[-1].strip() if lines else f"it ended with exit code {self.code}"


class Commands:
    """Runs commands of this machine.

    Args:
      dry_run: print commands in place of running them; each then counts as done, with no output.
      yes: what costs money or removes something is not asked about.
      take_over: a launch that somebody else has started is taken for one's own.
      say: takes a line for the user.
    """

    def __init__(
        self,
        *,
        dry_run: bool = False,
        yes: bool = False,
        take_over: bool = False,
        say: Callable[[str], None] = lambda line: print(line),
    ):
        self.dry_run = dry_run
        self.yes = yes
        self.take_over = take_over
        self.say = say
        self._running: set[subprocess.Popen[bytes]] = set()

    def run(self, argv: Sequence[str], *, given: bytes | None = None, seconds: float | None = None) -> Done:
        """Runs one command, `given` as its standard input. Raises LaunchError when there is no such program."""
        if self.dry_run:
            self.show(argv, given)
            return Done(0)
        child = self.start(argv, stdin=subprocess.PIPE, stderr=subprocess.PIPE)
        self._running.add(child)
        try:
            out, err = child.communicate(given or b"", seconds)
        except subprocess.TimeoutExpired:
            _kill(child)
            out, err = child.communicate()
            return Done(NOT_RUN, _text(out), f"{_text(err)}\nno answer within {seconds:.0f} s")
        except BaseException:
            self.kill()
            raise
        finally:
            self._running.discard(child)
        return Done(child.returncode, _text(out), _text(err))

    def start(
        self, argv: Sequence[str], *, stdin: int, stderr: int | None, stdout: int | None = subprocess.PIPE
    ) -> "subprocess.Popen[bytes]":
        """Starts one. Raises LaunchError when there is no such program."""
        try:
            # In a session of its own: Ctrl-C is for this program, which then tells what is left.
            return subprocess.Popen(argv, stdin=stdin, stdout=stdout, stderr=stderr, start_new_session=True)
        except FileNotFoundError:
            raise LaunchError(
                f"there is no program {argv[0]!r} on this machine; install it, or add it to PATH"
            ) from None

    def follow(self, argv: Sequence[str]) -> None:
        """Runs one that writes to this terminal, until it ends or Ctrl-C."""
        if self.dry_run:
            self.show(argv)
            return
        child = self.start(argv, stdin=subprocess.DEVNULL, stdout=None, stderr=None)
        try:
            child.wait()
        finally:
            self.end(child)

    @staticmethod
    def end(child: "subprocess.Popen[bytes]") -> None:
        """Ends what `start` has started, if it has not ended."""
        _kill(child)
        child.wait()

    def kill(self) -> None:
        """Ends what runs in other threads too."""
        for child in list(self._running):
            _kill(child)

    def must(self, argv: Sequence[str], what: str, *, given: bytes | None = None) -> str:
        """The output of a command that has to end with 0. Raises LaunchError: `what` went wrong, and what it said."""
        done = self.run(argv, given=given)
        if done.code:
            raise LaunchError(f"{what}: {done.err.strip() or done.why}\nthe command was: {shlex.join(argv)}")
        return done.out

    def show(self, argv: Sequence[str], given: bytes | None = None) -> None:
        """Says a command that is not run."""
        self.say("+ " + shlex.join(argv) + (f"  < {len(given):,} bytes" if given else ""))

    def ask(self, question: str) -> None:
        """Goes on after a yes. Raises ConfigError when it is no, or when there is nobody to ask."""
        if self.yes or self.dry_run:
            return
        if not sys.stdin.isatty():
            raise ConfigError(f"{question} Nobody is there to answer: say --yes")
        if input(f"{question} [y/N] ").strip().lower() not in ("y", "yes"):
            raise ConfigError("nothing was done")

    @contextlib.contextmanager
    def stage(self, doing: str, left: str) -> Iterator[None]:
        """Says what is being done; when Ctrl-C ends it, says what is `left` of it and how that is removed."""
        self.say(f"{doing} …")
        try:
            yield
        except KeyboardInterrupt:
            raise Interrupted(f"interrupted while {doing}: {left}") from None


def _kill(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # with what it has started, which else holds its output open
        os.killpg(child.pid, signal.SIGKILL)


def _text(output: bytes | None) -> str:
    return (output or b"").decode(errors="replace")
