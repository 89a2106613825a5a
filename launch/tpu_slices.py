"""Cloud TPU slices as gcloud knows them: what there is under a name, what it costs, its creation and removal."""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from launch.commands import Commands, Done
from launch.owner import Owner
from lm.errors import LaunchError

if TYPE_CHECKING:
    from launch.tpu_vm import TpuVm

Stage = Literal["nothing", "coming", "ready", "gone", "going"]
_READY = ("READY", "ACTIVE")
_GONE = ("PREEMPTED", "TERMINATED", "SUSPENDED", "FAILED", "STOPPED")
_GOING = ("DELETING", "SUSPENDING", "STOPPING")
_TYPES = {"v4": "v4", "v5e": "v5litepod", "v5p": "v5p", "v6e": "v6e"}
_VERSIONS = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
_HINTS = {
    r"active account|auth login|[Rr]eauthentication": "log in first: gcloud auth login",
    r"property \[project\]": "say which project: tpu_vm.project, or gcloud config set project",
    r"no more capacity|[Ii]nsufficient .*capacity": "another zone may have some, or a queue: --tpu_vm.request=queued",
    r"RESOURCE_EXHAUSTED|[Qq]uota": "ask for quota (console: IAM, Quotas), or take another zone or provisioning",
    r"PERMISSION_DENIED": "the account of `gcloud auth list` needs the role TPU Admin, and the project the TPU API",
    r"Invalid choice: 'alpha'|components install alpha": "slices of this shape need: gcloud components install alpha",
    r"ALREADY_EXISTS": "the name is taken: another `name` in the machines file",
}


@dataclasses.dataclass(frozen=True)
class Found:
    """What there is under the name of a launch."""

    stage: Stage = "nothing"
    state: str = ""
    """As Google calls it, of the whole."""
    nodes: tuple[tuple[str, int], ...] = ()
    """Each slice that is there, and its hosts."""
    queued: bool = False
    """A queued resource holds them."""
    why: str = ""
    """Where it failed: what Google says."""


