"""Work that each process of a run does a part of, and that has failed everywhere when a part of it failed."""

from collections.abc import Callable
from typing import TypeVar, cast

from lm.checkpoint.manifest import BadCheckpoint, UnreadableCheckpoint
from lm.errors import ConfigError, StorageError
from lm.files import reason
from lm.parallel.processes import Processes

R = TypeVar("R")


def together(processes: Processes, name: str, work: Callable[[], R]) -> R:
    """Does this process's part. When a part of any process failed, that is raised in all of them.

    Raises BadCheckpoint, ConfigError, or StorageError for anything else; alone, what `work` raises.
    """
    if processes.count == 1:
        return work()
    result, problem = None, None
    try:
        result = work()
    except Exception as error:
        problem = type(error).__name__, reason(error)
    problems = processes.gather(name, problem)
    first = None
    for index, found in enumerate(problems or ()):
        if found and first is None:
            kind, text = found
            first = kind, text if index == 0 else f"{processes.name(index)}: {text}"
    first = processes.broadcast(name, first)
    if first:
        kinds = {kind.__name__: kind for kind in (BadCheckpoint, UnreadableCheckpoint, ConfigError)}
        raise kinds.get(first[0], StorageError)(first[1])
    return cast(R, result)
