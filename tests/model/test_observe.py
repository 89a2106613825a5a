"""What a model does inside, against its own forward pass and NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.kernels.attention import Places
from lm.model.config import ModelConfig
from lm.model.loss import Batch, next_token_loss, row_losses
from lm.model.observe import MAPS, observe, shown_layers
from lm.model.transformer import bind, init_params

MODEL = ModelConfig(vocab_size=50, layers=5, width=32, heads=4, kv_heads=2, windows=(4, 0), qk_norm="per_head")


def batch_of(rows: int = 3, length: int = 24) -> Batch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50, (rows, length + 1), np.int32)
    segments = np.ones((rows, length), np.int32)
    segments[0, 10:] = 2
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    positions[0, 10:] -= 10
    segments[2, 20:] = positions[2, 20:] = 0  # padding
    mask = (segments > 0).astype(np.float32)
    mask[0, 9] = 0
    return {
        "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segments": segments, "positions": positions,
        "loss_mask": mask, "bytes": mask.sum(1).astype(np.int32) * 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    "changes", [{}, {"attention_softcap": 5.0, "output_softcap": 3.0}, {"norm_placement": "sandwich"},
                {"norm_placement": "post", "windows": ()}, {"positions": "learned", "layers": 2}],
)  # fmt: skip
def test_it_is_what_the_model_computes(changes: dict) -> None:
    model = dataclasses.replace(MODEL, **changes)
    params = init_params(model, jax.random.key(1))
    batch = batch_of()
    found = observe(bind(model, params), batch, jnp.float32)
    hidden, _ = bind(model, params)(batch["tokens"], Places(batch["segments"], batch["positions"]), dtype=jnp.float32)
    logits = np.asarray(bind(model, params).logits(hidden), np.float64)
    normalizer = np.log(np.exp(logits).sum(-1))
    wanted = normalizer - np.take_along_axis(logits, batch["targets"][..., None], -1)[..., 0]
    real = batch["segments"] > 0
    np.testing.assert_allclose(np.asarray(found.likelihoods)[real], wanted[real], rtol=2e-5, atol=2e-5)
    assert found.largest_output_logit == pytest.approx(logits[real].max(), rel=1e-5)
    by_row = row_losses(bind(model, params), batch, dtype=jnp.float32)
    np.testing.assert_allclose(by_row.nll, (wanted * batch["loss_mask"]).sum(1), rtol=2e-5)
    whole = next_token_loss(bind(model, params), batch, dtype=jnp.float32)
    for rows, total in zip(by_row, whole, strict=True):
        assert float(rows.sum()) == pytest.approx(float(total), rel=1e-5)


def test_maps_are_the_attention_of_the_layers_shown() -> None:
    params = init_params(MODEL, jax.random.key(1))
    batch = batch_of()
    found = observe(bind(MODEL, params), batch, jnp.float32)
    assert found.maps.shape == (MAPS, MAPS, 24, 24)
    assert shown_layers(5) == [0, 1, 2, 4]
    assert (shown_layers(1), shown_layers(2), shown_layers(100)) == ([0], [0, 1], [0, 33, 66, 99])
    maps = np.asarray(found.maps)
    np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)
    later = np.triu(np.ones((24, 24), bool), 1)
    assert (maps[:, :, later] == 0).all(), "no token sees those after it"
    assert (maps[:, :, 10:, :10] == 0).all(), "nor another document"
    assert maps[0, :, 20, :17].max() == 0, "nor beyond the window, in layer 0"
    assert maps[1, :, 9, :5].min() > 0, "layer 1 has none"


def test_entropy_and_the_largest_logit() -> None:
    """Of queries that are all zero, attention is even: its entropy is the logarithm of what a token sees."""
    params = init_params(MODEL, jax.random.key(1))
    params["layers"]["1"]["attention"]["query"] *= 0
    plain = dataclasses.replace(MODEL, qk_norm="none")
    for blocks in (params["layers"], params["last_layers"]):
        for block in blocks.values():
            del block["attention"]["query_norm"], block["attention"]["key_norm"]
    batch = batch_of()
    found = observe(bind(plain, params), batch, jnp.float32)
    seen = np.log(batch["positions"] + 1.0)[batch["segments"] > 0].mean()
    assert found.entropy.shape == (5, 4)
    np.testing.assert_allclose(found.entropy[1], seen, rtol=1e-5)
    np.testing.assert_allclose(found.entropy[3], seen, rtol=1e-5)
    assert found.largest_logit[1] == 0
    assert found.largest_logit[0] > 0
    assert (np.asarray(found.entropy[0]) < np.log(4)).all()