class Slices:
    """The slices of one launch: all nodes that are called like it."""

    def __init__(self, name: str, spec: "TpuVm", commands: Commands, owner: Owner):
        self.name = name
        self.spec = spec
        self.commands = commands
        self.labels = {"lm-launch": name, "lm-owner": owner.id}
        """Whose they are: nothing without these is touched."""
        self.names = {"lm-owner-name": _label(owner.name)}
        """For people."""

    @property
    def node_names(self) -> list[str]:
        if self.spec.slices == 1:
            return [self.name]
        return [f"{self.name}-{i}" for i in range(self.spec.slices)]

    @property
    def chips(self) -> int:
        return math.prod(self._shape()[1]) * self.spec.slices

    def planned(self) -> Found:
        """What creation will give."""
        from lm.plan.topology import host_shape

        kind, shape = self._shape()
        hosts = math.prod(shape) // math.prod(host_shape(kind, shape))
        return Found("ready", "READY", tuple((name, hosts) for name in self.node_names))

    def check_account(self) -> None:
        """Raises LaunchError when there is no gcloud, or nobody is logged in."""
        account = self._gcloud(
            "gcloud does not work", "auth", "list", "--filter=status:ACTIVE", "--format=value(account)"
        )
        if not account.strip() and not self.commands.dry_run:
            raise LaunchError("nobody is logged in to gcloud on this machine: gcloud auth login")

    def check_offered(self) -> None:
        """Raises LaunchError when the zone has no such TPU, with what it has."""
        what = f"what TPUs {self.spec.zone} has cannot be known"
        listed = self._list(what, "compute", "tpus", "tpu-vm", "accelerator-types", "list")
        if self.commands.dry_run:
            return
        chip, shape = self._shape()
        kind = _TYPES[chip.name]
        there = {str(one.get("type", "")): one.get("acceleratorConfigs", ()) for one in listed}
        same = [one for one in there if one.startswith(f"{kind}-")]
        shapes = {config.get("topology") for one in same for config in there[one]}
        if self._accelerator_type() in same or "x".join(map(str, shape)) in shapes:
            return
        raise LaunchError(
            f"{self.spec.zone} has no {self.spec.topology}. TPUs there: "
            f"{', '.join(same or sorted({one.rpartition('-')[0] for one in there})) or 'none'}. "
            "Zones: https://cloud.google.com/tpu/docs/regions-zones"
        )

    def find(self) -> Found:
        """What there is. Raises LaunchError when it is not of this launch, or of another shape."""
        what = f"what TPUs there are in {self.spec.zone} cannot be known"
        nodes = [one for one in self._list(what, "compute", "tpus", "tpu-vm", "list") if self._is_ours(one, _id(one))]
        requests = self._list(what, "compute", "tpus", "queued-resources", "list")
        request = next((one for one in requests if _id(one) == self.name), None)
        if request:
            for spec in request.get("tpu", {}).get("nodeSpec", ()):
                self._is_ours(spec.get("node", {}), self.name)
        nodes.sort(key=lambda node: (len(_id(node)), _id(node)))  # name-10 comes after name-9
        hosts = tuple((_id(node), len(node.get("networkEndpoints", ()))) for node in nodes)
        states = [node["state"] for node in nodes]
        why = ""
        if request:
            state = request.get("state", {})
            why = str(state.get("failedData", {}).get("error", {}).get("message", ""))
            states.insert(0, state.get("state", "STATE_UNSPECIFIED"))
        if not states:
            return Found()
        stage: Stage = "coming"
        ends: dict[Stage, tuple[str, ...]] = {"gone": _GONE, "going": _GOING}
        for one, among in ends.items():
            if ended := [state for state in states if state in among]:
                return Found(one, ended[0], hosts, request is not None, why)
        complete = len(nodes) == self.spec.slices
        if all(state in _READY for state in states):
            # Google removes nodes of its own accord too: a request stays, and has lost them.
            stage = "ready" if complete else "gone"
        if len(nodes) > self.spec.slices or (nodes and stage == "ready"):
            self._check_shape(nodes)
        waits = next((state for state in states if state not in _READY), states[0])
        return Found(stage, waits if complete or stage != "gone" else "incomplete", hosts, request is not None, why)

    def elsewhere(self) -> list[str]:
        """What there is of this launch in other zones. Raises LaunchError when that cannot be known."""
        found = set()
        for group in ("tpu-vm", "queued-resources"):
            listed = self._gcloud(
                "other zones cannot be asked", "compute", "tpus", group, "list", *self._where("-"), "--format=json"
            )
            for thing in json.loads(listed or "[]"):
                nodes = [thing, *(spec.get("node", {}) for spec in thing.get("tpu", {}).get("nodeSpec", ()))]
                zone = str(thing["name"]).split("/")[3]
                if zone != self.spec.zone and any(
                    self.labels.items() <= node.get("labels", {}).items() for node in nodes
                ):
                    found.add(f"{_id(thing)} in {zone}")
        return sorted(found)

    def create(self) -> None:
        """Asks for the slices, and waits as long as Google takes to say yes. Raises LaunchError with its no."""
        self._gcloud(f"{self.name} was not created", *self.creation())

    def creation(self) -> list[str]:
        """What gcloud is asked, without the word gcloud."""
        spec, kind = self.spec, self._shape()[0].name
        version = spec.version or _VERSIONS[kind]
        if spec.queued:
            count = [f"--node-id={self.name}"]
            if spec.slices > 1:
                count = [f"--node-count={spec.slices}", f"--node-prefix={self.name}"]
            command = [
                "compute",
                "tpus",
                "queued-resources",
                "create",
                self.name,
                *count,
                f"--runtime-version={version}",
                f"--valid-until-duration={spec.wait_seconds}s",  # what comes later would find nobody there
            ]
        else:
            command = ["compute", "tpus", "tpu-vm", "create", self.name, f"--version={version}"]
        if self._by_shape():
            command.insert(0, "alpha")
        labels = ",".join([*(f"{key}={value}" for key, value in (self.labels | self.names).items()), *spec.labels])
        return [
            *command,
            *self._where(),
            *self._kind_flags(),
            *([] if spec.provisioning == "on-demand" else [f"--{spec.provisioning}"]),
            f"--labels={labels}",
            *spec.create_options,
            "--quiet",
        ]

    def delete(self, found: Found) -> None:
        """Removes what was found, and waits until it is gone. What is gone already is no error."""
        failed = f"{self.name} was not removed, and may cost money"
        removals = [["tpu-vm", "delete", node] for node, _ in found.nodes]
        if found.queued:
            removals = [["queued-resources", "delete", self.name, "--force"]]
        for removal in removals:
            done = self._run("compute", "tpus", *removal, *self._where(), "--quiet")
            if done.code and "NOT_FOUND" not in done.err:
                raise LaunchError(f"{failed}: {_explained(done)}")

    def ssh(self, node: str, worker: int) -> tuple[str, ...]:
        """The command that runs what follows it on a host."""
        return (
            *("gcloud", "compute", "tpus", "tpu-vm", "ssh", node, *self._where(), f"--worker={worker}"),
            # So that it asks nothing, and notices a host that was cut off.
            *("--quiet", "--ssh-flag=-oConnectTimeout=10"),
            *("--ssh-flag=-oServerAliveInterval=5", "--ssh-flag=-oServerAliveCountMax=3"),
            *self.spec.ssh_options,
            "--command",
        )

    def cost(self, hours: float | None) -> str:
        """A line with what the slices cost, and for so many hours of training."""
        spec = self.spec
        many = f"{spec.slices} x " if spec.slices > 1 else ""
        what = f"{self.chips} chips ({many}{spec.topology}, {spec.provisioning}, {spec.zone})"
        if not spec.price:
            return f"{what}: price not given (tpu_vm.price, dollars for a chip and hour)"
        hourly = self.chips * spec.price
        run = "" if hours is None else f"; {hours:,.1f} hours of training by the model: ${hours * hourly:,.2f}"
        return f"{what} at ${spec.price:g} a chip and hour: ${hourly:,.2f} an hour{run}"

    def _shape(self) -> tuple[Any, tuple[int, ...]]:
        from lm.plan.topology import parse_name  # loads jax

        return parse_name(self.spec.topology)

    def _kind_flags(self) -> list[str]:
        kind, shape = self._shape()
        if self._by_shape():
            return [f"--type={_TYPES[kind.name]}", f"--topology={'x'.join(map(str, shape))}"]
        return [f"--accelerator-type={self._accelerator_type()}"]

    def _by_shape(self) -> bool:
        """Whether there are other slices of as many chips. The gcloud that is no alpha takes shapes of v4 at most."""
        from lm.plan.topology import shapes

        kind, shape = self._shape()
        return sum(math.prod(other) == math.prod(shape) for other in shapes(kind)) > 1

    def _accelerator_type(self) -> str:
        """As most know a slice: with its number of cores, of which a chip of the three-dimensional kinds has two."""
        kind, shape = self._shape()
        return f"{_TYPES[kind.name]}-{math.prod(shape) * (2 if kind.dimensions == 3 else 1)}"

    def _check_shape(self, nodes: Sequence[dict[str, Any]]) -> None:
        chip, shape = self._shape()
        for node in nodes:
            there = node.get("acceleratorConfig", {}).get("topology", "")
            same = not there or there == "x".join(map(str, shape))
            kind = node.get("acceleratorType", "").rpartition("/")[2].partition("-")[0]
            if not same or kind not in ("", _TYPES[chip.name]) or len(nodes) != self.spec.slices:
                raise LaunchError(
                    f"there are {len(nodes)} x {kind or chip.name}:{there} called {self.name}, which is not the "
                    f"{self.spec.slices} x {self.spec.topology} of the machines file: delete them first"
                )

    def _is_ours(self, thing: dict[str, Any], name: str) -> bool:
        labels = thing.get("labels", {})
        wanted = {"lm-launch": self.name} if self.commands.take_over else self.labels
        if wanted.items() <= labels.items():
            return True
        if name not in (self.name, *self.node_names):
            return False
        whose, may = "not ours", ""
        if "lm-launch" in labels:
            by = labels.get("lm-owner-name", labels.get("lm-owner"))
            whose, may = (
                f"of the launch {labels['lm-launch']} of {by}",
                ", or, if it is yours all the same, --take-over",
            )
        raise LaunchError(
            f"there is a TPU called {name} in {self.spec.zone} already, which is {whose}: take another name{may}. It "
            "was not touched"
        )

    def _where(self, zone: str = "") -> list[str]:
        return [f"--zone={zone or self.spec.zone}", *([f"--project={self.spec.project}"] if self.spec.project else [])]

    def _list(self, what: str, *command: str, zone: str = "") -> list[dict[str, Any]]:
        said = self._gcloud(what, *command, *self._where(zone), "--format=json")
        listed: list[dict[str, Any]] = json.loads(said or "[]")
        return listed

    def _gcloud(self, what: str, *command: str) -> str:
        done = self._run(*command)
        if done.code:
            raise LaunchError(f"{what}: {_explained(done)}")
        return done.out

    def _run(self, *command: str) -> Done:
        return self.commands.run(["gcloud", *command])


