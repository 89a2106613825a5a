"""The line between the processes of a run, on which they find each other, exchange values and hear who has ended.

Process 0 is the hub. It listens at the coordinator's address until all have come, and then leaves the port to
JAX's own service; each process keeps its connection for as long as it lives. So the end of a process, in whatever
way it came, is known everywhere at once and by name, where JAX's heartbeat takes a minute and ends the rest with an
abort. Devices are never touched: background threads may exchange values here while the main thread trains, where a
collective of the devices would have to come in the same order everywhere.
"""

import contextlib
import os
import random
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from lm.errors import ConfigError, HangError, LmError, LostProcessError, MissingProcessError, Stopped
from lm.parallel.agreement import Facts
from lm.parallel.hub import Hub
from lm.parallel.wire import Place, each, exit_after, frame, keep_alive, say

ENDING_SECONDS = 5.0
"""What a process may still take to end by itself when it has heard that another one ended."""
HEARD_SECONDS = 10.0
"""After which what listens at the coordinator's address, and does not answer, is taken for something else."""
_LEAVE_SECONDS = 300.0
_EXIT_SECONDS = 15.0
"""What the end itself may take: to say why, and in process 0 to wait for the others to hear it."""


class Link:
    """The end of the line in each process. Threads may use it at the same time.

    What waits here waits for as long as all processes live, and raises LostProcessError when one has ended.
    """

    def __init__(
        self, place: Place, hosts: Sequence[str], sock: socket.socket, messages: Iterator[Any], hub: Hub | None
    ):
        self.place, self.hosts = place, tuple(hosts)
        self._sock, self._messages, self._hub = sock, messages, hub
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._given: dict[str, Any] = {}
        self._calls: dict[str, int] = {}
        self._told: dict[str, Any] = {}
        self._at = 0  # how often `meet_before` has returned
        self._asked = False  # whether all are being asked where they are, so that none may begin another step
        self._asking: set[str] = set()  # what this process asked for, and has no answer to
        self._meetings: dict[int, dict[str, str]] = {}  # by the number of the call that returns it
        self._lost: LostProcessError | None = None
        self._ending = threading.Event()
        self._bye = threading.Event()
        threading.Thread(target=self._listen, name="link", daemon=True).start()

    def gather(self, name: str, value: Any) -> list[Any] | None:
        """Waits for all; in process 0 the values (JSON) of all processes in order, elsewhere None."""
        return self._give("gather/" + name, value)

    def scatter(self, name: str, values: Sequence[Any] | None) -> Any:
        """Waits for all; one of the `values` (JSON) that process 0 gives for each process."""
        return self._give("scatter/" + name, values)

    def tell(self, name: str, value: Any) -> None:
        """Gives all processes a value (JSON), which they need not wait for."""
        self._send(["tell", name, value])

    def told(self, name: str) -> Any:
        """What was told last under this name; None: nothing. Raises LostProcessError when a process has ended."""
        with self._changed:
            if self._lost is not None:
                raise self._lost
            return self._told.get(name)

    def note(self, name: str, value: Any) -> None:
        """Gives process 0 a value (JSON), in place of the one before; nobody waits."""
        self._send(["note", name, value])

    def notes(self, name: str) -> dict[int, tuple[float, Any]]:
        """In process 0: the newest value of each process under this name, and when (time.monotonic) it came."""
        return self._hub.notes(name) if self._hub else {}

    def missing(self) -> list[str]:
        """In process 0: a line for each thing that is waited for, with those who did not come."""
        return self._hub.missing() if self._hub else []

    def explain_hangs(self, explain: Callable[[], Sequence[str]]) -> None:
        """In process 0: what `explain` gives is added to the news that another process hangs."""
        if self._hub:
            self._hub.explain = explain

    def meet_before(self, requests: Mapping[str, str | None]) -> dict[str, str]:
        """What all do before the next step, by name, and why: the same answer everywhere.

        Called before each step. It costs nothing until one asks; then each says how many steps it has begun (which,
        unlike their numbers, never goes back), and all meet after the latest of these.
        """
        with self._changed:
            known = self._asking.union(*self._meetings.values())
            new = {name: reason for name, reason in requests.items() if reason is not None and name not in known}
            if new:
                self._asking |= new.keys()
                self._asked = True
                self._send(["ask", new])
            while self._asked:
                self._wait()
            self._at += 1
            return self._meetings.pop(self._at, {})

    def leave(self) -> None:
        """The end of a process whose work, like that of all others, is done. Waits for them."""
        self._send(["bye"])
        until = time.monotonic() + _LEAVE_SECONDS
        with self._changed:
            while not self._bye.is_set() and time.monotonic() < until:
                self._wait(1.0)
        self._ending.set()

    def end(self, error: BaseException) -> NoReturn:
        """The end of a process that ends alone, or because another one did: says why to all, and exits.

        Not by way of the interpreter's end, where JAX waits for processes that will not come.
        """
        self._ending.set()
        if not isinstance(error, (LmError, Stopped, KeyboardInterrupt)):
            with self._changed:  # a broken collective is heard of before the reason
                self._changed.wait_for(lambda: self._lost is not None, timeout=2.0)
                error = self._lost or error
        code = error.exit_code if isinstance(error, (LmError, Stopped)) else 1
        if isinstance(error, KeyboardInterrupt):
            code = 130
        if self._lost is not None and (self._lost.exit_code != code or isinstance(error, HangError)):
            # what failed here, or waited, did so for that
            error, code = self._lost, self._lost.exit_code
        exit_after(_EXIT_SECONDS, code)
        if not isinstance(error, LostProcessError):
            message = ["end", code, str(error) or type(error).__name__]
            sender = threading.Thread(target=self._send, args=(message,), daemon=True)
            sender.start()
            sender.join(2.0)  # the hub may be stopped
        if isinstance(error, (LmError, Stopped)):
            say(f"lm: {error}")
        else:
            say("".join(traceback.format_exception(error)).rstrip())
        self._exit(code)

    def _give(self, name: str, value: Any) -> Any:
        with self._changed:
            number = self._calls[name] = self._calls.get(name, 0) + 1
        key = f"{name}#{number}"
        self._send(["give", key, value])
        with self._changed:
            while key not in self._given:
                self._wait()
            return self._given.pop(key)

    def _wait(self, seconds: float | None = None) -> None:
        if self._lost is not None:
            raise self._lost
        self._changed.wait(seconds)

    def _send(self, message: Any) -> None:
        with self._sending, contextlib.suppress(OSError):  # that the hub is gone is heard by the other thread
            self._sock.sendall(frame(message))

    def _listen(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            for message in self._messages:
                self._take(message)
                if message[0] == "ended":
                    self._end_soon(ENDING_SECONDS)
        if not self._bye.is_set() and self._lost is None:
            self._lose(f"process 0 on {self.hosts[0]}", None, "")
            self._end_soon(0.0)  # JAX aborts without its coordinator

    def _take(self, message: Any) -> None:
        with self._changed:
            match message:
                case ["given", key, value]:
                    self._given[key] = value
                case ["told", name, value]:
                    self._told[name] = value
                case ["where?"]:
                    self._asked = True
                    self._send(["at", self._at])
                case ["meet", number, reasons]:
                    self._asked = False
                    self._asking -= reasons.keys()
                    self._meetings.setdefault(number, {}).update(reasons)
                case ["ended", who, code, text]:
                    self._lose(who, code, text)
                case ["bye"]:
                    self._bye.set()
            self._changed.notify_all()

    def _lose(self, who: str, code: int | None, text: str) -> None:
        with self._changed:
            said = text or "it was killed, or it crashed, or its host or network failed"
            self._lost = LostProcessError(f"{who} has ended, and so does the run: {said}")
            if code:
                self._lost.exit_code = code
            self._changed.notify_all()

    def _end_soon(self, seconds: float) -> None:
        """Ends the process unless the main thread, which may hang in a collective for ever, does it in time."""
        if not self._ending.wait(seconds):
            assert self._lost is not None
            exit_after(_EXIT_SECONDS, self._lost.exit_code)
            say(f"lm: {self._lost}")
            self._exit(self._lost.exit_code)

    def _exit(self, code: int) -> NoReturn:
        if self._hub is not None:  # with this process goes JAX's coordinator: the others abort if they still run
            self._hub.others_gone.wait(ENDING_SECONDS + 2.0)
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(code)


def join(place: Place, facts: Facts, seconds: float, *, bind: str | None = None, heartbeat: float = 40.0) -> Link:
    """Finds the other processes. Raises, on all that came, MissingProcessError when not all come, and ConfigError when
    they do not agree.

    A host that says nothing for `heartbeat` seconds, not even that it is there, counts as gone from then on.
    """
    hub = Hub(place, seconds, bind=bind, heartbeat=heartbeat) if place.index == 0 else None
    until = time.monotonic() + seconds
    hello = ["hello", place.index, place.count, socket.gethostname(), os.getpid(), facts]
    if hub is not None:
        sock = hub.connect()
        hub.start()
        sock.sendall(frame(hello))
        messages = each(sock)
        next(messages)
    else:
        sock, messages = _reach(place, hello, until, seconds, heartbeat)
    sock.settimeout(seconds + 30.0)  # process 0 may have started later, and waits as long as this one
    try:
        kind, content = next(messages)
    except (OSError, StopIteration, ValueError) as error:
        raise MissingProcessError(
            f"process 0 at {place.address} ended before all {place.count} processes had come: see its output"
        ) from error
    if kind == "missing":
        raise MissingProcessError(content)
    if kind == "refused":
        raise ConfigError(content)
    sock.settimeout(None)
    return Link(place, content, sock, messages, hub)


def _reach(
    place: Place, hello: Any, until: float, seconds: float, heartbeat: float
) -> tuple[socket.socket, Iterator[Any]]:
    """A connection to process 0, which has heard who this is."""
    host, _, port = place.address.rpartition(":")
    problem = "nothing was tried"
    while (left := until - time.monotonic()) > 0:
        try:
            sock = socket.create_connection((host.strip("[]"), int(port)), timeout=min(HEARD_SECONDS, left))
        except OSError as error:
            problem = f"{error.strerror or error}"
            time.sleep(min(left, random.uniform(0.1, 0.5)))
            continue
        try:
            keep_alive(sock, heartbeat)
            sock.sendall(frame(hello))
            messages = each(sock)
            if next(messages) == ["heard"]:
                return sock, messages
        except (OSError, StopIteration, ValueError):
            pass
        problem = "something else listens there, or an earlier start of the run that still goes on"
        sock.close()
        time.sleep(min(max(until - time.monotonic(), 0), 0.5))
    raise MissingProcessError(
        f"process {place.index} cannot reach the coordinator (process 0) at {place.address}: {problem}; tried for "
        f"{seconds:g} s. Check JAX_COORDINATOR_ADDRESS, that process 0 was started, and that its port is open"
    )
