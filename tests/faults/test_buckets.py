"""A bucket, of an emulator of Google's storage on this machine, that fails in all ways: the run goes on, loses nothing
but saves, and takes nothing for good that is not."""

import contextlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from etils import epath
from fsspec.config import conf, set_conf_env

from lm import files
from lm.checkpoint import manifest, retries
from lm.checkpoint.checkpoints import list_checkpoints
from lm.checkpoint.manifest import file_sizes
from lm.errors import StorageError
from lm.files import AppendOnlyFile
from lm.report.curves import curves
from lm.report.facts import read_facts
from lm.report.runs import compare
from lm.report.status import status
from lm.train.now import Now
from lm.train.run_directory import RunDirectory

from ..checkpoint.made import Writer, abstract, bits, small, steps
from ..report.made import begun, event, line, made
from .conftest import Run

pytest.importorskip("gcp_storage_emulator", reason="needs the package gcp-storage-emulator")
if find_spec("gcsfs") is None:  # to be imported later: it looks at variables
    pytest.skip("needs the package gcsfs", allow_module_level=True)

from ..end_to_end.conftest import Logged
from .faulty_bucket import FaultyBucket

# As `python -m lm`, but gcsfs asks again after a moment, and logs are uploaded often.
QUICK = """
import sys
import gcsfs.retry
from lm import files
from lm.cli import main
gcsfs.retry.min = lambda *_: 0.05
files.UPLOAD_SECONDS = 0.2
sys.exit(main())
"""


