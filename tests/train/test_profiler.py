"""Traces of configured steps, and of those asked for while a run goes on; whatever fails, training does not."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import pytest

from lm import config as configs
from lm.errors import ConfigError, StorageError
from lm.experiment import Config
from lm.train import profile_request, profiler
from lm.train.config import ProfileConfig
from lm.train.profile_request import Answer, Request, answered, ask, withdraw
from lm.train.profiler import Profiler
from lm.train.run_directory import RunDirectory

Start = Callable[..., Profiler]
DATA = "--data.paths=x.txt"


@pytest.mark.parametrize(
    ("steps", "problem"),
    [
        ("5", "must be as 20:25"),
        ("a:b", "must be as 20:25"),
        ("-1:3", "must be as 20:25"),
        ("1:2:3", "must be as 20:25"),
        ("1 : 3", "must be as 20:25"),
        ("9:3", "9:3 has no step"),
        ("4:4", "4:4 has no step"),
        ("0:101", "101 steps, more than 100"),
        ("995:1001", "goes beyond train.steps = 1000"),
    ],
)
def test_steps_that_cannot_be(steps: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=f"profile.steps: .*{problem}"):
        configs.check(configs.override(Config(), [DATA, "--profile.steps", steps]))


def test_steps() -> None:
    config = configs.override(Config(), [DATA, "--profile.steps=995:1000"])
    configs.check(config)
    assert list(config.profile.range) == [995, 996, 997, 998, 999]
    assert not ProfileConfig().range
    assert all(difference.free for difference in configs.diff(configs.override(Config(), [DATA]), config))


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def start(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """Begins a run in tmp_path whose steps are those."""
    monkeypatch.setattr(profile_request, "LOCAL_SECONDS", 0.02)
    started = []

    def made(steps: str = "") -> Profiler:
        run = RunDirectory(tmp_path)
        run.tensorboard.mkdir(exist_ok=True)
        started.append(Profiler(ProfileConfig(steps), run, said.append))
        return started[-1]

    yield made
    for one in started:
        one.close()


double = jax.jit(lambda x: x @ x)


def train(profiler: Profiler, steps: range) -> None:
    """As the loop does."""
    x = jax.numpy.ones((8, 8))
    for k in [*steps, None]:
        if profiler.turns(k):
            jax.block_until_ready(x)
            profiler.turn(k)
        profiler.mark(k)
        if k is not None:
            x = double(x)


def traces(run: Path) -> list[Path]:
    return sorted((run / "tensorboard" / "plugins" / "profile").glob("*/*.xplane.pb"))


def steps_in(file: Path) -> list[int]:
    plane = jax.profiler.ProfileData.from_file(str(file)).find_plane_with_name("/host:CPU")
    events = [event for line in plane.lines for event in line.events if event.name == "train"]
    return sorted(dict(event.stats)["step_num"] for event in events)


def no_folder_is_left(run: Path) -> bool:
    return not list(run.glob(".profile.*"))


def test_configured_steps(start: Start, tmp_path: Path, said: list[str]) -> None:
    profiler = start("3:5")
    train(profiler, range(8))
    profiler.close()
    (file,) = traces(tmp_path)
    assert steps_in(file) == [3, 4]
    assert said[0] == "profile: traces steps 3 to 4"
    assert f"`lm profile {tmp_path}`" in said[1]
    assert no_folder_is_left(tmp_path)


@pytest.mark.parametrize(("steps", "done", "expected"), [("3:5", range(4, 8), [4]), ("3:9", range(8), [3, 4, 5, 6, 7])])
def test_steps_that_are_done_in_part(
    start: Start, tmp_path: Path, steps: str, done: range, expected: list[int]
) -> None:
    """A run that goes on in the middle of them, and one that is stopped there."""
    profiler = start(steps)
    train(profiler, done)
    profiler.close()
    assert steps_in(traces(tmp_path)[0]) == expected


def test_steps_are_traced_once(start: Start, tmp_path: Path) -> None:
    """Though the run goes back before them; what was traced until then is written."""
    profiler = start("3:6")
    train(profiler, range(5))
    train(profiler, range(2, 8))
    profiler.close()
    assert [steps_in(file) for file in traces(tmp_path)] == [[3, 4]]


def wait_until(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_request(start: Start, tmp_path: Path) -> None:
    profiler = start()
    assert not profiler.turns(0)
    ask(tmp_path, Request(2, "abc"))
    wait_until(lambda: profiler.turns(6))
    assert answered(tmp_path, "abc") == Answer("abc")
    assert not (tmp_path / "profile").exists()
    train(profiler, range(6, 12))
    profiler.close()
    (file,) = traces(tmp_path)
    assert answered(tmp_path, "abc") == Answer("abc", trace=file.parent.name)
    assert answered(tmp_path, "of another") is None
    assert steps_in(file) == [6, 7]


@pytest.mark.parametrize("text", ["", "now, please", '{"steps": 0, "id": ""}', '{"steps": null}', "[1]"])
def test_a_file_that_somebody_touched(start: Start, tmp_path: Path, text: str) -> None:
    profiler = start()
    (tmp_path / "profile").write_text(text)
    wait_until(lambda: profiler.turns(6))
    train(profiler, range(6, 20))
    profiler.close()
    assert steps_in(traces(tmp_path)[0]) == [6, 7, 8, 9, 10]


def test_a_request_for_too_many_steps(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler, "MOST_PROFILED_STEPS", 3)
    made = start()
    ask(tmp_path, Request(1000, "abc"))
    wait_until(lambda: made.turns(0))
    train(made, range(20))
    made.close()
    assert steps_in(traces(tmp_path)[0]) == [0, 1, 2]


def test_a_request_before_the_end(start: Start, tmp_path: Path) -> None:
    made = start()
    ask(tmp_path, Request(2, "abc"))
    wait_until(lambda: made.turns(0))
    made.close()
    found = answered(tmp_path, "abc")
    assert found is not None
    assert found.problem == "the run has ended"


def test_a_request_before_another_was_begun(start: Start, tmp_path: Path) -> None:
    """The newest counts, and both are answered."""
    made = start()
    ask(tmp_path, Request(2, "first"))
    wait_until(lambda: answered(tmp_path, "first"))
    ask(tmp_path, Request(3, "second"))
    wait_until(lambda: answered(tmp_path, "second"))
    wait_until(lambda: answered(tmp_path, "first") != Answer("first"))
    train(made, range(6))
    made.close()
    (file,) = traces(tmp_path)
    assert steps_in(file) == [0, 1, 2]
    assert answered(tmp_path, "first") == Answer("first", problem="another trace was asked for")
    assert answered(tmp_path, "second") == Answer("second", trace=file.parent.name)


@pytest.mark.parametrize("id", ["second", ""])
def test_a_request_during_a_trace(start: Start, tmp_path: Path, id: str) -> None:
    made = start()
    ask(tmp_path, Request(3, "first"))
    wait_until(lambda: made.turns(0))
    made.turn(0)
    if id:
        ask(tmp_path, Request(3, id))
        wait_until(lambda: answered(tmp_path, id))
    else:
        (tmp_path / "profile").touch()
        wait_until(lambda: not (tmp_path / "profile").exists())
    train(made, range(1, 8))
    made.close()
    found = answered(tmp_path, "first")
    assert found is not None
    assert found.trace in [file.parent.name for file in traces(tmp_path)]
    second = answered(tmp_path, "second")
    assert second is None or second.trace or second.problem == "the one before is still being written"


def test_an_answer_that_cannot_be_written_comes_later(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = start()
    ask(tmp_path, Request(2, "abc"))
    wait_until(lambda: made.turns(0))

    def fails(*_: object) -> None:
        raise StorageError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(profile_request, "write_atomically", fails)
        train(made, range(4))
        wait_until(lambda: traces(tmp_path))
        time.sleep(0.1)
        assert answered(tmp_path, "abc") == Answer("abc")
    wait_until(lambda: answered(tmp_path, "abc") != Answer("abc"))
    assert answered(tmp_path, "abc") == Answer("abc", trace=traces(tmp_path)[0].parent.name)


def test_a_request_is_replaced_and_removed_by_nobody_else(tmp_path: Path) -> None:
    ask(tmp_path, Request(2, "first"))
    with pytest.raises(ConfigError, match="a trace is asked for already"):
        ask(tmp_path, Request(3, "second"))
    withdraw(tmp_path, Request(3, "second"))
    assert (tmp_path / "profile").exists()
    withdraw(tmp_path, Request(2, "first"))
    assert not (tmp_path / "profile").exists()


def test_an_error_in_the_middle(start: Start, tmp_path: Path, said: list[str]) -> None:
    """The profiler is free again, and nothing is left."""
    made = start("3:9")
    for k in range(5):
        if made.turns(k):
            made.turn(k)
        made.mark(k)
    made.close()
    assert said[-1] == "profile: no trace of steps 3 to 8: the run has ended"
    assert no_folder_is_left(tmp_path)
    again = start("0:2")
    train(again, range(3))
    again.close()
    assert len(traces(tmp_path)) == 1


def test_another_profiler_is_active(start: Start, tmp_path: Path, said: list[str]) -> None:
    with jax.profiler.trace(tmp_path / "theirs"):
        train(start("3:5"), range(8))
    assert "Only one profile may be run at a time" in said[0]
    assert len(said) == 1
    assert not traces(tmp_path)
    assert no_folder_is_left(tmp_path)


def test_a_profiler_that_fails_at_the_end(
    start: Start, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = jax.profiler.stop_trace

    def fails() -> None:
        stop()
        raise RuntimeError("the device does not answer")

    monkeypatch.setattr(jax.profiler, "stop_trace", fails)
    train(start("3:5"), range(8))
    assert said[-1] == "profile: no trace of steps 3 to 4: the device does not answer"
    assert no_folder_is_left(tmp_path)


def test_a_disk_that_is_full(start: Start, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(profiler.os, "rename", fails)
    made = start()
    ask(tmp_path, Request(2, "abc"))
    wait_until(lambda: made.turns(3))
    train(made, range(3, 8))
    made.close()
    assert said[-1] == "profile: no trace of steps 3 to 4: No space left on device"
    found = answered(tmp_path, "abc")
    assert found is not None
    assert found.problem == "No space left on device"


def test_a_bucket(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is traced goes through a folder of this machine; the file that is looked for comes last."""
    written = []

    def write(path: Path, contents: bytes) -> None:
        written.append(path.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)

    monkeypatch.setattr(profiler, "is_url", lambda path: True)
    monkeypatch.setattr(profiler, "write_atomically", write)
    made = start("3:5")
    train(made, range(8))
    made.close()
    assert steps_in(traces(tmp_path)[0]) == [3, 4]
    assert written[-1].endswith(".xplane.pb")


