"""One checkpoint read back: verified, loaded onto whatever devices are there, and held against its digest."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from lm.checkpoint.digest import leaf_paths, state_digest
from lm.checkpoint.folder import STATE, absolute
from lm.checkpoint.manifest import BadCheckpoint, FileChecksum, LeafDigest, Manifest, refuse_others, shares, verify
from lm.checkpoint.restack import restack, restacked, stacked_as
from lm.checkpoint.together import together
from lm.errors import ConfigError, StorageError, some
from lm.files import reason
from lm.parallel.processes import Processes

T = TypeVar("T")


def load(folder: epath.Path, step: int, abstract: T, fresh: Callable[[], T] | None, processes: Processes) -> T:
    """The state in the folder, with the shardings of `abstract`; each process verifies its share of the files.

    Fields that the format of the checkpoint lacks are those of `fresh`, which is traced, and not run as a whole.

    Raises:
      BadCheckpoint: it is not what was saved.
      ConfigError: it has other arrays than `abstract`.
      StorageError: it is sound, but cannot be loaded.
    """
    primary = processes.primary
    manifest = together(processes, "manifest", lambda: _fitting(folder, step, abstract, fresh) if primary else None)
    parts = about = None
    if manifest is not None:
        shapes = {path: leaf.shape for path, leaf in manifest.leaves.items()}
        about = shapes, [name for name in _fields(abstract) if manifest.lacks(f"{name}/")]
        split = shares({name: file.size for name, file in manifest.files.items()}, processes.count)
        files = {name: dataclasses.astuple(file) for name, file in manifest.files.items()}
        parts = [(manifest.digest, {name: files[name] for name in names}) for names in split]
    expected, mine = processes.scatter("restored files", parts)
    together(processes, "verified", lambda: verify(folder, {name: FileChecksum(*x) for name, x in mine.items()}))
    shapes, lacking = processes.broadcast("restored shapes", about)
    wanted: Any = abstract
    if lacking:
        wanted = {name: getattr(abstract, name) for name in _fields(abstract) if name not in lacking}
    try:
        state = ocp.load(absolute(folder / STATE), stacked_as(wanted, shapes))
    except Exception as error:  # with sound files the fault is elsewhere, and older ones would meet it too
        raise StorageError(f"checkpoint {folder} is sound but cannot be loaded: {reason(error)}") from error
    loaded = state_digest(state)
    if loaded.digest != expected:  # the same in all processes
        saved = manifest.leaves if manifest is not None else loaded.leaves
        changed = [path for path, leaf in loaded.leaves.items() if leaf != saved[path]]
        raise BadCheckpoint(f"the arrays are not those that were saved: {some(changed)}")
    state = restack(state, wanted)
    return type(abstract)(**state, **_fresh(abstract, fresh, lacking)) if lacking else state


def _fitting(folder: epath.Path, step: int, abstract: Any, fresh: Any) -> Manifest:
    manifest = Manifest.read(folder, step)
    refuse_others(folder, STATE, manifest.files)
    _check_same_arrays(folder, manifest, abstract, fresh)
    return manifest


def _check_same_arrays(folder: epath.Path, manifest: Manifest, abstract: Any, fresh: Any) -> None:
    def kind(shape: tuple[int, ...], dtype: str) -> str:
        return f"{dtype}[{', '.join(map(str, shape))}]"

    saved: Mapping[str, LeafDigest] = manifest.leaves
    there = {path: kind(leaf.shape, leaf.dtype) for path, leaf in saved.items()}
    leaves = zip(leaf_paths(abstract), jax.tree.leaves(abstract), strict=True)
    here = {}
    for path, x in leaves:
        if fresh is not None and path not in saved and manifest.lacks(path):
            continue
        stacked_otherwise = path in saved and "layers/" in path and restacked(saved[path].shape, x.shape)
        here[path] = kind(saved[path].shape if stacked_otherwise else x.shape, x.dtype.name)
    differences = [
        f"{path} is {there.get(path, 'missing')} there, {here.get(path, 'missing')} here"
        for path in [*here, *sorted(there.keys() - here.keys())]
        if there.get(path) != here.get(path)
    ]
    if differences:
        raise ConfigError(f"checkpoint {folder} does not fit this config: {some(differences, separator='; ')}")


def _fields(abstract: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(abstract)] if dataclasses.is_dataclass(abstract) else []


def _fresh(abstract: Any, fresh: Callable[[], Any] | None, names: list[str]) -> dict[str, Any]:
    """These fields of a fresh state, where `abstract` has them; the rest of it is not computed."""
    assert fresh is not None
    shardings = {name: jax.tree.map(lambda leaf: leaf.sharding, getattr(abstract, name)) for name in names}
    return jax.jit(lambda: {name: getattr(fresh(), name) for name in names}, out_shardings=shardings)()
