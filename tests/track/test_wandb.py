"""The library of Weights & Biases, with a server on this machine or none."""

import json
import math
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from wandb.proto import wandb_internal_pb2

import lm as package

from .conftest import Made
from .servers import Wandb

Track = Callable[..., str]
OWN = ("_step", "_runtime", "_timestamp", "_wandb")


def rows(service: Wandb) -> list[dict[str, Any]]:
    """As metrics.jsonl has them."""
    (run,) = service.runs.values()
    return [{"step": row["_step"]} | {name: x for name, x in row.items() if name not in OWN} for row in run["rows"]]


def test_what_is_logged_is_there_once(made: Callable[..., Made], service: Wandb, track: Track) -> None:
    run = made(steps=9)
    run.log(0, loss=0.1 + 0.2, **{"goodput/step": 0.5})
    run.log(1, loss="NaN", grad_norm="Infinity")
    said = track(run.path, "wandb")
    assert said == f"tracked at {service.url}/me/lm/runs/0123456789ab\nsent 2 logged steps to wandb\n"
    assert service.runs["0123456789ab"]["preempting"]
    run.log(4, loss=-1e-300)
    shutil.rmtree(run.path / "trackers")  # the service knows
    assert "sent 1 logged steps" in track(run.path, "wandb")
    run.note("end", code=0)
    assert "sent 0 logged steps" in track(run.path, "wandb")
    first, second, third = rows(service)
    assert first == {"step": 0, "loss": 0.1 + 0.2, "goodput/step": 0.5}
    assert math.isnan(second.pop("loss"))
    assert second == {"step": 1, "grad_norm": math.inf}
    assert third == {"step": 4, "loss": -1e-300}
    kept = service.runs["0123456789ab"]
    assert json.loads(kept["config"])["train"]["value"] == {"steps": 9}
    assert (kept["displayName"], kept["host"], kept["project"]) == ("made", "trainer", "lm")
    assert (kept["complete"], kept["exitcode"]) == (True, 0)


def test_what_the_service_did_not_keep_is_said_and_sent_again(
    made: Callable[..., Made], service: Wandb, track: Track
) -> None:
    run = made(steps=9)
    for step in range(5):
        run.log(step, loss=step)
    service.full = 3
    said = track(run.path, "wandb", code=5)
    missing = f"2 logged steps are not known to be there: `lm track {run.path} --to wandb` sends what is missing"
    assert said.splitlines()[-1] == f"lm: it has nothing after step 2; {missing}"
    service.full = None
    track(run.path, "wandb")
    assert rows(service) == run.lines()


# As `python -m lm`, with less time between looks and questions.
HURRY = """
import sys
from lm.cli import main
from lm.track import follow, wandb

follow.POLL_SECONDS, wandb.ASK_SECONDS, wandb.STALL_SECONDS = 0.2, 0.2, 2.0
sys.exit(main())
"""


def test_a_service_that_stops_taking_ends_who_follows(
    made: Callable[..., Made], service: Wandb, track: Track, tmp_path: Path
) -> None:
    """And what it did not take is sent by the next one."""
    taken = [{"_step": step, "loss": step} for step in range(3)]
    service.runs["0123456789ab"] = {"rows": taken, "config": "{}", "displayName": "made"}
    service.full = 3
    run = made(steps=9)
    for step in range(5):
        run.log(step, loss=step)
    with open(tmp_path / "log", "wb") as log:
        follower = subprocess.Popen(
            [sys.executable, "-c", HURRY, "track", str(run.path), "--to", "wandb", "--follow"],
            env=os.environ | {"PYTHONPATH": str(Path(package.__file__).parent.parent)},
            cwd=tmp_path,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert follower.stdin is not None
    assert follower.stdout is not None
    try:
        assert follower.wait(30) == 5
    finally:
        follower.stdin.close()
    tracked_at, said = follower.stdout.readlines()
    assert tracked_at.startswith("tracked at ")
    assert re.fullmatch(r"it has nothing after step 2, for \d+ s\n", said)
    assert rows(service) == run.lines()[:3]
    service.full = None
    assert "sent 2 logged steps" in track(run.path, "wandb")
    assert rows(service) == run.lines()


def test_after_a_rewind_it_keeps_what_it_has(made: Callable[..., Made], service: Wandb, track: Track) -> None:
    run = made(steps=9)
    for step in range(4):
        run.log(step, loss=step)
    track(run.path, "wandb")
    before = rows(service)
    run.metrics.write_text("".join(run.metrics.read_text().splitlines(keepends=True)[:2]))
    for step in range(2, 6):
        run.log(step, loss=10 * step, rewinds=1)
    track(run.path, "wandb")
    assert rows(service) == [*before, *run.lines()[4:]]


def test_offline_it_is_in_a_file(made: Callable[..., Made], track: Track, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = made(steps=9)
    for step in range(3):
        run.log(step, loss=step / 3)
    assert track(run.path, "wandb") == "sent 3 logged steps to wandb\n"
    run.log(3, loss=7.5)
    assert track(run.path, "wandb") == "sent 1 logged steps to wandb\n"
    found = [step for path in sorted(run.path.glob("trackers/wandb/offline-run-*/*.wandb")) for step in offline(path)]
    assert found == run.lines()


def offline(path: Path) -> list[dict[str, Any]]:
    found = []
    for data in records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            values = {
                item.nested_key[0] if item.nested_key else item.key: json.loads(item.value_json)
                for item in record.history.item
            }
            found.append({"step": record.history.step.num} | {name: x for name, x in values.items() if name not in OWN})
    return found


def records(contents: bytes) -> Iterator[bytes]:
    """Of a .wandb file: LevelDB's log format, after 7 bytes of its own that count as part of the first block."""
    position, whole, first_or_all, last_or_all = 7, b"", (1, 2), (1, 4)
    while position + 7 <= len(contents):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", contents, position)
        part = contents[position + 7 : position + 7 + length]
        whole = part if kind in first_or_all else whole + part
        if kind in last_or_all:
            yield whole
        position += 7 + length
