"""The line between processes, with threads for processes: who is missing, who differs, and where all stop."""

import random
import re
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lm.errors import ConfigError, HangError, LostProcessError, MissingProcessError
from lm.parallel import processes
from lm.parallel.hub import Hub
from lm.parallel.link import Link, join
from lm.parallel.processes import Processes
from lm.parallel.wire import Place, frame

FACTS = {"config": {"train.steps": "10"}, "code": {"lm/a.py": "1"}, "version": {"jax": "1"}}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def together(count: int, work: Callable[[int], Any], only: list[int] | None = None) -> list[Any]:
    """What `work` returned, or raised, for each process."""
    results: list[Any] = [None] * count

    def run(index: int) -> None:
        try:
            results[index] = work(index)
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,), daemon=True) for index in only or range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


@pytest.fixture
def address() -> str:
    return f"127.0.0.1:{free_port()}"


def all_have_ended(codes: list[int]) -> None:
    """Returns when the three processes have; the threads that would have to end hang in a collective."""
    until = time.monotonic() + 20
    while len(codes) < 3 and time.monotonic() < until:
        time.sleep(0.05)
    assert set(codes) == {6}


def links(address: str, count: int) -> list[Link]:
    return together(count, lambda index: join(Place(address, count, index), FACTS, 30, bind=address))


def test_values_go_round(address: str) -> None:
    found = [Processes(link) for link in links(address, 5)]

    def work(index: int) -> Any:
        mine = found[index]
        first = [mine.gather("x", [index, k]) for k in range(3)]
        other = threading.Thread(target=lambda: mine.gather("in another thread", None))
        other.start()
        scattered = mine.scatter("y", [f"for {i}" for i in range(5)] if mine.primary else None)
        other.join()
        return first, scattered, mine.broadcast("z", {"a": None} if mine.primary else None)

    results = together(5, work)
    assert results[0][0] == [[[i, k] for i in range(5)] for k in range(3)]
    assert results[3] == ([None] * 3, "for 3", {"a": None})


def test_a_process_alone_needs_nobody() -> None:
    alone = Processes()
    assert alone.primary
    assert alone.gather("x", 1) == [1]
    assert alone.broadcast("x", 2) == alone.scatter("x", [2]) == 2
    assert alone.meet_before({"stop": None}) == {}
    assert alone.meet_before({"stop": "SIGTERM", "save": None}) == {"stop": "SIGTERM"}
    alone.note("phase", 1)
    alone.note("phase", 2)
    assert [(index, value) for index, (_, value) in alone.notes("phase").items()] == [(0, 2)]
    assert alone.notes("nothing") == {}
    assert alone.missing() == []
    alone.agree("data", {"fingerprint": "1"})


def test_facts_found_later_are_compared_too(address: str) -> None:
    found = links(address, 3)
    results = together(3, lambda i: Processes(found[i]).agree("data", {"fingerprint": "abc" if i < 2 else "def"}))
    for error in results:
        assert isinstance(error, ConfigError)
        assert f"process 2 on {socket.gethostname()}:\n    data: fingerprint is def, not abc" in str(error)
        assert "process 1 " not in str(error)


@pytest.mark.parametrize(
    ("section", "name", "said"),
    [
        ("config", "train.steps", "config: train.steps is other, not 10"),
        ("config", "new", "config: new is other, not missing"),
        ("code", "lm/a.py", "code: lm/a.py is another file"),
        ("version", "jax", "version: jax is other, not 1"),
    ],
)
def test_a_difference_at_the_start(section: str, name: str, said: str, address: str) -> None:
    facts = FACTS | {section: FACTS[section] | {name: "other"}}
    for error in together(3, lambda i: join(Place(address, 3, i), facts if i == 1 else FACTS, 30, bind=address)):
        assert isinstance(error, ConfigError)
        assert f"  process 1 on {socket.gethostname()}:\n    {said}" in str(error)


def test_who_is_missing(address: str) -> None:
    hosts = ("a", "b", "c", "d")
    began = time.monotonic()
    results = together(4, lambda i: join(Place(address, 4, i, hosts), FACTS, 1.5, bind=address), only=[0, 2])
    assert time.monotonic() - began < 20
    for error in (results[0], results[2]):
        assert isinstance(error, MissingProcessError)
        assert f"2 of 4 processes did not come to {address} within 1.5 s: process 1 on b, 3 on d;" in str(error)


def test_a_coordinator_that_cannot_be_reached(address: str) -> None:
    with pytest.raises(MissingProcessError, match=f"process 1 cannot reach the coordinator .process 0. at {address}: "):
        join(Place(address, 2, 1), FACTS, 0.5)
    with pytest.raises(MissingProcessError, match=r"at no\.such\.host\.invalid:80: "):
        join(Place("no.such.host.invalid:80", 2, 1), FACTS, 0.5)


