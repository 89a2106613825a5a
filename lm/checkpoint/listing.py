"""What is saved in a folder of checkpoints, as far as small files tell: the manifests, and what is attached."""

from dataclasses import dataclass
from os import PathLike

from etils import epath

from lm.checkpoint.folder import saved_steps
from lm.checkpoint.manifest import BadCheckpoint, Manifest
from lm.errors import StorageError, some
from lm.files import reason


@dataclass(frozen=True)
class CheckpointInfo:
    step: int
    digest: str  # equal exactly when the states are bit for bit the same
    bytes: int
    time: float  # seconds since 1970 at which it was committed
    problem: str | None  # why it cannot be used, as far as the manifest alone shows


def list_checkpoints(directory: str | PathLike[str]) -> list[CheckpointInfo]:
    """What is saved there, oldest first. Reads the manifests only."""
    infos = []
    for step in saved_steps(epath.Path(directory)):
        try:
            manifest = Manifest.read(epath.Path(directory) / str(step), step)
            infos.append(CheckpointInfo(step, manifest.digest, manifest.bytes, manifest.time, None))
        except (BadCheckpoint, StorageError) as problem:
            infos.append(CheckpointInfo(step, "", 0, 0.0, str(problem)))
    return infos


def read_attachment(directory: str | PathLike[str], step: int, name: str) -> bytes:
    """A file that was saved with the state. Raises StorageError when it is not there as it was written."""
    folder = epath.Path(directory) / str(step)
    try:
        manifest = Manifest.read(folder, step)
        if name not in manifest.files:
            attached = [file for file in manifest.files if "/" not in file]
            raise StorageError(f"checkpoint {folder} has no {name}; it has {some(attached) or 'no attachments'}")
        manifest.verify(folder, name)
        return (folder / name).read_bytes()
    except StorageError:
        raise
    except Exception as problem:  # storage libraries raise classes of their own beside OSError
        raise StorageError(f"cannot read {folder / name}: {reason(problem)}") from problem
