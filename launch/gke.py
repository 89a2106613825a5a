"""Google Kubernetes Engine: a JobSet with one job for each TPU slice, or one for GPU nodes."""

import dataclasses
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.commands import Commands
from launch.target import Run, Target, owner, raise_ended, write_files
from lm.errors import LaunchError
from lm.train.supervise import FINAL

END_SECONDS = 20.0
"""From the end of all containers to that of the JobSet, at most."""
_OWNER = "lm/launched-by"
_DIGEST = "lm/launched"
_PORT = 8476
_MOUNT = "/config"


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A bucket as a folder. Not needed for paths that start with gs://."""

    name: str
    path: str
    """Of the folder, in all containers."""

    def check(self) -> Iterator[tuple[str, str]]:
        if not re.fullmatch(r"[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9]", self.name):
            yield "name", f"{self.name!r} is no name of a bucket; write it without gs://"
        if not self.path.startswith("/") or self.path.startswith(_MOUNT):
            yield "path", f"must start with /, and not be {_MOUNT}; got {self.path!r}"


@dataclasses.dataclass(frozen=True)
class Gke:
    """A cluster that kubectl reaches, with JobSet, and node pools for what is asked for here."""

    image: str = ""
    """Made from launch/Dockerfile, and in a registry of which the nodes may read."""
    topology: str = ""
    """TPU slices, as for `lm plan`: v5p:4x4x4. Empty: GPU nodes."""
    slices: int = 1
    gpu: str = ""
    """As GKE calls it: nvidia-h100-80gb."""
    nodes: int = 1
    """With GPUs; one process on each."""
    gpus_per_node: int = 8
    spot: bool = False
    reservation: str = ""
    namespace: str = "default"
    context: str = ""
    """Of kubectl; empty: the current one."""
    queue: str = ""
    """Of Kueue in the namespace."""
    service_account: str = ""
    """Of Kubernetes, with rights to the buckets."""
    buckets: tuple[Bucket, ...] = ()
    memory: str = ""
    """Of each host's container, as 400Gi; empty: no request."""
    grace_seconds: int = 600
    """What a process has to save and end when it is asked to."""
    restarts: int = 100
    """Of all processes, before the run is given up."""

    def check(self) -> Iterator[tuple[str, str]]:
        if not self.image:
            yield "image", "must name a container image, made from launch/Dockerfile"
        if bool(self.topology) == bool(self.gpu):
            yield "topology", f"either this or gpu must be given; got {self.topology!r} and {self.gpu!r}"
        for name in ("slices", "nodes", "gpus_per_node", "grace_seconds"):
            if getattr(self, name) < 1:
                yield name, f"must be at least 1, got {getattr(self, name)}"
        if self.restarts < 0:
            yield "restarts", f"must be at least 0, got {self.restarts}"
        if self.gpu and self.slices > 1:
            yield "slices", "are of TPUs; write nodes"
        if self.spot and self.reservation:
            yield "reservation", "has no spot nodes"


def target(name: str, gke: Gke, commands: Commands) -> "JobSet":
    """The launch of this name in the cluster."""
    return JobSet(name, commands, gke)


