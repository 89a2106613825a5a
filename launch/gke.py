"""Google Kubernetes Engine: a JobSet with one job for each TPU slice, or one for GPU nodes."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launch.commands import Commands
from launch.gke_follow import follow_pods
from launch.gke_manifests import CONTAINER, DIGEST, MOUNT, OWNER, config_map, manifests
from launch.owner import is_mine, whose
from launch.patience import patiently
from launch.target import NONE, STOPPED, Run, Target, of_others, raise_ended, write_files
from lm.errors import LaunchError


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A bucket as a folder. Not needed for paths that start with gs://."""

    name: str
    path: str
    """Of the folder, in all containers."""

    def check(self) -> Iterator[tuple[str, str]]:
        if not re.fullmatch(r"[a-z0-9][-_.a-z0-9]{1,220}[a-z0-9]", self.name):
            yield "name", f"{self.name!r} is no name of a bucket; write it without gs://"
        if not self.path.startswith("/") or self.path.startswith(MOUNT):
            yield "path", f"must start with /, and not be {MOUNT}; got {self.path!r}"


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
    grace_seconds: int = 3600
    """What a process has to save and end when it is asked to: as long as the watchdog lets a save go on."""
    restarts: int = 20
    """Of all pods, by the cluster, as after a preemption; what faults of the run need is done inside of them."""
    secrets: tuple[str, ...] = ()
    """Of Kubernetes in the namespace; what they hold is in the environment, as a token of Hugging Face."""

    @property
    def gpus(self) -> int:
        """In all."""
        return self.nodes * self.gpus_per_node if self.gpu else 0

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
        for i, secret in enumerate(self.secrets):
            if not re.fullmatch("[a-z0-9]([-.a-z0-9]*[a-z0-9])?", secret):
                yield f"secrets.{i}", f"{secret!r} is no name of a secret in Kubernetes"
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
        made = manifests(self.name, self.gke, run, self.owner)
        digest = made[1]["metadata"]["annotations"][DIGEST]
        with self.commands.stage("looking at the cluster", "nothing was created"):
            there, _ = self._ours()
        if there is not None and _terminal(there) is None:
            if there["metadata"]["annotations"].get(DIGEST) != digest:
                raise LaunchError(f"{self.name} is in the cluster with another config; first {self.verb('stop')}")
            self.commands.say(f"{self.name} is in the cluster already: {self.verb('status')}")
            return
        chips = self.gke.topology and f"{self.gke.slices} x {self.gke.topology}"
        self.commands.ask(f"Start {self.name} on {chips or f'{self.gke.nodes} node(s) with {self.gke.gpu}'}?")
        with self.commands.stage("creating", f"`{self.verb('delete')}` removes it, `{self.verb('status')}` tells"):
            if there is not None:  # most of a JobSet cannot be changed
                self._must("the old JobSet could not be removed", "delete", "jobset", self.name)
            text = json.dumps({"apiVersion": "v1", "kind": "List", "items": made}).encode()
            self._must(f"{self.name} could not be created", "apply", "-f", "-", given=text)
        self.commands.say(f"{self.name} was created: {self.verb('logs --follow')}, {self.verb('status')}")

    def status(self) -> None:
        there = self._there("jobset", self.name)
        if there is None:
            self.commands.say(f"there is no launch {self.name}")
            return
        restarts = there.get("status", {}).get("restarts", 0)
        self.commands.say(f"{self.name}: {_terminal(there) or 'not ended'}, {restarts} restarts")
        code = "CODE:.status.containerStatuses[*].state.terminated.exitCode"
        columns = f"custom-columns=POD:.metadata.name,STATE:.status.phase,NODE:.spec.nodeName,{code}"
        pods = self._must("pods could not be listed", "get", "pods", "-l", self._label, "-o", columns)
        self.commands.say(pods.rstrip())

    def logs(self, *, follow: bool) -> None:
        try:
            if not follow or self.commands.dry_run:
                self.commands.follow(
                    (*self.kubectl, "logs", "-l", self._label, "-c", CONTAINER, "--prefix", "--tail=100")
                )
                return
            if (there := self._there("jobset", self.name)) is None:
                raise LaunchError(f"there is no launch {self.name} in the cluster")
            jobs = there["spec"]["replicatedJobs"]
            count = sum(one["replicas"] * one["template"]["spec"]["completions"] for one in jobs)
            follow_pods(self.commands, self.kubectl, self._label, count, self._over)
        except KeyboardInterrupt:
            self.commands.say(f"the run goes on; {self.verb('stop')} ends it")
            return
        patiently(self._raise_ended, self.commands.say)

    def stop(self) -> None:
        self._ours()
        # Its pods get SIGTERM and the grace that they have, and it is gone when they are.
        waits = f"it may still be saving: `{self.verb('status')}` tells"
        with self.commands.stage("stopping, which saves first", waits):
            self._must(
                f"{self.name} was not stopped",
                *("delete", "jobset", self.name, "--cascade=foreground", "--ignore-not-found"),
            )

    def delete(self) -> None:
        jobset, config = self._ours()
        if jobset is None and config is None:
            self.commands.say(f"there is no launch {self.name}")
            return
        running = " which has not ended," if jobset is not None and _terminal(jobset) is None else ""
        self.commands.ask(
            f"Delete the JobSet {self.name},{running} and the ConfigMap {config_map(self.name)}, in the namespace "
            f"{self.gke.namespace} of {self.gke.context or 'the current context of kubectl'}?"
        )
        with self.commands.stage("deleting", f"what is left may still cost money: `{self.verb('delete')}` again"):
            self._must(
                f"the JobSet {self.name} was not deleted, and may cost money",
                *("delete", "jobset", self.name, "--cascade=foreground", "--ignore-not-found"),
            )
            self._must("its config was not deleted", "delete", "configmap", config_map(self.name), "--ignore-not-found")

    def write(self, run: Run, folder: Path) -> None:
        config, jobset = manifests(self.name, self.gke, run, self.owner)
        # JSON is YAML.
        files = {"1-config.yaml": config, "2-jobset.yaml": jobset}
        write_files({name: json.dumps(made, indent=2) + "\n" for name, made in files.items()}, folder, self.commands)

    def _over(self) -> bool:
        """Whether it has ended, or is gone."""
        there = patiently(lambda: self._there("jobset", self.name), self.commands.say)
        return there is None or _terminal(there) is not None

    def _raise_ended(self) -> None:
        """Raises RunEnded with the exit code of a run that has failed; `stop` removes a JobSet, once its pods saved."""
        there = self._there("jobset", self.name)
        if there is None:
            raise_ended(self.name, [STOPPED])
        elif _terminal(there) == "Failed":
            code = "jsonpath={.items[*].status.containerStatuses[*].state.terminated.exitCode}"
            codes = self._must("how it ended is not known", "get", "pods", "-l", self._label, "-o", code).split()
            raise_ended(self.name, [one for one in codes if one != "0"] or [NONE])

    def _there(self, kind: str, name: str) -> dict[str, Any] | None:
        """What there is of this name, if there is."""
        what = f"the cluster cannot be asked about {self.name}"
        said = self._must(what, "get", kind, name, "-o", "json", "--ignore-not-found")
        found: dict[str, Any] | None = json.loads(said) if said.strip() else None
        return found

    def _ours(self) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
        """JobSet and ConfigMap, if they are there. Raises LaunchError when they are somebody else's."""
        found = self._there("jobset", self.name), self._there("configmap", config_map(self.name))
        for one in found:
            text = "" if one is None else one["metadata"].get("annotations", {}).get(OWNER, "")
            if one is not None and not is_mine(text, self.owner) and not self.commands.take_over:
                raise LaunchError(of_others(whose(text)))
        return found

    @property
    def _label(self) -> str:
        return f"jobset.sigs.k8s.io/jobset-name={self.name}"

    def _must(self, what: str, *arguments: str, given: bytes | None = None) -> str:
        return self.commands.must((*self.kubectl, *arguments), what, given=given)


def _terminal(jobset: dict[str, Any]) -> str | None:
    """Completed, Failed, or None as long as it has not ended."""
    state: str | None = jobset.get("status", {}).get("terminalState")
    return state
