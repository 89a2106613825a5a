"""Failures that a user can act on, each with the exit code that the process ends with.

0 means that the work is done; any code not listed here is a bug. A message is written to be printed
as it is: what was wrong, where, and what to do instead.
"""

from collections.abc import Iterable


class LmError(Exception):
    """Base of all failures that are reported without a traceback."""

    exit_code = 1


class ConfigError(LmError):
    """A config, a command line or a use of a run directory that cannot work."""

    exit_code = 2


class DataError(LmError):
    """Missing, empty, unreadable or changed training data or tokenizer."""

    exit_code = 3


class DivergedError(LmError):
    """Training met too many non-finite steps in a row; the last good state is kept."""

    exit_code = 4


class StorageError(LmError):
    """Results could not be stored, or what is stored cannot be trusted."""

    exit_code = 5


class LostProcessError(LmError):
    """Another process of the run ended. What it said, and then its exit code, is taken over."""

    exit_code = 6


class MissingProcessError(LmError):
    """The processes of a run did not find each other, or one ended before all were there. Another start may do it."""

    exit_code = 6


class HangError(LmError):
    """This process made no progress for longer than the watchdog lets it."""

    exit_code = 6


class CorruptionError(LmError):
    """A device computed something else the second time, or holds something else than it must."""

    exit_code = 7


class LaunchError(LmError):
    """Machines could not be had or reached, or did not do what a launch needs of them."""

    exit_code = 8


class Stopped(BaseException):
    """The run was asked to stop, has saved its state, and goes on when started again.

    Like KeyboardInterrupt no Exception: a signal may raise it anywhere, and what handles errors must let it pass.
    """

    exit_code = 75
    together = False
    """In a run of many processes: whether all of them stop, at the same step."""


def some(things: Iterable[object], most: int = 3, separator: str = ", ") -> str:
    """The first of them, for a message, and how many more there are."""
    texts = list(map(str, things))
    more = [f"and {len(texts) - most} more"] if len(texts) > most else []
    return separator.join(texts[:most] + more)
