"""Prefix language modelling: which tokens are in a prefix, and what of a batch is then trained on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from lm.data.batches import Batches, Evaluation
from lm.data.config import DataConfig
from lm.data.corpus import open_corpus
from lm.data.prefix import Prefixes
from lm.data.show import show
from lm.experiment import Config
from lm.model.config import ModelConfig
from lm.parallel.mesh import MeshConfig, make_mesh
from lm.plan.compile import abstract_batch
from lm.train.config import TrainConfig

BOS, EOS = 256, 257


@pytest.fixture
def folder(write_data: Callable[..., Path]) -> Path:
    rng = np.random.default_rng(0)
    documents = [np.array([BOS, *rng.integers(97, 123, rng.integers(0, 90)), EOS]) for _ in range(120)]
    return write_data([documents[:60], documents[60:]], heldout=[documents[:5]])


def batches(folder: Path, rate: float, seed: int = 0, **options: str) -> Batches:
    return Batches(open_corpus(folder, replace(DataConfig(), prefix_rate=rate, **options)), 8, 32, seed)


def stretches(batch: dict[str, np.ndarray]) -> list[tuple[int, slice]]:
    """Row and columns of each segment."""
    found = []
    for row, segments in enumerate(batch["segments"]):
        for segment in range(1, segments.max() + 1):
            columns = np.flatnonzero(segments == segment)
            found.append((row, slice(columns[0], columns[-1] + 1)))
    return found


@pytest.mark.parametrize("attention", ["document", "row"])
@pytest.mark.parametrize("packing", ["split", "best_fit"])
def test_a_prefix_is_the_beginning_of_a_segment_and_is_not_trained_on(
    folder: Path, packing: str, attention: str
) -> None:
    plain = batches(folder, 0.0, packing=packing, attention=attention)
    made = batches(folder, 0.5, packing=packing, attention=attention)
    sizes = made.corpus.tokenizer.token_bytes
    chosen = total = 0
    for step in range(20):
        before, batch = plain.batch(step), made.batch(step)
        assert "prefix" not in before
        for name in ("tokens", "targets", "segments", "positions"):
            assert np.array_equal(before[name], batch[name])
        assert batch["prefix"].dtype == np.int32
        assert (batch["prefix"][batch["segments"] == 0] == 0).all()
        for row, columns in stretches(batch):
            prefix, mask = batch["prefix"][row, columns], batch["loss_mask"][row, columns]
            size, length = len(prefix), int(prefix.sum())
            assert prefix.tolist() == [1] * length + [0] * (size - length)
            assert length < max(size, 2)
            untrained = max(length - 1, 0)  # its last token predicts the first one after it
            assert (mask[:untrained] == 0).all()
            assert np.array_equal(mask[untrained:], before["loss_mask"][row, columns][untrained:])
            chosen, total = chosen + (length > 0), total + 1
        counted = (sizes[batch["targets"]] * (batch["loss_mask"] > 0)).sum(axis=1)
        assert np.array_equal(batch["bytes"], counted)
    assert 0.5 - 2 / total**0.5 < chosen / total < 0.5 + 2 / total**0.5


def test_lengths_are_drawn_evenly() -> None:
    segments = np.repeat(np.array([[1] * 9 + [2] * 3 + [0] * 4]), 4000, axis=0).astype(np.int32)
    prefix, within = Prefixes(0.75, seed=3)(segments, np.arange(4000))
    assert not prefix[:, 12:].any()
    for columns in (slice(0, 9), slice(9, 12)):
        lengths = prefix[:, columns].sum(axis=1)
        counts = np.bincount(lengths, minlength=columns.stop - columns.start)
        assert len(counts) == columns.stop - columns.start  # never the whole segment
        wanted = np.array([1000] + [3000 / (len(counts) - 1)] * (len(counts) - 1))
        assert (np.abs(counts - wanted) < 5 * np.sqrt(wanted)).all()
        assert np.array_equal(within[:, columns].sum(axis=1), np.maximum(lengths - 1, 0))
    both = prefix[:, 0].astype(int) + prefix[:, 9]  # segments of a row are drawn by themselves
    assert abs((both == 2).mean() - 0.75**2) < 0.04


def test_it_depends_on_seed_and_place_alone(folder: Path) -> None:
    made = batches(folder, 0.5)
    whole = made.batch(7)
    for rows in (slice(2, 5), np.array([6, 0])):
        part = batches(folder, 0.5).batch(7, rows)
        assert all(np.array_equal(part[name], whole[name][rows]) for name in whole)
    assert not np.array_equal(whole["prefix"], batches(folder, 0.5, seed=1).batch(7)["prefix"])
    epoch = made.orders[0].rows_per_epoch // 8 + 1
    assert len({made.batch(step)["prefix"].tobytes() for step in range(2 * epoch)}) == 2 * epoch
    one = Prefixes(0.5, 0)(np.ones((1, 12), np.int32), np.array([5]))[0]
    assert one.sum() == 10  # pinned: another draw would be another run


def test_what_is_compiled_and_shown(folder: Path) -> None:
    made = batches(folder, 0.5)
    data = made.corpus.data
    config = Config(
        data=replace(data, paths=("somewhere",)),
        model=ModelConfig(vocab_size=258),
        train=TrainConfig(batch_size=8, sequence_length=32),
        mesh=MeshConfig(fsdp=1),
    )
    planned = abstract_batch(config, make_mesh(config.mesh, jax.devices()[:1]))
    kinds = {name: (x.shape, x.dtype) for name, x in made.batch(0).items()}
    assert {name: (x.shape, x.dtype) for name, x in planned.items()} == kinds
    assert {name: (x.shape, x.dtype) for name, x in made.shapes().items()} == kinds
    assert "prefix" not in Evaluation(made.corpus, "heldout", 4, 32).batch(0)
    assert any("⟧" in line and len(line) > 20 for line in show(made, 0))


def test_a_rate_that_is_none() -> None:
    assert "between 0 and 1" in dict(DataConfig(paths=("x",), prefix_rate=-0.1).check())["prefix_rate"]
