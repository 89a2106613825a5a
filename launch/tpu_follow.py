"""`up --follow` of Cloud TPU slices: machines that are lost are got again, and after the run they are removed.

It is for days in which nobody looks: nothing that can be tried again ends it, and when it does end, machines that
nobody needs do not stay.
"""

import time
from collections.abc import Sequence

from launch import tpu_bring
from launch.commands import Interrupted
from launch.patience import Patience, patiently
from launch.target import NONE, RUNNING, STOPPED, UNKNOWN, Run, ended, raise_ended
from launch.tpu_bring import Bringing
from launch.tpu_slices import Found
from launch.tpu_workers import Workers
from lm.errors import LaunchError
from lm.errors import Stopped as Saved
from lm.train.supervise import FINAL

SILENT_LOOKS = 45
"""So many looks in a row, 20 s apart, and a host that does not answer is lost when all others have ended."""
ALL_SILENT_LOOKS = 180
"""The same when none answers: that may be this machine's network, and the run goes on."""


class Following:
    """The run on these machines, until it ends."""

    def __init__(self, machines: Bringing, run: Run):
        self.machines = machines
        self.run = run
        self.say = machines.commands.say
        self.spec = machines.spec

    def watch(self, workers: Workers) -> None:
        """Returns when the run is done. Raises RunEnded when it has ended otherwise, LaunchError when given up."""
        left = self.spec.preemptions
        try:
            while True:
                ends, lost = self._until_it_ends(workers)
                if not lost:
                    break
                if left == 0:
                    raise LaunchError(
                        f"the machines are {lost}, and came back {self.spec.preemptions} times already "
                        f"(tpu_vm.preemptions): `{self._up}` goes on\n{self.machines.costs()}"
                    )
                left -= 1
                self.say(f"the machines are {lost}: getting them again")
                workers = self.bring(remove=UNKNOWN in ends)
        except KeyboardInterrupt:
            self.say(
                f"The run goes on; after a preemption only `{self._up}` creates the machines again. "
                + self.machines.costs()
            )
            return
        for host, code in zip(workers.hosts.hosts, ends, strict=True):
            self.say(f"{host.name}: {'did not answer any more' if code == UNKNOWN else ended(code)}")
        trouble = ""
        if self.spec.when_done == "delete" and STOPPED not in ends:
            trouble = self._remove()
        else:
            self.say(f"The machines stay: {self.machines.costs()}")
        raise_ended(self.machines.name, ends)
        if trouble:
            raise LaunchError(trouble)

    def bring(self, *, got: bool = False, remove: bool = False) -> Workers:
        """Tries until the run was started; what is not there costs nothing, and is waited for without end.

        Machines on which nothing starts are removed at last, unless they are to be kept. Raises LaunchError then.

        Args:
          got: they are there or come; else they are created again.
          remove: first of all.
        """
        patience = Patience(self.say)
        while True:
            try:
                if remove and (found := self.machines.find()).stage == "ready":
                    self.machines.remove(found)
                remove = False
                if not got:
                    self.machines.get(self.run, ask=False)
                got = False
                self.machines.start(self.run)
                return self.machines.workers()
            except LaunchError as error:
                if self.look().stage != "ready":
                    patience.begin()
                try:
                    if patience.wait(error):
                        continue
                except KeyboardInterrupt:
                    raise Interrupted(f"interrupted before the next attempt\n{self.machines.costs()}") from None
                what = f"{error}\ngiven up, as nothing has started for so long"
                if self.spec.when_done == "delete" and not self._remove():
                    what += "; the machines were deleted"
                raise LaunchError(f"{what}. `{self._up}` goes on") from None

    def look(self) -> Found:
        """What there is, however long nothing can be known: the run goes on meanwhile."""
        while True:
            try:
                return self.machines.find()
            except LaunchError as error:
                self.say(f"{error}\ntrying again")
                time.sleep(tpu_bring.POLL_SECONDS)

    def _gone(self) -> bool:
        return self.look().stage != "ready"

    def _until_it_ends(self, workers: Workers) -> tuple[list[str], str]:
        """How each process ended; and if the run has not, in what state the machines are."""
        silent, again = 0, False
        while True:
            # Where one slice is lost, the others wait for it, and say nothing.
            workers.show_logs(follow=True, again=again, until=self._gone, seconds=tpu_bring.POLL_SECONDS)
            again = True
            found = self.look()
            if found.stage != "ready":
                return [], found.state or "no longer there"
            ends = workers.ends()
            if over(ends):
                return ends, ""
            if NONE in ends or not {RUNNING, UNKNOWN} & set(ends):
                return ends, "not running"  # started anew by Google, or about to be taken
            silent = 0 if RUNNING in ends else silent + 1
            if silent == 1:
                hosts = zip(workers.hosts.hosts, ends, strict=True)
                names = ", ".join(host.name for host, end in hosts if end == UNKNOWN)
                self.say(f"no answer from {names}: asking again")
            if silent > (ALL_SILENT_LOOKS if set(ends) == {UNKNOWN} else SILENT_LOOKS):
                return ends, "not answering"
            time.sleep(tpu_bring.POLL_SECONDS)

    def _remove(self) -> str:
        """What went wrong with that, if it did for too long."""

        def remove() -> None:
            if (found := self.machines.find()).stage != "nothing":
                self.machines.remove(found)

        try:
            with self.machines.paid():
                patiently(remove, self.say)
        except LaunchError as error:
            trouble = f"the machines could not be deleted: {error}"
            self.say(trouble)
            return trouble
        return ""

    @property
    def _up(self) -> str:
        return f"{self.machines.launch.verb('up')} --follow"


def over(ends: Sequence[str]) -> bool:
    """Whether the run has ended, by how its processes did.

    A process that saved without having been asked by `stop` is on a machine that is about to be taken; and what one of
    them says for good, a silent one does not change.
    """
    if RUNNING in ends or NONE in ends:
        return False
    if {STOPPED, *map(str, FINAL)} & set(ends):
        return True
    return UNKNOWN not in ends and str(Saved.exit_code) not in ends
