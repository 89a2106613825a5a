"""Storage that is slow, fails or hangs: training goes on, and what was not saved is made up for."""

import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from lm.checkpoint import retries
from lm.checkpoint.checkpoints import Checkpoints
from lm.checkpoint.manifest import Manifest, epath
from lm.checkpoint.retries import Retries
from lm.errors import StorageError

from .made import Writer, abstract, bits, small, steps


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(retries, "time", clock)
    return clock


def test_saves_that_fail_are_tried_again_ever_later(clock: Clock) -> None:
    saves = Retries(0)
    assert saves.due() is None
    waited = []
    for _ in range(9):
        saves.started()
        waited.append(saves.failed("disk full"))
        clock.now += waited[-1] - 0.01
        assert saves.due() is None
        clock.now += 0.02
        assert saves.due() == "a save failed: disk full"
    assert waited == [10, 20, 40, 80, 160, 320, 600, 600, 600]
    saves.started()
    clock.now += 3
    saves.succeeded()
    assert saves.due() is None
    clock.now += 4
    assert saves.counts() == {
        "saves": 1,
        "saves_failed": 9,
        "saves_skipped": 0,
        "save_blocked_seconds": 0,
        "save_seconds": 3,
        "checkpoint_age_seconds": 4,
    }
    saves.started()
    assert saves.failed("disk full") == 10


def test_giving_up_counts_from_the_first_try_after_a_good_one(clock: Clock) -> None:
    saves = Retries(100)
    clock.now += 1e6  # a long time without a save
    saves.check()
    saves.started()
    clock.now += 60
    saves.succeeded()
    clock.now += 1e6
    saves.check()
    saves.started()
    saves.failed("disk full")
    clock.now += 99
    saves.started()
    saves.check()
    clock.now += 2
    with pytest.raises(StorageError, match=r"for 100 s \(checkpoint.give_up_seconds\): disk full"):
        saves.check()
    saves.succeeded()
    saves.check()
    saves.started()  # and hangs
    clock.now += 101
    with pytest.raises(StorageError, match="a save is still going"):
        saves.check()


def test_states_that_are_refused_are_no_fault_of_storage(clock: Clock) -> None:
    saves = Retries(100)
    for _ in range(20):
        saves.started()
        saves.refused()
        assert saves.due() is None
        clock.now += 11
        assert saves.due() == "the state that was due was not good"
    saves.check()
    saves.started()
    saves.failed("disk full")
    clock.now += 60
    saves.started()
    saves.refused()
    clock.now += 60
    with pytest.raises(StorageError):
        saves.check()


def test_what_failed_is_made_up_for_with_the_newer_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "FIRST_SECONDS", 0.2)
    (tmp_path / "checkpoints").write_text("a file")
    writer = Writer(tmp_path / "checkpoints", every=5)
    assert [step for step in range(1, 12) if writer.due(step)] == [5, 10]
    writer.save(small(5), 5)
    writer.wait()
    assert writer.retry_due() is None
    time.sleep(0.3)
    assert str(writer.retry_due()).startswith("a save failed: ")
    (tmp_path / "checkpoints").unlink()
    writer.save(small(7), 7)
    writer.wait()
    assert steps(tmp_path / "checkpoints") == [7]
    assert writer.retry_due() is None
    assert bits(writer.restore(7, abstract(small(7)))) == bits(small(7))
    assert writer.counts()["saves_failed"] == writer.counts()["saves"] == 1


def test_training_never_waits_for_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever part of a save it is in which storage hangs."""
    for name in "_make", "_wait_for", "_finish", "_prune":
        hang, real = threading.Event(), getattr(Checkpoints, name)
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, name, lambda self, *a, hang=hang, real=real: (hang.wait(60), real(self, *a))[1])
            writer = Writer(tmp_path / name)
            start = time.monotonic()
            assert writer.save(small(1), 1)
            assert not writer.save(small(2), 2)
            assert time.monotonic() - start < 30
            assert writer.retry_due() is None
            hang.set()
            writer.wait()
            assert writer.last_good == 1


def test_a_state_whose_last_steps_were_not_applied_is_not_saved_but_at_the_end(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.write(1)
    spoil = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = small(2, bad_streak=3)
    assert writer.save(state, 2)
    spoil(state)
    writer.wait()
    assert writer.said == ["step 2 is not saved: its last 3 steps were not applied; the last good one is 1"]
    assert (steps(tmp_path), sorted(path.name for path in tmp_path.iterdir())) == ([1], ["1"])
    writer.check()
    assert writer.save(small(3, bad_streak=4), 3, wait=True)
    writer.wait()
    assert steps(tmp_path) == [1, 3]
    assert Manifest.read(epath.Path(tmp_path / "3"), 3).scalars == {"step": 3, "bad_streak": 4}
    assert Manifest.read(epath.Path(tmp_path / "1"), 1).scalars == {"step": 1, "bad_streak": 0}


def test_a_checkpoint_of_the_same_step_is_never_written_over(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.write(1, 2)
    (tmp_path / "2" / "config.json").unlink()  # and then it could not be renamed
    other = Writer(tmp_path)
    other.last_good = 1
    other.save(small(2), 2)
    other.wait()
    assert (steps(tmp_path), other.last_good) == ([1, 2], 2)
    assert (tmp_path / "2.bad" / "manifest.json").exists()


HANGS = """
    import sys, threading, time
    import jax.numpy as jnp
    from lm.checkpoint import checkpoints as checkpoint, ending
    from lm.errors import DivergedError, StorageError
    ending.EXIT_SECONDS = 0.5
    checkpoint.Checkpoints._make = lambda *_: threading.Event().wait()
    config = checkpoint.CheckpointConfig(give_up_seconds=1)
    writer = checkpoint.Checkpoints(sys.argv[1], config, {}, print)
    try:
        try:
            writer.save({"w": jnp.zeros(8)}, 3)
            time.sleep(1.1)
            if sys.argv[2] == "diverges":
                raise DivergedError("diverged")
            writer.save({"w": jnp.zeros(8)}, 4, wait=True)
            writer.check()
        finally:
            writer.close()
    except (DivergedError, StorageError) as error:
        print(error)
        sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [("goes on", 5, "no checkpoint could be made for 1 s (checkpoint.give_up_seconds)"), ("diverges", 4, "diverged")],
)
def test_a_process_whose_storage_hangs_ends_all_the_same(how: str, code: int, said: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(HANGS), str(tmp_path), how]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == code, ended.stderr
    assert said in ended.stdout
    assert "the save of step 3 hangs, and is left behind" in ended.stdout
    assert ended.stderr == ""


def test_nothing_is_compiled_when_it_was_before(tmp_path: Path) -> None:
    state = jax.device_put({"w": jnp.zeros((5, 7)), "n": jnp.int32(3)}, jax.local_devices()[0])
    writer = Writer(tmp_path)
    writer.compile(abstract(state))
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **details: str | int) -> None:
        if event == "/jax/core/compile/jaxpr_to_mlir_module_duration":
            compiled.append(str(details["fun_name"]))

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        writer.save(state, 1)
        writer.wait()
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert (compiled, writer.last_good) == ([], 1)
