"""The same loss and gradients on every mesh: each axis alone, sensible pairs, three axes, on eight simulated devices.

    python tests/parallel/test_equivalence.py

prints the table: axes, largest relative difference of the loss and of the gradients.

The tolerance: float32 sums in another order differ by about sqrt(terms) times 6e-8 of the largest partial sum. Here a
gradient is a sum over 512 tokens and up to 96 features through 4 layers; relative to the largest entry of its tensor
that is 1e-6 or less (the table says 7e-7). 5e-6 leaves room for it, and none for a missing or doubled term, which is
of the size of 1 / devices or larger.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
import pytest

from lm.data.prefix import Prefixes
from lm.experiment import Config
from lm.model.config import ModelConfig
from lm.optim.optimizer import paths
from lm.parallel.mesh import MeshConfig, Rule, make_mesh
from lm.parallel.sharding import batch_sharding
from lm.train.config import TrainConfig
from lm.train.state import abstract_state, init_state
from lm.train.step import _loss_and_gradients, make_eval_step

TOLERANCE = 5e-6

MODEL = ModelConfig(vocab_size=96, layers=4, width=64, heads=8, kv_heads=4, hidden=80, embeddings="untied")
TRAIN = TrainConfig(batch_size=16, sequence_length=32, z_loss=1e-2)

MODELS = {
    "llama": {},
    "gpt2": {
        "norm": "layer", "norm_parameters": "scale_and_bias", "bias": "all", "positions": "learned", "context": 32,
        "activation": "gelu", "embeddings": "tied", "dropout": 0.1, "kv_heads": None,
    },
    "gemma": {
        "norm_placement": "sandwich", "attention_softcap": 5.0, "output_softcap": 3.0, "windows": (7, 0),
        "activation": "geglu", "qk_norm": "per_head",
    },
    "olmo": {"norm_placement": "output", "qk_norm": "all_heads"},
}  # fmt: skip

MESHES: dict[str, dict[str, Any]] = {
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "tensor 4": {"tensor": 4},
    "context 8": {"context": 8},
    "expert 8": {"expert": 8},
    "stage 4": {"stage": 4},
    "stage 2, repeats 2": {"stage": 2, "repeats": 2},
    "stage 2, microbatches 8": {"stage": 2, "microbatches": 8},
    "data 2, fsdp 4": {"data": 2, "fsdp": 4},
    "data 2, tensor 4": {"data": 2, "tensor": 4},
    "data 2, context 4": {"data": 2, "context": 4},
    "data 4, expert 2": {"data": 4, "expert": 2},
    "data 4, stage 2": {"data": 4, "stage": 2},
    "fsdp 2, tensor 4": {"fsdp": 2, "tensor": 4},
    "fsdp 4, context 2": {"fsdp": 4, "context": 2},
    "fsdp 4, expert 2": {"fsdp": 4, "expert": 2},
    "fsdp 2, stage 4": {"fsdp": 2, "stage": 4},
    "tensor 2, context 4": {"tensor": 2, "context": 4},
    "tensor 4, stage 2": {"tensor": 4, "stage": 2},
    "context 2, stage 4": {"context": 2, "stage": 4},
    "data 2, fsdp 2, tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "data 2, context 2, tensor 2": {"data": 2, "context": 2, "tensor": 2},
    "fsdp 2, context 2, tensor 2": {"fsdp": 2, "context": 2, "tensor": 2},
    "fsdp 2, expert 2, tensor 2": {"fsdp": 2, "expert": 2, "tensor": 2},
    "fsdp 2, tensor 2, stage 2, repeats 2": {"fsdp": 2, "tensor": 2, "stage": 2, "repeats": 2},
    "context 2, tensor 2, stage 2": {"context": 2, "tensor": 2, "stage": 2},
    "fsdp 4, embed whole": {"fsdp": 4, "rules": (Rule("embed", ()),)},
    "tensor 2, vocabulary whole": {"tensor": 2, "fsdp": 2, "rules": (Rule("vocab", ()),)},
    "tensor 2, mlp whole": {"tensor": 2, "fsdp": 2, "rules": (Rule("mlp", ()),)},
    "data 2, fsdp 2, embed over both": {"data": 2, "fsdp": 2, "rules": (Rule("embed", ("data", "fsdp")),)},
}


def config_of(model: str, mesh: dict[str, Any], **train: Any) -> Config:
    return Config(
        model=dataclasses.replace(MODEL, **MODELS[model]),
        train=dataclasses.replace(TRAIN, **train),
        mesh=MeshConfig(**({"fsdp": 1} | mesh)),
    )


def packed_batch(length: int = TRAIN.sequence_length, prefix_rate: float = 0.0, seed: int = 0) -> dict[str, np.ndarray]:
    """Rows of several documents, begun at random places, with padding at the end of some."""
    rng = np.random.default_rng(seed)
    rows, vocabulary = TRAIN.batch_size, MODEL.vocab_size
    begins = rng.random((rows, length)) < 0.15
    begins[:, 0] = True
    segments = np.cumsum(begins, axis=1, dtype=np.int32)
    column = np.arange(length, dtype=np.int32)
    positions = column - np.maximum.accumulate(np.where(begins, column, 0), axis=1)
    inside = column < rng.integers(length // 2, 2 * length, (rows, 1))
    mask = inside & (np.roll(segments, -1, axis=1) == segments)
    prefix, within = Prefixes(prefix_rate, seed)(segments * inside, np.arange(rows))
    return ({"prefix": prefix.astype(np.int32)} if prefix_rate else {}) | {
        "tokens": rng.integers(0, vocabulary, (rows, length), np.int32),
        "targets": rng.integers(0, vocabulary, (rows, length), np.int32),
        "segments": segments * inside,
        "positions": positions.astype(np.int32) * inside,
        "loss_mask": (mask & ~within).astype(np.float32),
        "bytes": rng.integers(1, 99, rows, np.int32),
    }


def compute(config: Config, batch: dict[str, np.ndarray]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Sums of the loss, and gradients by parameter, layers in one axis."""
    sizes = math.prod(config.mesh.sizes.values())
    mesh = make_mesh(config.mesh, jax.devices()[:sizes])
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(config, mesh).params)
    params = jax.jit(lambda key: init_state(config, key).params, out_shardings=shardings)(jax.random.key(0))
    placed = jax.device_put(batch, batch_sharding(mesh))
    sums, gradients = jax.jit(_loss_and_gradients(config, mesh))(params, placed, jax.random.key(7))
    of_source = np.arange(len(batch["bytes"]), dtype=np.int32) % 3
    rows = jax.device_put(batch | {"source": of_source}, batch_sharding(mesh))
    evaluated = jax.jit(make_eval_step(config, mesh, sources=3))(params, rows)
    for found, wanted in zip(jax.tree.leaves(gradients), jax.tree.leaves(shardings), strict=True):
        assert found.sharding.is_equivalent_to(wanted, found.ndim)
    found = {path: np.asarray(leaf) for path, leaf in zip(paths(gradients), jax.tree.leaves(gradients), strict=True)}
    if config.mesh.repeats > 1:
        found = {p: g.reshape(-1, *g.shape[2:]) if p[0] == "layers" else g for p, g in found.items()}
    names = sums._asdict() | {
        f"evaluated {name} {i}": value for name, values in evaluated._asdict().items() for i, value in enumerate(values)
    }
    return {name: float(value) for name, value in names.items()}, {".".join(p): g for p, g in found.items()}