def test_a_bucket_that_hangs_holds_up_no_later_trace(
    start: Start, tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = threading.Event()
    monkeypatch.setattr(profiler, "is_url", lambda path: True)
    monkeypatch.setattr(profiler, "write_atomically", lambda path, contents: free.wait())
    made = start("0:1")
    made._wanted(Request(1, "later"))
    begin = time.monotonic()
    train(made, range(6))
    assert time.monotonic() - begin < 30
    assert said[-1] == "profile: no trace of step 1: the one before is still being written"
    assert answered(tmp_path, "later") == Answer("later", "", "the one before is still being written")
    free.set()


def test_storage_that_fails_is_asked_again(start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take, failures = profile_request.Watch._take, iter([True, True])

    def fails(watch: profile_request.Watch) -> Request | None:
        if next(failures, False):
            raise StorageError("no route to host")
        return take(watch)

    monkeypatch.setattr(profile_request.Watch, "_take", fails)
    made = start()
    ask(tmp_path, Request(2))
    wait_until(lambda: made.turns(0))


def test_what_a_killed_run_left_is_removed(start: Start, tmp_path: Path) -> None:
    (tmp_path / ".profile.abc" / "plugins").mkdir(parents=True)
    start()
    assert no_folder_is_left(tmp_path)


def test_an_answer_that_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "profile.answer").write_text(json.dumps({"id": "abc"})[:-3])
    assert answered(tmp_path, "abc") is None
