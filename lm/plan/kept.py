"""Plans that were compiled before, kept beside the compiled programs: a search that was interrupted goes on."""

import hashlib
import json
import os
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lm import config as configs
from lm.experiment import Config


def kept(config: Config, name: str, slices: int, compile_one: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `lm plan --json` says of a config on a topology: as it was found before, or as `compile_one` finds it.

    What was found is forgotten when lm itself, jax or libtpu is another. A folder that cannot be written is none.
    """
    try:
        path = _folder() / f"{_key(config, name, slices)}.json"
    except RuntimeError:  # there is no home directory
        return compile_one()
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        found = compile_one()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(found))
        temporary.replace(path)
    except OSError:
        pass
    return found


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lm" / "plans"


def _key(config: Config, name: str, slices: int) -> str:
    # What a step and its memory are made of: where data and results lie, and what is logged, change nothing.
    parts = (config.model, config.optim, config.train, config.mesh, config.recovery)
    sections = [configs.to_json(one) for one in parts]
    digest = hashlib.sha256(json.dumps([sections, name, slices, _versions()]).encode())
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:32]


def _versions() -> list[str]:
    found = []
    for package in ("jax", "libtpu"):
        try:
            found.append(version(package))
        except PackageNotFoundError:
            found.append("")
    return found