def test_a_port_that_is_taken() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"port {address.rpartition(':')[2]} .* is taken"):
            join(Place(address, 2, 0), FACTS, 5)
        threading.Thread(target=lambda: other.accept()[0].close(), daemon=True).start()
        with pytest.raises(MissingProcessError, match="something else listens there"):
            join(Place(address, 2, 1), FACTS, 1)


def test_the_coordinator_ends_before_all_have_come(address: str) -> None:
    host, port = address.split(":")
    with socket.create_server((host, int(port))) as process_0:

        def hear_one_and_end() -> None:
            sock, _ = process_0.accept()
            sock.recv(2**16)
            sock.sendall(frame(["heard"]))
            sock.close()

        threading.Thread(target=hear_one_and_end, daemon=True).start()
        with pytest.raises(MissingProcessError, match=f"process 0 at {address} ended before all 3 processes had come"):
            join(Place(address, 3, 1), FACTS, 5)


def test_two_with_one_number(address: str) -> None:
    numbers = [0, 1, 1]
    for error in together(3, lambda i: join(Place(address, 3, numbers[i]), FACTS, 30, bind=address)):
        assert isinstance(error, ConfigError)
        assert "two processes have the number 1" in str(error)


def test_a_stranger_at_the_door(address: str) -> None:
    host, port = address.split(":")

    def work(index: int) -> Any:
        if index < 2:
            time.sleep(index)
            return join(Place(address, 2, index), FACTS, 30, bind=address)
        time.sleep(0.5)
        with socket.create_connection((host, int(port))) as sock:
            sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            return sock.recv(100)

    first, second, answer = together(3, work)
    assert isinstance(first, Link)
    assert isinstance(second, Link)
    assert answer == b""


@pytest.mark.parametrize("seed", range(4))
def test_all_stop_at_the_same_step(seed: int, address: str) -> None:
    """Whoever asks, and however far apart they are: after at most the step that the fastest had begun."""
    found = links(address, 4)
    draw = random.Random(seed)
    asks = {draw.randrange(4), draw.randrange(4)}
    begun = [0] * 4

    def work(index: int) -> tuple[int, str | None]:
        rate = random.Random(f"{seed}/{index}")
        for step in range(100):
            asked = "SIGTERM" if index in asks and step >= 20 else None
            reason = found[index].meet_before({"stop": asked}).get("stop")
            if reason:
                return step, reason
            begun[index] = step
            time.sleep(rate.uniform(0, 0.005))
        return 100, None

    results = together(4, work)
    assert len(set(results)) == 1, results
    step, reason = results[0]
    assert 20 <= step < 100
    assert max(begun) == step - 1
    assert reason is not None
    assert any(reason.startswith(f"SIGTERM at process {index} on ") for index in asks)


@pytest.mark.parametrize("seed", range(4))
def test_all_do_the_same_before_the_same_step(seed: int, address: str) -> None:
    """Whatever is asked for, by whom, and how often."""
    found = links(address, 3)
    asked: list[dict[str, int]] = [{} for _ in range(3)]

    def work(index: int) -> list[dict[str, str]]:
        rate = random.Random(f"{seed}/{index}")
        wanted: dict[str, str | None] = {"save": None, "stop": None, "else": None}
        answers: list[dict[str, str]] = []
        while len(answers) < 200:
            for name in wanted:
                if wanted[name] is None and rate.random() < (0.03 if len(answers) < 150 else 0):
                    wanted[name] = f"{name} {len(answers)}"
                    asked[index][name] = asked[index].get(name, 0) + 1
            answers.append(found[index].meet_before(wanted))
            wanted |= dict.fromkeys(answers[-1])
            time.sleep(rate.uniform(0, 0.002))
        assert not any(wanted.values()), wanted
        return answers

    results = together(3, work)
    assert results[0] == results[1] == results[2]
    for name in ("save", "stop", "else"):
        times = sum(name in answer for answer in results[0])
        assert 0 < max(one.get(name, 0) for one in asked) <= times <= sum(one.get(name, 0) for one in asked)


def test_nobody_is_asked_and_nobody_waits(address: str) -> None:
    first, second = links(address, 2)
    assert [first.meet_before({"save": None}) for _ in range(1000)] == [{}] * 1000  # the other has not begun one
    assert second.meet_before({"save": "now"}) == {}
    assert first.meet_before({})["save"].startswith("now at process 1 on ")


