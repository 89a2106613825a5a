import json
import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.checkpoint.checkpoints import Checkpoints, read_attachment
from lm.checkpoint.config import CheckpointConfig
from lm.checkpoint.local import LocalCheckpoints, Restored, restore_newest, steps_of_run
from lm.checkpoint.manifest import Manifest
from lm.cli import main
from lm.train.journal import Journal

MESH = jax.make_mesh((2, 4), ("a", "b"))
SPECS = {"split": jax.P("a", "b"), "rows": jax.P(("b", "a")), "whole": jax.P(), "half": jax.P(None, "b")}
ATTACHMENTS = {"config.json": b"{}", "data.json": b"[]"}


def make_state(step: int, value: float = 0.0) -> dict[str, Any]:
    """Arrays of several types and shardings."""
    draw = jax.random.normal(jax.random.key(step), (8, 16)) + value
    placed = {name: jax.device_put(draw, jax.NamedSharding(MESH, spec)) for name, spec in SPECS.items()}
    short = jax.device_put(draw[0].astype(jnp.bfloat16), jax.NamedSharding(MESH, jax.P("a")))
    others = {"mask": jnp.array([True, False]), "step": jnp.int32(step)}
    others["bad_streak"] = jnp.int32(0)
    return placed | {"short": short} | jax.device_put(others, jax.NamedSharding(MESH, jax.P()))


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


ABSTRACT = abstract(make_state(0))


def bits(state: Any) -> list[tuple[Any, bytes]]:
    return [((x.shape, x.dtype, x.sharding), np.asarray(x).tobytes()) for x in jax.tree.leaves(state)]


class Tier(LocalCheckpoints):
    def __init__(self, folder: Path, run: str = "first", run_dir: str = "run", **config: float):
        self.said: list[str] = []
        config = {"local_seconds": 1e-6} | config
        super().__init__(CheckpointConfig(local_dir=str(folder), **config), folder / run_dir, run, self.said.append)

    def write(self, *steps: int) -> None:
        for step in steps:
            assert self.due()
            self.save(make_state(step), step, ATTACHMENTS)
            self.wait()

    def steps(self) -> list[int]:
        return self.whole_steps(ABSTRACT)[0]


class Durable(Checkpoints):
    def __init__(self, folder: Path, *steps: int):
        self.said: list[str] = []
        super().__init__(folder / "durable", CheckpointConfig(keep_last=9), ATTACHMENTS, self.said.append)
        for step in steps:
            assert self.save(make_state(step), step, wait=True)
        self.wait()
        assert self.said == []

    def newest(self, local: LocalCheckpoints) -> Restored[Any] | None:
        return restore_newest(self, local, self._directory, ABSTRACT)


def test_round_trip_gives_the_same_bits_types_and_places(tmp_path: Path) -> None:
    Tier(tmp_path).write(3)
    tier = Tier(tmp_path)
    assert tier.steps() == [3]
    restored = tier.restore(3, ABSTRACT)
    assert bits(restored) == bits(make_state(3))
    assert read_attachment(tier.directory, 3, "data.json") == b"[]"
    assert steps_of_run(tier.directory, "first") == [3]
    assert tier.said == []
    assert tier.counts()["local_saves"] == 0


def test_those_of_this_host_and_run_are_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with Journal(run / "journal.jsonl", facts={}, began=0.0, report=pytest.fail) as journal:
        pass
    Tier(tmp_path, journal.run, run_dir="elsewhere").write(7)
    tier = Tier(tmp_path, "another")  # which was in the same place
    tier.write(6)
    tier.directory.rename(tier.directory.with_name("process-1"))
    Tier(tmp_path, journal.run).write(5)
    shutil.copytree(tier.directory / "5", tier.directory.with_name("process-1") / "5")
    durable = Checkpoints(run / "checkpoints", CheckpointConfig(), ATTACHMENTS, pytest.fail)
    assert durable.save(make_state(5), 5)
    durable.wait()
    config = {"checkpoint": {"local_dir": str(tmp_path)}}
    (run / "config.json").write_text(json.dumps(config))
    assert main(["checkpoint", "list", str(run), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["step"], row["status"], row["tier"], row["name"]) for row in rows] == [
        (5, "good", "durable", "5"),
        (5, "good", "local", "process-0/5"),
        (5, "good", "local", "process-1/5"),
    ]
    assert len({row["digest"] for row in rows}) == 1
    assert main(["checkpoint", "list", str(run)]) == 0
    *_, line = capsys.readouterr().out.splitlines()
    assert line.split()[1:3] == ["good", "local"]
    assert line.endswith(f"  {rows[0]['digest']}  process-1/5")


