"""The look inside while training: the same on a mesh, bounded in a run, and what is counted between logged steps."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.util import tensor_util

from lm.data.tokenizers import BytesTokenizer
from lm.experiment import Config
from lm.model.config import ModelConfig
from lm.model.observe import observe
from lm.model.transformer import bind
from lm.parallel.mesh import MeshConfig, make_mesh
from lm.train.config import EvalConfig, TrainConfig
from lm.train.groups import groups_of
from lm.train.health import Health
from lm.train.histograms import EDGES
from lm.train.images import attention_maps, token_losses
from lm.train.probe import PICTURES, TEXTS, TOKENS, Probe, jit_look
from lm.train.state import abstract_state, init_state
from lm.train.summaries import NoSummaries

CONFIG = Config(
    model=ModelConfig(vocab_size=258, layers=4, width=32, heads=4),
    train=TrainConfig(steps=1000, batch_size=8, sequence_length=200),
    eval=EvalConfig(every=10),
    mesh=MeshConfig(fsdp=1),
)


def batch_of(rows: int = 8, length: int = 200) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, 256, (rows, length + 1)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": np.ones((rows, length), np.int32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "loss_mask": np.ones((rows, length), np.float32),
        "bytes": np.full(rows, length, np.int32),
        "source": np.zeros(rows, np.int32),
    }


class Shown:
    """In place of summaries: which tags came at which step, and the last value of each."""

    def __init__(self) -> None:
        self.tags: list[tuple[int, str]] = []
        self.last: dict[str, Any] = {}

    def show(self, step: int, summary: Any) -> None:
        self.tags += [(step, value.tag) for value in summary.value]
        self.last |= {value.tag: value for value in summary.value}


def probe_on(config: Config) -> tuple[Probe, Any]:
    mesh = make_mesh(config.mesh, jax.devices()[: int(np.prod([*config.mesh.sizes.values()]))])
    abstract = abstract_state(config, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    state = jax.jit(lambda key: init_state(config, key), out_shardings=shardings)(jax.random.key(0))
    return Probe(config, mesh, abstract, batch_of(), BytesTokenizer(), pytest.fail), state


@pytest.mark.parametrize(
    "mesh",
    [{"fsdp": 4, "tensor": 2}, {"context": 2, "fsdp": 2}],
    ids=lambda mesh: " ".join(mesh),
)
def test_it_sees_the_same_on_a_mesh(mesh: dict[str, int]) -> None:
    config = dataclasses.replace(CONFIG, mesh=MeshConfig(**({"fsdp": 1} | mesh)))
    one, several = (probe.look(state, 9, NoSummaries()) for probe, state in (probe_on(CONFIG), probe_on(config)))
    assert one.keys() == several.keys()
    assert several == pytest.approx(one, rel=1e-4)
    assert {"attention_entropy", "attention_logit", "output_logit", "attention_entropy/layer_3"} <= one.keys()


def test_pictures_are_made_so_often_at_most() -> None:
    probe, state = probe_on(CONFIG)
    shown = Shown()
    for step in (*range(9, 1000, 10), 1000):
        probe.look(state, step, shown)
    pictures = [step for step, tag in shown.tags if tag == "attention"]
    assert len(pictures) <= PICTURES + 1
    assert (pictures[0], pictures[-2:]) == (19, [999, 1000])
    of_one = {tag for step, tag in shown.tags if step == 19}
    matrices = {name for name in groups_of(CONFIG.model).depths if name != "final_norm"}
    assert of_one == {"attention", "loss of each token", *(f"parameters/{name}" for name in matrices)}, "no momenta yet"


PIPELINE = MeshConfig(stage=2, repeats=2, microbatches=2, fsdp=2)


@pytest.mark.parametrize(
    "mesh", [MeshConfig(fsdp=8), MeshConfig(fsdp=2, tensor=4), PIPELINE], ids=["fsdp", "tensor", "stage"]
)
def test_it_needs_no_room_for_the_model(mesh: MeshConfig) -> None:
    """No device gathers more than some layers; a pipeline, which would gather all, is not looked into."""
    model = dataclasses.replace(CONFIG.model, layers=32, width=128, vocab_size=256)
    config = dataclasses.replace(CONFIG, mesh=mesh, model=model)
    devices = make_mesh(mesh, jax.devices()[: int(np.prod([*mesh.sizes.values()]))])
    params = abstract_state(config, devices).params
    batch = {name: jax.ShapeDtypeStruct((TEXTS, 32), x.dtype) for name, x in batch_of().items() if x.ndim == 2}
    compiled = jit_look(config, devices).lower(params, params, batch).compile()
    size = sum(leaf.size * 4 for leaf in jax.tree.leaves(params["layers"]))
    assert compiled.memory_analysis().temp_size_in_bytes < size / 3
    assert (compiled.out_info.observed is None) == (mesh.stage > 1)


def test_of_a_pipeline_it_shows_histograms() -> None:
    probe, state = probe_on(dataclasses.replace(CONFIG, mesh=PIPELINE))
    shown = Shown()
    assert probe.look(state, 1000, shown) == {}
    assert {tag for _, tag in shown.tags} >= {"parameters/layer_0", "parameters/layer_3"}


def test_a_picture_that_cannot_be_drawn_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    probe, state = probe_on(CONFIG)
    monkeypatch.setattr(probe, "_tokenizer", None)
    said: list[str] = []
    monkeypatch.setattr(probe, "_say", said.append)
    assert "attention_entropy" in probe.look(state, 1000, Shown())
    assert said == ["step 1000 is not shown in pictures: AttributeError: 'NoneType' object has no attribute 'piece'"]


def test_only_the_begin_of_the_text_is_looked_at() -> None:
    probe, _ = probe_on(CONFIG)
    assert {x.shape for x in probe._batch.values()} == {(TEXTS, TOKENS)}


def test_shares_of_steps_and_what_each_depth_does() -> None:
    health = Health(CONFIG)
    for norm, applied in ((0.5, True), (1.5, True), (3.0, False), (0.1, True)):
        health.see({"grad_norm": norm}, applied=applied)
    names = groups_of(CONFIG.model).depths
    norms = np.stack([np.full(len(names), value, np.float32) for value in (1.0, 4.0, 0.5)])
    norms[1, 0] = 0
    values = health.values(norms)
    assert (values["clipped_share"], values["skipped_share"]) == (0.25, 0.25)
    assert values["grad_norm/layer_0"] == 1
    assert values["update_ratio/layer_0"] == 0.125
    assert np.isfinite(values[f"update_ratio/{names[0]}"]), "also of what is all zero"
    assert health.values(norms)["clipped_share"] == 0, "since the last time"


def test_each_depth_is_given_its_own_layers() -> None:
    """Of 9 layers in 8 ranges, of which the first has two."""
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, layers=9))
    probe, state = probe_on(config)
    attention = state.params["layers"]["0"]["attention"]
    attention["query"] *= jnp.arange(10.0, 100.0, 10.0).reshape(9, *[1] * (attention["query"].ndim - 1))
    shown = Shown()
    values = probe.look(state, 1000, shown)
    text = {name: jnp.asarray(x[:TEXTS, :TOKENS]) for name, x in batch_of().items() if x.ndim == 2}
    seen = jax.jit(lambda: observe(bind(config.model, state.params), text, jnp.float32))()
    assert values["attention_entropy/layers_0-1"] == pytest.approx(float(seen.entropy[:2].mean()), rel=1e-4)
    assert values["attention_logit/layers_0-1"] == pytest.approx(float(seen.largest_logit[:2].max()), rel=1e-4)
    for layer in (2, 8):
        assert values[f"attention_entropy/layer_{layer}"] == pytest.approx(float(seen.entropy[layer].mean()), rel=1e-4)
        assert values[f"attention_logit/layer_{layer}"] == pytest.approx(float(seen.largest_logit[layer]), rel=1e-4)
    assert len({f"{seen.entropy[layer].mean():.5f}" for layer in range(9)}) == 9, "so that they can be told apart"

    blocks = state.params["layers"]["0"]
    arrays = [np.asarray(x[2]) for x in jax.tree.leaves(blocks) if x.ndim > 2]
    flat = np.concatenate([x.ravel() for x in arrays])
    scale = np.sqrt(np.square(flat).mean())
    # As TensorBoard keeps it: a row is where a bin begins, where it ends, and how many are in it.
    bins = tensor_util.make_ndarray(shown.last["parameters/layer_2"].tensor)
    assert bins[1:, 0] == pytest.approx(bins[:-1, 1])
    assert bins[1:-1] == pytest.approx(
        np.stack([scale * EDGES[:-1], scale * EDGES[1:], np.histogram(flat, scale * EDGES)[0]], axis=1), rel=1e-3
    )


def test_where_a_map_is_dark() -> None:
    maps = np.zeros((1, 2, 8, 8), np.float32)
    maps[0, 1, 6, 2] = 1.0  # of the second head, token 6 looks at token 2
    picture = np.asarray(attention_maps(maps, [0]).convert("L"))
    dark = np.argwhere(picture < 80)
    [(left, top)] = [(16 + 8, 22)]  # after the first head and two margins, below the line with the words
    assert [top + 6, left + 2] in dark.tolist()
    assert picture[top + 2, left + 6] == 255


def test_how_red_a_token_is() -> None:
    picture = np.asarray(token_losses(["aaa", "bbb"], np.array([0.0, 9.0]), np.array([True, True])).convert("RGB"))
    row = picture[9].tolist()  # above the letters
    assert row[10] == [255, 255, 255]
    assert [255, 65, 65] in row
    assert row.index([255, 65, 65]) > 20


def test_images_of_odd_texts() -> None:
    pieces = ["a", "\n", "", "\u4e2d\u6587", "x" * 500, "\x07"]
    losses = np.array([0.0, 9.0, np.nan, np.inf, 1.0, 2.0])
    picture = token_losses(pieces, losses, np.array([True, True, True, True, False, True]))
    assert picture.width == 960
    maps = np.full((1, 2, 8, 8), np.nan, np.float32)
    assert attention_maps(maps, [0]).height > 8
