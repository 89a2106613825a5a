import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.data.tokenizers import BytesTokenizer
from lm.errors import ConfigError
from lm.generate import generate as module
from lm.generate.generate import Generator
from lm.generate.sampling import Sampling
from lm.kernels.attention import Places
from lm.model.config import ModelConfig
from lm.model.transformer import abstract_params, bind

GREEDY = Sampling(temperature=0.0)
BASE = ModelConfig(vocab_size=258, layers=2, width=32, heads=4, context=64, dtype="float32")
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "learned": {"positions": "learned", "norm": "layer", "bias": "all", "activation": "gelu"},
    "sinusoidal, post norm": {"positions": "sinusoidal", "norm_placement": "post"},
    "no positions, multi-query": {"positions": "none", "kv_heads": 1},
    "grouped, QK norm per head": {"kv_heads": 2, "qk_norm": "per_head", "head_dim": 16},
    "QK norm over heads, output norm": {"qk_norm": "all_heads", "norm_placement": "output"},
    "softcaps, sandwich": {"attention_softcap": 5.0, "output_softcap": 3.0, "norm_placement": "sandwich"},
    "windows with a remainder": {"layers": 5, "windows": (3, 0), "embeddings": "untied"},
    "all local": {"windows": (4,), "layers": 3},
}
PROMPTS = ["", "the quick brown fox jumps over a lazy dog", "né", "0123456789"]


@functools.cache
def params_of(config: ModelConfig) -> Any:
    """Random, norms and biases too; large enough that predictions are sharp and depend on what was read."""
    rng = np.random.default_rng(0)

    def leaf(path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        centre = 1 if path[-1].key == "scale" else 0
        return jnp.array(centre + rng.normal(0, 0.2, shape.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(config))


def config_of(variant: str) -> ModelConfig:
    return dataclasses.replace(BASE, **VARIANTS[variant])


def generator_of(config: ModelConfig = BASE, **settings: int) -> Generator:
    return Generator(config, params_of(config), BytesTokenizer(), **settings)


@functools.partial(jax.jit, static_argnames="config")
def uncached(params: Any, tokens: jax.Array, config: ModelConfig) -> jax.Array:
    """float32 [B, S, V] log-probabilities of whole sequences [B, S], all of it read at once."""
    model = bind(config, params)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden, _ = model(tokens, Places(jnp.ones_like(tokens), positions), dtype=jnp.dtype(jnp.float32))
    return jax.nn.log_softmax(model.logits(hidden))


@functools.partial(jax.jit, static_argnames="config")
def cached(params: Any, tokens: jax.Array, lengths: jax.Array, config: ModelConfig) -> tuple[Any, Any]:
    """The same of prompts padded to 16, [B, 16, V], then of the 10 tokens after each, [10, B, V]."""
    model = bind(config, params)
    rows = jnp.arange(len(tokens))

    def read(cache: Any, ids: jax.Array, positions: jax.Array) -> tuple[Any, jax.Array]:
        places = Places(jnp.ones_like(ids), positions)
        hidden, cache = model(ids, places, dtype=jnp.dtype(jnp.float32), cache=cache)
        return cache, jax.nn.log_softmax(model.logits(hidden))

    places = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), (len(tokens), 16))
    prompts = jnp.where(places < lengths[:, None], tokens[:, :16], 7)
    cache, first = read(model.empty_cache(len(tokens), 32, jnp.dtype(jnp.float32)), prompts, places)

    def step(cache: Any, at: jax.Array) -> tuple[Any, jax.Array]:
        cache, logs = read(cache, tokens[rows, at][:, None], at[:, None])
        return cache, logs[:, 0]

    return first, jax.lax.scan(step, cache, lengths + jnp.arange(10)[:, None])[1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_and_uncached_logits_agree(variant: str) -> None:
    """Prompts of several lengths in one batch, then each token alone, to within 1e-4 nats."""
    config = config_of(variant)
    tokens = np.random.default_rng(1).integers(0, 258, (3, 24)).astype(np.int32)
    lengths = np.array([1, 9, 14], np.int32)
    expected = np.asarray(uncached(params_of(config), tokens, config))
    assert expected.std(axis=(0, 1)).min() > 0.1  # else they would agree whatever was read
    first, later = cached(params_of(config), tokens, lengths, config)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(first[row, :length], expected[row, :length], atol=1e-4)
        np.testing.assert_allclose(later[:, row], expected[row, length : length + 10], atol=1e-4)


@pytest.mark.parametrize("variant", ["learned", "windows with a remainder"])
def test_batched_greedy_text_is_that_of_full_forwards(variant: str) -> None:
    config = config_of(variant)
    completions = generator_of(config).generate(PROMPTS, max_tokens=14, sampling=GREEDY)
    for prompt, completion in zip(PROMPTS, completions, strict=True):
        ids = [256, *prompt.encode()]
        assert completion.pieces
        for piece in completion.pieces:
            padded = np.zeros((1, 64), np.int32)  # one compilation; what follows is not seen
            padded[0, : len(ids)] = ids
            logs = np.asarray(uncached(params_of(config), padded, config))[0, len(ids) - 1]
            assert piece.token == logs.argmax()
            np.testing.assert_allclose(piece.probability, np.exp(logs.max()), rtol=1e-3)
            np.testing.assert_allclose(piece.entropy, -(np.exp(logs) * logs).sum(), rtol=1e-3)
            ids.append(piece.token)
        assert completion.text == BytesTokenizer().decode(ids[1 + len(prompt.encode()) :])
        assert completion.finished in ("length", "eos")


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(top_p=0.9, seed=5)], ids=["greedy", "sampled"])
def test_a_row_is_the_same_alone_and_in_a_batch(sampling: Sampling) -> None:
    prompts = ["", "the quick brown fox", "né"]
    together = generator_of().generate(prompts, max_tokens=12, sampling=sampling)
    one_by_one = generator_of(batch_size=1).generate(prompts, max_tokens=12, sampling=sampling)
    assert [c.text for c in together] == [c.text for c in one_by_one]
    assert sum(len(c.pieces) for c in together) > 12


