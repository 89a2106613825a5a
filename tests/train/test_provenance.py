"""Checkpoints of other code and other libraries."""

import json

import pytest

from lm.errors import ConfigError, StorageError
from lm.train import provenance


def changed(**sections: dict[str, str]) -> bytes:
    found = provenance.provenance()
    return provenance.write({name: found[name] | sections.get(name, {}) for name in found})


def test_the_same_is_the_same() -> None:
    assert provenance.refuse_if_other(changed(), 7, ()) == []
    kept = json.loads(changed())
    assert "lm/model/transformer.py" in kept["code"]
    assert "lm/train/step.py" in kept["code"]
    assert "lm/train/summaries.py" not in kept["code"]
    assert {"jax", "optax", "python"} <= kept["versions"].keys()


def test_what_is_another_is_named_and_refused_unless_allowed() -> None:
    other = changed(code={"lm/train/step.py": "abc", "lm/model/old.py": "def"}, versions={"jax": "0.9.9"})
    with pytest.raises(ConfigError) as error:
        provenance.refuse_if_other(other, 7, ())
    said = str(error.value)
    assert said.startswith("checkpoint 7 was made by other code and other versions than is here:\n")
    assert "    lm/model/old.py: there -> missing\n    lm/train/step.py: abc -> " in said
    assert "    jax: 0.9.9 -> " in said
    assert said.endswith("add --allow code --allow versions")
    with pytest.raises(ConfigError, match=r"made by other versions than(?s:.)*add --allow versions$"):
        provenance.refuse_if_other(other, 7, ("code",))
    assert len(provenance.refuse_if_other(other, 7, ("code", "versions"))) == 3


@pytest.mark.parametrize("contents", [b"", b"3", b"{}", b'{"code": 3, "versions": {}}'])
def test_what_cannot_be_read(contents: bytes) -> None:
    with pytest.raises(StorageError, match=r"code\.json of checkpoint 7 cannot be read"):
        provenance.refuse_if_other(contents, 7, ())
