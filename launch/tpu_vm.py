"""Cloud TPU VMs: created, run on, created again after a preemption, and removed, through gcloud."""

import contextlib
import dataclasses
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from launch import keep
from launch.commands import Commands, Interrupted
from launch.fits import training_hours
from launch.hosts import Host, Hosts, raise_failed
from launch.target import Run, Target, ended, raise_ended, write_files
from launch.tpu_slices import Found, Slices
from launch.tpu_workers import ACTIVATE, Workers, kept_versions
from lm.errors import ConfigError, LaunchError, LmError

POLL_SECONDS = 20.0
INSTALL = (
    'export PATH="$HOME/.local/bin:$PATH"',
    "command -v uv > /dev/null || curl -LsSf https://astral.sh/uv/install.sh | sh",
    '[ -x ~/lm-python/bin/python ] || uv venv --quiet --python "${LM_PYTHON:-3.12}" ~/lm-python',
    "uv pip install --quiet --python ~/lm-python/bin/python -r pyproject.toml --extra gcs --extra huggingface "
    "'jax[tpu]'",
)


@dataclasses.dataclass(frozen=True)
class TpuVm:
    """Cloud TPU VMs, called as the launch is; with several slices NAME-0, NAME-1, …"""

    zone: str = ""
    topology: str = ""
    """Of one slice, as `lm plan` has it: v5p:4x4x4, v6e:16x16."""
    slices: int = 1
    project: str = ""
    """Empty: that of `gcloud config`."""
    provisioning: Literal["on-demand", "spot", "reserved"] = "on-demand"
    request: Literal["now", "queued"] = "now"
    """now: refused when there is no capacity. queued: waits for it. Several slices are always queued."""
    wait_seconds: int = 3600
    """How long `up` waits until the machines are there; what is queued stays so."""
    version: str = ""
    """Of the TPU software; empty: the plain one for this kind of chip."""
    price: float = 0.0
    """Dollars for a chip and hour, for the line of costs; 0: not given."""
    labels: tuple[str, ...] = ()
    """KEY=VALUE, beside those that say whose launch it is."""
    install: tuple[str, ...] = INSTALL
    """Lines of bash, on each host in the folder of the code before each start. If they make ~/lm-python, it is used.
    When a run goes on, uv and pip find the versions with which it began in their variables *_CONSTRAINT, and LM_PYTHON
    is that of Python."""
    when_done: Literal["delete", "keep"] = "delete"
    """What `up --follow` does with the machines after the run."""
    preemptions: int = 100
    """How often `up --follow` gets the machines again."""
    create_options: tuple[str, ...] = ()
    """More for gcloud's create: --network=…, --service-account=…, --internal-ips."""
    ssh_options: tuple[str, ...] = ()
    """More for gcloud's ssh: --internal-ip."""
    folder: str = "~/lm-launches"
    """For the launch, on the hosts."""

    @property
    def queued(self) -> bool:
        return self.request == "queued" or self.slices > 1

    def check(self) -> Iterator[tuple[str, str]]:
        if not re.fullmatch("[a-z]+-[a-z]+[0-9]+-[a-z]+[0-9]*", self.zone):
            yield "zone", f"must be a zone, such as us-east5-a, got {self.zone!r}"
        if not self.topology:
            yield "topology", "must be that of one slice, such as v5p:4x4x4"
        if self.topology.startswith("tpu7x"):
            yield "topology", "tpu7x is not to be had as Cloud TPU VMs: use the target gke"
        for name in ("slices", "wait_seconds"):
            if getattr(self, name) < 1:
                yield name, f"must be at least 1, got {getattr(self, name)}"
        for name in ("price", "preemptions"):
            if getattr(self, name) < 0:
                yield name, f"must be at least 0, got {getattr(self, name)}"
        for i, label in enumerate(self.labels):
            if not re.fullmatch("[a-z][a-z0-9_-]{0,62}=[a-z0-9_-]{0,63}", label) or label.startswith("lm-"):
                yield f"labels.{i}", f"must be KEY=VALUE of small letters, digits, - and _, not lm-…; got {label!r}"
        for name in ("create_options", "ssh_options"):
            if wrong := [one for one in getattr(self, name) if not one.startswith("--")]:
                yield name, f"are flags of gcloud, --NAME=VALUE each; got {wrong[0]!r}"
        if not self.folder.startswith(("/", "~/")):
            yield "folder", f"must start with / or ~/, got {self.folder!r}"


def target(name: str, tpu_vm: TpuVm, commands: Commands) -> "TpuVms":
    """The launch of this name on Cloud TPU VMs."""
    return TpuVms(name, tpu_vm, commands)