@pytest.fixture(scope="module")
def bucket() -> Iterator[FaultyBucket]:
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    assert int(os.environ["TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS"]) <= 60  # as lm has set it; here it is 1
    bucket = FaultyBucket()
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in bucket.variables.items():
            patch.setenv(variable, value)
        set_conf_env(conf, {"FSSPEC_GCS": bucket.variables["FSSPEC_GCS"]})  # fsspec has looked already
        yield bucket
    conf.pop("gcs")
    bucket.close()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits before the next try are short: those of gcsfs, of reads, and from save to save."""
    monkeypatch.setattr("gcsfs.retry.min", lambda *_: 0.02, raising=False)
    monkeypatch.setattr(manifest, "READ_WAITS", (0.05, 0.1))
    monkeypatch.setattr(retries, "FIRST_SECONDS", 0.2)


@pytest.fixture
def folder(bucket: FaultyBucket, quick: None, request: pytest.FixtureRequest) -> epath.Path:
    return epath.Path("gs://bucket/" + re.sub(r"\W", "_", request.node.name))  # brackets are patterns


def started(folder: epath.Path, **config: Any) -> Writer:
    """As another process would be: it has listed nothing yet."""
    epath.backend.fsspec_backend.fs(os.fspath(folder)).invalidate_cache()
    return Writer(folder, **config)


def saved(writer: Writer, step: int) -> bool:
    assert writer.save(small(step), step)
    writer.wait()
    return writer.last_good == step


def restored(folder: epath.Path, step: int) -> None:
    """That of this step is the newest, it is as it was saved, and nothing is said of any other."""
    writer = started(folder)
    found = writer.restore_newest(abstract(small(step)))
    assert found is not None
    assert (found[0], bits(found[1]), writer.said) == (step, bits(small(step)), [])


def test_what_is_saved_there_is_restored(folder: epath.Path) -> None:
    assert saved(started(folder), 1)
    restored(folder, 1)


def test_a_save_outlasts_a_moment_of_failures(folder: epath.Path, bucket: FaultyBucket) -> None:
    """Whatever is asked for first; in the uploads of the arrays; of what is written last."""
    for step, does, part, method in (
        (1, 503, "", ""),
        (2, 503, "/state/", "POST"),
        (3, "cut", "/state/", "POST"),
        (4, "hang", "/state/", "POST"),
        (5, "cut", "/manifest.json", "POST"),
    ):
        writer = started(folder)
        with bucket.failing(does, part, method, times=2) as rule:
            assert saved(writer, step), writer.said
        assert rule.met == 2
        assert (writer.said, writer.counts()["saves_failed"]) == ([], 0)
        restored(folder, step)


@pytest.mark.parametrize("does", [503, "cut", "hang"])
def test_an_upload_that_dies_leaves_nothing_that_counts(folder: epath.Path, bucket: FaultyBucket, does: Any) -> None:
    writer = started(folder)
    assert saved(writer, 1)
    with bucket.failing(does, "/2/manifest.json", "POST"), bucket.failing(503, "/2/config.json", "DELETE"):
        assert not saved(writer, 2)
    assert len(writer.said) == 1
    assert writer.said[0].startswith(f"checkpoint {folder}/2 was not saved: ")
    assert writer.said[0].endswith("; the run goes on, the last good one is 1; tried again in 0 s")
    assert writer.counts()["saves_failed"] == 1
    restored(folder, 1)
    assert "config.json" in file_sizes(folder / "2")  # which could not be removed
    time.sleep(0.3)
    assert str(writer.retry_due()).startswith("a save failed: ")
    assert saved(writer, 2)  # over what was left
    restored(folder, 2)


def test_a_save_that_a_kill_ends_is_cleared_away(folder: epath.Path, bucket: FaultyBucket) -> None:
    assert saved(started(folder), 1)
    with bucket.failing(503, "/2/manifest.json", "POST"), bucket.failing(503, "/2/config.json", "DELETE"):
        assert not saved(started(folder), 2)  # of which nothing is left, but what it wrote
    restored(folder, 1)
    assert saved(started(folder), 3)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "3"]


def test_storage_that_is_away_is_tried_ever_later_and_given_up_in_the_end(
    folder: epath.Path, bucket: FaultyBucket
) -> None:
    writer = started(folder, give_up_seconds=3)
    assert saved(writer, 1)
    with bucket.away():
        for step in (2, 3, 4):
            began = time.monotonic()
            assert writer.save(small(step), step)
            assert time.monotonic() - began < 1  # training goes on
            writer.wait()
            assert writer.counts()["saves_failed"] == step - 1
            while writer.retry_due() is None:
                writer.check()
                time.sleep(0.01)
            assert time.monotonic() - began > 0.2 * 2 ** (step - 2)
        time.sleep(1.7)
        with pytest.raises(StorageError, match=r"no checkpoint could be made for 3 s .*: "):
            writer.check()
    assert [line.partition(";")[2] for line in writer.said] == [
        f" the run goes on, the last good one is 1; tried again in {seconds} s" for seconds in (0, 0, 1)
    ]
    assert saved(writer, 5)
    writer.check()
    assert writer.retry_due() is None
    restored(folder, 5)
    assert steps(folder) == [1, 5]


def test_training_does_not_wait_for_a_save_that_hangs(folder: epath.Path, bucket: FaultyBucket) -> None:
    writer = started(folder, give_up_seconds=600)
    with bucket.failing("hang") as rule:
        began = time.monotonic()
        assert writer.save(small(1), 1)
        assert not writer.save(small(2), 2)
        assert not writer.save(small(3), 3)
        assert time.monotonic() - began < 1.5  # sooner than the first request can fail
        assert writer.said == ["step 2 is not saved: the save of step 1 is still going"]
        assert writer.counts()["saves_skipped"] == 2
        writer.wait()  # until what is asked is given up
        assert rule.met
    assert writer.counts()["saves_failed"] == 1
    assert saved(writer, 4)
    restored(folder, 4)


@pytest.mark.parametrize("does", [503, "hang"])
def test_a_restore_outlasts_a_moment_of_failures(folder: epath.Path, bucket: FaultyBucket, does: Any) -> None:
    assert saved(started(folder), 1)
    for part in ("/1/manifest.json?alt=media", "/state/", "/config.json"):
        with bucket.failing(does, part, "GET", times=2) as rule:
            restored(folder, 1)
        assert rule.met == 2
    assert steps(folder) == [1]


def test_what_cannot_be_read_for_long_is_not_bad(folder: epath.Path, bucket: FaultyBucket) -> None:
    writer = started(folder)
    assert saved(writer, 1)
    assert saved(writer, 2)
    before = file_sizes(folder)
    for part in ("/2/manifest.json?alt=media", "/2/state/_METADATA"):
        writer = started(folder)
        with bucket.failing(503, part, "GET"):
            found = writer.restore_newest(abstract(small(1)))
        assert found is not None
        assert found[0] == 1
        (line,) = writer.said
        assert line.startswith(f"checkpoint {folder}/2 is not used: ")
        assert line.endswith("; it stays where it is")
    assert file_sizes(folder) == before
    restored(folder, 2)


def test_storage_that_is_away_is_never_taken_for_a_run_that_is_new(folder: epath.Path, bucket: FaultyBucket) -> None:
    run = RunDirectory(folder)
    assert saved(started(run.checkpoints), 1)
    for fault in (bucket.away(), bucket.failing(503), bucket.failing(503, method="GET"), bucket.failing(403)):
        with fault:
            writer = started(run.checkpoints)
            for look in (
                lambda writer=writer: writer.restore_newest(abstract(small(1))),
                lambda: list_checkpoints(run.checkpoints),
                run.__enter__,
            ):
                with contextlib.suppress(StorageError):
                    pytest.fail(f"{look()}")
    restored(run.checkpoints, 1)


@pytest.mark.parametrize("does", [503, "cut", "hang"])
def test_a_log_stops_nothing_and_is_whole_in_the_end(
    folder: epath.Path, bucket: FaultyBucket, monkeypatch: pytest.MonkeyPatch, does: Any
) -> None:
    monkeypatch.setattr(files, "UPLOAD_SECONDS", 0.05)
    said: list[str] = []
    log = AppendOnlyFile(folder / "log.txt", said.append)
    log.append(b"first\n")
    while not (folder / "log.txt").exists():
        time.sleep(0.02)
    with bucket.failing(does, "/log.txt", "POST") as rule:
        began = time.monotonic()
        for number in range(50):
            log.append(b"%d\n" % number)
        assert time.monotonic() - began < 1
        while not said:
            log.append(b"again\n")
            time.sleep(0.05)
            assert time.monotonic() - began < 30
        assert rule.met
    (line,) = said
    assert line.startswith(f"cannot write {folder}/log.txt: ")
    log.append(b"last\n")
    log.close()
    lines = (folder / "log.txt").read_bytes().splitlines()
    assert lines[:51] == [b"first", *(b"%d" % number for number in range(50))]
    assert lines[-1] == b"last"
    assert len(said) == 1


def test_a_run_there_is_looked_at_from_anywhere(folder: epath.Path, tmp_path: Path) -> None:
    lines = [line(k, loss=5.0 - k, heldout_loss=4.5) for k in range(3)]
    made(folder / "sweep" / "a", lines=lines, events=[begun(host="elsewhere", ago=900)])
    made(folder / "sweep" / "b", lines=lines, events=[begun(host="elsewhere", ago=300), event("end", code=0)])
    (folder / "sweep" / "a" / "checkpoints" / "2").mkdir(parents=True)
    (folder / "sweep" / "a" / "checkpoints" / "2" / "config.json").write_text("{}")
    with Now(folder / "sweep" / "a" / "now.json", start="a", look=lambda: ("evaluation", 3)):
        until = time.monotonic() + 30
        while (facts := read_facts(folder / "sweep" / "a")).now is None:
            assert time.monotonic() < until
        found = status(facts)
        assert found | {"state": "running", "doing": "evaluation", "step": 3, "loss": 3.0} == found
    assert not (folder / "sweep" / "a" / "now.json").exists()
    rows = compare([f"{folder}/"], "run")
    assert [(row["run"], row["state"]) for row in rows] == [
        (f"{folder}/sweep/a", "silent"),
        (f"{folder}/sweep/b", "done"),
    ]
    [curve] = curves([f"{folder}/sweep/b"], ["loss"], x="step", smooth=1, log=False).curves
    assert curve.y == [5.0, 4.0, 3.0]


def test_a_run_through_failures(
    bucket: FaultyBucket, undisturbed: Path, workplace: Path, logged: Logged, tmp_path: Path
) -> None:
    """The first save succeeds all the same, the second and third fail, and no log can be written for a while."""
    run = "gs://bucket/run"
    with (
        bucket.failing(503, "/checkpoints/3/", times=3) as for_a_moment,
        bucket.failing("cut", "/checkpoints/6/manifest.json", "POST"),
        bucket.failing(403, "/checkpoints/9/state", "POST"),
        bucket.failing("cut", "run/log.txt", "POST", times=20),
        bucket.failing(503, "run/metrics.jsonl", "POST", times=20),
        bucket.failing(503, "run/journal.jsonl", "POST", times=8),
    ):
        said = Run(workplace, run, "--data.dir=undisturbed/data", program=("-c", QUICK)).wait(code=0)
    assert for_a_moment.met == 3
    assert "checkpoints/3 was not saved" not in said
    assert "checkpoints/6 was not saved: cannot write gs://bucket/run/checkpoints/6/manifest.json: " in said
    assert "checkpoints/9 was not saved: " in said
    assert said.count("the run goes on, the last good one is 3") == 2
    assert "Traceback" not in said
    same_as(undisturbed, run, logged, tmp_path)


@pytest.mark.slow
def test_a_run_whose_storage_hangs_and_is_away(
    bucket: FaultyBucket, undisturbed: Path, workplace: Path, logged: Logged, tmp_path: Path
) -> None:
    """It ends with exit code 5, and goes on from the last good checkpoint when there is one to be read."""
    run = "gs://bucket/hangs"
    options = ("--data.dir=undisturbed/data", "--checkpoint.give_up_seconds=6")
    with bucket.failing("hang", "/checkpoints/12/state", "POST"):
        said = Run(workplace, run, *options, program=("-c", QUICK)).wait(code=5)
    assert "the save of step 12 hangs, and is left behind" in said
    with bucket.away():
        said = Run(workplace, run, *options, program=("-c", QUICK)).wait(code=5)
    assert said.startswith("lm: cannot ")
    assert said.count("\n") == 1
    with bucket.failing(503, "/checkpoints/9/", "GET", times=4) as rule:
        said = Run(workplace, run, *options, program=("-c", QUICK)).wait(code=0)
    assert rule.met == 4
    assert "goes on from checkpoint 9\n" in said
    assert "not used" not in said
    same_as(undisturbed, run, logged, tmp_path)


def same_as(undisturbed: Path, run: str, logged: Logged, tmp_path: Path) -> None:
    """Bit for bit, and all of its logs are there."""
    epath.backend.fsspec_backend.fs(run).invalidate_cache()
    there = epath.Path(run)
    digest = {info.step: info.digest for info in list_checkpoints(there / "checkpoints")}
    assert digest[12] == list_checkpoints(undisturbed / "checkpoints")[-1].digest
    for name in ("metrics.jsonl", "log.txt", "journal.jsonl"):
        (tmp_path / name).write_bytes((there / name).read_bytes())
    assert logged(tmp_path) == logged(undisturbed)
    assert "all 12 steps are done" in (tmp_path / "log.txt").read_text()
    assert json.loads((tmp_path / "journal.jsonl").read_text().splitlines()[-1])["event"] == "end"