def test_process_0_leaves_when_all_others_have_heard_it(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With it goes the hub: what it had not told yet would look like its sudden end."""
    send = Hub._send

    def slowly(hub: Hub, peer: Any, message: Any) -> None:
        time.sleep(0.2 if message == ["bye"] else 0)
        send(hub, peer, message)

    monkeypatch.setattr(Hub, "_send", slowly)
    found = links(address, 3)

    def work(index: int) -> float:
        found[index].leave()
        return time.monotonic()

    left = together(3, work)
    assert left[0] > max(left[1:]) + 0.1


def test_the_newest_note_of_each_is_there(address: str) -> None:
    found = links(address, 4)
    began = time.monotonic()
    together(4, lambda index: [found[index].note("phase", [index, k]) for k in range(index, 50)])
    together(4, lambda index: found[index].gather("until here", None))  # what was sent before it has come
    notes = found[0].notes("phase")
    assert {index: value for index, (_, value) in notes.items()} == {index: [index, 49] for index in range(4)}
    assert all(began <= when <= time.monotonic() for when, _ in notes.values())
    assert found[1].notes("phase") == {}


def test_who_did_not_come(address: str) -> None:
    found = links(address, 3)
    threads = [threading.Thread(target=lambda i=i: found[i].gather("read back", None), daemon=True) for i in (0, 1)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 10
    while len(lines := found[0].missing()) != 1 or lines[0].count("process") > 1:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert re.fullmatch(r"process 2 on .* has not come to 'gather/read back#1'", lines[0])
    found[2].gather("read back", None)
    for thread in threads:
        thread.join(10)
    assert found[0].missing() == []


def test_a_hang_is_told_with_what_is_known_of_the_others(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr("lm.parallel.link.os._exit", codes.append)
    monkeypatch.setattr("lm.parallel.link.ENDING_SECONDS", 0.2)
    found = links(address, 3)
    found[0].explain_hangs(lambda: ["process 2 was not heard of"])
    results = together(
        3, lambda i: found[1].end(HangError("no progress")) if i == 1 else found[i].gather("never complete", i)
    )
    all_have_ended(codes)
    for error in (results[0], results[2]):
        assert isinstance(error, LostProcessError)
        assert str(error).startswith("process 1 on ")
        assert str(error).endswith("has ended, and so does the run: no progress; process 2 was not heard of")
        assert error.exit_code == 6


@pytest.mark.parametrize(
    ("address", "bound"),
    [
        ("127.0.0.1:7", "127.0.0.1:7"),
        ("localhost:7", "localhost:7"),
        ("[::1]:7", "[::1]:7"),
        ("10.0.0.1:7", "[::]:7"),
        ("a.b:7", "[::]:7"),
    ],
)
def test_only_this_host_reaches_an_address_of_this_host(address: str, bound: str) -> None:
    assert Place(address, 2, 0).bind == bound


def test_the_hub_listens_where_it_is_told(address: str) -> None:
    def work(index: int) -> Any:
        if index == 0:
            return join(Place(address, 2, 0), FACTS, 30)
        time.sleep(0.5)
        sockets = [line.split() for path in tables for line in path.read_text().splitlines()[1:]]
        port = f":{int(address.rpartition(':')[2]):04X}"
        listening = [fields[1] for fields in sockets if fields[1].endswith(port) and fields[3] == "0A"]
        return listening, join(Place(address, 2, 1), FACTS, 30)

    tables = [path for path in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")) if path.exists()]
    if not tables:
        pytest.skip("there is no /proc/net to see who listens")
    _, (listening, _) = together(2, work)
    assert [place.partition(":")[0] for place in listening] == ["0100007F"]


def test_the_end_of_one_is_heard_by_all(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr("lm.parallel.link.os._exit", codes.append)
    monkeypatch.setattr("lm.parallel.link.ENDING_SECONDS", 0.5)
    found = links(address, 3)

    def work(index: int) -> Any:
        if index == 2:
            time.sleep(0.2)
            found[2]._sock.shutdown(socket.SHUT_RDWR)  # as a kill does
            return None
        return found[index].gather("never complete", index)

    results = together(3, work)
    for error in results[:2]:
        assert isinstance(error, LostProcessError)
        assert "process 2 on" in str(error)
        assert error.exit_code == 6
    all_have_ended(codes)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1"},
            "JAX_COORDINATOR_ADDRESS set, but not JAX_NUM_PROCESSES and JAX_PROCESS_ID",
        ),
        ({"JAX_COORDINATOR_ADDRESS": "a", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "write host:port"),
        ({"JAX_COORDINATOR_ADDRESS": "a:x", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "write host:port"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2 of"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "must be a number"),
    ],
)
def test_an_environment_that_cannot_be(given: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as raised, processes.joined({}):
        pass
    assert said in str(raised.value)


@pytest.mark.parametrize("given", [{}, {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "n1"}])
def test_one_process_joins_nothing(given: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with processes.joined({}) as found:
        assert (found.count, found.index, found.primary) == (1, 0, True)


def test_the_processes_of_a_slurm_job(monkeypatch: pytest.MonkeyPatch) -> None:
    job = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "node[3-5]",
        "SLURM_NTASKS": "3",
        "SLURM_PROCID": "2",
        "SLURM_LOCALID": "0",
    }
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    place = processes._place()
    assert place is not None
    assert (place.count, place.index, place.address.partition(":")[0]) == (3, 2, "node3")
