"""What a run that goes on may be trained on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath

from lm.data.config import DataConfig, PhaseConfig
from lm.data.corpus import Corpus, Source
from lm.data.manifest import Manifest, TokenizerRecord
from lm.data.mixture import Shares
from lm.data.records import Shard
from lm.data.skips import Skip
from lm.data.tokenizers import BytesTokenizer
from lm.errors import ConfigError, StorageError
from lm.train import ledger
from lm.train.ledger import Ledger, Rewind

Weights = dict[str, float]
A, B, C = "abc"


def corpus(*phases: tuple[int, Weights], **contents: str) -> Corpus:
    """Sources a, b and c, of which `contents` are not what they are else; "" for one that is not there."""
    tokenizer = BytesTokenizer()
    record = TokenizerRecord("bytes", tokenizer.file_name, tokenizer.fingerprint, tokenizer.vocab_size)
    sources = tuple(
        Source(name, epath.Path("/data") / name, Manifest(record, {}, {"train": (shard(content),), "heldout": ()}))
        for name, content in ({name: name for name in "abc"} | contents).items()
        if content
    )
    mixture = tuple(PhaseConfig(step, tuple(weights.items())) for step, weights in phases)
    return Corpus(DataConfig(mixture=mixture), epath.Path("/data"), sources, tokenizer)


def shard(content: str) -> Shard:
    return Shard("train", tokens=10, records=1, documents=1, text_bytes=10, size=10, sha256=content)


def go_on(before: Corpus, after: Corpus, done: int) -> Ledger:
    """As a checkpoint keeps it."""
    found = ledger.extended(ledger.read(ledger.write(Ledger((ledger.entry(before, 0),)))), after, done)
    assert ledger.read(ledger.write(found)) == found
    return found


HALVES: Weights = {A: 0.5, B: 0.5}


def test_what_is_still_to_come_may_change_up_to_the_step_that_is_next() -> None:
    before = corpus((0, HALVES), (7, {A: 1.0}))
    after = corpus((0, HALVES), (5, {C: 1.0}))
    for done in (1, 4, 5):
        found = go_on(before, after, done)
        assert [one["from_step"] for one in found.entries] == [0, done]
        assert found.entries[-1]["phases"] == [[0, HALVES], [5, {C: 1.0}]]
        assert go_on(before, before, done).entries == found.entries[:1]
    for done in (6, 7, 8, 10**9):
        with pytest.raises(ConfigError, match=rf"steps that are done \({done} are\).*(?s:.*)from step {done} or"):
            go_on(before, after, done)


def test_the_ledger_of_an_earlier_checkpoint_goes_on_from_there() -> None:
    plans = [corpus((0, HALVES), (step, {C: 1.0})) for step in (30, 20, 10)]
    kept = go_on(plans[0], plans[1], 12)
    with pytest.raises(ConfigError):
        ledger.extended(kept, plans[2], 12)
    assert [one["from_step"] for one in ledger.extended(kept, plans[2], 10).entries] == [0, 10]
    assert ledger.extended(kept, plans[0], 12).entries[-1]["phases"][1][0] == 30


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((0, {A: 1.0, B: 2.0}), (0, {A: 1.0, B: 2.5})),
        ((0, {A: 1.0, B: 2.0}), (0, {A: 1.0, B: 2.0, C: 1e-9})),
        ((0, {A: 1.0, B: 2.0}), (0, {A: 1.0, C: 2.0})),
    ],
)
def test_steps_that_are_done_keep_their_mixture(old: Any, new: Any) -> None:
    with pytest.raises(ConfigError, match=r"mixture=\(PhaseConfig\(0, \(\('a', 1\.0\), \('b', 2\.0\)\)\),\)"):
        go_on(corpus(old), corpus(new), 1)


def test_weights_in_the_same_proportion_can_be_another_mixture() -> None:
    weights = {"a": 0.2, "b": 0.1, "c": 0.3, "d": 0.6, "e": 0.8}
    tenfold = {name: round(10 * weight) for name, weight in weights.items()}
    one, other = Shares(weights), Shares(tenfold)
    assert one.shares == other.shares
    assert not np.array_equal(one.deal(np.arange(20))[0], other.deal(np.arange(20))[0])
    with pytest.raises(ConfigError, match="another one for steps that are done"):
        go_on(corpus((0, weights), d="d", e="e"), corpus((0, tenfold), d="d", e="e"), 1)


def test_what_was_read_keeps_its_data() -> None:
    phases = (0, {A: 1.0, B: 0.0}), (5, {A: 1.0, B: 1.0, C: 1.0})
    before = corpus(*phases)
    for other in (corpus(*phases, b="other", c="other"), corpus((0, {A: 1.0}), b="", c="")):
        assert len(go_on(before, other, 5).entries) == 2  # neither b nor c was read
    for name in (B, C):
        with pytest.raises(ConfigError, match=f"trained on other data than source {name} in /data"):
            go_on(before, corpus(*phases, **{name: "other"}), 6)
    with pytest.raises(ConfigError, match="trained on other data than source a in /data"):
        go_on(before, corpus(*phases, a="other"), 1)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    for contents in (b"", b"{", b'[{"from_step": 0}]', b"3"):
        with pytest.raises(StorageError, match=r"data\.json of the checkpoint cannot be read"):
            ledger.read(contents)


def test_returns_are_kept() -> None:
    found = Ledger((ledger.entry(corpus((0, HALVES)), 0),)).rewound(4, 9, 1)
    assert found.rewinds == (Rewind(4, 9, 5, 1),)
    assert found.times == 1
    assert found.rewound(6, 8, 1).skips.all == (Skip(4, 5), Skip(6, 2))
    assert found.rewound(2, 8, 2).rewinds == (Rewind(2, 8, 11, 2),)
    assert ledger.read(ledger.write(found)) == found


def test_every_return_counts() -> None:
    """Also one of which nothing is seen any more, as a later one went back beyond it."""
    found = Ledger((ledger.entry(corpus((0, HALVES)), 0),))
    for number, (step, until, attempt) in enumerate([(100, 170, 1), (200, 270, 1), (100, 225, 2), (50, 180, 3)], 1):
        found = found.rewound(step, until, attempt)
        assert ledger.read(ledger.write(found)).times == number
    assert [one.step for one in found.rewinds] == [50]
    before = json.dumps({"data": list(found.entries), "rewinds": [dataclasses.asdict(one) for one in found.rewinds]})
    assert ledger.read(before.encode()).times == 3, "of one that was kept before they were counted"


def test_what_was_kept_before_runs_went_back_is_read() -> None:
    entries = [ledger.entry(corpus((0, HALVES)), 0)]
    assert ledger.read(json.dumps(entries).encode()) == Ledger(tuple(entries))
