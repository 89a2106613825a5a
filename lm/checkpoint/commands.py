"""`lm checkpoint …`: what a run has saved, whether it is still that, a copy of it, and room for more."""

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from lm.checkpoint.config import CheckpointConfig
from lm.checkpoint.folder import names_set_aside, remove, saved_steps, to_prune
from lm.checkpoint.listing import CheckpointInfo, list_checkpoints
from lm.checkpoint.manifest import NAME as MANIFEST
from lm.checkpoint.manifest import BadCheckpoint, Manifest
from lm.errors import ConfigError, StorageError, some
from lm.files import is_url, reason, write_atomically

DURABLE, LOCAL = "durable", "local"
"""The tier of what is below `<run>/checkpoints`, and of what is in a `checkpoint.local_dir`."""


def listed(directory: epath.Path, *, local_dir: str = "", run: str = "") -> list[dict[str, Any]]:
    """Each checkpoint: `step`, `status` (good, bad, set aside), `tier`, `bytes`, `time`, `digest`, `problem`, `name`.

    Good is as far as the manifest shows; `verified` reads the rest. With a `local_dir` also those on this host that are
    of the run with this identity: of each process its part, which counts when all processes of the run have theirs.
    """
    rows = [_row(info, DURABLE, str(info.step)) for info in list_checkpoints(directory)]
    if local_dir:
        rows += _listed_on_this_host(CheckpointConfig(local_dir=local_dir), directory.parent, run)
    for name in names_set_aside(directory):
        step = int(name.partition(".")[0])
        rows.append(
            {
                "step": step,
                "status": "set aside",
                "tier": DURABLE,
                "bytes": None,
                "time": None,
                "digest": "",
                "problem": None,
                "name": name,
            }
        )
    return sorted(rows, key=lambda row: (row["step"], row["tier"], row["name"]))


def _listed_on_this_host(config: CheckpointConfig, run_dir: epath.Path, run: str) -> Iterator[dict[str, Any]]:
    from lm.checkpoint.local import local_directory, steps_of_run  # its import is slow

    for folder in local_directory(config, run_dir).parent.glob("process-*"):
        steps = steps_of_run(folder, run)
        for info in list_checkpoints(folder):
            if info.step in steps:
                yield _row(info, LOCAL, f"{folder.name}/{info.step}")


def _row(info: CheckpointInfo, tier: str, name: str) -> dict[str, Any]:
    return {
        "step": info.step,
        "status": "good" if info.problem is None else "bad",
        "tier": tier,
        "bytes": info.bytes,
        "time": info.time,
        "digest": info.digest,
        "problem": info.problem,
        "name": name,
    }


def list_lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    now = time.time()
    yield f"{'step':>10}  {'status':<9}  {'tier':<7}  {'MB':>12}  {'hours ago':>9}  digest"
    for row in rows:
        size = age = ""
        if row["status"] == "good":
            size, age = f"{row['bytes'] / 1e6:,.3f}", f"{(now - row['time']) / 3600:,.1f}"
        last = row["digest"] or row["problem"] or f"kept as {row['name']}"
        if row["tier"] == LOCAL:
            last += f"  {row['name']}"
        yield f"{row['step']:>10}  {row['status']:<9}  {row['tier']:<7}  {size:>12}  {age:>9}  {last}"


def verified(directory: epath.Path, step: int | None) -> Iterator[tuple[int, str | None]]:
    """Reads all files of each checkpoint, or of one: its step, and what is wrong with it. Changes nothing."""
    for one in _chosen(directory, step):
        folder = directory / str(one)
        try:
            Manifest.read(folder, one).verify(folder)
        except (BadCheckpoint, StorageError) as problem:
            yield one, str(problem)
        else:
            yield one, None


def shown(directory: epath.Path, step: int | None) -> dict[str, Any]:
    """What the manifest of a checkpoint, by default the newest, and its data ledger say."""
    *_, step = _chosen(directory, step)
    folder = directory / str(step)
    ledger = None
    with _good(folder):
        manifest = Manifest.read(folder, step)
        if "data.json" in manifest.files:
            manifest.verify(folder, "data.json")
            ledger = json.loads((folder / "data.json").read_bytes())
    return {
        "step": step,
        "format": manifest.format,
        "digest": manifest.digest,
        "time": manifest.time,
        "bytes": manifest.bytes,
        "versions": manifest.versions,
        "scalars": manifest.scalars,
        "leaves": {path: [leaf.dtype, *leaf.shape] for path, leaf in sorted(manifest.leaves.items())},
        "files": {name: file.size for name, file in sorted(manifest.files.items())},
        "data": ledger,
    }