@functools.cache
def on_one_device(model: str, length: int, prefix_rate: float) -> Any:
    return compute(config_of(model, {}, sequence_length=length), packed_batch(length, prefix_rate))


def differences(
    model: str, mesh: dict[str, Any], length: int = TRAIN.sequence_length, prefix_rate: float = 0.0, **train: Any
) -> tuple[float, float]:
    """Largest relative difference of a sum, and of an entry of a gradient to the largest of its tensor."""
    batch = packed_batch(length, prefix_rate)
    sums, gradients = compute(config_of(model, mesh, sequence_length=length, **train), batch)
    wanted_sums, wanted = on_one_device(model, length, prefix_rate)
    loss = max(abs(sums[name] - value) / abs(value) for name, value in wanted_sums.items())
    floor = 1e-4 * max(np.abs(g).max() for g in wanted.values())  # the gradient of the bias of keys is 0
    gradient = max(float(np.abs(gradients[n] - g).max() / max(np.abs(g).max(), floor)) for n, g in wanted.items())
    return loss, gradient


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_computes_the_same(mesh: str) -> None:
    loss, gradient = differences("llama", MESHES[mesh])
    assert loss < TOLERANCE
    assert gradient < TOLERANCE


@pytest.mark.parametrize("model", [name for name in MODELS if name != "llama"])
@pytest.mark.parametrize(
    "mesh",
    [
        {"fsdp": 2, "context": 2, "tensor": 2},
        {"data": 2, "fsdp": 2, "stage": 2},
    ],
    ids=str,
)
def test_other_architectures(model: str, mesh: dict[str, Any]) -> None:
    """Learned positions, biases, dropout, windows, caps and norms over heads that are split."""
    loss, gradient = differences(model, mesh)
    assert loss < TOLERANCE
    assert gradient < TOLERANCE


@pytest.mark.parametrize(
    ("mesh", "train"),
    [
        ({"fsdp": 4}, {"accumulation": 4}),
        ({"data": 2, "tensor": 2}, {"accumulation": 2, "unroll": 2}),
        ({"fsdp": 2, "stage": 2}, {"accumulation": 2, "remat": "full"}),
        ({"fsdp": 2, "context": 2}, {"remat": "full"}),
        ({"fsdp": 2, "tensor": 2}, {"remat": "names", "saved": ("attention", "feed_forward_up")}),
    ],
    ids=str,
)
def test_accumulation_and_remat(mesh: dict[str, Any], train: dict[str, Any]) -> None:
    loss, gradient = differences("llama", mesh, **train)
    assert loss < TOLERANCE
    assert gradient < TOLERANCE


@pytest.mark.parametrize(
    ("mesh", "length"), [({"context": 4}, 88), ({"context": 2, "tensor": 2}, 40), ({"fsdp": 8}, 37)]
)
def test_lengths_that_are_no_power_of_two(mesh: dict[str, Any], length: int) -> None:
    loss, gradient = differences("llama", mesh, length)
    assert loss < TOLERANCE
    assert gradient < TOLERANCE


@pytest.mark.parametrize(
    ("mesh", "train"),
    [({"fsdp": 2, "context": 2, "tensor": 2}, {}), ({"context": 2, "stage": 2}, {"accumulation": 2, "remat": "full"})],
    ids=str,
)
def test_prefixes(mesh: dict[str, Any], train: dict[str, Any]) -> None:
    """Tokens that see each other in both directions, with and without a window."""
    loss, gradient = differences("gemma", mesh, prefix_rate=0.7, **train)
    assert loss < TOLERANCE
    assert gradient < TOLERANCE


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    print(f"{'mesh':<40}  loss      gradients")
    for name, sizes in MESHES.items():
        loss, gradient = differences("llama", sizes)
        print(f"{name:<40}  {loss:.1e}   {gradient:.1e}", flush=True)
