"""Which host is named as the one that holds the others up."""

import os
import subprocess
import sys
from pathlib import Path

import lm as package
from launch.local import free_port
from lm.train.slowest import slowest

Notes = dict[int, tuple[float, dict[str, float]]]


def notes(count: int = 8) -> Notes:
    """Of processes that are alike but for a little noise."""
    return {
        index: (
            100.0 + 0.001 * index,
            {"step": 20, "step_seconds": 1.0, "input": 0.002 + 0.0001 * index, "host": 0.02 - 0.0001 * index},
        )
        for index in range(count)
    }


def name(index: int) -> str:
    return f"process {index} on host-{index}"


def changed(index: int, **values: float) -> Notes:
    found = notes()
    found[index] = found[index][0], found[index][1] | values
    return found


def test_nobody_is_named_where_all_are_alike() -> None:
    assert slowest(notes(), name) is None
    assert slowest(notes(1), name) is None
    assert slowest({}, name) is None
    slow = {i: (when, note | {"input": 0.5, "save": 0.2}) for i, (when, note) in notes().items()}
    assert slowest(slow, name) is None  # nobody is slower than the others


def test_one_is_named_with_the_reason() -> None:
    assert slowest(changed(5, input=0.4), name) == (
        "process 5 on host-5 holds the others up: it waits for input for 0.4 s of each step, where half of the "
        "processes need at most 0.0023 s"
    )
    line = slowest(changed(2, save=0.3), name)
    assert line is not None
    assert line.startswith("process 2 on host-2 holds the others up: it saves for 0.3 s of each step")
    assert slowest(changed(5, input=0.09), name) is None  # not a tenth of a step
    most = changed(5, input=0.4)
    most[1] = most[1][0], most[1][1] | {"host": 0.6}
    line = slowest(most, name)
    assert line is not None
    assert line.startswith("process 1 on host-1 holds the others up: it computes on the host for 0.6 s of each step")


def test_one_whose_note_comes_late_is_named() -> None:
    late = notes()
    late[6] = late[6][0] + 0.5, late[6][1]
    assert slowest(late, name) == (
        "process 6 on host-6 holds the others up: it ended step 20 0.503 s later than half of them"
    )
    late[6] = late[6][0], late[6][1] | {"step": 10}  # an older note says nothing about this step
    assert slowest(late, name) is None


PROCESS = """
import sys, time
from lm.parallel.link import join
from lm.parallel.processes import Processes
from lm.parallel.wire import Place
from lm.train.slowest import slowest

link = join(Place(sys.argv[1], 3, int(sys.argv[2])), {}, 60)
processes = Processes(link)
for step in range(4):
    began = time.monotonic()
    time.sleep(0.3 if processes.index == 2 else 0.001)
    waited = time.monotonic() - began
    processes.gather("as on the devices", None)
    processes.broadcast("as on the devices")
    processes.note("times", {"step": step, "step_seconds": time.monotonic() - began, "input": waited})
processes.gather("the notes are there", None)
if processes.primary:
    print(slowest(processes.notes("times"), processes.name))
link.leave()
"""


def test_real_processes_of_which_one_reads_slowly() -> None:
    address = f"127.0.0.1:{free_port()}"
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, address, str(index)],
            env=os.environ | {"PYTHONPATH": str(Path(package.__file__).parent.parent)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(3)
    ]
    said = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert said[0].startswith("process 2 on ")
    assert " holds the others up: it waits for input for 0.3" in said[0]
    assert said[1:] == ["", ""]
