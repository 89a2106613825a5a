import dataclasses
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from lm.checkpoint import checkpoints as checkpoint
from lm.checkpoint import manifest
from lm.checkpoint.checkpoints import Checkpoints, list_checkpoints, read_attachment
from lm.checkpoint.config import CheckpointConfig
from lm.checkpoint.digest import state_digest
from lm.errors import ConfigError, StorageError
from lm.experiment import Config
from lm.model.config import ModelConfig
from lm.parallel.mesh import MeshConfig, make_mesh
from lm.train.config import TrainConfig
from lm.train.state import abstract_state, init_state

ATTACHMENTS = {"config.json": b'{"run": 1}\n', "tokenizer.model": bytes(range(256))}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    step: jax.Array
    params: dict[str, Any]
    opt_state: Any
    skipped: jax.Array


def make_state(step: int, width: int = 8) -> State:
    w = jax.random.normal(jax.random.key(step), (4, width))
    params = {"layers": {"w": w, "b": w[0].astype(jnp.bfloat16)}, "norm": -jnp.zeros(3)}
    opt_state = optax.adamw(1e-3).init(params)
    return State(jnp.int32(step), params, opt_state, jnp.array([True, False]))


def abstract(state: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


ABSTRACT = abstract(make_state(0))


class Writer(Checkpoints):
    def __init__(self, directory: Path, **config: float):
        self.said: list[str] = []
        super().__init__(directory, CheckpointConfig(**config), ATTACHMENTS, self.said.append)

    def write(self, *steps: int) -> None:
        for step in steps:
            assert self.save(make_state(step), step, wait=True)
        self.wait()


def bits(state: Any) -> list[tuple[Any, bytes]]:
    return [((x.shape, x.dtype), np.asarray(x).tobytes()) for x in jax.tree.leaves(state)]


def steps(directory: Path) -> list[int]:
    return [info.step for info in list_checkpoints(directory)]


def test_round_trip_gives_the_same_bits_and_types(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run" / "checkpoints")
    assert writer.restore_newest(ABSTRACT) is None
    assert not (tmp_path / "run").exists()
    writer.write(3)
    restored = Writer(tmp_path / "run" / "checkpoints").restore_newest(ABSTRACT)
    assert restored is not None
    step, state = restored
    assert step == 3
    assert str(jax.tree.structure(state)) == str(jax.tree.structure(make_state(3)))
    assert bits(state) == bits(make_state(3))
    assert writer.said == []
    assert writer.last_good == 3


def test_listing_tells_equal_states_from_others(tmp_path: Path) -> None:
    Writer(tmp_path / "a").write(1, 2)
    Writer(tmp_path / "b").write(1)
    one, two = list_checkpoints(tmp_path / "a")
    assert list_checkpoints(tmp_path / "b")[0].digest == one.digest == state_digest(make_state(1)).digest
    assert two.digest != one.digest
    files = [path for path in (tmp_path / "a" / "1").rglob("*") if path.is_file()]
    assert one.bytes == sum(path.stat().st_size for path in files if path.name != "manifest.json")
    assert (one.problem, list_checkpoints(tmp_path / "none")) == (None, [])


def test_attachments_come_back(tmp_path: Path) -> None:
    Writer(tmp_path).write(1)
    for name, contents in ATTACHMENTS.items():
        assert read_attachment(tmp_path, 1, name) == contents
    with pytest.raises(StorageError, match=r"has no other; it has config.json, tokenizer.model"):
        read_attachment(tmp_path, 1, "other")
    (tmp_path / "1" / "config.json").write_bytes(b'{"run": 2}\n')
    with pytest.raises(StorageError, match=r"config.json is not as it was written"):
        read_attachment(tmp_path, 1, "config.json")
    with pytest.raises(ValueError, match="state"):
        Checkpoints(tmp_path, CheckpointConfig(), {"state": b""}, print)


def test_arrays_may_be_donated_right_after_save(tmp_path: Path) -> None:
    state = {"w": jnp.arange(2**20, dtype=jnp.float32)}
    like, expected = abstract(state), bits(state)
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 2, state), donate_argnums=0)
    writer = Writer(tmp_path)
    assert writer.save(state, 1)
    for _ in range(3):
        state = step(state)
    writer.wait()
    assert bits(writer.restore(1, like)) == expected


