"""The transformer: every architecture choice, packing, remat, the cache, and counts of published models."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import config as configs
from lm.errors import ConfigError
from lm.kernels.attention import Places
from lm.model.config import ModelConfig
from lm.model.flops import flops_per_token, parameter_count
from lm.model.loss import next_token_loss
from lm.model.positions import rotary
from lm.model.remat import NO_REMAT, Remat
from lm.model.transformer import abstract_params, bind, init_params, parameter_axes

BASE = ModelConfig(vocab_size=31, layers=3, width=16, heads=4, context=32)
VARIANTS = {
    "rotary pre swiglu": {},
    "gpt2": {
        "norm": "layer", "norm_parameters": "scale_and_bias", "bias": "all", "positions": "learned",
        "activation": "gelu_tanh",
    },
    "nanogpt": {"norm": "layer", "positions": "learned", "activation": "gelu"},
    "post norm, sinusoidal": {"norm": "layer", "norm_placement": "post", "positions": "sinusoidal"},
    "gemma 2": {
        "norm_placement": "sandwich", "attention_softcap": 5.0, "output_softcap": 3.0, "windows": (4, 0),
        "activation": "geglu", "kv_heads": 2,
    },
    "gemma 3": {"norm_placement": "sandwich", "qk_norm": "per_head", "windows": (3, 3), "kv_heads": 1},
    "olmo 2": {"norm_placement": "output", "qk_norm": "all_heads", "embeddings": "untied"},
    "qwen 2": {"bias": "qkv", "kv_heads": 2},
    "no positions, squared relu": {"positions": "none", "activation": "squared_relu", "norm_parameters": "none"},
    "wide heads": {"head_dim": 10, "init": "lecun"},
    "heads of one feature": {"head_dim": 1, "positions": "learned"},
    "small init": {"init": "small"},
}  # fmt: skip
ALL = [pytest.param(dataclasses.replace(BASE, **changes), id=name) for name, changes in VARIANTS.items()]


def batch_of(rng, batch=2, length=12, vocabulary=31):
    tokens = rng.integers(0, vocabulary, (batch, length + 1)).astype(np.int32)
    segments = np.ones((batch, length), np.int32)
    positions = np.tile(np.arange(length, dtype=np.int32), (batch, 1))
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": segments,
        "positions": positions,
        "loss_mask": np.ones((batch, length), np.float32),
        "bytes": np.full(batch, length, np.int32),
    }


def params_of(config, seed=0):
    """Parameters of size one, so that every part matters in every test."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: 0.3 * rng.normal(size=x.shape).astype(np.float32), abstract_params(config))


def drawn(config, seed=0):
    return jax.jit(functools.partial(init_params, config))(jax.random.key(seed))


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config, params, batch, **options):
    model = bind(config, params)
    hidden, _ = model(batch["tokens"], Places(batch["segments"], batch["positions"]), dtype=jnp.float32, **options)
    return model.logits(hidden)


@pytest.mark.parametrize("config", ALL)
def test_config_passes_its_own_check_and_every_parameter_matters(config):
    configs.check(config)
    params, batch = params_of(config), batch_of(np.random.default_rng(0))

    def loss(params):
        return next_token_loss(bind(config, params), batch, dtype=jnp.float32).total

    gradients = jax.jit(jax.grad(loss))(params)
    for path, gradient in jax.tree_util.tree_flatten_with_path(gradients)[0]:
        name = jax.tree_util.keystr(path)
        assert np.all(np.isfinite(gradient)), name
        # Softmax does not see a constant added to all keys: a key bias has no gradient without rotation.
        if "key_bias" not in name or config.positions == "rotary":
            assert np.any(np.abs(np.asarray(gradient)) > 1e-7), name


@pytest.mark.parametrize("config", ALL)
def test_a_token_sees_nothing_after_it(config):
    params, batch = params_of(config), batch_of(np.random.default_rng(1))
    changed = dict(batch, tokens=batch["tokens"].copy())
    changed["tokens"][:, 7] = (changed["tokens"][:, 7] + 1) % 31
    before, after = logits_of(config, params, batch), logits_of(config, params, changed)
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert np.all(np.abs(before[:, 7] - after[:, 7]).max(-1) > 1e-4)


