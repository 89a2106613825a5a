"""The hub, in process 0: waits until all processes are there and agree, then passes on what they say."""

import contextlib
import errno
import os
import resource
import selectors
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm.errors import ConfigError, HangError, some
from lm.parallel.agreement import disagreement
from lm.parallel.wire import Frames, Place, frame, keep_alive, say


class Hub:
    """Runs in a thread of process 0: waits for all, compares what they bring, then passes on what they say."""

    def __init__(self, place: Place, seconds: float, *, bind: str | None, heartbeat: float):
        """Raises ConfigError when it cannot listen at the port."""
        _allow_connections(place.count)
        self.place, self.deadline, self.seconds = place, time.monotonic() + seconds, seconds
        self.heartbeat = heartbeat
        self.others_gone = threading.Event()
        """Set when no other process is connected any more."""
        self.explain: Callable[[], Sequence[str]] = self.missing
        """What is added to the news that a process hangs."""
        self._listener = _listen(bind or place.bind, place.address)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._peers: dict[int, _Peer] = {}
        self._names: list[str] = []
        self._given: dict[str, dict[int, Any]] = {}
        self._wanted: dict[str, str] = {}
        """What is to be done at the next meeting, and why."""
        self._at: dict[int, int] | None = None
        """Where those are that have said so; None: nobody was asked."""
        self._notes: dict[str, dict[int, tuple[float, Any]]] = {}
        self._ended = False

    def connect(self) -> socket.socket:
        """A connection for process 0 itself, to be made before the start."""
        mine, its = socket.socketpair()
        self._own = _Peer(its)
        self._selector.register(its, selectors.EVENT_READ, self._own)
        return mine

    def notes(self, name: str) -> dict[int, tuple[float, Any]]:
        """The newest value of each process, and when (time.monotonic) it came. From any thread."""
        return dict(self._notes.get(name, {}))

    def missing(self) -> list[str]:
        """Which processes the others wait for, and where. From any thread."""
        waiting = {f"has not come to {name!r}": dict(given) for name, given in dict(self._given).items()}
        if self._at is not None:
            waiting[f"was asked where it is, and has not said so ({', '.join(self._wanted)})"] = dict(self._at)
        return [
            f"{some([name for index, name in enumerate(self._names) if index not in there], 8)} {what}"
            for what, there in waiting.items()
        ]

    def start(self) -> None:
        threading.Thread(target=self._run_or_exit, name="hub", daemon=True).start()

    def _run_or_exit(self) -> None:
        try:
            self._run()
        except Exception:  # without the hub all would wait for ever
            say(traceback.format_exc())
            os._exit(1)

    def _run(self) -> None:
        refusal = self._gather_all()  # a message, for all
        self._selector.unregister(self._listener)
        self._listener.close()  # before anyone is welcome: JAX's service needs the port
        if refusal is not None:
            self._refuse(refusal)
            return
        self._names = [str(self._peers[index]) for index in range(self.place.count)]
        hosts = [self._peers[index].host for index in range(self.place.count)]
        for peer in self._peers.values():
            self._send(peer, ["welcome", hosts])
        self._note_gone()
        while self._peers:
            for peer, message in self._messages(None):
                self._handle(peer, message)

    def _refuse(self, message: Sequence[str]) -> None:
        """Tells all that are connected, also those whose names did not come to be read."""
        peers = [key.data for key in self._selector.get_map().values()]
        for peer in sorted(peers, key=lambda peer: peer is self._own):  # last: it may end at once, and this thread too
            if not peer.heard:
                self._send(peer, ["heard"])
            self._send(peer, message)

    def _gather_all(self) -> Sequence[str] | None:
        """Waits until all are here and agree; else why they cannot start: "missing", or "refused", and the reason."""
        count = self.place.count
        while len(self._peers) < count:
            left = self.deadline - time.monotonic()
            if left <= 0:
                return "missing", self._missing()
            for peer, message in self._messages(left):
                match message:
                    case ["hello", int(index), int(its_count), str(host), int(pid), dict(facts)] if peer.index is None:
                        peer.host, peer.pid, peer.facts = host, pid, facts
                    case None:
                        self._drop(peer)  # it may come again
                        continue
                    case _:
                        continue
                peer.heard = True
                self._send(peer, ["heard"])
                if its_count != count or not 0 <= index < count:
                    its_place = f"process {index} of {its_count} on {peer.host}"
                    return "refused", f"{its_place} came to a run of {count} processes"
                other = self._peers.get(index)
                if other is not None:
                    return "refused", f"two processes have the number {index}: {other.where} and {peer.where}"
                peer.index = index
                self._peers[index] = peer
        problem = disagreement(
            {index: peer.facts for index, peer in self._peers.items()},
            {index: peer.host for index, peer in self._peers.items()},
        )
        return problem and ("refused", problem)

    def _missing(self) -> str:
        missing = [i for i in range(self.place.count) if i not in self._peers]
        names = [f"{i} on {self.place.hosts[i]}" if i < len(self.place.hosts) else str(i) for i in missing]
        here = [f"{i} on {self._peers[i].host}" for i in sorted(self._peers)]
        return (
            f"{len(missing)} of {self.place.count} processes did not come to {self.place.address} within "
            f"{self.seconds:g} s: process {some(names, 8)}; here are {some(here, 8)}. Start what is missing, or give "
            "it more time with LM_START_SECONDS"
        )

    def _messages(self, seconds: float | None) -> Iterator[tuple["_Peer", Any]]:
        """What has come: (who, message), and (who, None) when a connection is at its end."""
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                with contextlib.suppress(OSError):
                    sock, _ = self._listener.accept()
                    keep_alive(sock, self.heartbeat)
                    self._selector.register(sock, selectors.EVENT_READ, _Peer(sock))
                continue
            peer: _Peer = key.data
            try:
                chunk = peer.sock.recv(2**20)
                messages = peer.frames.feed(chunk)
            except (OSError, ValueError):
                chunk, messages = b"", []
            for message in messages:
                yield peer, message
            if not chunk:
                self._selector.unregister(peer.sock)
                yield peer, None

    def _handle(self, peer: "_Peer", message: Any) -> None:
        match message:
            case None:
                self._gone(peer)
            case ["give", name, value]:
                self._given.setdefault(name, {})[peer.number] = value
                self._pass_on(name)
            case ["tell", name, value]:
                for other in list(self._peers.values()):
                    self._send(other, ["told", name, value])
            case ["note", name, value]:
                self._notes.setdefault(name, {})[peer.number] = time.monotonic(), value
            case ["ask", dict(reasons)]:
                for name, reason in reasons.items():
                    self._wanted.setdefault(name, f"{reason} at {peer}")
                if self._at is None:
                    self._at = {}
                    for other in list(self._peers.values()):
                        self._send(other, ["where?"])
            case ["at", number] if self._at is not None:
                self._at[peer.number] = number
                if len(self._at) == self.place.count:
                    meeting = ["meet", max(self._at.values()) + 1, self._wanted]
                    self._at, self._wanted = None, {}
                    for other in list(self._peers.values()):
                        self._send(other, meeting)
            case ["end", code, text]:
                self._tell_end(peer, code, text)
            case ["bye"]:
                peer.left = True
                if all(other.left for other in self._peers.values()):
                    # last to this process, which ends then, and with it what the others have not heard
                    for other in sorted(self._peers.values(), key=lambda peer: peer is self._own):
                        self._send(other, ["bye"])

    def _pass_on(self, name: str) -> None:
        given = self._given[name]
        if len(given) < self.place.count:
            return
        del self._given[name]
        scattered = given[0] if name.startswith("scatter/") else None
        gathered = [given[index] for index in range(self.place.count)]
        for index, peer in list(self._peers.items()):
            mine = scattered[index] if scattered is not None else gathered if index == 0 else None
            self._send(peer, ["given", name, mine])

    def _gone(self, peer: "_Peer") -> None:
        self._drop(peer)
        self._note_gone()
        if not peer.left:
            self._tell_end(peer, None, "")

    def _tell_end(self, peer: "_Peer", code: int | None, text: str) -> None:
        peer.left = True
        if self._ended:  # those that follow end because of the first
            return
        self._ended = True
        if code == HangError.exit_code and peer is not self._own:  # which has it from there
            text = "; ".join([text, *self.explain()])
        for other in list(self._peers.values()):
            if other is not peer:
                self._send(other, ["ended", str(peer), code, text])

    def _note_gone(self) -> None:
        if set(self._peers) <= {0}:
            self.others_gone.set()

    def _drop(self, peer: "_Peer") -> None:
        peer.sock.close()
        if peer.index is not None:
            self._peers.pop(peer.index, None)

    def _send(self, peer: "_Peer", message: Any) -> None:
        with contextlib.suppress(OSError):  # its end shows where it is read
            peer.sock.sendall(frame(message))


