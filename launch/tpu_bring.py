"""From nothing to a run on Cloud TPU slices: they are created, waited for, and started on; and they are removed."""

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from launch.commands import Commands, Interrupted
from launch.fits import training_hours
from launch.hosts import Host, Hosts, raise_failed
from launch.target import Run, Target
from launch.tpu_slices import Found, Slices
from launch.tpu_workers import Workers
from lm.errors import ConfigError, LaunchError, LmError

if TYPE_CHECKING:
    from launch.tpu_vm import TpuVm

POLL_SECONDS = 20.0


class Bringing:
    """The machines of one launch, step by step; `launch` is the target that they are for."""

    def __init__(self, launch: Target, spec: "TpuVm", commands: Commands):
        self.launch = launch
        self.name = launch.name
        self.spec = spec
        self.commands = commands
        self.slices = Slices(launch.name, spec, commands, launch.owner)

    def get(self, run: Run, *, ask: bool) -> bool:
        """Creates them where they are not. Whether they were yet to come, so that no run can be on them."""
        with self.commands.stage(f"looking for {self.name} in {self.spec.zone}", "nothing was created"):
            self.slices.check_account()
            found = self.slices.find()
        if found.stage == "going":
            with self.commands.stage(f"waiting until what was there is gone ({found.state})", "nothing was created"):
                found = self._wait(found)
        if found.stage in ("nothing", "gone"):
            self._create(run, found, ask=ask)
        return found.stage != "ready"

    def start(self, run: Run) -> None:
        """Waits for them, and starts the run, or what of it does not run."""
        with self.paid():
            with self.commands.stage("waiting until the machines are ready", "they come nevertheless"):
                found = self._ready()
            workers = self.workers(found)
            with self.commands.stage("waiting until their hosts answer", "no run was started"):
                self._answer(workers.hosts)
            workers.up(run)
        if not self.commands.dry_run:
            self.commands.say(self.costs())

    def find(self) -> Found:
        """What there is; in a dry run what there would be."""
        found = self.slices.find()
        return self.slices.planned() if self.commands.dry_run else found

    def workers(self, found: Found | None = None) -> Workers:
        """The hosts. Raises LaunchError when there are none."""
        found = found or self.find()
        if found.stage != "ready":
            there = f"are {found.state}" if found.state else "are not there"
            raise LaunchError(f"the machines of {self.name} in {self.spec.zone} {there}: `{self.launch.verb('up')}`")
        many = len(found.nodes) > 1
        hosts = [
            Host(f"{node}/{worker}" if many else str(worker), self.slices.ssh(node, worker))
            for node, count in found.nodes
            for worker in range(count)
        ]
        workers = Workers(self.name, self.commands, hosts, self.spec)
        workers.again = self.launch.again
        return workers

    def remove(self, found: Found) -> None:
        """Deletes what was found, and waits until it is gone."""
        left = f"they may be there, and cost money: `{self.launch.verb('delete')}` removes them"
        with self.commands.stage(f"deleting the machines of {self.name}", left):
            self.slices.delete(found)
        if not self.commands.dry_run:
            self.commands.say(f"deleted; {self.elsewhere()}")

    def none(self) -> str:
        """For when nothing was found in the zone."""
        return f"there are no machines of {self.name} in {self.spec.zone}; {self.elsewhere()}"

    def elsewhere(self) -> str:
        """That nothing costs: which is said only when other zones have nothing of this launch either."""
        try:
            others = self.slices.elsewhere()
        except LaunchError as error:
            return f"whether other zones have machines of it is not known: {error}"
        if others:
            zone = self.launch.verb("delete") + " --tpu_vm.zone=ZONE"
            return f"but of this launch there is, and costs money: {', '.join(others)}: `{zone}` removes it"
        return "nothing costs"

    def costs(self) -> str:
        """What is to be said whenever machines are left."""
        hourly = f"${self.slices.chips * self.spec.price:,.2f} an hour" if self.spec.price else "money"
        return f"what is there costs {hourly}, until `{self.launch.verb('delete')}`"

    @contextlib.contextmanager
    def paid(self) -> Iterator[None]:
        """Whatever ends what is done on the machines: that they are there is said."""
        try:
            yield
        except KeyboardInterrupt:  # between two stages
            raise Interrupted(f"interrupted\n{self.costs()}") from None
        except LmError as error:
            kind = type(error) if isinstance(error, Interrupted | LaunchError | ConfigError) else LaunchError
            raise kind(f"{error}\n{self.costs()}") from None

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
            self.remove(found)
        left = f"they may be created nevertheless, and cost money then: `{self.launch.verb('delete')}` removes them"
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
                    f"{found.state}: `{self.launch.verb('up')}` goes on waiting"
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