@pytest.mark.parametrize("config", ALL)
def test_packed_documents_are_as_if_alone(config):
    params, rng = params_of(config), np.random.default_rng(2)
    whole, cut = batch_of(rng), 5
    whole["segments"][:, cut:] = 2
    whole["positions"][:, cut:] = np.arange(12 - cut)
    together = logits_of(config, params, whole)
    for part in (slice(0, cut), slice(cut, 12)):
        size = part.stop - part.start
        alone = batch_of(rng)  # other tokens after the document, as padding
        alone["tokens"][:, :size] = whole["tokens"][:, part]
        alone["segments"][:, size:] = 0
        alone["positions"][:, size:] = 0
        np.testing.assert_allclose(together[:, part], logits_of(config, params, alone)[:, :size], rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("config", ALL)
def test_cached_logits_agree_with_uncached(config):
    params, batch = params_of(config), batch_of(np.random.default_rng(3))
    places = Places(batch["segments"], batch["positions"])

    @jax.jit
    def read(params, tokens, places, cache):
        model = bind(config, params)
        hidden, cache = model(tokens, places, dtype=jnp.float32, cache=cache)
        return model.logits(hidden), cache

    whole = logits_of(config, params, batch)
    cache = bind(config, params).empty_cache(2, 16, jnp.float32)
    parts = []
    for piece in (slice(0, 6), slice(6, 7), slice(7, 12)):
        part = Places(places.segments[:, piece], places.positions[:, piece])
        logits, cache = read(params, batch["tokens"][:, piece], part, cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    "remat",
    [Remat("full"), Remat("names", ("attention", "feed_forward_up")), Remat("names", ("query",), ("attention",))],
)
def test_remat_changes_no_value_and_no_gradient(remat):
    config = dataclasses.replace(BASE, windows=(4, 0), dropout=0.3)
    params, batch, key = params_of(config), batch_of(np.random.default_rng(4)), jax.random.split(jax.random.key(5))

    def loss(params, remat):
        return next_token_loss(bind(config, params), batch, dtype=jnp.float32, key=key, remat=remat).total

    compute = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    value, gradients = compute(params, NO_REMAT)
    other, others = compute(params, remat)
    np.testing.assert_allclose(value, other, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(others), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * float(jnp.abs(a).max()))


def test_dropout_needs_a_key_and_differs_by_it():
    config = dataclasses.replace(BASE, dropout=0.5)
    params, batch = params_of(config), batch_of(np.random.default_rng(6))
    without = logits_of(config, params, batch)
    np.testing.assert_array_equal(without, logits_of(dataclasses.replace(config, dropout=0.0), params, batch))
    first, second = (logits_of(config, params, batch, key=jax.random.split(jax.random.key(k))) for k in (0, 1))
    assert np.abs(first - without).max() > 0.1
    assert np.abs(first - second).max() > 0.1
    np.testing.assert_array_equal(first, logits_of(config, params, batch, key=jax.random.split(jax.random.key(0))))


def test_windows_repeat_over_layers_and_the_rest_is_not_lost():
    """With one layer of window 2 of three, moving token 0 reaches further than with three of them."""
    batch = batch_of(np.random.default_rng(7), batch=1)
    changed = dict(batch, tokens=batch["tokens"].copy())
    changed["tokens"][:, 0] = (changed["tokens"][:, 0] + 1) % 31

    def reach(windows):
        config = dataclasses.replace(BASE, windows=windows)
        params = params_of(config)
        difference = np.abs(logits_of(config, params, batch) - logits_of(config, params, changed)).max(axis=(0, 2))
        return int(np.flatnonzero(difference > 1e-6).max())

    assert reach((2,)) == 3  # each of three layers passes it on by one
    assert reach((2, 2, 0)) == 11
    assert reach((0, 2)) == 11
    assert reach((1, 2)) == 1  # layers 0 and 2 see only themselves


def test_layers_of_a_pattern_are_drawn_as_those_without():
    """A pattern only names windows: with windows longer than the text, the model is the same."""
    batch = batch_of(np.random.default_rng(8))
    plain = BASE
    pattern = dataclasses.replace(BASE, windows=(100, 0))
    first, second = drawn(plain, 3), drawn(pattern, 3)
    np.testing.assert_allclose(logits_of(plain, first, batch), logits_of(pattern, second, batch), rtol=1e-5, atol=1e-6)


def test_initialization_follows_its_scheme():
    def std(config, *path):
        node = drawn(config)
        for part in path:
            node = node[part]
        return float(jnp.std(node))

    size = {"width": 256, "layers": 8, "heads": 4, "vocab_size": 512, "activation": "gelu"}
    up, down = ("layers", "0", "feed_forward", "up"), ("layers", "0", "feed_forward", "down")
    gpt2, lecun, small = (ModelConfig(init=init, **size) for init in ("gpt2", "lecun", "small"))
    assert std(gpt2, *up) == pytest.approx(0.02, rel=0.02)
    assert std(gpt2, *down) == pytest.approx(0.02 / 4, rel=0.02)
    assert std(gpt2, "embedding") == pytest.approx(0.02, rel=0.02)
    assert std(lecun, *up) == pytest.approx(1 / 16, rel=0.02)
    assert std(lecun, *down) == pytest.approx(1 / 32 / 4, rel=0.02)
    assert std(small, *up) == pytest.approx((2 / (5 * 256)) ** 0.5, rel=0.02)
    assert std(small, *down) == pytest.approx(2 / (8 * 16), rel=0.02)


def test_layers_differ_from_each_other():
    params = drawn(BASE)
    query = params["layers"]["0"]["attention"]["query"]
    assert np.abs(query[0] - query[1]).max() > 0.01


@pytest.mark.parametrize("config", ALL)
def test_every_parameter_names_its_axes(config):
    shapes, axes = abstract_params(config), parameter_axes(config)
    names = jax.tree.leaves(axes, is_leaf=lambda node: isinstance(node, tuple))
    assert jax.tree.structure(shapes) == jax.tree.structure(axes, is_leaf=lambda node: isinstance(node, tuple))
    assert [len(n) for n in names] == [len(leaf.shape) for leaf in jax.tree.leaves(shapes)]


def test_long_patterns_keep_their_order():
    """Twelve windows, of which only the last layer's sees further than itself: token 0 reaches everyone, once."""
    config = dataclasses.replace(BASE, layers=12, windows=(1,) * 11 + (0,))
    permuted = dataclasses.replace(BASE, layers=12, windows=(1, 1, 0) + (1,) * 9)
    batch, params = batch_of(np.random.default_rng(10)), params_of(config)
    order = logits_of(dataclasses.replace(config, windows=()), drawn_like(config, params), batch)
    windowed = logits_of(dataclasses.replace(config, windows=(0,) * 12), params, batch)
    np.testing.assert_allclose(order, windowed, rtol=1e-4, atol=1e-4)
    assert np.abs(logits_of(permuted, params, batch) - logits_of(config, params, batch)).max() > 1e-3


def drawn_like(config, params):
    """The parameters of a pattern with one layer in each place, as those of a model without a pattern."""
    places = [params["layers"][str(i)] for i in range(config.layers)]
    return params | {"layers": {"0": jax.tree.map(lambda *leaves: np.concatenate(leaves), *places)}}


def test_gradient_of_a_frequent_token_is_summed_in_float32():
    batch = batch_of(np.random.default_rng(11), batch=4, length=256)
    batch["tokens"][:] = 7
    config = dataclasses.replace(BASE, embeddings="untied")
    params = jax.tree.map(lambda x: 0.1 * x, params_of(config))

    @functools.partial(jax.jit, static_argnums=1)
    def gradient(params, dtype):
        loss = lambda params: next_token_loss(bind(config, params), batch, dtype=jnp.dtype(dtype)).total  # noqa: E731
        return jax.grad(loss)(params)["embedding"][7]

    exact, low = gradient(params, "float32"), gradient(params, "bfloat16")
    assert np.abs(low - exact).max() < 0.1 * np.abs(exact).max()


def test_bfloat16_computes_in_bfloat16_from_float32_weights():
    params, batch = params_of(BASE), batch_of(np.random.default_rng(9))

    @jax.jit
    def low(params):
        model = bind(BASE, params)
        hidden, _ = model(batch["tokens"], Places(batch["segments"], batch["positions"]), dtype=jnp.bfloat16)
        return hidden, model.logits(hidden)

    hidden, logits = low(params)
    assert hidden.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    exact = logits_of(BASE, params, batch)
    assert np.abs(logits - exact).max() < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"heads": 5}, "model.heads: 5 does not divide"),
        ({"kv_heads": 3}, "kv_heads: 3 does not divide"),
        ({"width": 12}, "must be even, got 3"),
        ({"layers": 0}, "layers: must be at least 1"),
        ({"windows": (1, 2, 3, 4)}, "a pattern of 4 layers"),
        ({"dropout": 1.0}, "dropout"),
        ({"attention_softcap": 0.0}, "attention_softcap"),
        ({"norm_parameters": "scale_and_bias"}, "norm_parameters"),
    ],
)
def test_impossible_values_are_named(changes, part):
    @dataclasses.dataclass(frozen=True)
    class Root:
        model: ModelConfig

    with pytest.raises(ConfigError, match=part.replace("(", r"\(")):
        configs.check(Root(dataclasses.replace(BASE, **changes)))