@dataclass(eq=False)
class _Peer:
    sock: socket.socket
    frames: "Frames" = field(default_factory=Frames)
    index: int | None = None
    host: str = ""
    pid: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    heard: bool = False
    """Whether it was told that its name was understood."""
    left: bool = False
    """Whether its end is no surprise."""

    @property
    def number(self) -> int:
        assert self.index is not None
        return self.index

    def __str__(self) -> str:
        return f"process {self.index} on {self.where}"

    @property
    def where(self) -> str:
        return f"{self.host} (pid {self.pid})"


def _listen(bind: str, address: str) -> socket.socket:
    host, _, port = bind.rpartition(":")
    host = host.strip("[]")
    problem: OSError = OSError("no address")
    # A kernel without IPv6 has no "::"; where there is one, it takes IPv4 too.
    for family, name in ((socket.AF_INET6, host), (socket.AF_INET, "0.0.0.0" if host == "::" else host)):
        try:
            sock = socket.socket(family, socket.SOCK_STREAM)
        except OSError as error:
            problem = error
            continue
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            sock.bind((name, int(port)))
            sock.listen(4096)
            sock.setblocking(False)
            return sock
        except OSError as error:
            problem = error
            sock.close()
            if error.errno == errno.EADDRINUSE:
                break
    what = "is taken" if problem.errno == errno.EADDRINUSE else f"cannot be listened at: {problem.strerror or problem}"
    raise ConfigError(
        f"port {port} on this host, where process 0 coordinates the run ({address}), {what}; stop what uses it, or "
        "choose another port"
    )


def _allow_connections(count: int) -> None:
    """Each takes a file of this process, here and in JAX's service, and the usual limit is 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1024 + 4 * count
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, limit), hard))
