"""Text from a model: batched prompts, a key/value cache, and each token's text and scores as it comes."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from lm.data.tokenizers import Tokenizer
from lm.errors import ConfigError
from lm.generate.sampling import Sampling, sample
from lm.generate.stops import RowText
from lm.kernels.attention import Places
from lm.model.config import ModelConfig
from lm.model.transformer import Cache, Transformer, bind, compute_dtype
from lm.parallel.replicated import replicated

Ending = Literal["eos", "stop", "length", "context"]
"""End of document, a stop string, `max_tokens`, or no learned position left."""

STEPS_PER_CALL = 8  # hides what it costs to start a computation; at most twice as many are computed in vain
SHORTEST_BUCKET = 32


@dataclass(frozen=True)
class Piece:
    """One generated token of one row."""

    row: int
    text: str
    """What became certain with this token: whole characters, nothing of a stop string; often ""."""
    token: int
    token_text: str
    """The token for a person to see, also when it is part of a character, the end, or of a stop string."""
    probability: float
    """Of this token, as the model has it: without temperature and filters."""
    entropy: float
    """Of that distribution over all tokens, in nats."""
    finished: Ending | None


@dataclass(frozen=True)
class Completion:
    """What followed one prompt."""

    text: str
    pieces: tuple[Piece, ...]

    @property
    def finished(self) -> Ending | None:
        return self.pieces[-1].finished


class Generator:
    """Continues prompts with the parameters of `lm.model.transformer.init_params`.

    A prompt is read as the begin of a document and its tokens. Lengths are rounded up to powers of two and
    compiled once each. At most `batch_size` prompts are computed at once.

    Raises ConfigError when the tokenizer has ids that the model does not have.
    """

    def __init__(self, config: ModelConfig, params: Any, tokenizer: Tokenizer, *, batch_size: int = 16):
        if tokenizer.vocab_size > config.vocab_size:
            raise ConfigError(
                f"the tokenizer has {tokenizer.vocab_size} ids, but model.vocab_size = {config.vocab_size}; "
                "use the tokenizer that the model was trained with"
            )
        self.config, self.params, self.tokenizer, self.batch_size = config, params, tokenizer, batch_size
        self._context = config.context if config.positions == "learned" else None
        self._results = replicated(params)

    def generate(
        self, prompts: Sequence[str], *, max_tokens: int, sampling: Sampling, stop: Sequence[str] = ()
    ) -> list[Completion]:
        """One completion for each prompt, in their order; see `stream`."""
        pieces: list[list[Piece]] = [[] for _ in prompts]
        for piece in self.stream(prompts, max_tokens=max_tokens, sampling=sampling, stop=stop):
            pieces[piece.row].append(piece)
        return [Completion("".join(piece.text for piece in row), tuple(row)) for row in pieces]

    def stream(
        self, prompts: Sequence[str], *, max_tokens: int, sampling: Sampling, stop: Sequence[str] = ()
    ) -> Iterator[Piece]:
        """The tokens of all rows as they come, a row's in order; its last one says why it finished.

        What is drawn for a row depends on the seed, the number of the row and the position, and not on the
        other rows.

        Raises:
            ConfigError: max_tokens below 1, an empty stop string, or a prompt longer than the learned
                positions reach. Raised here, before any piece is asked for.
        """
        if max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}")
        if "" in stop:
            raise ConfigError("a stop string must not be empty")
        ids = [[self.tokenizer.bos_id, *map(int, tokens)] for tokens in self.tokenizer.encode_batch(prompts)]
        for row, tokens in enumerate(ids):
            if self._context is not None and len(tokens) > self._context:
                raise ConfigError(
                    f"prompt {row + 1} has {len(tokens)} tokens with the begin of document, but the model "
                    f"has model.context = {self._context} learned positions; shorten the prompt"
                )
        return self._stream(ids, max_tokens, sampling, tuple(stop))

    def _stream(
        self, prompts: list[list[int]], max_tokens: int, sampling: Sampling, stop: Sequence[str]
    ) -> Iterator[Piece]:
        for first in range(0, len(prompts), self.batch_size):
            batch = prompts[first : first + self.batch_size]
            rows = [self._row(first + i, ids, max_tokens, stop) for i, ids in enumerate(batch)]
            for drawn in self._steps(batch, first, max(row.limit for row in rows), sampling):
                for row, token, probability, entropy in zip(rows, *drawn, strict=True):
                    if row.finished is None:
                        yield row.advance(int(token), float(probability), float(entropy))
                if all(row.finished for row in rows):
                    break

    def _row(self, number: int, prompt: list[int], max_tokens: int, stop: Sequence[str]) -> "_Row":
        # The last position that can be read still gives a token, which itself is never read.
        room = max_tokens if self._context is None else self._context - len(prompt) + 1
        ending: Ending = "context" if room < max_tokens else "length"
        text = RowText(self.tokenizer, prompt, stop)
        return _Row(number, self.tokenizer, text, min(room, max_tokens), ending)

    def _steps(self, prompts: list[list[int]], first: int, count: int, sampling: Sampling) -> Iterator["_Drawn"]:
        """What is drawn for all rows, [B] each, `count` times or more; computed ahead of demand."""
        longest = max(map(len, prompts))
        tokens = np.full((len(prompts), self._bucket(longest)), self.tokenizer.bos_id, np.int32)
        for row, ids in enumerate(prompts):
            tokens[row, : len(ids)] = ids
        lengths = np.array([len(ids) for ids in prompts], np.int32)
        keys = _row_keys(jax.random.key(sampling.seed), np.arange(first, first + len(prompts)))
        # The seed comes in through the keys: without it, another one is no reason to compile again.
        sampling = dataclasses.replace(sampling, seed=0)
        static = {
            "config": self.config,
            "sampling": sampling,
            "vocabulary": self.tokenizer.vocab_size,
            "results": self._results,
        }

        size = self._bucket(longest + count - 1)
        state, ahead = _prefill(self.params, tokens, lengths, keys, cache_length=size, **static)
        computed = 1
        while ahead is not None:
            drawn, ahead = ahead, None
            if computed < count:
                state, ahead = _decode(self.params, state, keys, **static)
                computed += STEPS_PER_CALL
            yield from (_Drawn(*step) for step in zip(*jax.device_get(drawn), strict=True))

    def _bucket(self, length: int) -> int:
        size = max(SHORTEST_BUCKET, 1 << (length - 1).bit_length())
        return size if self._context is None else min(size, self._context)


@dataclass
class _Row:
    """Where one row is; `ending` is what it finishes with at `limit` tokens."""

    number: int
    tokenizer: Tokenizer
    text: RowText
    limit: int
    ending: Ending
    count: int = 0
    finished: Ending | None = None

    def advance(self, token: int, probability: float, entropy: float) -> Piece:
        self.count += 1
        text = self.text.push(token)
        if token == self.tokenizer.eos_id:
            self.finished = "eos"
        elif self.text.stopped:
            self.finished = "stop"
        elif self.count == self.limit:
            self.finished = self.ending
        if self.finished:
            text += self.text.finish()
        shown = self.tokenizer.piece(token)
        return Piece(self.number, text, token, shown, probability, entropy, self.finished)


class _Drawn(NamedTuple):
    """One token for each row, with the probability and entropy of a `Piece`."""

    tokens: Any
    probabilities: Any
    entropies: Any


class _State(NamedTuple):
    cache: Cache
    tokens: jax.Array
    """int32 [B], drawn but not yet read."""
    positions: jax.Array
    """int32 [B], where they stand."""


@jax.jit
def _row_keys(key: jax.Array, rows: jax.Array) -> jax.Array:
    return jax.vmap(functools.partial(jax.random.fold_in, key))(rows)


@functools.partial(jax.jit, static_argnames=("config", "sampling", "vocabulary", "results", "cache_length"))
def _prefill(
    params: Any,
    tokens: jax.Array,
    lengths: jax.Array,
    keys: jax.Array,
    *,
    config: ModelConfig,
    sampling: Sampling,
    vocabulary: int,
    results: NamedSharding | None,
    cache_length: int,
) -> tuple[_State, _Drawn]:
    """Reads prompts [B, S] padded on the right and draws one token for each row, [1, B].

    What the padding leaves in the cache is at positions after the prompt, which no token sees before the
    generated token of that position is written over it.
    """
    model = bind(config, params)
    dtype = compute_dtype(config, jax.default_backend())
    cache = model.empty_cache(tokens.shape[0], cache_length, dtype)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    hidden, written = model(tokens, Places(jnp.ones_like(tokens), positions), dtype=dtype, cache=cache)
    assert written is not None
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
    drawn = _draw(model, last, keys, lengths, sampling, vocabulary)
    return _State(written, drawn.tokens, lengths), _readable(jax.tree.map(lambda x: x[None], drawn), results)


@functools.partial(jax.jit, static_argnames=("config", "sampling", "vocabulary", "results"), donate_argnames=("state",))
def _decode(
    params: Any,
    state: _State,
    keys: jax.Array,
    *,
    config: ModelConfig,
    sampling: Sampling,
    vocabulary: int,
    results: NamedSharding | None,
) -> tuple[_State, _Drawn]:
    """Draws STEPS_PER_CALL tokens for each row, [STEPS_PER_CALL, B].

    Rows that reach the end of the cache, whose tokens nobody asked for, stay at its last position.
    """
    model = bind(config, params)
    dtype = compute_dtype(config, jax.default_backend())
    last = jax.tree.leaves(state.cache)[0].shape[-3] - 1

    def step(state: _State, _: None) -> tuple[_State, _Drawn]:
        tokens, positions = state.tokens[:, None], state.positions[:, None]
        places = Places(jnp.ones_like(tokens), positions)
        hidden, cache = model(tokens, places, dtype=dtype, cache=state.cache)
        assert cache is not None
        drawn = _draw(model, hidden, keys, state.positions + 1, sampling, vocabulary)
        return _State(cache, drawn.tokens, jnp.minimum(state.positions + 1, last)), drawn

    state, drawn = jax.lax.scan(step, state, length=STEPS_PER_CALL)
    return state, _readable(drawn, results)


def _readable(drawn: _Drawn, results: NamedSharding | None) -> _Drawn:
    return drawn if results is None else jax.lax.with_sharding_constraint(drawn, results)


def _draw(
    model: Transformer,
    hidden: jax.Array,
    keys: jax.Array,
    positions: jax.Array,
    sampling: Sampling,
    vocabulary: int,
) -> _Drawn:
    """The token that follows hidden [B, 1, D] at `positions` [B], among the first `vocabulary` ids."""
    logits = model.logits(hidden[:, 0])
    tokens = sample(logits[:, :vocabulary], jax.vmap(jax.random.fold_in)(keys, positions), sampling)
    logs = jax.nn.log_softmax(logits, axis=-1)
    probabilities = jnp.exp(jnp.take_along_axis(logs, tokens[:, None], axis=-1)[:, 0])
    return _Drawn(tokens, probabilities, -jnp.sum(jnp.exp(logs) * logs, axis=-1))