class JobSet(Target):
    """A JobSet, and a ConfigMap with the config that all its processes read."""

    takes_code = False

    def __init__(self, name: str, commands: Commands, gke: Gke):
        super().__init__(name, commands)
        self.gke = gke
        context = ("--context", gke.context) if gke.context else ()
        self.kubectl = ("kubectl", *context, "--namespace", gke.namespace)

    def up(self, run: Run) -> None:
        made = manifests(self.name, self.gke, run)
        digest = made[1]["metadata"]["annotations"][_DIGEST]
        with self.commands.stage("looking at the cluster", "nothing was created"):
            there = self._there()
        if there is not None:
            notes = self._own(there)
            over = there.get("status", {}).get("terminalState") in ("Completed", "Failed")
            if not over and notes.get(_DIGEST) == digest:
                self.commands.say(f"{self.name} is in the cluster already: {self.verb('status')}")
                return
            if not over:
                raise LaunchError(f"{self.name} is in the cluster with another config; first {self.verb('stop')}")
        chips = self.gke.topology and f"{self.gke.slices} x {self.gke.topology}"
        self.commands.ask(f"Start {self.name} on {chips or f'{self.gke.nodes} node(s) with {self.gke.gpu}'}?")
        with self.commands.stage("creating", f"`{self.verb('delete')}` removes it, `{self.verb('status')}` tells"):
            if there is not None:  # most of a JobSet cannot be changed
                self._must("the old JobSet could not be removed", "delete", "jobset", self.name)
            text = json.dumps({"apiVersion": "v1", "kind": "List", "items": made}).encode()
            self._must(f"{self.name} could not be created", "apply", "-f", "-", given=text)
        self.commands.say(f"{self.name} was created: {self.verb('logs --follow')}, {self.verb('status')}")

    def status(self) -> None:
        there = self._there()
        if there is None:
            self.commands.say(f"there is no launch {self.name}")
            return
        status = there.get("status", {})
        self.commands.say(
            f"{self.name}: {status.get('terminalState') or 'not ended'}, {status.get('restarts', 0)} restarts"
        )
        code = "CODE:.status.containerStatuses[*].state.terminated.exitCode"
        columns = f"custom-columns=POD:.metadata.name,STATE:.status.phase,NODE:.spec.nodeName,{code}"
        pods = self._must("pods could not be listed", "get", "pods", "-l", self._label(), "-o", columns)
        self.commands.say(pods.rstrip())

    def logs(self, *, follow: bool) -> None:
        more = ("--follow", "--max-log-requests=1000") if follow else ()
        argv = (*self.kubectl, "logs", "-l", self._label(), "--prefix", "--tail=100", "--ignore-errors", *more)
        try:
            self.commands.follow(argv)
        except KeyboardInterrupt:
            self.commands.say(f"the run goes on; {self.verb('stop')} ends it")
            return
        if follow and not self.commands.dry_run:
            self._raise_ended()

    def _raise_ended(self) -> None:
        """Raises RunEnded with the exit code of a run that has failed; what its log has told may come before that."""
        until = time.monotonic() + END_SECONDS
        while (there := self._there()) is not None and (state := there.get("status", {}).get("terminalState")) is None:
            if time.monotonic() > until:
                self.commands.say(f"{self.name} has not ended, only its log: {self.verb('logs --follow')} goes on")
                return
            time.sleep(1)
        if there is not None and state == "Failed":
            code = "jsonpath={.items[*].status.containerStatuses[*].state.terminated.exitCode}"
            codes = self._must("how it ended is not known", "get", "pods", "-l", self._label(), "-o", code).split()
            raise_ended(self.name, [one for one in codes if one != "0"] or ["none"])

    def stop(self) -> None:
        if (there := self._there()) is not None:
            self._own(there)
        # Its pods get SIGTERM and the grace that they have, and it is gone when they are.
        waits = f"it may still be saving: `{self.verb('status')}` tells"
        with self.commands.stage("stopping, which saves first", waits):
            self._must(
                f"{self.name} was not stopped",
                *("delete", "jobset", self.name, "--cascade=foreground", "--ignore-not-found"),
            )

    def delete(self) -> None:
        if (there := self._there()) is not None:
            self._own(there)
        self.commands.ask(f"Delete the JobSet {self.name} and its config?")
        with self.commands.stage("deleting", f"what is left may still cost money: `{self.verb('delete')}` again"):
            self._must(
                f"the JobSet {self.name} was not deleted, and may cost money",
                *("delete", "jobset", self.name, "--cascade=foreground", "--ignore-not-found"),
            )
            self._must(
                "its config was not deleted", "delete", "configmap", _config_map(self.name), "--ignore-not-found"
            )

    def write(self, run: Run, folder: Path) -> None:
        config, jobset = manifests(self.name, self.gke, run)
        # JSON is YAML.
        files = {"1-config.yaml": config, "2-jobset.yaml": jobset}
        write_files({name: json.dumps(made, indent=2) + "\n" for name, made in files.items()}, folder, self.commands)

    def _there(self) -> dict[str, Any] | None:
        """The JobSet of this name, if there is one."""
        said = self._must(
            f"the cluster cannot be asked about {self.name}",
            "get",
            "jobset",
            self.name,
            "-o",
            "json",
            "--ignore-not-found",
        )
        found: dict[str, Any] | None = json.loads(said) if said.strip() else None
        return found

    def _own(self, jobset: dict[str, Any]) -> dict[str, str]:
        """The notes of a JobSet that was made from here. Raises LaunchError for another."""
        notes: dict[str, str] = jobset.get("metadata", {}).get("annotations", {})
        if notes.get(_OWNER) != owner():
            whose = notes.get(_OWNER, "somebody else")
            raise LaunchError(f"there is a JobSet {self.name} of {whose}: take another name, or have it deleted")
        return notes

    def _label(self) -> str:
        return f"jobset.sigs.k8s.io/jobset-name={self.name}"

    def _must(self, what: str, *arguments: str, given: bytes | None = None) -> str:
        return self.commands.must((*self.kubectl, *arguments), what, given=given)


