"""All that a run reads: one source or several, built and open, with one tokenizer."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from etils import epath

from lm.data import files, sources
from lm.data.build import build_share
from lm.data.config import DataConfig, SourceConfig
from lm.data.manifest import FILE, SPLITS, Manifest, read_manifest, read_tokenizer
from lm.data.mixture import Mixture
from lm.data.plan import divide, part_bytes
from lm.data.progress import Named, Progress
from lm.data.shares import WHOLE, Share
from lm.data.splits import holdout_below
from lm.data.stream import TokenStream
from lm.data.tokenizers import FILE_NAMES, Tokenizer, load_tokenizer
from lm.data.vocabulary import Sample, is_trained, train_tokenizer
from lm.errors import ConfigError, DataError


@dataclass(frozen=True)
class Source:
    """What was built of one source. The only one of a run has no name."""

    name: str
    directory: epath.Path
    manifest: Manifest

    @property
    def title(self) -> str:
        return self.name or "data"


@dataclass(frozen=True)
class Corpus:
    """The sources of a run, in the order of the config."""

    data: DataConfig
    directory: epath.Path
    sources: tuple[Source, ...]
    tokenizer: Tokenizer

    @property
    def fingerprint(self) -> str:
        """Equal exactly when every token of every source is, and the names are."""
        if [one.name for one in self.sources] == [""]:
            return self.sources[0].manifest.fingerprint
        content = json.dumps(sorted([one.name, one.manifest.fingerprint] for one in self.sources))
        return hashlib.sha256(content.encode()).hexdigest()

    def tokens(self, split: str) -> int:
        return sum(one.manifest.tokens(split) for one in self.sources)

    @property
    def phases(self) -> list[tuple[int, dict[str, float]]]:
        """(first step, weights by name) of the mixture."""
        by_tokens = {one.name: float(one.manifest.tokens("train")) for one in self.sources}
        return [(one.from_step, dict(one.weights)) for one in self.data.mixture] or [(0, by_tokens)]

    def mixture(self, batch_size: int) -> Mixture:
        """Which source each row is from, in batches of so many rows."""
        names = [one.name for one in self.sources]
        return Mixture(names, [(step * batch_size, weights) for step, weights in self.phases])

    def max_epochs(self, name: str) -> float | None:
        """The limit for a source."""
        own = next((one.max_epochs for one in self.data.sources if one.name == name), None)
        return self.data.max_epochs if own is None else own


def open_corpus(directory: epath.PathLike, data: DataConfig | None = None) -> Corpus:
    """What `build_corpus` built. Raises DataError for what is not there, or was built with another tokenizer."""
    folder, data = epath.Path(directory), data or DataConfig()
    if not data.sources:
        manifest = read_manifest(folder)
        return Corpus(data, folder, (Source("", folder, manifest),), read_tokenizer(folder, manifest))
    found = []
    for one in data.sources:
        where = _folder(folder, one)
        try:
            found.append(Source(one.name, where, read_manifest(where)))
        except DataError as error:
            raise DataError(f"source {one.name}: {error}") from None
    first = found[0]
    for other in found[1:]:
        if other.manifest.tokenizer.fingerprint != first.manifest.tokenizer.fingerprint:
            raise DataError(
                f"source {other.name}, in {other.directory}, was built with another tokenizer than {first.name}, in "
                f"{first.directory}: build one of them anew"
            )
    return Corpus(data, folder, tuple(found), read_tokenizer(first.directory, first.manifest))


def build_corpus(data: DataConfig, directory: epath.PathLike, progress: Progress) -> Corpus:
    """Builds what is not built yet, each source by itself and all with the same tokenizer, and opens it.

    Raises as `build` does, and DataError when a shard is missing or of another size than when it was built.
    """
    build_corpus_share(data, directory, progress, WHOLE)
    return _checked(open_corpus(directory, data))


def build_corpus_share(data: DataConfig, directory: epath.PathLike, progress: Progress, share: Share) -> None:
    """On one of several machines its share of each source, as `build_share` does."""
    folder = epath.Path(directory)
    if not data.sources:
        build_share(data, folder, progress, share=share)
        return
    tokenizer = None
    if any(one.paths and not (_folder(folder, one) / FILE).exists() for one in data.sources):
        tokenizer = _shared_tokenizer(data, folder, progress)
    for one in data.sources:
        if one.paths:
            _build_source(data, one, folder, tokenizer, progress, share)


def manifest_files(data: DataConfig, directory: epath.PathLike) -> list[epath.Path]:
    """The files that are there when all is built."""
    folder = epath.Path(directory)
    return [where / FILE for where in ([_folder(folder, one) for one in data.sources] or [folder])]


def _checked(corpus: Corpus) -> Corpus:
    for one in corpus.sources:
        for split in SPLITS:
            if one.manifest.tokens(split):
                TokenStream(one.directory, split, one.manifest).check_files()
    return corpus


def _folder(directory: epath.Path, source: SourceConfig) -> epath.Path:
    return epath.Path(source.dir) if source.dir is not None else directory / source.name


def _build_source(
    data: DataConfig,
    source: SourceConfig,
    directory: epath.Path,
    tokenizer: Tokenizer | None,
    progress: Progress,
    share: Share,
) -> None:
    with _named(source):
        build_share(data.of(source), _folder(directory, source), Named(source.name, progress), tokenizer, share)


@contextlib.contextmanager
def _named(source: SourceConfig) -> Iterator[None]:
    try:
        yield
    except (DataError, ConfigError) as error:
        raise type(error)(f"source {source.name}: {error}") from None


def _shared_tokenizer(data: DataConfig, directory: epath.Path, progress: Progress) -> Tokenizer:
    """The one that is there: of all, of a source that was built before; or one that is trained on all of them."""
    kind = data.tokenizer.kind
    if not is_trained(data):
        return load_tokenizer(kind, data.tokenizer.path or b"")
    path = directory / FILE_NAMES[kind]
    with files.sole_writer(directory, lambda: progress(f"another process is building {directory}; waiting for it")):
        if path.exists():
            return load_tokenizer(kind, path)
        built = [where for one in data.sources if ((where := _folder(directory, one)) / FILE).exists()]
        tokenizer = read_tokenizer(built[0]) if built else train_tokenizer(data.tokenizer, samples(data), progress)
        files.write_atomically(path, tokenizer.serialize())
    return tokenizer


def samples(data: DataConfig) -> Sequence[Sample]:
    """What a tokenizer of `data` is trained on: of each source that has text."""
    if not data.sources:
        return [_sample(data)]
    found = []
    for source in data.sources:
        if source.paths and source.tokens is None:
            with _named(source):
                found.append(_sample(data.of(source)))
    return found


def _sample(config: DataConfig) -> Sample:
    sources.load_filter(config.filter)
    listed = sources.list_files(config.paths, config.holdout_paths, config.tokens)
    parts = divide(listed, part_bytes(listed))
    return Sample(config, parts, holdout_below(config, parts))
