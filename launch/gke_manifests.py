"""What the cluster is given for a launch: a ConfigMap with the config, and a JobSet."""

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Any

from launch.owner import Owner
from launch.target import Run
from lm.train.supervise import FINAL

if TYPE_CHECKING:
    from launch.gke import Gke

OWNER = "lm/launched-by"
DIGEST = "lm/launched"
MOUNT = "/config"
CONTAINER = "train"
_PORT = 8476
_NVIDIA = "/usr/local/nvidia"
"""Where GKE puts the driver of its nodes."""
_BUG, _DATA = 1, 3
_ENDS = sorted({*filter(None, FINAL), _BUG, _DATA})
"""Exit codes with which the supervisor in a pod gives up: more of the same by the cluster would change nothing."""


def manifests(name: str, gke: "Gke", run: Run, owner: Owner) -> list[dict[str, Any]]:
    """The ConfigMap with the config, and the JobSet. Raises ConfigError for a topology that there is not."""
    notes = {OWNER: str(owner), DIGEST: run.digest(json.dumps(dataclasses.asdict(gke)))}
    hosts, chips = (gke.nodes, gke.gpus_per_node) if gke.gpu else _tpu_hosts(gke.topology)
    resource = {"nvidia.com/gpu" if gke.gpu else "google.com/tpu": str(chips)}
    memory = {"memory": gke.memory} if gke.memory else {}
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": gke.image,
        # A tag may have got another image since a node has fetched it.
        "imagePullPolicy": "IfNotPresent" if "@sha256:" in gke.image else "Always",
        "command": ["bash", "-c", "\n".join(_script(name, gke, run, hosts))],
        "resources": {"requests": resource | memory, "limits": resource | memory},
        "volumeMounts": [
            {"name": "config", "mountPath": MOUNT},
            {"name": "shm", "mountPath": "/dev/shm"},
            *({"name": f"bucket-{i}", "mountPath": bucket.path} for i, bucket in enumerate(gke.buckets)),
        ],
    }
    if gke.secrets:
        container["envFrom"] = [{"secretRef": {"name": secret}} for secret in gke.secrets]
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "shareProcessNamespace": True,  # the first process of a namespace ignores SIGTERM until it handles it
        "terminationGracePeriodSeconds": gke.grace_seconds,
        "nodeSelector": _selector(gke),
        "tolerations": _tolerations(gke),
        "containers": [container],
        "volumes": [
            {"name": "config", "configMap": {"name": config_map(name)}},
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
                    "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": _ENDS},
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
        "metadata": {"name": config_map(name), "annotations": notes},
        "data": {"config.json": run.config},
    }
    return [config, jobset]


def _script(name: str, gke: "Gke", run: Run, hosts: int) -> list[str]:
    """Lines of bash. Of TPU slices JAX learns from GKE which process is which; for GPUs it is said here."""
    # The backend that is meant, or an error: never the CPU in its place.
    variables = {"JAX_PLATFORMS": "cuda" if gke.gpu else "tpu,cpu"}
    place: list[str] = []
    if gke.gpu:
        place = [
            f'export PATH={_NVIDIA}/bin:"$PATH"',
            f'export LD_LIBRARY_PATH={_NVIDIA}/lib64"${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}"',
        ]
    if gke.gpu and hosts > 1:
        place += [
            f"export JAX_COORDINATOR_ADDRESS={name}-slice-0-0.{name}:{_PORT}",
            f"export JAX_NUM_PROCESSES={hosts} JAX_PROCESS_ID=$JOB_COMPLETION_INDEX",
        ]
    elif hosts * gke.slices == 1:
        place += [f"export JAX_COORDINATOR_ADDRESS=localhost:{_PORT} JAX_NUM_PROCESSES=1 JAX_PROCESS_ID=0"]
    return [*run.prelude(variables, "/lm"), *place, f"exec {run.command(f'{MOUNT}/config.json', supervise=True)}"]


def _tpu_hosts(topology: str) -> tuple[int, int]:
    """Hosts of one slice, and chips of one host."""
    from lm.plan.topology import host_shape, parse_name  # loads jax

    chip, shape = parse_name(topology)
    chips = math.prod(host_shape(chip, shape))
    return math.prod(shape) // chips, chips


def _selector(gke: "Gke") -> dict[str, str]:
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


def _tolerations(gke: "Gke") -> list[dict[str, str]]:
    resource = "nvidia.com/gpu" if gke.gpu else "google.com/tpu"
    found = [{"key": resource, "operator": "Exists", "effect": "NoSchedule"}]
    if gke.spot:
        found.append({"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"})
    return found


def config_map(name: str) -> str:
    return f"lm-{name}-config"


_ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
    "tpu7x": "tpu7x",
}
"""What GKE calls the chips in the labels of nodes."""
