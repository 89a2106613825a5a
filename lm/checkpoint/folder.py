"""Where checkpoints lie: a folder for each step, what is done with a whole one, and which of them count.

A folder without a manifest is what a killed save, or a killed removal, left behind. One that is called `<step>.bad` was
set aside: nothing reads it, and nothing here removes it.
"""

import contextlib
import re
from collections.abc import Iterable, Iterator

from etils import epath

from lm.checkpoint.manifest import NAME as MANIFEST
from lm.errors import StorageError
from lm.files import is_url, reason

STATE = "state"
"""The folder of the arrays, in that of the checkpoint."""


def saved_steps(directory: epath.Path) -> list[int]:
    """Steps that were committed, in order. Raises StorageError when that cannot be known."""
    return [int(folder.name) for folder, whole in _numbered(directory) if whole]


def half_written(directory: epath.Path) -> list[epath.Path]:
    """What killed saves left, and a save that is going on."""
    return [folder for folder, whole in _numbered(directory) if not whole]


def names_set_aside(directory: epath.Path) -> list[str]:
    """Names of the checkpoints that were set aside, oldest step first."""
    found = [path.name for path in _inside(directory) if re.fullmatch(r"\d+\.bad\d*", path.name)]
    return sorted(found, key=lambda name: (int(name.partition(".")[0]), len(name), name))


def set_aside(folder: epath.Path) -> str:
    """Renames a checkpoint that is not to be used, and says how."""
    names = (f"{folder.name}.bad{n}" for n in ("", *range(2, 1000)))
    target = next(path for path in (folder.with_name(name) for name in names) if not path.exists())
    try:
        folder.rename(target)
    except Exception as error:  # storage libraries raise classes of their own beside OSError
        return f"it could not be renamed: {reason(error)}"
    return f"it is kept as {target.name}"


def remove(folder: epath.Path) -> None:
    (folder / MANIFEST).unlink(missing_ok=True)  # first: what a kill leaves then is no checkpoint
    folder.rmtree(missing_ok=True)


def to_prune(steps: Iterable[int], *, keep_last: int, keep_every: int, keep: int | None) -> list[int]:
    """Which of the good ones (in order) are not kept: all but the newest, multiples of `keep_every`, and `keep`."""
    return [step for step in list(steps)[:-keep_last] if step != keep and not (keep_every and step % keep_every == 0)]


def absolute(path: epath.Path) -> epath.Path:
    """Orbax takes no other local paths."""
    return path if is_url(path) else path.absolute()


def _numbered(directory: epath.Path) -> list[tuple[epath.Path, bool]]:
    """In order of their steps; and whether they were committed."""
    folders = [path for path in _inside(directory) if re.fullmatch("0|[1-9][0-9]*", path.name)]
    with _listing(directory):
        return [(path, (path / MANIFEST).exists()) for path in sorted(folders, key=lambda path: int(path.name))]


def _inside(directory: epath.Path) -> list[epath.Path]:
    with _listing(directory):
        return list(directory.iterdir()) if directory.exists() else []


@contextlib.contextmanager
def _listing(directory: epath.Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # storage libraries raise classes of their own beside OSError
        raise StorageError(f"cannot list the checkpoints in {directory}: {reason(error)}") from error
