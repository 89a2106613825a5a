"""A run in the background of machines that a shell reaches: local processes, ssh, Cloud TPU VMs.

On each host there is one folder for the launch. In it: the code, by its digest; for each process i a folder with its
config, program, log, exit code, and a lock that is held for as long as anything of it runs. Hosts may share the folder.
"""

import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launch.commands import Commands
from launch.hosts import Host, Hosts, raise_failed
from launch.local import copy_lines
from launch.owner import shell
from launch.patience import Patience
from launch.target import (
    NONE,
    RUNNING,
    STOPPED,
    UNKNOWN,
    Run,
    Target,
    ended,
    of_others,
    raise_ended,
    shell_path,
    write_files,
)
from launch.tree import unpack
from lm.errors import LaunchError, Stopped

SYNC_SECONDS = 1800.0
SETUP_SECONDS = 300.0
STOP_SECONDS = 900.0
_OTHERS, _RUNNING, _NOTHING = 20, 21, 22
_PACKAGES = ("jax", "flax", "optax", "orbax.checkpoint", "grain", "sentencepiece")


class Background(Target):
    """One process of a run on each of `hosts`.

    Args:
      folder: on the hosts, for launches; ~/ is the home there.
      variables: the environment of process i, with how it finds the others.
      workdir: where relative paths of the config start; default: the launch's own folder.
    """

    def __init__(
        self,
        name: str,
        commands: Commands,
        hosts: Sequence[Host],
        folder: str,
        variables: Callable[[int], Mapping[str, str]],
        workdir: str | None = None,
    ):
        super().__init__(name, commands)
        self.hosts = Hosts(hosts, commands)
        self.folder = f"{folder.rstrip('/')}/{name}"
        self.base = shell_path(self.folder)
        self.variables = variables
        self.workdir = shell_path(workdir) if workdir else self.base

    def up(self, run: Run) -> None:
        nothing = f"nothing was started; what was copied goes with `{self.verb('delete')}`"
        with self.commands.stage(f"looking at {len(self.hosts.hosts)} host(s)", "nothing was changed anywhere"):
            self.reach()
        digest = self._digest(run)
        with self.commands.stage("looking for another launch of this name", nothing):
            running = self._claim(digest)
            if all(running):
                self.commands.say(f"{self.name} is running already: {self.verb('logs --follow')}")
                return
        with self.commands.stage(f"copying the code ({len(run.archive) / 2**20:.1f} MiB)", nothing):
            self._sync(run)
        with self.commands.stage("looking at Python there", nothing):
            self._check_python(run)
        some = f"it may run on some hosts: `{self.verb('stop')}` ends it there, `{self.verb('up')}` starts the rest"
        with self.commands.stage("starting", some):
            self._start(run, digest, running)
        if not self.commands.dry_run:
            self.commands.say(f"{self.name} is running: {self.verb('logs --follow')}, {self.verb('status')}")

    def reach(self) -> None:
        """Raises LaunchError that names the hosts which cannot be reached, or have not what is needed there."""
        script = """\
for it in bash tar gzip flock setsid; do
    command -v $it > /dev/null || { echo there is no program $it there >&2; exit 1; }
done"""
        self.hosts.each(script, "nothing was started, as these hosts cannot be used")

    def status(self) -> None:
        done = self.hosts.try_each(
            lambda i: f"cd {self.base} 2>/dev/null || exit {_NOTHING}\n{_state(i)}\ntail -n 1 {i}/log.txt"
        )
        failed = self.hosts.failed(done, {_NOTHING: f"no launch {self.name} there"})
        for host, one in zip(self.hosts.hosts, done, strict=True):
            if self.commands.dry_run:
                continue
            state, _, last = one.out.strip().partition("\n")
            word = RUNNING if state == RUNNING else "not started" if not state else ended(state)
            self.commands.say(f"{host.name}: {failed.get(host.name, word)}{'  | ' + last if last else ''}")
        if any(one.code not in (0, _NOTHING) for one in done):
            raise LaunchError(f"what {self.name} does on hosts that did not answer cannot be known")

    def ends(self) -> list[str]:
        """Of each process its exit code, STOPPED for that of one that `stop` has asked, NONE where it has
        ended without one, RUNNING, or UNKNOWN: no answer."""
        done = self.hosts.try_each(lambda i: f"cd {self.base} || exit {_NOTHING}\n{_state(i)}")
        return [NONE if one.code == _NOTHING else UNKNOWN if one.code else one.out.strip() or NONE for one in done]

    def logs(self, *, follow: bool) -> None:
        ends: list[str] = []
        try:
            self.show_logs(follow=follow)
            if follow and not self.commands.dry_run:
                ends = self._until_ended()
        except KeyboardInterrupt:
            self.commands.say(f"the run goes on; {self.verb('stop')} ends it")
            return
        raise_ended(self.name, ends)

    def _until_ended(self) -> list[str]:
        """How it ended; a connection that is lost is no end. Raises LaunchError when hosts do not answer any more."""
        patience = Patience(self.commands.say)
        while True:
            ends = self.ends()
            if RUNNING not in ends and UNKNOWN not in ends:
                return ends
            if RUNNING in ends:
                patience.begin()
                time.sleep(1)
            elif not patience.wait(LaunchError(f"how {self.name} goes cannot be known, as hosts do not answer")):
                raise LaunchError(f"how {self.name} ended is not known, as hosts do not answer: {self.verb('status')}")
            self.show_logs(follow=True, again=True)

    def show_logs(
        self,
        *,
        follow: bool,
        again: bool = False,
        until: Callable[[], bool] = lambda: False,
        seconds: float | None = None,
    ) -> None:
        """As `logs`, but Ctrl-C is raised, and it may end before the run does: when `until`, called so many seconds
        apart, is true, or when a connection is lost. Most was shown already if it is shown `again`."""
        lines = 5 if again else 100

        def script(i: int) -> str:
            if not follow:
                return f"cd {self.base} && tail -n 100 {i}/log.txt"
            return f"cd {self.base} && exec tail -n {lines} -F --pid=$(cat {i}/pid) {i}/log.txt 2>/dev/null"

        if self.commands.dry_run:
            self.hosts.try_each(script)
            return
        children = [
            self.commands.start(host.command(script(i)), stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT)
            for i, host in enumerate(self.hosts.hosts)
        ]
        mutex = threading.Lock()
        readers = [
            threading.Thread(target=copy_lines, args=(host.name, child.stdout, sys.stdout.buffer, mutex), daemon=True)
            for host, child in zip(self.hosts.hosts, children, strict=True)
        ]
        try:
            for reader in readers:
                reader.start()
            while left := [reader for reader in readers if reader.is_alive()]:
                left[0].join(seconds)
                if left[0].is_alive() and until():
                    break
        finally:
            for child in children:
                self.commands.end(child)

    def stop(self) -> None:
        waits = f"it was asked to stop and may still be saving: `{self.verb('status')}` tells"
        with self.commands.stage("stopping, which saves first", waits):
            done = self.hosts.try_each(
                lambda i: (
                    f"{self._whose}cd {self.base} || exit {_NOTHING}\n"
                    f"mine || exit {_OTHERS}\n"
                    f"flock -s -n {i}/lock true && exit 0\n"
                    f"touch {i}/stop\n"
                    f"kill -TERM $(cat {i}/pid) && flock -w {STOP_SECONDS:.0f} {i}/lock true"
                ),
                seconds=STOP_SECONDS + 60,
            )
            failed = self.hosts.failed(done, {_NOTHING: f"no launch {self.name} there", _OTHERS: of_others("{said}")})
            raise_failed(f"{self.name} may still be running on these hosts", failed)
        self.status()

    def delete(self) -> None:
        hosts = ", ".join(host.name for host in self.hosts.hosts)
        self.commands.ask(f"Remove code and logs of {self.name}, in the folder {self.folder}, on {hosts}?")
        partly = f"some hosts may still have files of it: `{self.verb('delete')}` removes the rest"
        with self.commands.stage(f"removing {self.name}", partly):
            said = self.hosts.each(
                lambda i: (
                    f"""\
{self._whose}
cd {self.base} 2> /dev/null || exit 0
mine || exit {_OTHERS}
[ ! -d {i} ] || flock -s -n {i}/lock true || exit {_RUNNING}
rm -rf {i} new-{i}.*
ls -d [0-9]* > /dev/null 2>&1 || rm -rf code-* owner versions.txt
cd .. && rmdir {self.base} 2> /dev/null || ls {self.base} 2> /dev/null || true"""
                ),
                "not removed",
                codes={_RUNNING: f"still runs there; {self.verb('stop')}", _OTHERS: of_others("{said}")},
            )
        for host, left in zip(self.hosts.hosts, said, strict=True):
            if left.strip():
                self.commands.say(f"{host.name}: what the run has written stays: {' '.join(left.split())}")

    def write(self, run: Run, folder: Path) -> None:
        count = len(self.hosts.hosts)
        files = {f"{i}/run.sh": self._program(i, run, self._digest(run)) for i in range(count)}
        write_files({"config.json": run.config, **files}, folder, self.commands)

    # Stages of `up`

    def _claim(self, digest: str) -> list[bool]:
        """Makes the name ours on all hosts; whether it runs there, by host.

        Raises LaunchError when it is somebody else's, or runs with another config or code.
        """

        def script(i: int) -> str:
            return f"""\
{self._whose}
mkdir -p {self.base}/{i} && cd {self.base} || exit 1
claim || exit {_OTHERS}
for other in [0-9]*; do  # of other machines files, with fewer processes or in another order, some may run here
    flock -s -n "$other"/lock true || [ "$(cat "$other"/digest)" = {digest} ] || exit {_RUNNING}
done
flock -s -n {i}/lock true || echo running"""

        said = self.hosts.each(
            script,
            f"{self.name} was not started",
            codes={
                _OTHERS: of_others("{said}"),
                _RUNNING: "it is running there with another config, other code or other machines; first "
                + self.verb("stop"),
            },
        )
        return ["running" in one for one in said]

    def _sync(self, run: Run) -> None:
        there = self.hosts.each(f"test -d {self.base}/code-{run.code} && echo there || true", "the code was not copied")
        missing = [i for i, said in enumerate(there) if "there" not in said]
        hosts = Hosts([self.hosts.hosts[i] for i in missing], self.commands)

        def script(place: int) -> str:
            new = f"new-{missing[place]}"
            return unpack(self.base, run.code, new)

        if missing:
            what = "the code could not be copied, and nothing was started"
            hosts.each(script, what, given=run.archive, seconds=SYNC_SECONDS)

    def _check_python(self, run: Run) -> None:
        check = (
            "import importlib.util as u, sys; sys.version_info < (3, 11) and sys.exit('Python 3.11 or newer is needed, "
            "there is %d.%d' % sys.version_info[:2]); "
            f"no = [n for n in {_PACKAGES!r} if u.find_spec(n.partition('.')[0]) is None]; "
            "sys.exit('not installed there: ' + ', '.join(no) if no else 0)"
        )
        script = "\n".join([*run.prelude({}, "."), f"{run.python} -c {shlex.quote(check)}"])
        what = "nothing was started, as Python there cannot run it (see python and setup)"
        self.hosts.each(script, what, seconds=SETUP_SECONDS)

    def _digest(self, run: Run) -> str:
        """Of all processes: one of other hosts, or of another number of them, is another run."""
        hosts = ((host.name, *sorted(self.variables(i).items())) for i, host in enumerate(self.hosts.hosts))
        return run.digest(self.workdir, *map(str, hosts))

    @property
    def _whose(self) -> str:
        return shell(self.owner, take_over=self.commands.take_over)

    def _program(self, i: int, run: Run, digest: str) -> str:
        own = f"{self.base}/{i}"
        train = run.command('"$own"/config.json', supervise=True)
        return "\n".join(
            [
                f"exec >> {own}/log.txt 2>&1 < /dev/null",
                f"own={own} code={self.base}/code-{run.code}",
                'rm -f "$own"/exit',
                f'echo {digest} > "$own"/digest',
                "(",
                "trap 'exit 75' TERM  # asked to stop while it sets up; after that the run does it",
                'echo $BASHPID > "$own"/pid',
                f"mkdir -p {self.workdir} && cd {self.workdir} || exit 1",
                *run.prelude(self.variables(i), '"$code"'),
                f"exec {train}",
                ")",
                'echo $? > "$own"/exit',
                "",
            ]
        )

    def _start(self, run: Run, digest: str, running: Sequence[bool]) -> None:
        def script(i: int) -> str:
            if running[i]:
                return "true"
            return f"""\
cd {self.base} && exec 8> {i}/start && flock 8 || exit 1
flock -s -n {i}/lock true || {{ [ "$(cat {i}/digest)" = {digest} ]; exit; }}  # another `up` was faster
rm -f {i}/pid {i}/stop
cat > {i}/config.json || exit 1
printf %s {shlex.quote(self._program(i, run, digest))} > {i}/run.sh || exit 1
setsid flock -w 10 -E {_RUNNING} {i}/lock bash {i}/run.sh > /dev/null 2>&1 < /dev/null 8>&- &
for _ in {{1..40}}; do [ -s {i}/pid ] && exit 0; sleep 0.5; done  # written under the lock, before anything else
tail -n 1 {i}/log.txt; exit 1"""

        ended = self.hosts.try_each(script, given=run.config.encode())
        failed = self.hosts.failed(ended)
        if not failed:
            return
        # A part of a run only waits for the rest, and that may cost.
        self.hosts.try_each(lambda i: "true" if running[i] else f"cd {self.base} && kill -TERM $(cat {i}/pid)")
        raise_failed("it could not be started on these hosts, and was stopped on the others", failed)


def _state(i: int) -> str:
    """Shell that prints `running`, or the exit code, or that there is none."""
    return (
        f"[ -e {i}/digest ] || exit 0\n"
        f"if ! flock -s -n {i}/lock true; then echo {RUNNING}\n"
        f"elif [ -e {i}/stop ] && grep -qx {Stopped.exit_code} {i}/exit; then echo {STOPPED}\n"
        f"elif [ -s {i}/exit ]; then cat {i}/exit; else echo {NONE}; fi"
    )