def test_seed_and_row_decide_the_draws() -> None:
    def texts(seed: int) -> list[str]:
        completions = generator_of().generate(["a", "a"], max_tokens=20, sampling=Sampling(seed=seed))
        return [completion.text for completion in completions]

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)
    assert texts(1)[0] != texts(1)[1]


def test_more_tokens_continue_fewer() -> None:
    """Also across the lengths that are compiled apart, and beyond what one call computes."""
    sampling = Sampling(seed=2, top_k=40)
    long = generator_of().generate(["ab"], max_tokens=40, sampling=sampling)[0]
    assert len(long.pieces) > 3 * module.STEPS_PER_CALL
    for count in (1, module.STEPS_PER_CALL, module.STEPS_PER_CALL + 1, module.STEPS_PER_CALL + 2):
        short = generator_of().generate(["ab"], max_tokens=count, sampling=sampling)[0]
        assert [p.token for p in short.pieces] == [p.token for p in long.pieces[:count]]
        assert short.finished == "length"


def favouring(tokens: list[int]) -> Generator:
    """A generator for which any token is followed by the next of `tokens`, the last one by the first."""
    config = dataclasses.replace(BASE, layers=1, width=260, heads=1, embeddings="untied", positions="none")
    params = jax.tree.map(jnp.zeros_like, params_of(config))
    embedding, output = np.zeros((258, 260), np.float32), np.zeros((258, 260), np.float32)
    embedding[range(258), range(258)] = 1
    for this, after in zip([256, *tokens], [*tokens, tokens[0]], strict=True):
        output[after, this] = 1
    params = params | {"embedding": jnp.array(embedding), "output": jnp.array(output)}
    params["final_norm"] = {"scale": jnp.ones(260)}
    return Generator(config, params, BytesTokenizer())