def test_a_save_is_skipped_while_one_is_going_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish, read = threading.Event(), checkpoint.Manifest.of
    monkeypatch.setattr(checkpoint.Manifest, "of", lambda *a: finish.wait(60) and read(*a))
    writer = Writer(tmp_path)
    assert writer.save(make_state(1), 1)
    assert writer.retry_due() is None
    for step in 2, 3:
        start = time.monotonic()
        assert not writer.save(make_state(step), step)
        assert time.monotonic() - start < 5
        assert writer.retry_due() is None
    assert writer.said == ["step 2 is not saved: the save of step 1 is still going"]
    finish.set()
    writer.wait()
    assert writer.retry_due() == "a save was skipped"
    assert writer.save(make_state(4), 4)
    assert writer.retry_due() is None
    assert writer.save(make_state(5), 5, wait=True)
    writer.close()
    assert (steps(tmp_path), writer.last_good) == ([4, 5], 5)
    assert writer.counts()["saves_skipped"] == 2
    assert writer.retry_due() is None


def test_a_save_may_wait_for_the_one_before(tmp_path: Path) -> None:
    writer = Writer(tmp_path, keep_last=5, patience_seconds=60)
    for step in range(1, 6):
        assert writer.save(make_state(step), step)
    writer.wait()
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_every_flipped_bit_and_truncation_is_found_in_every_file(tmp_path: Path) -> None:
    Writer(tmp_path / "good").write(1, 2)
    names = [str(p.relative_to(tmp_path / "good" / "2")) for p in (tmp_path / "good" / "2").rglob("*")]
    files = sorted(name for name in names if (tmp_path / "good" / "2" / name).is_file())
    assert {"manifest.json", "config.json", "tokenizer.model", "state/_METADATA"} <= set(files)
    assert any("ocdbt" in name for name in files)
    for name in files:
        contents = (tmp_path / "good" / "2" / name).read_bytes()
        flipped = bytearray(contents or b"\0")
        flipped[len(flipped) // 2] ^= 1
        for damage, damaged in {
            "flip": bytes(flipped),
            "cut": contents[: len(contents) // 2],
            "gone": None,
        }.items():
            if damaged == contents or (name, damage) == ("manifest.json", "gone"):
                continue
            run = tmp_path / "run"
            shutil.copytree(tmp_path / "good", run)
            if damaged is None:
                (run / "2" / name).unlink()
            else:
                (run / "2" / name).write_bytes(damaged)
            writer = Writer(run)
            restored = writer.restore_newest(ABSTRACT)
            assert restored is not None
            assert (restored[0], bits(restored[1])) == (1, bits(make_state(1))), (name, damage)
            assert len(writer.said) == 1
            assert name in writer.said[0]
            assert sorted(p.name for p in run.iterdir()) == ["1", "2.bad"]
            shutil.rmtree(run)


def test_sound_files_with_other_arrays_are_found(tmp_path: Path) -> None:
    """As after a bit flipped in memory on its way to the disk: every checksum agrees, the digest does not."""
    writer = Writer(tmp_path)
    writer.write(1, 2)
    folder = checkpoint.epath.Path(tmp_path / "2")
    written = checkpoint.Manifest.read(folder, 2)
    (folder / "manifest.json").unlink()
    (folder / "state").rmtree()
    wrong = make_state(2)
    wrong.params["layers"]["w"] = wrong.params["layers"]["w"].at[0, 0].add(1)
    writing = checkpoint.Writing(folder / "state", wrong)
    (folder / "state").mkdir()
    writing.begin()
    writing.wait()
    writing.finish()
    digest = dataclasses.replace(state_digest(wrong), digest=written.digest, leaves=written.leaves)
    files = {name: checkpoint.FileChecksum.of(folder / name) for name in checkpoint.file_sizes(folder)}
    checkpoint.Manifest.of(2, digest, files).write(folder)
    restored = writer.restore_newest(ABSTRACT)
    assert restored is not None
    assert restored[0] == writer.last_good == 1
    assert "the arrays are not those that were saved: params/layers/w;" in writer.said[0]


def test_a_run_never_starts_over_when_all_its_checkpoints_are_bad(tmp_path: Path) -> None:
    Writer(tmp_path).write(1, 2)
    for step in "1", "2":
        (tmp_path / step / "config.json").unlink()
    for _ in range(2):  # at the second start as well
        with pytest.raises(StorageError, match=r"no good checkpoint is left .* 1\.bad, 2\.bad"):
            Writer(tmp_path).restore_newest(ABSTRACT)
    assert (tmp_path / "2.bad" / "manifest.json").exists()


@pytest.mark.parametrize("name", ["manifest.json", "config.json"])
def test_what_storage_does_not_give_for_a_moment(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sound checkpoint is not set aside for it; when it goes on, an older one is used."""
    Writer(tmp_path).write(1, 2)
    monkeypatch.setattr(manifest, "READ_WAITS", (0.01, 0.01))
    failures = 2
    path = type(epath.Path(tmp_path))
    read, opened = path.read_bytes, path.open

    def fail(file: epath.Path) -> None:
        nonlocal failures
        if file.parent.name == "2" and file.name == name and failures:
            failures -= 1
            raise OSError(5, "Input/output error")

    def read_bytes(self: Any) -> bytes:
        fail(self)
        return bytes(read(self))

    def open_(self: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        fail(self)
        return opened(self, mode, *rest, **more)

    monkeypatch.setattr(path, "read_bytes", read_bytes)
    monkeypatch.setattr(path, "open", open_)
    writer = Writer(tmp_path)
    restored = writer.restore_newest(ABSTRACT)
    assert restored is not None
    assert restored[0] == 2
    assert (writer.said, failures) == ([], 0)
    failures = 100
    restored = writer.restore_newest(ABSTRACT)
    assert restored is not None
    assert restored[0] == 1
    text = f"{tmp_path}/2 is not used: {name} cannot be read: Input/output error; it stays where it is"
    assert writer.said == [f"checkpoint {text}"]
    assert steps(tmp_path) == [1, 2]


def test_restoring_a_named_step_changes_nothing(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.write(1, 2)
    assert bits(writer.restore(1, ABSTRACT)) == bits(make_state(1))
    with pytest.raises(StorageError, match=r"no checkpoint of step 7 .* there are \[1, 2\]"):
        writer.restore(7, ABSTRACT)
    (tmp_path / "1" / "config.json").unlink()
    with pytest.raises(StorageError, match=r"1 is bad: config.json is missing"):
        writer.restore(1, ABSTRACT)
    assert steps(tmp_path) == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: abstract(make_state(0, 9)), r"params/layers/b is bfloat16\[8\] there, bfloat16\[9\] here"),
        (
            lambda s: dataclasses.replace(s, step=jax.ShapeDtypeStruct((), jnp.uint32)),
            r"step is int32\[\] there",
        ),
        (
            lambda s: dataclasses.replace(s, opt_state=()),
            r"opt_state/0/count is int32\[\] there, missing here",
        ),
        (lambda s: dataclasses.replace(s, step={"a": s.step}), r"step/a is missing there, int32\[\] here"),
    ],
)
def test_another_state_is_a_config_error(tmp_path: Path, change: Callable[[State], State], message: str) -> None:
    writer = Writer(tmp_path)
    writer.write(1)
    with pytest.raises(ConfigError, match=message):
        writer.restore_newest(change(ABSTRACT))
    assert steps(tmp_path) == [1]


def test_half_written_folders_are_no_checkpoints(tmp_path: Path) -> None:
    Writer(tmp_path, keep_last=3).write(1, 2, 3)
    for step in "2", "3":
        (tmp_path / step / "manifest.json").unlink()
    (tmp_path / "7").mkdir()
    (tmp_path / "notes").mkdir()
    writer = Writer(tmp_path)
    assert steps(tmp_path) == [1]
    restored = writer.restore_newest(ABSTRACT)
    assert restored is not None
    assert (restored[0], writer.said) == (1, [])
    assert (tmp_path / "3").exists()  # reading removes nothing
    writer.write(2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "notes"]
    assert bits(writer.restore(2, ABSTRACT)) == bits(make_state(2))


def test_only_half_written_folders_are_a_fresh_start(tmp_path: Path) -> None:
    (tmp_path / "7" / "state").mkdir(parents=True)
    assert Writer(tmp_path).restore_newest(ABSTRACT) is None


def test_what_is_kept(tmp_path: Path) -> None:
    writer = Writer(tmp_path, every=2, keep_last=2, keep_every=4)
    kept = []
    for step in 2, 4, 6, 8, 10, 11:
        writer.write(step)
        kept.append(steps(tmp_path))
    assert kept == [[2], [2, 4], [4, 6], [4, 6, 8], [4, 8, 10], [4, 8, 10, 11]]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "11", "4", "8"]


def test_a_newer_format_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("lm.checkpoint.manifest.FORMAT", 3)
        writer.write(1)
    assert "has format 3, and 2 is the newest known" in str(list_checkpoints(tmp_path)[0].problem)
    with pytest.raises(StorageError, match="update lm"):
        writer.restore_newest(ABSTRACT)
    assert steps(tmp_path) == [1]


def test_a_renamed_or_damaged_checkpoint_shows_in_the_listing(tmp_path: Path) -> None:
    Writer(tmp_path).write(1, 2)
    (tmp_path / "1").rename(tmp_path / "5")
    body = json.loads((tmp_path / "2" / "manifest.json").read_text())
    (tmp_path / "2" / "manifest.json").write_text(json.dumps({**body, "digest": "0" * 64}))
    problems = [info.problem for info in list_checkpoints(tmp_path)]
    assert problems == ["manifest.json is not as it was written", "it is the checkpoint of step 1"]


def test_a_state_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.write(1)
    state = make_state(2)
    state.params["norm"] = state.params["norm"].at[1].set(jnp.nan)
    assert writer.save(state, 2)
    writer.wait()
    assert (steps(tmp_path), writer.last_good, writer.counts()["saves_failed"]) == ([1], 1, 1)
    assert "the state is not finite: params/norm; the run goes on, the last good one is 1" in writer.said[0]
    assert not (tmp_path / "2").exists()


@pytest.fixture(params=["a limit on file sizes", "a full file system"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, Callable[[], object]]]:
    """A directory in which 2 MB do not fit until the call is made."""
    if request.param == "a limit on file sizes":
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
        yield tmp_path, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        return
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)], capture_output=True, text=True
    )
    if mount.returncode:
        pytest.skip(f"mounting needs root; a limit on file sizes stands in: {mount.stderr.strip()}")
    remount = ["mount", "-o", "remount,size=8m", str(tmp_path)]
    yield tmp_path, lambda: subprocess.run(remount, check=True)
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(
    small_disk: tuple[Path, Callable[[], object]], capfd: pytest.CaptureFixture[str]
) -> None:
    directory, make_room = small_disk
    writer = Writer(directory)
    writer.write(1)
    big = {"w": jnp.arange(2**19, dtype=jnp.float32)}
    assert writer.save(big, 2)
    writer.wait()
    assert writer.counts()["saves_failed"] == 1
    assert len(writer.said) == 1
    assert "2 was not saved" in writer.said[0]
    assert "\n" not in writer.said[0]
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in directory.iterdir()] == ["1"]
    restored = writer.restore_newest(ABSTRACT)
    assert restored is not None
    assert bits(restored[1]) == bits(make_state(1))
    make_room()
    assert writer.save(big, 3)
    writer.wait()
    assert steps(directory) == [1, 3]


def test_a_directory_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file")
    writer = Writer(tmp_path / "checkpoints")
    writer.save(make_state(1), 1)
    writer.wait()
    assert (writer.counts()["saves_failed"], len(writer.said)) == (1, 1)
    assert "there is no older one" in writer.said[0]


KILLED_AT = {
    "arrays are being written": """
        state = {"w": jnp.zeros(2**24)}
        writer.save(state, 3)
        while not os.path.exists(sys.argv[1] + "/3/state"):
            pass
        die()
    """,
    "the manifest is to be written": """
        checkpoint.Manifest.write = die
        writer.save(state, 3)
        writer.wait()
    """,
    "the oldest checkpoint is half removed": """
        type(checkpoint.epath.Path(".")).rmtree = lambda path, **_: die() if path.name == "1" else None
        writer.save(state, 3)
        writer.wait()
    """,
}


@pytest.mark.parametrize("moment", KILLED_AT)
def test_kill(tmp_path: Path, moment: str) -> None:
    Writer(tmp_path).write(1, 2)
    code = f"""
        import os, signal, sys
        import jax.numpy as jnp
        from lm.checkpoint import checkpoints as checkpoint
        die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        writer = checkpoint.Checkpoints(sys.argv[1], checkpoint.CheckpointConfig(), {{}}, print)
        state = {{"w": jnp.zeros(8)}}
        {textwrap.indent(textwrap.dedent(KILLED_AT[moment]), " " * 8).strip()}
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, ""), done.stderr
    expected, left = ([2, 3], "1") if "removed" in moment else ([1, 2], "3")
    assert steps(tmp_path) == expected
    assert (tmp_path / left).exists()
    writer = Writer(tmp_path)
    if expected == [1, 2]:
        restored = writer.restore_newest(ABSTRACT)
        assert restored is not None
        assert (restored[0], bits(restored[1])) == (2, bits(make_state(2)))
    writer.write(4)
    assert not (tmp_path / left).exists()
    assert steps(tmp_path) == [expected[1], 4]


def test_processes_share_the_reading_of_files() -> None:
    sizes = {f"state/{i}": 1000 - i for i in range(40)} | {"config.json": 3, "empty": 0}
    parts = checkpoint.shares(sizes, 4)
    assert sorted(name for part in parts for name in part) == sorted(sizes)
    loads = [sum(sizes[name] for name in part) for part in parts]
    assert max(loads) - min(loads) <= 1000
    assert checkpoint.shares(sizes, 4) == parts
    assert checkpoint.shares({"one": 5}, 3) == [["one"], [], []]


@pytest.mark.parametrize(
    ("before", "after", "memory"),
    [
        ({"stage": 2, "repeats": 2}, {"fsdp": 4}, "device"),
        ({"fsdp": 4}, {"stage": 2, "repeats": 2}, "host"),
        ({"stage": 2, "repeats": 4}, {"stage": 4, "repeats": 2, "fsdp": 2}, "device"),
    ],
    ids=str,
)
def test_a_pipeline_is_restored_as_another_one(
    before: dict[str, int], after: dict[str, int], memory: Literal["device", "host"], tmp_path: Path
) -> None:
    def abstract(sizes: dict[str, int]) -> Any:
        config = Config(
            model=ModelConfig(vocab_size=32, layers=8, width=16, heads=2),
            train=TrainConfig(optimizer_memory=memory),
            mesh=MeshConfig(**({"fsdp": 1} | sizes)),
        )
        mesh = make_mesh(config.mesh, jax.devices()[: math.prod(config.mesh.sizes.values())])
        return config, abstract_state(config, mesh)

    config, wanted = abstract(before)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, wanted)
    state = jax.jit(lambda: init_state(config, jax.random.key(0)), out_shardings=shardings)()
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(), {}, print)
    checkpoints.save(state, 3)
    checkpoints.close()
    _, other = abstract(after)
    _, found = Checkpoints(tmp_path, CheckpointConfig(), {}, print).restore_newest(other)
    for leaf, expected, original in zip(
        jax.tree.leaves(found), jax.tree.leaves(other), jax.tree.leaves(state), strict=True
    ):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (expected.shape, expected.dtype, expected.sharding)
        np.testing.assert_array_equal(np.asarray(leaf).reshape(-1), np.asarray(original).reshape(-1))


LATE_WRITE = """
import asyncio, threading
import tensorstore
import lm.checkpoint.checkpoints

async def save(late):
    async def fails():
        raise OSError("full disk")
    async def waits():
        await late
    await asyncio.gather(waits(), fails())

promise, late = tensorstore.Promise.new()
loop = asyncio.new_event_loop()
try:
    loop.run_until_complete(save(late))
except OSError:
    loop.close()
thread = threading.Thread(target=lambda: promise.set_result(1))
thread.start()
thread.join()

class Other:
    def __del__(self):
        raise RuntimeError("something else")
Other()
"""


def test_writes_that_end_after_a_failed_save_are_silent_and_nothing_else_is() -> None:
    ended = subprocess.run([sys.executable, "-c", LATE_WRITE], capture_output=True, text=True, check=True)
    assert "Event loop is closed" not in ended.stderr
    assert "something else" in ended.stderr
