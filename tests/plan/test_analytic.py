"""The counts of the analytic model: exact where they can be, and what they are made of."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from lm.chips import TPUS
from lm.experiment import Config
from lm.kernels.attention import Places
from lm.model.config import ModelConfig
from lm.model.flops import flops_per_token, parameter_count
from lm.model.transformer import Block
from lm.optim.config import OptimConfig
from lm.parallel.layout import Layout
from lm.parallel.mesh import AXES, MeshConfig, Rule, abstract_mesh
from lm.plan.analytic import Work, count_work, predict
from lm.plan.machine import Machine
from lm.train.config import RecoveryConfig, TrainConfig
from lm.train.state import abstract_state

BASE = Config(
    model=ModelConfig(
        layers=8,
        width=512,
        heads=8,
        head_dim=64,
        kv_heads=4,
        hidden=1536,
        vocab_size=4096,
        embeddings="untied",
        positions="none",  # rotary ones are products of their own
    ),
    train=TrainConfig(batch_size=64, sequence_length=2048, steps=10),
    optim=OptimConfig(),
)


def on(sizes: dict[str, int], **train: Any) -> tuple[Config, dict[str, int]]:
    """The base on a mesh, with its sizes by axis. Sizes may hold other fields of the mesh."""
    config = dataclasses.replace(
        BASE, mesh=MeshConfig(**({"fsdp": 1} | sizes)), train=dataclasses.replace(BASE.train, **train)
    )
    return config, config.mesh.sizes


def work(sizes: dict[str, int], **train: Any) -> Work:
    return count_work(*on(sizes, **train))


def moved(found: Work, kind: str) -> float:
    return sum(one.bytes for one in found.exchanges if one.kind == kind)


MESHES = [
    {"fsdp": 8},
    {"data": 2, "fsdp": 4},
    {"fsdp": 2, "tensor": 4},
    {"fsdp": 2, "context": 4},
    {"fsdp": 2, "stage": 4},
    {"data": 2, "context": 2, "tensor": 2},
    {"stage": 2, "repeats": 2, "microbatches": 4, "fsdp": 4},
]


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_parameters_are_those_of_the_state(sizes: dict[str, int]) -> None:
    config, counts = on(sizes)
    params = abstract_state(config, abstract_mesh(config.mesh, math.prod(counts.values()))).params
    held = sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * 4 for leaf in jax.tree.leaves(params))
    assert count_work(config, counts).parameters == held


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_products_are_those_of_the_model(sizes: dict[str, int]) -> None:
    """All devices together, without recomputation: 6 N for each token, and what a pipeline computes while idle."""
    config, counts = on(sizes)
    found, devices = count_work(config, counts), math.prod(counts.values())
    tokens = config.train.batch_size * config.train.sequence_length
    flops = flops_per_token(config.model, config.train.sequence_length).parameters * tokens
    stage, rounds = counts["stage"], config.mesh.pipeline_microbatches * config.mesh.repeats
    idle = (rounds + stage - 1) / rounds if stage > 1 else 1
    loss = 6 * tokens * config.model.width * config.model.vocab_size
    assert found.loss_flops * devices == pytest.approx(loss)
    assert found.layer_flops * devices == pytest.approx((flops - loss) * idle)


def test_recomputation_by_what_is_saved() -> None:
    """Of a layer: queries and outputs 512 x 512, keys and values 512 x 256 each, three of 512 x 1536."""
    tokens, ups, attention = 64 * 2048 / 8, 2 * 512 * 1536, 2 * 512 * 512 + 2 * 512 * 256
    sizes = {"fsdp": 8}

    def again(**train: Any) -> float:
        return (work(sizes, **train).layer_flops - work(sizes).layer_flops) / (2 * tokens * 8)

    assert again(remat="full") == attention + ups  # what only adds to the residual stream is not needed again
    assert again(remat="names", saved=("feed_forward_up", "feed_forward_gate")) == attention
    assert again(remat="names", saved=("query", "key", "value")) == 512 * 512 + ups
    assert again(remat="names", saved=("attention",)) == attention + ups
    kernels = {remat: work(sizes, **remat_of(remat)).attention_flops for remat in ("none", "full", "attention")}
    assert kernels["none"] == kernels["attention"]
    assert kernels["full"] == pytest.approx(kernels["none"] * (4 + 4 + 10) / (4 + 10), rel=0.2)  # tiles differ in size


def remat_of(name: str) -> dict[str, Any]:
    return {"remat": name} if name in ("none", "full") else {"remat": "names", "saved": (name,)}


def test_weights_are_gathered_twice_and_scattered_once() -> None:
    found = work({"fsdp": 8}, remat="full")
    vectors = 8 * 2 * 512 + 512
    matrices = parameter_count(BASE.model) - vectors - 4096 * 512  # the embedding is looked up where it lies
    layers = matrices - 4096 * 512
    assert found.layer_weights * 8 == layers
    assert moved(found, "all-gather") == 2 * (2 * layers + 4096 * 512)
    assert moved(found, "reduce-scatter") == 4 * matrices
    assert moved(work({"fsdp": 8}, reduce_dtype="bfloat16"), "reduce-scatter") == 2 * matrices
    twice = work({"fsdp": 8}, remat="full", accumulation=2)
    assert moved(twice, "all-gather") == 2 * moved(found, "all-gather")
    assert twice.saved == found.saved / 2
    (summed,) = work({"data": 8}).exchanges
    assert (summed.kind, summed.bytes) == ("all-reduce", 4 * parameter_count(BASE.model))


def test_rotary_positions_are_products() -> None:
    """On TPUs: 8 heads of queries and 4 of keys, each times 64 x 64, forward, backward, and again unless saved."""
    config, sizes = on({"fsdp": 8}, remat="names", saved=("query",))
    turned = dataclasses.replace(config, model=dataclasses.replace(config.model, positions="rotary"))
    more = count_work(turned, sizes).layer_flops - count_work(config, sizes).layer_flops
    assert more == 8 * 2 * (64 * 2048 / 8) * 64 * 64 * (2 * 8 + 3 * 4)
    assert count_work(turned, sizes, "cpu").layer_flops == count_work(config, sizes, "cpu").layer_flops


def test_saved_results() -> None:
    """A head of 64 takes 128 lanes."""
    tokens = 64 * 2048 / 8
    full = work({"fsdp": 8}, remat="full")
    assert full.saved == 8 * tokens * 512 * 2  # the residual stream
    names = work({"fsdp": 8}, remat="names", saved=("feed_forward_up",), offloaded=("query",))
    assert names.saved - full.saved == 8 * tokens * 1536 * 2
    assert names.offloaded == 8 * tokens * 8 * 128 * 2
    split = work({"tensor": 4, "fsdp": 2}, remat="names", saved=("feed_forward_up",))
    assert split.saved == names.saved  # in the same parts of the sequence, or of the hidden layer
    assert work({"fsdp": 8}, remat="none").saved > names.saved


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "gelu", "gelu_tanh", "squared_relu"])
def test_without_recomputation_what_autodiff_keeps_is_saved(activation: str) -> None:
    """The residuals of a layer's gradient as JAX traces it, besides weights and numbers of a whole row."""
    model = ModelConfig(
        layers=1, width=384, heads=4, head_dim=128, kv_heads=2, hidden=640, activation=activation, positions="none"
    )
    rows, length = 2, 256
    graph, state = nnx.split(nnx.eval_shape(lambda: Block(model, jax.random.key(0), window=0)))

    def residuals(state: Any, x: jax.Array, places: Places) -> Any:
        def layer(state: Any, x: jax.Array) -> jax.Array:
            return nnx.merge(graph, state)(x, places, Layout(platform="tpu"))[0]

        return jax.vjp(layer, state, x)[1]

    x = jax.ShapeDtypeStruct((rows, length, 384), jnp.bfloat16)
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    kept = jax.tree.leaves(jax.eval_shape(residuals, state, x, Places(ids, ids)))
    weights = {leaf.shape for leaf in jax.tree.leaves(state)}
    of_tokens = [k for k in kept if k.size > rows * length and k.size % (rows * length) == 0 and k.shape not in weights]
    # Products that read the same each have it; the compiler keeps one.
    again = (2 + model.gated) * rows * length * 384 * 2
    train = dataclasses.replace(BASE.train, batch_size=rows, sequence_length=length, remat="none")
    config = dataclasses.replace(BASE, model=model, train=train, mesh=MeshConfig(fsdp=1))
    found = count_work(config, config.mesh.sizes).saved
    assert found == sum(leaf.size * leaf.dtype.itemsize for leaf in of_tokens) - again