def show_lines(facts: dict[str, Any]) -> Iterator[str]:
    """One fact a line, so that two checkpoints can be compared with `diff`."""
    for name in ("step", "format", "digest", "bytes"):
        yield f"{name} = {facts[name]}"
    yield f"time = {time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(facts['time']))} UTC"
    for name, version in sorted(facts["versions"].items()):
        yield f"versions.{name} = {version}"
    for path, value in sorted(facts["scalars"].items()):
        yield f"scalars.{path} = {value}"
    for path, (dtype, *shape) in facts["leaves"].items():
        yield f"leaves.{path} = {dtype}[{', '.join(map(str, shape))}]"
    for name, size in facts["files"].items():
        if "/" not in name:  # those of Orbax are called otherwise each time
            yield f"files.{name} = {size} bytes"
    if facts["data"] is not None:
        yield f"data = {json.dumps(facts['data'], sort_keys=True)}"


def copy(directory: epath.Path, step: int, run: epath.Path, target: epath.Path, say: Callable[[str], None]) -> None:
    """Makes `target` a run that has the checkpoint of that step, and nothing else, of the run `run`.

    Verified before and after; the manifest, which makes it a checkpoint, is written last. Raises ConfigError when there
    is something at the target.
    """
    if target.exists() and (not target.is_dir() or any(True for _ in target.iterdir())):
        raise ConfigError(f"{target} is there already: choose a directory that is new or empty")
    _chosen(directory, step)
    source, folder = directory / str(step), target / "checkpoints" / str(step)
    with _good(source):
        manifest = Manifest.read(source, step)
        manifest.verify(source)
    try:
        for name in manifest.files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            _copy_file(source / name, folder / name)
        write_atomically(folder / MANIFEST, (source / MANIFEST).read_bytes())
        with _good(folder):
            manifest.verify(folder)
        write_atomically(target / "config.json", (folder / "config.json").read_bytes())
    except StorageError:
        raise
    except Exception as error:  # storage libraries raise classes of their own beside OSError
        raise StorageError(f"{source} could not be copied to {folder}: {reason(error)}") from error
    say(
        f"step {step} of {run} is in {target}, {manifest.bytes:,} bytes\n"
        "next:\n"
        f"    lm train {target}    # goes on from there, with the data built anew, or with --data.dir {run}/data\n"
        f"    lm eval {target} --data {run}/data\n"
        f"    lm generate {target}"
    )


def prune(
    directory: epath.Path, *, keep_last: int, keep_every: int, dry_run: bool, say: Callable[[str], None]
) -> list[int]:
    """Removes all but the newest and the multiples of `keep_every`; returns the steps.

    The caller holds the lock of the run. The newest one that is good, all its files read, stays, and so do bad ones and
    those that were set aside.
    """
    if keep_last < 1 or keep_every < 0:
        raise ConfigError(f"--keep-last must be at least 1 and --keep-every at least 0, got {keep_last}, {keep_every}")
    good = [info.step for info in list_checkpoints(directory) if info.problem is None]
    newest, bad = None, []
    for step in reversed(good):
        ((_, problem),) = verified(directory, step)
        if problem is None:
            newest = step
            break
        bad.append(step)
        say(f"{step:>10}  bad, and left alone: {problem}")
    good = [step for step in good if step not in bad]
    steps = to_prune(good, keep_last=keep_last, keep_every=keep_every, keep=newest)
    for step in steps:
        if not dry_run:
            try:
                remove(directory / str(step))
            except Exception as error:
                raise StorageError(f"{directory / str(step)} could not be removed: {reason(error)}") from error
        say(f"{step:>10}  {'would be removed' if dry_run else 'removed'}")
    return steps


def _chosen(directory: epath.Path, step: int | None) -> list[int]:
    steps = saved_steps(directory)
    if not steps:
        raise ConfigError(f"{directory} has no checkpoint")
    if step is not None and step not in steps:
        raise ConfigError(f"{directory} has no checkpoint {step}; there are {some(reversed(steps))}")
    return steps if step is None else [step]


@contextlib.contextmanager
def _good(folder: epath.Path) -> Iterator[None]:
    """For what reads a checkpoint: one that is bad is a StorageError."""
    try:
        yield
    except (BadCheckpoint, OSError, ValueError) as problem:
        raise StorageError(f"{folder} is bad: {problem}") from problem


def _copy_file(source: epath.Path, target: epath.Path) -> None:
    with source.open("rb") as old, target.open("wb") as new:
        shutil.copyfileobj(old, new, 2**22)
        new.flush()
        if not is_url(target):
            os.fsync(new.fileno())
