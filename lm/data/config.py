"""What to train on and how it is tokenised."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

_FILES = {
    "huggingface": "tokenizer.json",
    "gpt2": "folder with vocab.json and merges.txt",
    "llama3": "tokenizer.model of Llama 3",
}


@dataclass(frozen=True)
class TokenizerConfig:
    """Which tokenizer; without `path`, a sentencepiece model is trained on the training documents."""

    kind: Literal["bytes", "sentencepiece", "huggingface", "gpt2", "llama3"] = "sentencepiece"
    path: str | None = None
    """Of its file: for `huggingface` a tokenizer.json, for `llama3` a tokenizer.model; for `gpt2` its folder."""
    model_type: Literal["bpe", "unigram", "char"] = "bpe"
    """What is trained: `char` has one token for each character of the training text."""
    vocab_size: int = 8192
    """Of the model to train, at most: a small text supports fewer."""
    training_bytes: int = 8_000_000
    """Text sampled for training it, spread over all files."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for values that cannot work."""
        if self.kind == "bytes" and self.path is not None:
            yield "path", "the bytes tokenizer has no file; leave it None or choose another kind"
        if self.kind in _FILES and self.path is None:
            yield "path", f"must name a {_FILES[self.kind]}: only sentencepiece models are trained here"
        if self.vocab_size < 4:
            yield "vocab_size", f"must be at least 4, got {self.vocab_size}"
        if self.training_bytes < 1:
            yield "training_bytes", f"must be positive, got {self.training_bytes}"


@dataclass(frozen=True)
class SourceConfig:
    """One of several sources, each of which is built by itself: what `DataConfig` says of the only one."""

    name: str
    paths: tuple[str, ...] = ()
    """Empty: `dir` holds what was built elsewhere."""
    dir: str | None = dataclasses.field(default=None, metadata={"free": True})
    """Where the built files are; None: a folder of this name among those of the run."""
    text_field: str = "text"
    filter: str | None = None
    tokens: Literal["uint16", "uint32", "llm.c", "megatron"] | None = None
    separator: int | None = None
    holdout_paths: tuple[str, ...] = ()
    # Where they are not what `data` says.
    holdout_by: Literal["document", "tail"] | None = None
    holdout_fraction: float | None = None
    fim_rate: float | None = None
    max_epochs: float | None = None

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for values that cannot work."""
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", self.name):
            yield "name", f"must be letters, digits, '_', '.' or '-', got {self.name!r}"
        if not self.paths and self.dir is None:
            yield "paths", "empty; name files, folders or globs, or in `dir` what `lm data build` made"
        yield from _check_source(self)


@dataclass(frozen=True)
class PhaseConfig:
    """What the mixture is from a step on, up to the next phase."""

    from_step: int = 0
    weights: tuple[tuple[str, float], ...] = ()
    """Name and weight of sources, by tokens: they are divided by their sum. Those not named are not read."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for values that cannot work."""
        if self.from_step < 0:
            yield "from_step", f"must not be negative, got {self.from_step}"
        names = [name for name, _ in self.weights]
        if len({*names}) < len(names):
            yield "weights", f"names {next(n for n in names if names.count(n) > 1)!r} twice"
        for name, weight in self.weights:
            if not 0 <= weight < math.inf:
                yield "weights", f"must be numbers of at least 0, got {weight} for {name!r}"
        if not any(weight > 0 for _, weight in self.weights):
            yield "weights", "no source has a weight above 0; write for instance (('web', 0.8), ('code', 0.2))"