class TpuVms(Target):
    """One process of a run on each host of the slices."""

    def __init__(self, name: str, spec: TpuVm, commands: Commands):
        super().__init__(name, commands)
        self.spec = spec
        self.slices = Slices(name, spec, commands)
        self._run: Run | None = None

    def up(self, run: Run) -> None:
        if "versions" in run.allow and not self.commands.dry_run:
            keep.forget(kept_versions(self.name, run))
        self._run = dataclasses.replace(run, setup=(ACTIVATE, *run.setup))
        self._bring(self._run, ask=True)

    def status(self) -> None:
        found = self._find()
        if found.stage == "nothing":
            self.commands.say(f"there are no machines of {self.name} in {self.spec.zone}; nothing costs")
            return
        self.commands.say(f"{self.name}: {found.state}{' | ' + found.why if found.why else ''}; {self._costs()}")
        if found.stage == "ready":
            self._workers(found).status()

    def logs(self, *, follow: bool) -> None:
        workers = self._workers(self._find_ready())
        if follow and self._run and not self.commands.dry_run:
            self._watch(self._run, workers)
        else:
            workers.logs(follow=follow)

    def stop(self) -> None:
        workers = self._workers(self._find_ready())
        with self._paid():
            workers.stop()
        self.commands.say(f"The machines stay: {self._costs()}")

    def delete(self) -> None:
        found = self._find()
        if found.stage == "nothing":
            self.commands.say(f"there are no machines of {self.name} in {self.spec.zone}; nothing costs")
            return
        nodes = ", ".join(node for node, _ in found.nodes) or "the request"
        self.commands.ask(
            f"Delete {nodes} of {self.name} in {self.spec.zone}, with their disks? A run on them loses what came after "
            f"its last checkpoint; `{self.verb('stop')}` saves first."
        )
        self._delete(found)

    def write(self, run: Run, folder: Path) -> None:
        workers = self._workers(self.slices.planned())
        workers.write(dataclasses.replace(run, setup=(ACTIVATE, *run.setup)), folder)
        lines = ["gcloud", *self.slices.creation()]
        write_files({"create.sh": " \\\n    ".join(lines) + "\n"}, folder, self.commands)

    # Stages of `up`

    def _bring(self, run: Run, *, ask: bool) -> None:
        with self.commands.stage(f"looking for {self.name} in {self.spec.zone}", "nothing was created"):
            self.slices.check_account()
            found = self.slices.find()
        if found.stage == "going":
            with self.commands.stage(f"waiting until what was there is gone ({found.state})", "nothing was created"):
                found = self._wait(found)
        if found.stage in ("nothing", "gone"):
            self._create(run, found, ask=ask)
        with self._paid():
            with self.commands.stage("waiting until the machines are ready", "they come nevertheless"):
                found = self._ready()
            workers = self._workers(found)
            with self.commands.stage("waiting until their hosts answer", "no run was started"):
                self._answer(workers.hosts)
            workers.up(run)
        if not self.commands.dry_run:
            self.commands.say(self._costs())

    def _create(self, run: Run, found: Found, *, ask: bool) -> None:
        with self.commands.stage(f"looking whether there is {self.spec.topology}", "nothing was created"):
            self.slices.check_offered()
        if "://" not in run.dir:
            self.commands.say(
                f"run.dir is {run.dir}, no bucket: unless storage of your own is mounted there, checkpoints are lost "
                "with the machines"
            )
        self.commands.say(self.slices.cost(training_hours(run.config, self.spec.topology, self.spec.slices)))
        if ask:
            self.commands.ask("Create them?")
        if found.stage == "gone":
            self._delete(found)
        left = f"they may be created nevertheless, and cost money then: `{self.verb('delete')}` removes them"
        with self.commands.stage(f"creating {', '.join(self.slices.node_names)}", left):
            self.slices.create()

    def _ready(self) -> Found:
        if self.commands.dry_run:
            self.slices.find()
            return self.slices.planned()
        found = self._wait(Found("coming"))
        if found.stage != "ready":
            state = "they are not there" if found.stage == "nothing" else f"they are {found.state}"
            raise LaunchError(f"the machines of {self.name} did not get ready: {state}. {found.why}".rstrip())
        return found

    def _wait(self, found: Found) -> Found:
        """Until it is no longer so. Raises LaunchError when that takes too long."""
        stage, until, said = found.stage, time.monotonic() + self.spec.wait_seconds, found.state
        while (found := self.slices.find()).stage == stage:
            if found.state != said:
                self.commands.say(f"    {found.state}")
                said = found.state
            if time.monotonic() > until:
                raise LaunchError(
                    f"after {self.spec.wait_seconds} s (tpu_vm.wait_seconds) the machines of {self.name} are still "
                    f"{found.state}: `{self.verb('up')}` goes on waiting"
                )
            time.sleep(POLL_SECONDS)
        return found

    def _answer(self, hosts: Hosts) -> None:
        """A host that is ready takes a while to let somebody in who has not been there."""
        hosts.try_each("true") if self.commands.dry_run else None
        until = time.monotonic() + self.spec.wait_seconds
        # The first alone: gcloud makes the key of this machine.
        first = Hosts(hosts.hosts[:1], hosts.commands)
        for some in () if self.commands.dry_run else (first, hosts):
            while failed := some.failed(some.try_each("true")):
                if time.monotonic() > until or self.slices.find().stage != "ready":
                    raise_failed("these hosts do not answer, and nothing was started", failed)
                time.sleep(POLL_SECONDS)

    # After `up --follow`

    def _watch(self, run: Run, workers: Workers) -> None:
        left = self.spec.preemptions
        try:
            while True:
                # Where one slice is lost, the others wait for it, and say nothing.
                workers.show_logs(follow=True, until=lambda: self._look().stage != "ready", seconds=POLL_SECONDS)
                found = self._look()
                ends = workers.ends() if found.stage == "ready" else []
                if ends and "none" not in ends:
                    if all(ends):
                        break
                    time.sleep(POLL_SECONDS)
                    continue
                # Gone, or started anew by Google, with nothing running.
                state = "not running" if ends else found.state or "no longer there"
                if left == 0:
                    raise LaunchError(
                        f"the machines are {state}, and came back {self.spec.preemptions} times already "
                        f"(tpu_vm.preemptions): `{self.verb('up')} --follow` goes on\n{self._costs()}"
                    )
                left -= 1
                self.commands.say(f"the machines are {state}: getting them again")
                workers = self._again(run)
        except KeyboardInterrupt:
            self.commands.say(
                f"The run goes on; after a preemption only `{self.verb('up')} --follow` creates the machines again. "
                + self._costs()
            )
            return
        for host, code in zip(workers.hosts.hosts, ends, strict=True):
            self.commands.say(f"{host.name}: {ended(code)}")
        if self.spec.when_done == "delete":
            self._delete(found)
        else:
            self.commands.say(self._costs())
        raise_ended(self.name, ends)

    def _again(self, run: Run) -> Workers:
        """Until there is capacity for them."""
        while True:
            try:
                self._bring(run, ask=False)
                return self._workers(self._find_ready())
            except LaunchError as error:
                if self._look().stage == "ready":  # it is something else
                    raise
                self.commands.say(f"{error}\ntrying again")
                time.sleep(POLL_SECONDS)

    def _look(self) -> Found:
        """What there is, however long nothing can be known: the run goes on meanwhile."""
        while True:
            try:
                return self.slices.find()
            except LaunchError as error:
                self.commands.say(f"{error}\ntrying again")
                time.sleep(POLL_SECONDS)

    # Parts

    def _workers(self, found: Found) -> Workers:
        many = len(found.nodes) > 1
        hosts = [
            Host(f"{node}/{worker}" if many else str(worker), self.slices.ssh(node, worker))
            for node, count in found.nodes
            for worker in range(count)
        ]
        workers = Workers(self.name, self.commands, hosts, self.spec)
        workers.again = self.again
        return workers

    def _find(self) -> Found:
        found = self.slices.find()
        return self.slices.planned() if self.commands.dry_run else found

    def _find_ready(self) -> Found:
        found = self._find()
        if found.stage != "ready":
            there = f"are {found.state}" if found.state else "are not there"
            raise LaunchError(f"the machines of {self.name} in {self.spec.zone} {there}: `{self.verb('up')}`")
        return found

    def _delete(self, found: Found) -> None:
        left = f"they may be there, and cost money: `{self.verb('delete')}` removes them"
        with self.commands.stage(f"deleting the machines of {self.name}", left):
            self.slices.delete(found)
        if not self.commands.dry_run:
            self.commands.say("deleted; nothing costs")

    def _costs(self) -> str:
        hourly = f"${self.slices.chips * self.spec.price:,.2f} an hour" if self.spec.price else "money"
        return f"what is there costs {hourly}, until `{self.verb('delete')}`"

    @contextlib.contextmanager
    def _paid(self) -> Iterator[None]:
        """Whatever ends what is done on the machines: that they are there is said."""
        try:
            yield
        except KeyboardInterrupt:  # between two stages
            raise Interrupted(f"interrupted\n{self._costs()}") from None
        except LmError as error:
            kind = type(error) if isinstance(error, Interrupted | LaunchError | ConfigError) else LaunchError
            raise kind(f"{error}\n{self._costs()}") from None