def test_what_devices_hold_alike_is_there_once(tmp_path: Path) -> None:
    tier = Tier(tmp_path)
    tier.write(3)
    size = (tier.directory / "3" / "shards.bin").stat().length
    assert size == sum(x.nbytes for x in jax.tree.leaves(make_state(3)))


def test_arrays_may_be_donated_at_once(tmp_path: Path) -> None:
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 2, state), donate_argnums=0)
    state = make_state(3)
    expected = bits(state)
    tier = Tier(tmp_path)
    tier.save(state, 3, {})
    for _ in range(3):
        state = step(state)
    tier.wait()
    assert tier.steps() == [3]
    assert bits(tier.restore(3, ABSTRACT)) == expected


def test_memory_of_the_host(tmp_path: Path) -> None:
    sharding = jax.NamedSharding(MESH, jax.P("b"), memory_kind="pinned_host")
    state = {"x": jax.device_put(jnp.arange(16.0), sharding)}
    tier = Tier(tmp_path)
    tier.save(state, 1, {})
    tier.wait()
    assert tier.whole_steps(abstract(state))[0] == [1]
    restored = tier.restore(1, abstract(state))
    assert restored is not None
    assert restored["x"].sharding == sharding
    assert bits(restored) == bits(state)


def test_a_ring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier, sizes = Tier(tmp_path, local_keep=3), []
    of = Manifest.of
    monkeypatch.setattr(Manifest, "of", lambda *a: (sizes.append(len(list(tier.directory.iterdir()))), of(*a))[1])
    tier.write(1, 2, 3, 4)
    assert tier.steps() == [2, 3, 4]
    assert sizes == [1, 2, 3, 3]  # with the one that is being written
    (tier.directory / "9").mkdir()  # what a kill leaves
    again = Tier(tmp_path, local_keep=3)
    assert again.steps() == [2, 3, 4]
    again.write(5)
    assert sorted(path.name for path in again.directory.iterdir()) == ["3", "4", "5"]
    again.remove_after(4)
    assert again.steps() == [3, 4]
    again.remove_all()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", [{"split": jnp.inf}, {"half": jnp.nan}, {"bad_streak": 1}])
def test_only_good_states_are_kept(tmp_path: Path, change: dict[str, float]) -> None:
    tier = Tier(tmp_path)
    tier.write(1)
    state = make_state(2)
    state |= {name: jnp.full_like(state[name], value) for name, value in change.items()}
    tier.save(state, 2, {})
    tier.wait()
    assert (tier.steps(), tier.counts()["local_saves_skipped"], tier.said) == ([1], 1, [])


def test_one_is_left_out_while_the_one_before_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier, read, held = Tier(tmp_path), Manifest.of, []
    monkeypatch.setattr(Manifest, "of", lambda *a: (held.append(tier.due()), held.append(tier.due()), read(*a))[2])
    tier.write(1)
    assert held == [None, None]
    assert tier.said == ["a local checkpoint is left out: the one before is still being written"]
    assert tier.counts()["local_saves_skipped"] == 2
    tier.write(2)
    assert tier.steps() == [1, 2]