@dataclass(frozen=True)
class DataConfig:
    """Documents, their split into training and held-out, and the tokenizer.

    A document is one text file, one line of a .jsonl file (both may be compressed: .gz, .zst), one record of an
    ArrayRecord file, or one row of a .parquet file or of a dataset that Hugging Face's library saved on disk. The last
    two need the extra `parquet`.
    """

    paths: tuple[str, ...] = ()
    """Files, folders and globs, local or at URLs: gs://, s3://, https:// (there, a folder ends with a slash and a web
    page lists it), hf://datasets/NAMESPACE/NAME[@REVISION][/PATH] and whatever else fsspec reads. `python-stdlib` is
    the running interpreter's library."""
    dir: str | None = dataclasses.field(default=None, metadata={"free": True})
    """Where the built files are; None: `data` in the run directory."""
    text_field: str = "text"
    """Of each JSON line, or the column of each row."""
    filter: str | None = None
    """`package.module:function`, called with each record as a dict; of those that it gives False for, none is read.

    A record has all fields of its line or row, or the one field `text` in files of plain text. The data is known by
    the name of the function alone: build anew when it decides differently.
    """
    tokens: Literal["uint16", "uint32", "llm.c", "megatron"] | None = None
    """What the files hold in place of text: arrays of tokens, made with what `tokenizer` names. `uint16` and `uint32`
    are files without a header, such as nanoGPT writes; of `megatron` give the .bin files, each with its .idx beside."""
    separator: int | None = None
    """The id between the documents of such a file (`megatron` has an index in place of it); None: what the tokenizer
    begins or ends a document with."""
    sources: tuple[SourceConfig, ...] = ()
    """Several, each with a name, in place of `paths`."""
    mixture: tuple[PhaseConfig, ...] = ()
    """How much of each source, by steps; empty: as many tokens as each has."""
    max_epochs: float | None = dataclasses.field(default=None, metadata={"free": True})
    """A run that would read a source more often is refused before it starts."""
    packing: Literal["split", "best_fit"] = "split"
    """How documents become rows. `split`: one after the other, cut wherever a row ends. `best_fit`: documents that
    together fill a row, so that few are cut. Neither drops a token, or repeats one."""
    attention: Literal["document", "row"] = "document"
    """What a token sees: of its own document only, or all before it in the row."""
    prefix_rate: float = 0.0
    """The share of segments that begin with a prefix of random length, in which tokens see each other in both
    directions and are not trained on (prefix language modelling)."""
    fim_rate: float = 0.0
    """The share of documents of text to train on whose middle is moved to their end (fill in the middle)."""
    fim_tokens: tuple[str, str, str] | None = None
    """The special tokens that then mark prefix, suffix and middle; None: those that published tokenizers have."""
    holdout_paths: tuple[str, ...] = ()
    """When given, exactly these are held out and all other `paths` are trained on."""
    holdout_by: Literal["document", "tail"] = "document"
    """`document`: by the hash of its text, so that copies fall on one side. `tail`: the end of each."""
    holdout_fraction: float = 0.01
    duplicates: Literal["keep", "exact", "near"] = "keep"
    """Of documents with the same text only the first is kept; `near`: also of those that are nearly the same, which
    needs the extra `dedup`. One that is held out comes first, unless `holdout_paths` names it: then it stays anyway."""
    near_similarity: float = 0.8
    """Documents that have this share of their runs of five words in common (Jaccard) are nearly the same."""
    overlap_paths: tuple[str, ...] = ()
    """Evaluation sets: training documents that share 13 words in a row with any text in them are counted by name."""
    overlap: Literal["report", "remove"] = "report"
    """`remove`: such documents are also left out."""
    tokenizer: TokenizerConfig = TokenizerConfig()
    workers: int = dataclasses.field(default=0, metadata={"free": True})
    """Processes that build; 0: one for each core. The result does not depend on it."""
    loader_workers: int = dataclasses.field(default=0, metadata={"free": True})
    """Processes that make the batches of each host while it trains; 0: a thread. Batches do not depend on it."""
    stall_seconds: float = dataclasses.field(default=600.0, metadata={"free": True})
    """A read of built data that lasts longer ends the run, which would wait for it for ever."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for values that cannot work."""
        if not self.paths and not self.sources:
            yield "paths", "empty; name files (text, .jsonl, .parquet), folders or globs, or 'python-stdlib'"
        if self.sources:
            yield from self._check_sources()
        elif self.mixture:
            yield "mixture", "is of named sources; write data.sources in place of data.paths"
        yield from _check_source(self)
        if not 0 <= self.prefix_rate <= 1:
            yield "prefix_rate", f"must be between 0 and 1, got {self.prefix_rate}"
        if self.tokenizer.kind == "bytes" and (self.fim_rate or any(source.fim_rate for source in self.sources)):
            yield "fim_rate", "the bytes tokenizer has no tokens to mark prefix, suffix and middle; choose another kind"
        if self.fim_tokens is not None and len({*self.fim_tokens}) < 3:
            yield "fim_tokens", f"must be three different names, got {', '.join(self.fim_tokens)}"
        holds_tokens = self.tokens or any(source.tokens for source in self.sources)
        if holds_tokens and self.tokenizer.kind == "sentencepiece" and self.tokenizer.path is None:
            yield "tokenizer.path", "must name the tokenizer that the files of data.tokens were made with"
        if not 0 <= self.holdout_fraction < 1:
            yield "holdout_fraction", f"must be at least 0 and below 1, got {self.holdout_fraction}"
        if not 0 < self.near_similarity <= 1:
            yield "near_similarity", f"must be above 0 and at most 1, got {self.near_similarity}"
        if self.overlap == "remove" and not self.overlap_paths:
            yield "overlap", "'remove' needs evaluation sets; name their files in data.overlap_paths"
        if self.workers < 0:
            yield "workers", f"must not be negative, got {self.workers}; 0 means one for each core"
        if self.loader_workers < 0:
            yield "loader_workers", f"must not be negative, got {self.loader_workers}; 0 means a thread"
        if not self.stall_seconds > 0:
            yield "stall_seconds", f"must be above 0, got {self.stall_seconds}"

    def of(self, source: SourceConfig) -> DataConfig:
        """What one of `sources` is built with."""
        fields = ("paths", "dir", "text_field", "filter", "tokens", "separator", "holdout_paths")
        own = {name: getattr(source, name) for name in fields}
        if source.tokens:
            own["fim_rate"] = 0.0
        for name in ("holdout_by", "holdout_fraction", "fim_rate"):
            if getattr(source, name) is not None:
                own[name] = getattr(source, name)
        return dataclasses.replace(self, sources=(), mixture=(), **own)

    def _check_sources(self) -> Iterator[tuple[str, str]]:
        default = DataConfig(paths=self.paths)
        for field in ("paths", "text_field", "filter", "tokens", "separator", "holdout_paths"):
            if self.paths if field == "paths" else getattr(self, field) != getattr(default, field):
                yield field, "is of a single source; with data.sources, each has its own"
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                yield "sources", f"two are called {name!r}"
                break
        for i, phase in enumerate(self.mixture):
            for name, _ in phase.weights:
                if name not in names:
                    close = get_close_matches(name, names, 1)
                    meant = f"; did you mean {close[0]!r}?" if close else f"; there are: {', '.join(names)}"
                    yield f"mixture.{i}.weights", f"no source is called {name!r}{meant}"
        steps = [phase.from_step for phase in self.mixture]
        if steps and steps[0] != 0:
            yield "mixture.0.from_step", f"must be 0, got {steps[0]}: the first phase begins with the run"
        if steps != sorted({*steps}):
            yield "mixture", f"from_step must grow from phase to phase, got {', '.join(map(str, steps))}"


def _check_source(config: SourceConfig | DataConfig) -> Iterator[tuple[str, str]]:
    if config.filter is not None and not re.fullmatch(r"\w+(\.\w+)*:\w+", config.filter):
        yield "filter", f"must be package.module:function, got {config.filter!r}"
    if config.max_epochs is not None and not 0 < config.max_epochs < math.inf:
        yield "max_epochs", f"must be a number above 0, got {config.max_epochs}"
    if config.fim_rate is not None and not 0 <= config.fim_rate <= 1:
        yield "fim_rate", f"must be between 0 and 1, got {config.fim_rate}"
    if config.tokens and config.fim_rate:
        yield "fim_rate", "parts of documents are drawn from text, but data.tokens says that there is none; make it 0"
    if config.tokens and config.filter is not None:
        yield "filter", "is given records of text, but data.tokens says that there is none; leave one of them None"
    if config.separator is not None and config.tokens in (None, "megatron"):
        yield "separator", "is of files of tokens without an index: data.tokens is 'uint16', 'uint32' or 'llm.c'"
    if config.separator is not None and config.separator < 0:
        yield "separator", f"must not be negative, got {config.separator}"
