"""One run in many processes: how a process finds out that it is one of them, starts with the others, and ends.

What an environment must say, where no cluster says it:

    JAX_COORDINATOR_ADDRESS   host:port of process 0
    JAX_NUM_PROCESSES         how many there are
    JAX_PROCESS_ID            which this one is, from 0
    LM_START_SECONDS          how long to wait for all of them; default 300
    LM_HEARTBEAT_SECONDS      how long a host may be silent (no power, no network) before the others end; default 40

Without these the processes of Cloud TPU slices (also several), SLURM, Open MPI and Kubernetes jobs are found as JAX
finds them. Here alone stands what JAX does not publish.
"""

import contextlib
import glob
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from lm.errors import ConfigError, HangError, Stopped
from lm.parallel.agreement import disagreement, facts_of
from lm.parallel.link import Link, join
from lm.parallel.wire import Place, say

FROZEN_SECONDS = 1800
"""After which JAX, with an abort, ends all processes when one is there and answers nothing. Longer than a run's
watchdog lets it be: that says more, and a process that was only stopped for a while goes on."""
_SHUTDOWN_SECONDS = 60


class Processes:
    """The processes of this run, seen from one of them; with a single one everything here is at once and free.

    What waits here waits for all, for as long as they live: LostProcessError when one has ended. The same calls must
    come in all processes, those of one name in the same order; threads with names of their own may call at any time.
    """

    def __init__(self, link: Link | None = None):
        self._link = link
        self._notes: dict[str, tuple[float, Any]] = {}
        self.index = link.place.index if link else 0
        self.count = link.place.count if link else 1

    @property
    def primary(self) -> bool:
        """Whether this is the process that builds data, prints, and writes all but arrays."""
        return self.index == 0

    def name(self, index: int) -> str:
        """For messages: which process, on which host."""
        return f"process {index} on {self._link.hosts[index]}" if self._link else "this process"

    def gather(self, name: str, value: Any) -> list[Any] | None:
        """The values (JSON) of all processes, in order, in the primary; None elsewhere."""
        return self._link.gather(name, value) if self._link else [value]

    def scatter(self, name: str, values: Sequence[Any] | None = None) -> Any:
        """Its own of the `values` (JSON), of which the primary gives one for each process."""
        if self._link:
            return self._link.scatter(name, values)
        assert values is not None
        return values[0]

    def broadcast(self, name: str, value: Any = None) -> Any:
        """The value (JSON) that the primary gives."""
        return self.scatter(name, [value] * self.count if self.primary else None)

    def agree(self, section: str, facts: Mapping[str, str]) -> None:
        """Raises ConfigError, in all processes, that names those whose facts are not those of the primary."""
        if self._link is None:
            return
        values = self.gather(f"agree/{section}", dict(facts))
        problem = None
        if values is not None:
            hosts = dict(enumerate(self._link.hosts))
            problem = disagreement({i: {section: value} for i, value in enumerate(values)}, hosts)
        if problem := self.broadcast(f"agree/{section}", problem):
            raise ConfigError(problem)

    def tell(self, name: str, value: Any) -> None:
        """Gives all processes a value (JSON), which they need not wait for."""
        if self._link:
            self._link.tell(name, value)

    def told(self, name: str) -> Any:
        """What was told last under this name, by whichever process; None: nothing."""
        return self._link.told(name) if self._link else None

    def note(self, name: str, value: Any) -> None:
        """Gives the primary a value (JSON), in place of the one before under this name; nobody waits."""
        if self._link:
            self._link.note(name, value)
        else:
            self._notes[name] = time.monotonic(), value

    def notes(self, name: str) -> dict[int, tuple[float, Any]]:
        """In the primary: the newest value of each process that noted one, and when (time.monotonic) it came here."""
        if self._link:
            return self._link.notes(name)
        return {0: self._notes[name]} if name in self._notes else {}

    def meet_before(self, requests: Mapping[str, str | None]) -> dict[str, str]:
        """What is to be done before the next step, by name, and why; in all processes before the same one.

        To be called before each step, with what this process asks for: a reason, or None, by name. What was asked
        for is returned soon afterwards, once, here and everywhere; then it can be asked for again. No device and no
        other process is waited for unless one asks for something.
        """
        if self._link:
            return self._link.meet_before(requests)
        return {name: reason for name, reason in requests.items() if reason is not None}

    def missing(self) -> list[str]:
        """In the primary: a line for each thing that is waited for, with those who did not come."""
        return self._link.missing() if self._link else []

    def explain_hangs(self, explain: Callable[[], Sequence[str]]) -> None:
        """In the primary: what `explain` gives, called in any thread, is added to the news that another one hangs."""
        if self._link:
            self._link.explain_hangs(explain)

    def end(self, error: HangError) -> NoReturn:
        """Ends all processes from any thread, while the main one hangs."""
        if self._link:
            self._link.end(error)
        say(f"lm: {error}")
        os._exit(error.exit_code)


