"""What every target does: the verbs of `lm launch`, and the run that they start."""

import abc
import dataclasses
import functools
import hashlib
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.commands import Commands
from launch.owner import Owner, this_user
from lm.errors import ConfigError, LmError, LostProcessError, Stopped

RUNNING, STOPPED, NONE, UNKNOWN = "running", "stopped", "none", ""
"""In place of the exit code of a process: it runs, it saved as `stop` asked it to, it ended without one, it cannot be
asked."""


@dataclasses.dataclass(frozen=True)
class Run:
    """What is trained, and what each of its processes is given on its machine."""

    config: str
    """The text of the resolved config.json: what was checked here is what runs there."""
    python: str
    setup: tuple[str, ...]
    environment: tuple[str, ...]
    archive: bytes = b""
    """The code, packed once: machines that are got again days later run the same."""
    code: str = ""
    """Its digest."""
    allow: tuple[str, ...] = ()
    """What may be other than when the run began, as for `lm train`."""

    @property
    def dir(self) -> str:
        """The run's own folder, or bucket."""
        return str(json.loads(self.config)["run"]["dir"])

    def command(self, config: str, *, supervise: bool) -> str:
        """A line of shell that trains the config in a file, which is named as in shell."""
        options = [*(["--supervise"] if supervise else []), *(f"--allow={one}" for one in self.allow)]
        return " ".join([f"{self.python} -m lm train {config}", *options])

    def prelude(self, variables: Mapping[str, str], path: str) -> list[str]:
        """Lines of bash that come first: setup, and the environment. `path` is the folder of the code, as shell."""
        failed = "[ $? = 0 ] || {{ echo setup failed: {line} >&2; exit 1; }}"
        pairs = [*variables.items(), *((name, value) for name, _, value in map(_parts, self.environment))]
        return [
            *(f"{line}\n{failed.format(line=shlex.quote(line))}" for line in self.setup),
            *(f"export {name}={shlex.quote(value)}" for name, value in pairs),
            f'export PYTHONPATH={path}"${{PYTHONPATH:+:$PYTHONPATH}}" PYTHONUNBUFFERED=1',
        ]

    def digest(self, *more: str) -> str:
        """A short name of all that decides what is run, with what the target adds."""
        parts = (self.config, self.code, self.python, *self.setup, *self.environment, *more)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


class Target(abc.ABC):
    """Machines of one kind, and one launch on them. Each verb may be asked again: it does what is left to do.

    All raise LaunchError for what the machines did not do, and ConfigError for what cannot be asked.
    """

    takes_code = True
    """Whether the code of this working tree goes along."""

    def __init__(self, name: str, commands: Commands):
        self.name = name
        self.commands = commands
        self.again = "lm launch {verb} MACHINES"

    @functools.cached_property
    def owner(self) -> Owner:
        return this_user(keep_it=not self.commands.dry_run)

    @abc.abstractmethod
    def up(self, run: Run) -> None:
        """Everything from nothing to training. A launch of the same name that is somebody else's is refused."""

    def up_and_follow(self, run: Run) -> None:
        """As `up`, then shows the log until the run ends."""
        self.up(run)
        self.logs(follow=True)

    @abc.abstractmethod
    def status(self) -> None:
        """Says what there is and how it goes."""

    @abc.abstractmethod
    def logs(self, *, follow: bool) -> None:
        """Shows the end of the log, and with `follow` what comes, until the run ends or Ctrl-C."""

    @abc.abstractmethod
    def stop(self) -> None:
        """Ends the run so that it saves and can go on."""

    @abc.abstractmethod
    def delete(self) -> None:
        """Removes what `up` made. What the run itself has written stays."""

    @abc.abstractmethod
    def write(self, run: Run, folder: Path) -> None:
        """Writes what `up` would hand in, for those who do that themselves."""

    def verb(self, verb: str) -> str:
        """The command line of a verb for this launch."""
        return self.again.format(verb=verb)


def write_files(files: Mapping[str, str], folder: Path, commands: Commands) -> None:
    """Writes texts by name, or in a dry run says them."""
    for name, text in files.items():
        path = folder / name
        if commands.dry_run:
            commands.say(f"+ write {path}:\n{text.rstrip()}")
            continue
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        except OSError as error:
            raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
        commands.say(f"written: {path}")


def shell_path(folder: str) -> str:
    """A folder as shell has it; a ~ at its start is the home of whoever runs it."""
    return '"$HOME"' + shlex.quote(folder[1:]) if folder.startswith("~/") else shlex.quote(folder)


def ended(code: int | str) -> str:
    """What an exit code of `lm train` means, in a few words."""
    try:
        number = Stopped.exit_code if code == STOPPED else int(code)
    except ValueError:
        return "ended without a word: killed, or its machine failed"
    return f"ended with {number}: {_MEANING.get(number, 'killed' if number > 128 else 'a bug')}"


class RunEnded(LmError):
    """A run that was followed did not end with 0; the exit code is the run's."""


def of_others(said: str) -> str:
    """What is wrong with a name that somebody else has."""
    return f"a launch of this name is there, of {said}: take another name, or, if it is yours all the same, --take-over"


def raise_ended(name: str, codes: Sequence[str]) -> None:
    """Raises RunEnded when a process of a run that was followed is known to have ended, and not with 0."""
    failed = [code for code in codes if code not in (UNKNOWN, RUNNING, "0")]
    if not failed:
        return
    because_of_others = (str(LostProcessError.exit_code), NONE)
    first = next((code for code in failed if code not in because_of_others), failed[0])
    error = RunEnded(f"{name} {ended(first)}")
    error.exit_code = Stopped.exit_code if first == STOPPED else int(first) if first.isdecimal() else 1
    raise error


def problems(name: str, python: str, setup: Sequence[str], environment: Sequence[str]) -> list[tuple[str, str]]:
    """What is wrong with the values that all targets have."""
    found = []
    if not re.fullmatch("[a-z]([-a-z0-9]{0,38}[a-z0-9])?", name):
        found.append(("name", f"must be small letters, digits and - between them, at most 40; got {name!r}"))
    if not python:
        found.append(("python", "must be the interpreter on the machines, such as python3"))
    for i, pair in enumerate(environment):
        key, equals, _ = _parts(pair)
        if not equals or not key.isidentifier():
            found.append((f"environment.{i}", f"must be NAME=VALUE, got {pair!r}"))
    if any("\n" in line for line in setup):
        found.append(("setup", "is one line of shell for each element"))
    return found


def _parts(pair: str) -> tuple[str, str, str]:
    return pair.partition("=")


_MEANING = {
    0: "done",
    2: "config or usage",
    3: "data",
    4: "diverged",
    5: "storage",
    6: "a hang, or another process ended",
    7: "a device computes wrongly",
    75: "stopped and saved; `up` goes on",
}
