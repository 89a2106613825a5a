import dataclasses

import pytest

from lm.data.config import DataConfig, TokenizerConfig


def test_good_configs_have_no_problems() -> None:
    assert list(DataConfig(paths=("a",)).check()) == []
    assert list(TokenizerConfig().check()) == []
    assert list(TokenizerConfig(kind="huggingface", path="tokenizer.json").check()) == []


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (DataConfig(), "paths"),
        (DataConfig(paths=("a",), holdout_fraction=1.0), "holdout_fraction"),
        (DataConfig(paths=("a",), holdout_fraction=-0.1), "holdout_fraction"),
        (DataConfig(paths=("a",), workers=-1), "workers"),
        (TokenizerConfig(kind="bytes", path="x"), "path"),
        (TokenizerConfig(kind="huggingface"), "path"),
        (TokenizerConfig(vocab_size=3), "vocab_size"),
        (TokenizerConfig(training_bytes=0), "training_bytes"),
    ],
)
def test_impossible_values(config: DataConfig | TokenizerConfig, field: str) -> None:
    assert [name for name, _ in config.check()] == [field]


def test_only_what_does_not_change_the_data_is_free() -> None:
    free = {field.name for field in dataclasses.fields(DataConfig) if field.metadata.get("free")}
    assert free == {"dir", "max_epochs", "workers", "loader_workers", "stall_seconds"}