@pytest.fixture
def limit(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (min(size, 2**62) if size else soft, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_said_once_and_costs_nothing_else(tmp_path: Path, limit: Callable[[int], None]) -> None:
    tier = Tier(tmp_path)
    tier.write(1)
    limit(100)
    tier.write(2, 3)
    limit(0)
    (said,) = tier.said
    assert "/2 was not saved: File too large; the run goes on, and this is not said again" in said
    assert [path.name for path in tier.directory.iterdir()] == ["1"]
    assert tier.counts()["local_saves_failed"] == 2
    tier.write(4)
    assert tier.steps() == [1, 4]


def test_a_place_that_is_not_ours(tmp_path: Path) -> None:
    (tmp_path / "precious" / "process-0" / "7").mkdir(parents=True)
    tier = Tier(tmp_path / "local")
    tier.directory.parent.parent.mkdir()
    os.symlink(tmp_path / "precious", tier.directory.parent)
    tier.write(1)
    assert "is a link, or belongs to another user" in tier.said[0]
    assert (tmp_path / "precious" / "process-0" / "7").exists()


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["shards.bin", "shards.json", "data.json", "manifest.json", "a link"])
def test_a_damaged_one_is_named_and_the_one_before_taken(tmp_path: Path, name: str) -> None:
    Tier(tmp_path).write(5, 6)
    tier, durable = Tier(tmp_path), Durable(tmp_path, 4)
    folder = Path(tier.directory / "6")
    if name == "a link":
        (folder / "shards.bin").rename(tmp_path / "elsewhere")
        (folder / "shards.bin").symlink_to(tmp_path / "elsewhere")
    else:
        damage(folder / name)
    found = durable.newest(tier)
    assert found is not None
    assert (found.step, found.tier, found.directory) == (5, "local", tier.directory)
    assert bits(found.state) == bits(make_state(5))
    assert durable.last_good == 4
    (said,) = tier.said
    assert said.startswith("local checkpoint 6 is not used: ")
    tier.write(7)
    assert tier.steps() == [5, 7]


def test_the_newest_good_one_of_both(tmp_path: Path) -> None:
    Tier(tmp_path).write(5, 6)

    def newest(*steps: int) -> tuple[int, str]:
        found = Durable(tmp_path, *steps).newest(Tier(tmp_path))
        assert found is not None
        assert bits(found.state) == bits(make_state(found.step))
        return found.step, found.tier

    assert newest() == (6, "local")
    assert newest(3) == (6, "local")
    assert newest(6) == (6, "durable")
    assert newest(9) == (9, "durable")
    damage(next(path for path in (tmp_path / "durable" / "9" / "state").rglob("*") if path.is_file()))
    assert newest() == (6, "durable")
    damage(next(path for path in (tmp_path / "durable" / "6" / "state").rglob("*") if path.is_file()))
    assert newest() == (6, "local")
    assert Durable(tmp_path / "other").newest(Tier(tmp_path / "other")) is None


def test_another_layout_and_another_run_are_not_taken(tmp_path: Path) -> None:
    Tier(tmp_path).write(5)
    tier = Tier(tmp_path)
    wanted = ABSTRACT | {"rows": jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=ABSTRACT["half"].sharding)}
    steps, problems = tier.whole_steps(wanted)
    assert (steps, problems[5]) == ([], "it is of another layout of arrays over processes and devices: rows")
    assert tier.whole_steps({"more": ABSTRACT["rows"]} | ABSTRACT)[0] == []
    durable, other = Durable(tmp_path, 2), Tier(tmp_path, run="second")
    found = durable.newest(other)
    assert found is not None
    assert (found.step, found.tier) == (2, "durable")
    assert other.said == ["local checkpoint 5 is not used: it is of another run that was in the same run.dir"]
    assert steps_of_run(other.directory, "second") == []
    other.write(3)
    assert [path.name for path in other.directory.iterdir()] == ["3"]


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    one, two = Tier(tmp_path, "a", "one"), Tier(tmp_path, "b", "two")
    one.write(1, 2)
    two.write(2, 3)
    assert (one.steps(), two.steps()) == ([1, 2], [2, 3])
    two.remove_all()
    assert Tier(tmp_path, "a", "one").steps() == [1, 2]


def test_none_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tier = LocalCheckpoints(CheckpointConfig(local_seconds=1e-6), "run", "first", print)
    assert (tier.due(), tier.counts(), tier.whole_steps(ABSTRACT)) == (None, {}, ([], {}))
    tier.remove_after(3)
    tier.remove_all()
    assert list(tmp_path.iterdir()) == []


def test_the_index_is_plain(tmp_path: Path) -> None:
    tier = Tier(tmp_path)
    tier.write(3)
    index = json.loads((tier.directory / "3" / "shards.json").read_bytes())
    assert index["run"] == "first"
    assert index["shards"]["whole"] == [[[[0, 8], [0, 16]], index["shards"]["whole"][0][1]]]
    assert len(index["shards"]["split"]) == 8
