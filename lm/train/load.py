"""What a finished or running run has learned: its config, tokenizer and parameters, from a checkpoint alone."""

import dataclasses
import functools
import json
from typing import Any

import jax
from jax.sharding import Mesh

from lm import config as configs
from lm.checkpoint.checkpoints import Checkpoints, list_checkpoints, read_attachment
from lm.data.tokenizers import FILE_NAMES, Tokenizer, load_tokenizer
from lm.errors import ConfigError, StorageError
from lm.experiment import Config
from lm.parallel.mesh import MeshConfig, count_slices, make_mesh
from lm.parallel.processes import ALONE, Processes
from lm.train.run_directory import RunDirectory, is_run
from lm.train.state import abstract_state, init_state


@dataclasses.dataclass(frozen=True)
class Trained:
    """A model as it was with `step` steps done."""

    config: Config
    params: Any
    tokenizer: Tokenizer
    step: int
    mesh: Mesh


def load_trained(path: str, *, step: int | None = None, processes: Processes = ALONE) -> Trained:
    """Reads the newest checkpoint of the run at `path`, or that of `step`; all checksums are verified.

    All of the `processes` call this, and get the same step. Raises ConfigError when there is no such run or step,
    StorageError when the checkpoint is damaged.
    """
    directory = RunDirectory(path).checkpoints
    if not is_run(path):
        raise ConfigError(f"{path} is not a run, it has no config.json; `lm train` makes runs")
    infos = {info.step: info for info in list_checkpoints(directory)}
    if not infos:
        raise ConfigError(f"{path} has no checkpoint yet")
    if step is not None and step not in infos:
        raise ConfigError(f"{path} has no checkpoint {step}; there are {', '.join(map(str, infos))}")
    step = int(processes.broadcast("step to load", max(infos) if step is None else step))
    if step not in infos:  # a run that goes on may have saved it since
        infos = {info.step: info for info in list_checkpoints(directory)}
    problem = infos[step].problem if step in infos else "not to be seen on this host"
    if problem is not None:
        raise StorageError(f"checkpoint {step} of {path} is bad: {problem}; choose another with --step")

    text = read_attachment(directory, step, "config.json").decode()
    config = configs.from_dict(Config, json.loads(text))
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(path)))  # it may have moved
    # On the devices here, not those it was trained on.
    train = dataclasses.replace(config.train, optimizer_memory="device")
    config = dataclasses.replace(config, mesh=MeshConfig(data=count_slices(jax.devices())), train=train)
    mesh = make_mesh(config.mesh)
    try:
        abstract = abstract_state(config, mesh)
    except ConfigError:  # sizes that so many devices cannot split: a copy on each
        config = dataclasses.replace(config, mesh=MeshConfig(data=-1, fsdp=1))
        mesh = make_mesh(config.mesh)
        abstract = abstract_state(config, mesh)
    fresh = functools.partial(init_state, config, jax.random.key(config.run.seed))
    state = Checkpoints(directory, config.checkpoint, {}, print, processes, fresh).restore(step, abstract)
    kind = config.data.tokenizer.kind
    tokenizer = load_tokenizer(kind, read_attachment(directory, step, FILE_NAMES[kind]))
    return Trained(config, state.params, tokenizer, step, mesh)