ALONE = Processes()


@contextlib.contextmanager
def joined(config: Mapping[str, object]) -> Iterator[Processes]:
    """Makes this process one of the processes that the environment tells of. Before JAX touches devices.

    `config` is what must be the same in all of them, by dotted key; the source of lm and the versions of its
    libraries are compared too. Raises ConfigError, in every process that came, when they differ, and when the port of
    the coordinator is taken; MissingProcessError when not all come, or it cannot be reached. From then on the end of
    one process is the end of all, with its exit code: an error that leaves this context ends the process here.
    """
    place = _place()
    if place is None:
        yield ALONE
        return
    seconds = _number("LM_START_SECONDS", 300.0)
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS") or place.bind
    link = join(place, facts_of(config), seconds, bind=bind, heartbeat=_number("LM_HEARTBEAT_SECONDS", 40.0))
    try:
        _initialize(place, bind)
        yield Processes(link)
    except Stopped as stopped:
        if not stopped.together:
            link.end(stopped)
        _leave(link)
        if place.index == 0:
            raise
        raise Stopped("") from None
    except BaseException as error:
        link.end(error)
    else:
        _leave(link)


def _leave(link: Link) -> None:
    import jax

    try:
        link.leave()
    except BaseException as error:
        link.end(error)
    jax.distributed.shutdown()


def _initialize(place: Place, bind: str) -> None:
    import jax

    # Its handler of SIGTERM would take the place of ours, which stops all processes by itself.
    # And warnings of proxies are idle: the line between the processes stands.
    for flag in ("jax_enable_preemption_service", "jax_check_proxy_envs"):
        with contextlib.suppress(AttributeError):  # a version of JAX without it
            jax.config.update(flag, False)
    jax.distributed.initialize(
        place.address,
        place.count,
        place.index,
        local_device_ids=place.local_devices,
        cluster_detection_method="deactivate",
        coordinator_bind_address=bind,
        heartbeat_timeout_seconds=FROZEN_SECONDS,
        shutdown_timeout_seconds=_SHUTDOWN_SECONDS,
    )


def _place() -> Place | None:
    """Where the environment says that this process is; None: it is alone."""
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [name for name in names if os.environ.get(name)]
    if not given:
        return _place_in_cluster()
    missing = [name for name in names if name not in given]
    if missing:
        raise ConfigError(f"{' and '.join(given)} set, but not {' and '.join(missing)}: a run of many needs all three")
    address = os.environ["JAX_COORDINATOR_ADDRESS"]
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"JAX_COORDINATOR_ADDRESS is {address!r}; write host:port, such as 10.0.0.1:8476")
    count, index = (_number(name, 0) for name in names[1:])
    if count < 1 or not 0 <= index < count or count != int(count) or index != int(index):
        raise ConfigError(
            f"JAX_PROCESS_ID={os.environ[names[2]]} of JAX_NUM_PROCESSES={os.environ[names[1]]}: it must be from 0 to "
            "one less than the number of processes"
        )
    return Place(address, int(count), int(index)) if count > 1 else None


def _place_in_cluster() -> Place | None:
    if not _in_cluster():
        return None
    from jax._src.clusters import ClusterEnv

    seconds = int(_number("LM_START_SECONDS", 300.0))
    try:
        address, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, seconds
        )
    except Exception as error:  # of the cluster's own libraries too
        raise ConfigError(
            f"the processes of this cluster cannot be found: {error}; JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID say it in their place"
        ) from error
    if address is None or count is None or index is None or count == 1:
        return None
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return Place(
        address,
        count,
        index,
        hosts=tuple(hosts) if len(hosts) == count else (),
        local_devices=None if devices is None else tuple(devices),
    )


def _in_cluster() -> bool:
    """Whether to ask JAX, which takes its import, and on a TPU VM questions to a server."""
    environment = os.environ
    if _number("SLURM_NTASKS", 1) > 1 and "SLURM_PROCID" in environment and "SLURM_STEP_NODELIST" in environment:
        return True
    if _number("OMPI_COMM_WORLD_SIZE", 1) > 1 or "JOB_COMPLETION_INDEX" in environment:
        return True
    platforms = environment.get("JAX_PLATFORMS", "")
    if (platforms and "tpu" not in platforms.split(",")) or "TPU_SKIP_MDS_QUERY" in environment:
        return False
    several = "," in environment.get("TPU_WORKER_HOSTNAMES", "") + environment.get("TPU_PROCESS_ADDRESSES", "")
    return several or bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def _number(name: str, default: float) -> float:
    text = os.environ.get(name) or str(default)
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{name} must be a number, got {text!r}") from None
