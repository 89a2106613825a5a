"""Cloud TPU VMs: created, run on, created again after a preemption, and removed, through gcloud."""

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from launch import keep
from launch.commands import Commands
from launch.target import Run, Target, write_files
from launch.tpu_bring import Bringing
from launch.tpu_follow import Following
from launch.tpu_slices import Found
from launch.tpu_workers import ACTIVATE, kept_versions
from lm.errors import LaunchError

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
    """How long `up` waits until the machines are there; what is queued is not for longer. `up --follow` asks again."""
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
        self.machines = Bringing(self, spec, commands)

    def up(self, run: Run) -> None:
        run = self._prepared(run)
        self.machines.get(run, ask=True)
        try:
            self.machines.start(run)
        except LaunchError as error:
            found = self.machines.find() if self.spec.queued else Found()
            if not found.queued or (found.nodes and found.stage != "coming"):
                raise
            # What a request brings later would cost, with nobody there.
            self.machines.remove(found)
            why = str(error).removesuffix(self.machines.costs()).rstrip()
            raise LaunchError(f"{why}\nThe request was deleted") from None

    def up_and_follow(self, run: Run) -> None:
        if self.commands.dry_run:
            super().up_and_follow(run)
            return
        run = self._prepared(run)
        following = Following(self.machines, run)
        if self.machines.get(run, ask=True):
            workers = following.bring(got=True)
        else:
            self.machines.start(run)
            workers = self.machines.workers()
        following.watch(workers)

    def status(self) -> None:
        found = self.machines.find()
        if found.stage == "nothing":
            self.commands.say(self.machines.none())
            return
        why = f" | {found.why}" if found.why else ""
        self.commands.say(f"{self.name}: {found.state}{why}; {self.machines.costs()}")
        if found.stage == "ready":
            self.machines.workers(found).status()

    def logs(self, *, follow: bool) -> None:
        self.machines.workers().logs(follow=follow)

    def stop(self) -> None:
        workers = self.machines.workers()
        with self.machines.paid():
            workers.stop()
        self.commands.say(f"The machines stay: {self.machines.costs()}")

    def delete(self) -> None:
        found = self.machines.find()
        if found.stage == "nothing":
            self.commands.say(self.machines.none())
            return
        nodes = ", ".join(node for node, _ in found.nodes) or "the request"
        self.commands.ask(
            f"Delete {nodes} of {self.name} in {self.spec.zone}, with their disks? A run on them loses what came after "
            f"its last checkpoint; `{self.verb('stop')}` saves first."
        )
        self.machines.remove(found)

    def write(self, run: Run, folder: Path) -> None:
        self.machines.workers(self.machines.slices.planned()).write(self._prepared(run), folder)
        lines = ["gcloud", *self.machines.slices.creation()]
        write_files({"create.sh": " \\\n    ".join(lines) + "\n"}, folder, self.commands)

    def _prepared(self, run: Run) -> Run:
        if "versions" in run.allow and not self.commands.dry_run:
            keep.forget(kept_versions(self.name, run))
        return dataclasses.replace(run, setup=(ACTIVATE, *run.setup))