def test_end_of_document_ends_its_row_and_the_others_go_on() -> None:
    generator = favouring([*b"abc", 257])
    first, second = generator.generate(["", "c"], max_tokens=9, sampling=GREEDY)
    assert (first.text, first.finished) == ("abc", "eos")
    assert [piece.token_text for piece in first.pieces] == ["a", "b", "c", "<eos>"]
    assert (second.text, second.finished) == ("", "eos")
    endless = favouring([*b"abc"])
    pieces = list(endless.stream(["", "b"], max_tokens=5, sampling=GREEDY, stop=["ab"]))
    assert [p.row for p in pieces] == [0, 1, 0, 1, 1]
    assert [(p.text, p.finished) for p in pieces if p.row == 1] == [("c", None), ("", None), ("", "stop")]


def test_stop_string_over_several_tokens() -> None:
    completion = favouring([*"xé\n\ny".encode()]).generate(
        [""], max_tokens=50, sampling=GREEDY, stop=["é\n\n", "never"]
    )[0]
    assert (completion.text, completion.finished) == ("x", "stop")
    assert len(completion.pieces) == 5
    held = favouring([*b"ab!"]).generate([""], max_tokens=2, sampling=GREEDY, stop=["b?"])[0]
    assert (held.text, held.finished) == ("ab", "length")


def test_learned_positions_end_the_text_at_the_context() -> None:
    config = dataclasses.replace(config_of("learned"), context=20)
    generator = generator_of(config)
    sampling = Sampling(top_k=100)
    prompts = ["abc", "x" * 19]
    for completion, prompt in zip(generator.generate(prompts, max_tokens=30, sampling=sampling), prompts, strict=True):
        assert completion.finished == "context"
        assert 1 + len(prompt) + len(completion.pieces) == 20 + 1
    with pytest.raises(ConfigError, match=r"prompt 2 has 21 tokens .* model.context = 20 .* shorten"):
        generator.stream(["a", "x" * 20], max_tokens=1, sampling=sampling)
    exact = generator.generate(["abc"], max_tokens=17, sampling=sampling)[0]
    assert exact.finished == "length"


def test_ids_that_the_tokenizer_lacks_are_never_drawn() -> None:
    config = dataclasses.replace(BASE, vocab_size=2000)
    completions = generator_of(config).generate([""] * 8, max_tokens=8, sampling=Sampling(temperature=5.0))
    tokens = [piece.token for completion in completions for piece in completion.pieces]
    assert len(tokens) > 32
    assert max(tokens) < 258


def test_bad_calls_are_reported_at_once() -> None:
    with pytest.raises(ConfigError, match="max_tokens must be at least 1, got 0"):
        generator_of().stream(["a"], max_tokens=0, sampling=GREEDY)
    with pytest.raises(ConfigError, match="stop string must not be empty"):
        generator_of().stream(["a"], max_tokens=1, sampling=GREEDY, stop=["x", ""])
    with pytest.raises(ConfigError, match=r"258 ids, but model.vocab_size = 100"):
        Generator(dataclasses.replace(BASE, vocab_size=100), {}, BytesTokenizer())
    assert generator_of().generate([], max_tokens=3, sampling=GREEDY) == []


def test_similar_lengths_and_other_seeds_do_not_compile_again() -> None:
    generator = generator_of()
    generator.generate(["ab"], max_tokens=20, sampling=Sampling(top_k=7, seed=1))
    sizes = module._prefill._cache_size(), module._decode._cache_size()
    generator.generate(["abcdef"], max_tokens=25, sampling=Sampling(top_k=7, seed=2))
    generator_of().generate(["x"], max_tokens=31, sampling=Sampling(top_k=7, seed=3))
    assert (module._prefill._cache_size(), module._decode._cache_size()) == sizes