def test_the_gradient_of_queries_for_each_tile_of_keys() -> None:
    """Of 2,048 at most: between 2,048 and 16,384 tokens, seven more for as many tokens; with a window, smaller ones."""
    short, long = (on({"fsdp": 8}, batch_size=65536 * 8 // n, sequence_length=n) for n in (2048, 16384))
    more = count_work(*long).kernel - count_work(*short).kernel
    assert more == 7 * 65536 * 8 * 128
    config, sizes = long
    near = dataclasses.replace(config, model=dataclasses.replace(config.model, windows=(512,)))
    assert count_work(near, sizes).kernel - count_work(config, sizes).kernel == (32 - 8) * 65536 * 8 * 128
    split = work({"fsdp": 2, "context": 4}, batch_size=65536 * 8 // 16384, sequence_length=16384)
    assert split.kernel == count_work(*long).kernel + 3 * 65536 * 4 * 4 * 128  # keys and values of whole sequences


def test_what_else_is_there_with_a_layer() -> None:
    tokens, table = 64 * 2048 / 8, 4096 * 512
    found = work({"fsdp": 8}, remat="full")
    assert found.layer_parameters == found.parameters - 4 * (2 * table / 8 + 512)  # and the last norm
    relaid = 2 * 3 * 4 * 4096 * 128  # of both tables and their optimizer state, where the 64 columns stored are padded
    assert found.copies == 8 * found.layer_weights / 8 * 2 + relaid
    assert found.transposed
    assert not work({"fsdp": 4}).transposed
    assert work({"fsdp": 4}).copies == 8 * found.layer_weights / 4 * 2
    assert count_work(*on({"fsdp": 8}), "cpu").copies == 0  # computed with as stored
    assert found.loss_left == 4 * tokens * 4096 + 2 * tokens * 512  # one chunk: its logits, and what they are made of
    assert work({"fsdp": 8}, batch_size=256).loss_left == 4 * table  # several: the sum of their gradients
    assert work({"fsdp": 8}, batch_size=256, accumulation=4).loss_left == found.loss_left
    tied = dataclasses.replace(BASE.model, embeddings="tied")
    for sizes, left in (({"fsdp": 8}, 4 * table), ({"fsdp": 4}, table), ({"fsdp": 2, "context": 2}, 4 * table)):
        # Scattered before the layers where that is into parts of 128 columns, over one axis.
        config, counts = on(sizes, batch_size=256)
        assert count_work(dataclasses.replace(config, model=tied), counts).loss_left == left
        assert count_work(config, counts).loss_left == 4 * table
    assert found.moving == 0
    offloaded = work({"fsdp": 8}, remat="names", offloaded=("query",))
    assert offloaded.moving == 2 * tokens * (8 * 512 + 8 * 128)


def test_what_goes_to_the_host_does_so_for_every_part_of_the_batch() -> None:
    """Held at one time is that of one part; carried, and the seconds that this takes, are those of all."""
    kept: dict[str, Any] = {"remat": "names", "offloaded": ("query",)}
    once, often = work({"fsdp": 8}, **kept), work({"fsdp": 8}, accumulation=4, **kept)
    assert once.offloaded == once.carried == 4 * often.offloaded == often.carried
    seconds = [
        predict(config, Machine(TPUS["v5e"], (2, 4)), sizes).estimate.times.host
        for config, sizes in (on({"fsdp": 8}, **kept), on({"fsdp": 8}, accumulation=4, **kept))
    ]
    assert seconds[0] == seconds[1] == pytest.approx(2 * once.offloaded / 16e9)


def test_gradients_are_summed_over_all_axes_that_do_not_split_them() -> None:
    config, sizes = on({"data": 2, "fsdp": 4})
    whole = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, rules=(Rule("embed", ()),)))
    (summed,) = count_work(whole, sizes).exchanges
    assert (summed.kind, summed.axes, summed.bytes) == ("all-reduce", ("data", "fsdp"), 4 * parameter_count(BASE.model))


def test_layers_beyond_the_pattern_are_like_the_others() -> None:
    config, sizes = on({"fsdp": 8})
    odd = dataclasses.replace(config, model=dataclasses.replace(config.model, windows=(128, 128, 0)))
    assert count_work(odd, sizes).layer_weights == count_work(config, sizes).layer_weights


def test_a_prediction() -> None:
    machine = Machine(TPUS["v5e"], (2, 4))
    config, sizes = on({"fsdp": 8}, remat="full")
    found = predict(config, machine, sizes)
    held = count_work(config, sizes).parameters
    assert (found.memory.parameters, found.memory.optimizer) == (held, 2 * held)
    assert found.fits
    assert found.step_seconds == pytest.approx(sum(found.estimate.times.parts.values()))
    assert 0.05 < found.estimate.mfu < 0.8
    on_host = predict(*_with(config, machine, sizes, optimizer_memory="host"))
    assert on_host.memory.total == found.memory.total - 2 * held
    assert on_host.memory.host == 2 * held
    assert on_host.estimate.times.parts["host"] == on_host.estimate.times.update > 0
    verified = dataclasses.replace(config, recovery=RecoveryConfig(verify_every=100))
    for kept, more in ((found, 3 * held), (on_host, held)):  # the state once more, in the memory that it lies in
        where = "host" if kept is on_host else "device"
        twice = predict(*_with(verified, machine, sizes, optimizer_memory=where)).memory
        assert (twice.again, twice.total) == (more, kept.memory.total + more)
        assert twice.host == 2 * kept.memory.host
    larger = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=2**17))
    assert not predict(larger, machine, sizes).fits


def _with(config: Config, machine: Machine, sizes: dict[str, int], **train: Any) -> tuple[Any, Any, Any]:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **train)), machine, sizes


def test_two_chips_that_share_links() -> None:
    """On TPU7x two devices are one chip: bytes on the chip, seconds of a device."""
    config, sizes = on({"fsdp": 8})
    found = predict(config, Machine(TPUS["tpu7x"], (2, 2, 1)), sizes)
    assert found.memory.parameters == 2 * count_work(config, sizes).parameters
    assert set(sizes) == set(AXES)
