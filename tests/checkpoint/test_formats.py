"""Checkpoints that older code wrote: today's code reads them, and goes on as that code did.

Each archive is of a run of ten steps: its text, config and metrics, and its checkpoint of step 6. A run of today, made
the same way, takes its place here before the format changes.
"""

import json
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import config as configs
from lm.checkpoint.checkpoints import Checkpoints, list_checkpoints, read_attachment
from lm.checkpoint.config import CheckpointConfig
from lm.checkpoint.digest import leaf_paths, state_digest
from lm.checkpoint.manifest import FORMAT, Manifest, epath
from lm.cli import main
from lm.errors import ConfigError
from lm.experiment import Config
from lm.parallel.mesh import make_mesh
from lm.train.state import abstract_state, init_state

ARCHIVES = sorted((Path(__file__).parent / "formats").glob("*.zip"))


@pytest.fixture(params=ARCHIVES, ids=lambda path: path.stem)
def old(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an old run, on one device."""
    with zipfile.ZipFile(request.param) as archive:
        archive.extractall(tmp_path)
    devices = jax.local_devices()[:1]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def logged(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_there_is_one_of_each_format() -> None:
    assert {int(path.stem.partition("_")[0]) for path in ARCHIVES} == set(range(1, FORMAT))


def test_an_old_checkpoint_is_read(old: Path) -> None:
    config = configs.from_dict(Config, json.loads(read_attachment(old / "checkpoints", 6, "config.json")))
    assert config.recovery.max_bad_steps == 20
    mesh = make_mesh(config.mesh)
    abstract = abstract_state(config, mesh)

    def fresh() -> object:
        state = init_state(config, jax.random.key(0))
        return jax.tree.map(lambda x: x + 1 if x.dtype == jnp.int32 else x, state)  # to be told from zeros

    checkpoints = Checkpoints(old / "checkpoints", CheckpointConfig(), {}, print, fresh=fresh)
    restored = checkpoints.restore_newest(abstract)
    assert restored is not None
    step, state = restored
    assert (step, int(state.step)) == (6, 6)
    norm = np.sqrt(sum(np.sum(np.asarray(x, np.float64) ** 2) for x in jax.tree.leaves(state.params)))
    assert norm == pytest.approx(logged(old)[5]["param_norm"], rel=1e-6)
    assert jax.tree.structure(state) == jax.tree.structure(abstract)
    manifest = Manifest.read(epath.Path(old / "checkpoints" / "6"), 6)
    assert manifest.format == 1
    added = set(leaf_paths(state)) - set(manifest.leaves)
    assert {path.partition("/")[0] for path in added} == {"guard"}
    assert {path: state_digest(state).leaves[path] for path in manifest.leaves} == dict(manifest.leaves)
    assert int(state.guard.counted) == 1
    with pytest.raises(ConfigError, match=r"guard/counted is missing there, int32\[\] here"):
        Checkpoints(old / "checkpoints", CheckpointConfig(), {}, print).restore_newest(abstract)


def test_an_old_run_goes_on(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = logged(old)
    assert main(["checkpoint", "verify", str(old)]) == 0
    assert main(["train", str(old), "--allow=code", "--allow=versions"]) == 0, capsys.readouterr().err
    assert "goes on from checkpoint 6\n" in capsys.readouterr().out
    found = logged(old)
    assert [line["step"] for line in found] == list(range(10))
    for line, wanted in zip(found, expected, strict=True):
        for name in ("loss", "grad_norm", "param_norm", "learning_rate", "targets"):
            assert line[name] == pytest.approx(wanted[name], rel=1e-5), (line["step"], name)
    assert list_checkpoints(old / "checkpoints")[-1].step == 10


def test_a_leaf_that_no_format_added_is_not_invented(old: Path) -> None:
    config = configs.from_dict(Config, json.loads(read_attachment(old / "checkpoints", 6, "config.json")))
    abstract = abstract_state(config, make_mesh(config.mesh))
    state = init_state(config, jax.random.key(0))
    more = {**abstract.params, "new": abstract.step}
    with pytest.raises(ConfigError, match=r"params/new is missing there, int32\[\] here"):
        Checkpoints(old / "checkpoints", CheckpointConfig(), {}, print, fresh=lambda: state).restore_newest(
            type(abstract)(**{**vars(abstract), "params": more})
        )