class Quiet(Commands):
    """Runs commands on hosts through gcloud, and leaves out what gcloud and ssh add to what these say."""

    def run(self, argv: Sequence[str], *, given: bytes | None = None, seconds: float | None = None) -> Done:
        done = super().run(argv, given=given, seconds=seconds)
        lines = [line for line in done.err.splitlines() if line.strip() and not _NOISE.search(line)]
        if len(lines) > 1 and lines[-1].startswith("no answer within"):
            lines.insert(0, lines.pop())  # what ssh said last tells more
        return dataclasses.replace(
            done, err="\n".join(lines) or ("" if done.out.strip() or not done.code else done.err)
        )


_NOISE = re.compile(
    r"^(SSH: Attempting to connect|Using ssh batch size|Retrying: SSH|SSH key found|Propagating SSH public key|\.+done"
    r"|Warning: Permanently added|ERROR: \(gcloud\.compute\.tpus\.tpu-vm\.ssh\) \[.* exited with)"
)


def _explained(done: Done) -> str:
    text = done.err.strip() or done.why
    hints = [hint for pattern, hint in _HINTS.items() if re.search(pattern, text)]
    return text + (f"\n{hints[0]}" if hints else "")


def _id(thing: dict[str, Any]) -> str:
    """The last part of projects/…/locations/…/nodes/NAME."""
    return str(thing["name"]).rpartition("/")[2]


def _label(text: str) -> str:
    """As the value of a label may be."""
    return re.sub("[^a-z0-9_-]", "-", text.lower())[:63]
