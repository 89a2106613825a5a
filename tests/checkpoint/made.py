"""Small states, and what writes them."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.checkpoint.checkpoints import Checkpoints, list_checkpoints
from lm.checkpoint.config import CheckpointConfig
from lm.checkpoint.manifest import FileChecksum, Manifest, epath

ATTACHMENTS = {"config.json": b'{"run": 1}\n', "tokenizer.model": bytes(range(256))}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Small:
    step: jax.Array
    w: jax.Array
    bad_streak: jax.Array


def small(step: int, bad_streak: int = 0) -> Small:
    return Small(jnp.int32(step), jax.random.normal(jax.random.key(step), (4, 8)), jnp.int32(bad_streak))


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


class Writer(Checkpoints):
    def __init__(self, directory: Path, **config: Any):
        self.said: list[str] = []
        super().__init__(directory, CheckpointConfig(**config), ATTACHMENTS, self.said.append)

    def write(self, *steps: int) -> None:
        for step in steps:
            assert self.save(small(step), step, wait=True)
        self.wait()
        assert self.last_good == steps[-1], self.said


def steps(directory: Path) -> list[int]:
    return [info.step for info in list_checkpoints(directory)]


def bits(state: Any) -> list[tuple[Any, bytes]]:
    return [((x.shape, x.dtype), np.asarray(x).tobytes()) for x in jax.tree.leaves(state)]


def rewrite_manifest(folder: Path, **changes: Any) -> None:
    """As somebody would who wants other files to be taken for those that were saved."""
    manifest = Manifest.read(epath.Path(folder), int(folder.name))
    files = {name: FileChecksum.of(epath.Path(folder / name)) for name in manifest.files if (folder / name).is_file()}
    dataclasses.replace(manifest, **{"files": files} | changes).write(epath.Path(folder))