def manifests(name: str, gke: Gke, run: Run) -> list[dict[str, Any]]:
    """The ConfigMap with the config, and the JobSet. Raises ConfigError for a topology that there is not."""
    notes = {_OWNER: owner(), _DIGEST: run.digest(json.dumps(dataclasses.asdict(gke)))}
    hosts, chips = (gke.nodes, gke.gpus_per_node) if gke.gpu else _tpu_hosts(gke.topology)
    resource = {"nvidia.com/gpu" if gke.gpu else "google.com/tpu": str(chips)}
    memory = {"memory": gke.memory} if gke.memory else {}
    container = {
        "name": "train",
        "image": gke.image,
        "command": ["bash", "-c", "\n".join(_script(name, gke, run, hosts))],
        "resources": {"requests": resource | memory, "limits": resource | memory},
        "volumeMounts": [
            {"name": "config", "mountPath": _MOUNT},
            {"name": "shm", "mountPath": "/dev/shm"},
            *({"name": f"bucket-{i}", "mountPath": bucket.path} for i, bucket in enumerate(gke.buckets)),
        ],
    }
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": gke.grace_seconds,
        "nodeSelector": _selector(gke),
        "tolerations": _tolerations(gke),
        "containers": [container],
        "volumes": [
            {"name": "config", "configMap": {"name": _config_map(name)}},
            {"name": "shm", "emptyDir": {"medium": "Memory"}},
            *(
                {
                    "name": f"bucket-{i}",
                    "csi": {"driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": {"bucketName": bucket.name}},
                }
                for i, bucket in enumerate(gke.buckets)
            ),
        ],
    }
    if gke.service_account:
        pod["serviceAccountName"] = gke.service_account
    job = {
        "completionMode": "Indexed",
        "completions": hosts,
        "parallelism": hosts,
        "backoffLimit": 0,  # one process that ends ends all: the JobSet starts them again together
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {"containerName": "train", "operator": "In", "values": sorted(filter(None, FINAL))},
                }
            ]
        },
        "template": {
            "metadata": {"annotations": {"gke-gcsfuse/volumes": "true"} if gke.buckets else {}},
            "spec": pod,
        },
    }
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    jobset = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            "labels": {"kueue.x-k8s.io/queue-name": gke.queue} if gke.queue else {},
            # One slice to a node pool, and no other slice in it.
            "annotations": notes | (exclusive if gke.topology and hosts > 1 else {}),
        },
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {
                "maxRestarts": gke.restarts,
                "rules": [
                    {"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]},
                ],
            },
            "replicatedJobs": [{"name": "slice", "replicas": gke.slices, "template": {"spec": job}}],
        },
    }
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": _config_map(name), "annotations": notes},
        "data": {"config.json": run.config},
    }
    return [config, jobset]


def _script(name: str, gke: Gke, run: Run, hosts: int) -> list[str]:
    """Lines of bash. Of TPU slices JAX learns from GKE which process is which; for GPUs it is said here."""
    place: list[str] = []
    if gke.gpu and hosts > 1:
        place = [
            f"export JAX_COORDINATOR_ADDRESS={name}-slice-0-0.{name}:{_PORT}",
            f"export JAX_NUM_PROCESSES={hosts} JAX_PROCESS_ID=$JOB_COMPLETION_INDEX",
        ]
    elif hosts * gke.slices == 1:
        place = [f"export JAX_COORDINATOR_ADDRESS=localhost:{_PORT} JAX_NUM_PROCESSES=1 JAX_PROCESS_ID=0"]
    return [*run.prelude({}, "/lm"), *place, f"exec {run.command(f'{_MOUNT}/config.json', supervise=False)}"]


def _tpu_hosts(topology: str) -> tuple[int, int]:
    """Hosts of one slice, and chips of one host."""
    import math

    from lm.plan.topology import host_shape, parse_name  # loads jax

    chip, shape = parse_name(topology)
    chips = math.prod(host_shape(chip, shape))
    return math.prod(shape) // chips, chips


def _selector(gke: Gke) -> dict[str, str]:
    found = {}
    if gke.gpu:
        found["cloud.google.com/gke-accelerator"] = gke.gpu
    else:
        chip, _, sides = gke.topology.partition(":")
        found["cloud.google.com/gke-tpu-accelerator"] = _ACCELERATORS[chip]
        found["cloud.google.com/gke-tpu-topology"] = sides
    if gke.spot:
        found["cloud.google.com/gke-spot"] = "true"
    if gke.reservation:
        found["cloud.google.com/reservation-name"] = gke.reservation
    return found


def _tolerations(gke: Gke) -> list[dict[str, str]]:
    resource = "nvidia.com/gpu" if gke.gpu else "google.com/tpu"
    found = [{"key": resource, "operator": "Exists", "effect": "NoSchedule"}]
    if gke.spot:
        found.append({"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"})
    return found


def _config_map(name: str) -> str:
    return f"lm-{name}-config"


_ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
"""What GKE calls the chips in the labels of nodes."""