def test_published_models_have_their_published_sizes():
    from lm.experiment import Config

    gpt2 = configs.load("configs/gpt2_124m.py", Config)
    llama = configs.load("configs/llama3_8b.py", Config)
    assert parameter_count(gpt2.model) == 124_439_808
    assert parameter_count(llama.model) == 8_030_261_248
    # Llama 3 8B at 8,192 tokens: 51.5 GFLOP per token with causal attention, 57.9 with full (Megatron Bridge).
    flops = flops_per_token(llama.model, 8192)
    assert flops.causal == pytest.approx(51.5e9, rel=2e-3)
    assert flops.full == pytest.approx(57.9e9, rel=2e-3)
    assert flops.parameters == 6 * (8_030_261_248 - 128_256 * 4096 - 65 * 4096)


def test_flops_of_windows():
    config = dataclasses.replace(BASE, windows=(4, 0))
    full, local = flops_per_token(BASE, 16), flops_per_token(config, 16)
    per_pair = 12 * BASE.heads * BASE.head_width
    # Two of three layers see 4 tokens back: 16 - 8 + ... pairs shrink from S/2 to w - w²/2S on average.
    assert full.causal - local.causal == pytest.approx(per_pair * 2 * (8 - (4 - 0.5)))
    assert full.full == local.full


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rotary_positions_for_tpus_are_the_same(dtype):
    """Values and gradients of the form whose halves are swapped by a product."""
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 8)).astype(dtype)
    positions = jnp.array([[0, 1, 2, 3, 4], [100, 7, 0, 1, 9]], jnp.int32)

    def both(platform):
        def loss(x):
            y = rotary(x, positions, 100.0, platform=platform)
            return jnp.sum(jnp.sin(y.astype(jnp.float32))), y

        return jax.grad(loss, has_aux=True)(x)

    (gradient, y), (expected_gradient, expected) = both("tpu"), both("cpu")
    assert (y.dtype, gradient.dtype) == (dtype, dtype)
    tolerance = 1e-6 if dtype == jnp.float32 else 2e-2
    np.testing.assert_allclose(y.astype(jnp.float32), expected.astype(jnp.float32), atol=tolerance)
    np.testing.assert_allclose(gradient.astype(jnp.float32), expected_gradient.astype(jnp.float32), atol=tolerance)
