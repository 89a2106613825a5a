"""Manifests against the schemas of Kubernetes and JobSet; the verbs against a stand-in for kubectl that keeps state."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch.commands import Commands
from launch.config import Machines
from launch.fits import check_fits, check_mesh
from launch.gke import Bucket, Gke
from launch.gke_follow import logs_command
from launch.gke_manifests import manifests
from launch.owner import Owner
from launch.target import Run
from lm import config as configs
from lm.chips import TPUS
from lm.config import check
from lm.errors import ConfigError
from lm.experiment import Config
from lm.plan.topology import shapes

from .conftest import ROOT, Launch, command, environment

OWNER = Owner("0123456789abcdef", "ann@laptop")
RUN = Run(configs.to_json(Config()), "python3", (), ("A=b c",))
TPU = Gke(image="r/lm:1", topology="v5p:4x4x4", slices=2, spot=True, service_account="me", memory="400Gi")
GPU = Gke(
    image="r/lm:1",
    gpu="nvidia-h100-80gb",
    nodes=4,
    reservation="ours",
    queue="q",
    buckets=(Bucket("b-1", "/b"),),
    secrets=("hugging-face",),
)
ONE = Gke(image="r/lm:1", topology="v5e:1x1")


def jobset(gke: Gke) -> dict[str, Any]:
    return manifests("tiny", gke, RUN, OWNER)[1]


@pytest.mark.parametrize("gke", [TPU, GPU, ONE], ids=["tpu", "gpu", "one"])
def test_the_schemas_take_all_of_it(gke: Gke) -> None:
    """The models are made from the OpenAPI schemas; what they do not know, they leave out when they write it."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="comes with the extra `test`")
    config, made = manifests("tiny", gke, RUN, OWNER)
    for text, model in ((config, models.IoK8sApiCoreV1ConfigMap), (made, models.JobsetV1alpha2JobSet)):
        read = model.from_dict(text)
        assert json.loads(json.dumps(read.to_dict())) == text
    assert (
        len(models.JobsetV1alpha2JobSet.from_dict(made).spec.replicated_jobs[0].template.spec.template.spec.containers)
        == 1
    )


def test_the_check_of_schemas_can_fail() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="comes with the extra `test`")
    wrong = jobset(TPU)
    wrong["spec"]["replicatedJobs"][0]["template"]["spec"]["backofLimit"] = 1
    assert json.loads(json.dumps(models.JobsetV1alpha2JobSet.from_dict(wrong).to_dict())) != wrong
    wrong = jobset(TPU)
    wrong["spec"]["replicatedJobs"][0]["template"]["spec"]["completions"] = "16"
    with pytest.raises(ValueError, match="completions"):
        models.JobsetV1alpha2JobSet.from_dict(wrong)


def test_two_spot_slices() -> None:
    made = jobset(TPU)
    (slices,) = made["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    assert slices["replicas"] == 2
    assert (job["completionMode"], job["completions"], job["parallelism"], job["backoffLimit"]) == (
        "Indexed",
        16,
        16,
        0,
    )
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
        "cloud.google.com/gke-spot": "true",
    }
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": "4", "memory": "400Gi"}
    assert {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"} in pod[
        "tolerations"
    ]
    assert "JAX_PROCESS_ID" not in pod["containers"][0]["command"][2], "GKE tells the processes of TPU slices"
    exclusive = made["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
    assert exclusive == "cloud.google.com/gke-nodepool"


def test_exit_codes_that_end_the_run_and_those_that_do_not() -> None:
    job = jobset(TPU)["spec"]["replicatedJobs"][0]["template"]["spec"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"] == {"containerName": "train", "operator": "In", "values": [1, 2, 3, 4, 7, 130]}
    assert job["template"]["spec"]["restartPolicy"] == "Never", "what a podFailurePolicy needs"
    policy = jobset(TPU)["spec"]["failurePolicy"]
    assert policy["maxRestarts"] == 20
    assert policy["rules"] == [
        {"name": "final", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ], "all others, 6 and 75 among them, start again"


def test_gpu_nodes_find_each_other() -> None:
    made = jobset(GPU)
    pod = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]
    script = pod["spec"]["containers"][0]["command"][2]
    assert "export JAX_COORDINATOR_ADDRESS=tiny-slice-0-0.tiny:8476\n" in script
    assert "JAX_NUM_PROCESSES=4 JAX_PROCESS_ID=$JOB_COMPLETION_INDEX\n" in script
    assert "export A='b c'\n" in script
    subprocess.run(["bash", "-n"], input=script.encode(), check=True)
    assert pod["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert {"name": "bucket-0", "mountPath": "/b"} in pod["spec"]["containers"][0]["volumeMounts"]
    assert pod["spec"]["nodeSelector"]["cloud.google.com/reservation-name"] == "ours"
    assert made["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "q"}


def test_grace_is_as_long_as_the_watchdog_lets_a_save_go_on() -> None:
    pod = jobset(TPU)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    watchdog = Config().watchdog
    assert pod["terminationGracePeriodSeconds"] >= max(watchdog.save_seconds, watchdog.step_seconds)


def test_a_gpu_image_finds_the_driver_and_a_backend_is_never_replaced_by_the_cpu() -> None:
    def script(gke: Gke) -> str:
        text = jobset(gke)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0][
            "command"
        ][2]
        head = text.rpartition("exec ")[0] + 'echo "$JAX_PLATFORMS|$PATH|$LD_LIBRARY_PATH"'
        clean = {"PATH": "/usr/bin:/bin"}
        return subprocess.run(
            ["bash", "-c", head], env=clean, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert script(GPU) == "cuda|/usr/local/nvidia/bin:/usr/bin:/bin|/usr/local/nvidia/lib64"
    assert script(TPU) == "tpu,cpu|/usr/bin:/bin|"


def test_containers() -> None:
    pod = jobset(GPU)["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert pod["shareProcessNamespace"] is True
    assert container["envFrom"] == [{"secretRef": {"name": "hugging-face"}}]
    assert container["imagePullPolicy"] == "Always"
    assert container["command"][2].rstrip().endswith("-m lm train /config/config.json --supervise")
    pinned = jobset(Gke(image="r/lm@sha256:12", topology="v5e:1x1"))
    assert '"imagePullPolicy": "IfNotPresent"' in json.dumps(pinned)


def test_a_mesh_that_gpus_do_not_make_is_refused() -> None:
    large = configs.load(str(ROOT / "configs" / "llama3_8b.py"), Config)
    with pytest.raises(ConfigError, match="mesh"):
        check_mesh(configs.override(large, ["--mesh.tensor=3"]), 32)
    assert check_mesh(large, 32).startswith("mesh on 32 GPUs: ")


@pytest.mark.parametrize("name", TPUS)
def test_every_slice_that_there_is(name: str) -> None:
    for shape in shapes(TPUS[name])[:6]:
        sides = "x".join(map(str, shape))
        job = jobset(Gke(image="i", topology=f"{name}:{sides}"))["spec"]["replicatedJobs"][0]["template"]["spec"]
        chips = int(job["template"]["spec"]["containers"][0]["resources"]["limits"]["google.com/tpu"])
        size = 1
        for side in shape:
            size *= side
        assert job["completions"] * chips == size


@pytest.mark.parametrize(
    ("gke", "said"),
    [
        (Gke(topology="v5p:4x4x4"), "gke.image: must name a container image"),
        (Gke(image="i"), "gke.topology: either this or gpu must be given"),
        (Gke(image="i", gpu="h", slices=2), "gke.slices: are of TPUs; write nodes"),
        (Gke(image="i", gpu="h", spot=True, reservation="r"), "gke.reservation: has no spot nodes"),
        (Gke(image="i", gpu="h", buckets=(Bucket("gs://b", "/b"),)), "gke.buckets.0.name: 'gs://b' is no name"),
    ],
)
def test_clusters_that_cannot_be(gke: Gke, said: str) -> None:
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        check(Machines(name="tiny", gke=gke))


def test_what_does_not_fit_is_refused() -> None:
    large = configs.load(str(ROOT / "configs" / "llama3_70b.py"), Config)
    with pytest.raises(
        ConfigError, match=r"does not fit v5e:4x4: by the model .* GiB a device of .* Nothing was created"
    ):
        check_fits(large, "v5e:4x4", 1)
    with pytest.raises(ConfigError, match=r"cannot be spread over 2 slices: make mesh\.data"):
        check_fits(configs.override(large, ["--mesh.data=1"]), "v5p:8x8x8", 2)
    with pytest.raises(ConfigError, match="there is no TPU topology 'v5p:4x4x5'; the nearest"):
        check_fits(large, "v5p:4x4x5", 1)
    with pytest.raises(ConfigError, match=r"mesh: .* does not fit"):
        check_fits(configs.override(large, ["--mesh.tensor=3"]), "v5p:4x4x4", 1)
    assert check_fits(large, "v5p:8x8x8", 1).startswith("fits v5p:8x8x8: ")


MACHINES = """
from launch.config import Machines
from launch.gke import Gke

config = Machines(name="tiny", gke=Gke(image="r/lm:1", topology="v5e:2x2"))
"""


@pytest.fixture
def state(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the cluster of a stand-in for kubectl holds, as JSON."""
    (folder / "machines.py").write_text(MACHINES)
    monkeypatch.setenv("PATH", f"{Path(__file__).parent / 'stand_in'}:{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.setenv("LM_STAND_IN", str(folder / "state"))
    return folder / "state"


def test_from_nothing_to_nothing(launch: Launch, state: Path) -> None:
    up = ("up", "machines.py", "config.py")
    refused = launch(*up, code=2).stderr
    assert "Start tiny on 1 x v5e:2x2? Nobody is there to answer: say --yes" in refused
    assert not json.loads(state.read_text())
    assert "fits v5e:2x2: " in launch(*up, "--yes").stdout
    assert set(json.loads(state.read_text())) == {"tiny", "lm-tiny-config"}
    assert "is in the cluster already" in launch(*up, "--yes").stdout
    other = launch(*up, "--yes", "--train.steps=13", code=8).stderr
    assert "is in the cluster with another config; first lm launch stop machines.py" in other
    assert "tiny: not ended, 0 restarts\nPOD STATE" in launch("status", "machines.py").stdout
    assert "a line of the log" in launch("logs", "machines.py").stdout
    launch("stop", "machines.py")
    assert set(json.loads(state.read_text())) == {"lm-tiny-config"}
    launch(*up, "--yes", "--train.steps=13")
    launch("delete", "machines.py", "--yes")
    assert not json.loads(state.read_text())
    assert "there is no launch tiny" in launch("status", "machines.py").stdout


def test_one_that_has_ended_is_made_again(launch: Launch, state: Path) -> None:
    launch("up", "machines.py", "config.py", "--yes")
    there = json.loads(state.read_text())
    there["tiny"]["status"] = {"terminalState": "Failed", "restarts": 3}
    state.write_text(json.dumps(there))
    assert "tiny: Failed, 3 restarts" in launch("status", "machines.py").stdout
    launch("up", "machines.py", "config.py", "--yes")
    assert "status" not in json.loads(state.read_text())["tiny"]


def test_followed_from_the_first_pod_to_the_last(launch: Launch, state: Path) -> None:
    first = ["tiny-a 2026-01-01T00:00:01.5Z one", "tiny-a 2026-01-01T00:00:02Z two"]
    phases = [
        {},
        {"pods": {"tiny-a": "waiting"}},
        {"pods": {"tiny-a": "running"}, "lines": first},
        {"pods": {"tiny-a": "running"}, "lines": [*first, "tiny-a 2026-01-01T00:00:02.25Z three"]},
        {"pods": {"tiny-b": "waiting"}},  # all pods were made anew
        {"pods": {"tiny-b": "running"}, "lines": ["tiny-b 2026-01-01T00:01:00Z four"]},
        {"pods": {"tiny-b": "terminated"}, "lines": ["tiny-b 2026-01-01T00:02:00Z five"], "terminal": "Failed"},
    ]
    state.write_text(json.dumps({"phases": phases}))
    ended = launch("up", "machines.py", "config.py", "--yes", "--follow", code=4)
    shown = [line for line in ended.stdout.splitlines() if line.startswith("[pod/")]
    assert shown == [
        "[pod/tiny-a/train] one",
        "[pod/tiny-a/train] two",
        "[pod/tiny-a/train] three",
        "[pod/tiny-b/train] four",
        "[pod/tiny-b/train] five",
    ]
    assert "lm: tiny ended with 4: diverged" in ended.stderr


@pytest.mark.parametrize("shown", [{}, {b"a": "2026-01-01T00:00:00.000000000"}])
def test_what_is_asked_of_kubectl_for_logs(shown: dict[bytes, str]) -> None:
    if not shutil.which("kubectl"):
        pytest.skip("needs kubectl: https://kubernetes.io/docs/tasks/tools")
    asked = logs_command(["kubectl", "--server=http://127.0.0.1:1"], "a=b", shown)
    said = subprocess.run(asked, capture_output=True, text=True).stderr
    assert "connection to the server 127.0.0.1:1 was refused" in said, "it was read, and sent"


@pytest.mark.parametrize(("state_at_end", "code"), [("Failed", 4), ("Completed", 0)])
def test_what_is_followed_gives_its_exit_code(launch: Launch, state: Path, state_at_end: str, code: int) -> None:
    launch("up", "machines.py", "config.py", "--yes")
    there = json.loads(state.read_text())
    there["tiny"]["status"] = {"terminalState": state_at_end}
    state.write_text(json.dumps(there))
    said = launch("logs", "machines.py", "--follow", code=code)
    assert "a line of the log" in said.stdout
    assert ("lm: tiny ended with 4: diverged" in said.stderr) == bool(code)


@pytest.mark.parametrize("name", ["tiny", "lm-tiny-config"])
def test_what_is_somebody_elses_is_left_alone(launch: Launch, state: Path, name: str) -> None:
    notes = {"annotations": {"lm/launched-by": "0123 eve@laptop", "lm/launched": "x"}}
    other = {name: {"metadata": notes, "spec": {}, "status": {"terminalState": "Failed"}}}
    state.write_text(json.dumps(other))
    verbs = (
        ("up", "machines.py", "config.py", "--yes"),
        ("stop", "machines.py"),
        ("delete", "machines.py", "--yes"),
    )
    for verb in verbs:
        assert "a launch of this name is there, of eve@laptop: take another name" in launch(*verb, code=8).stderr
    assert json.loads(state.read_text()) == other
    launch(*verbs[0], "--take-over")
    assert "eve@" not in state.read_text()
    state.write_text(json.dumps(other))
    launch(*verbs[2], "--take-over")
    assert json.loads(state.read_text()) == {}


def test_the_question_before_deleting_says_what_goes(launch: Launch, state: Path) -> None:
    launch("up", "machines.py", "config.py", "--yes")
    said = launch("delete", "machines.py", code=2).stderr
    assert (
        "Delete the JobSet tiny, which has not ended, and the ConfigMap lm-tiny-config, in the namespace default"
        in said
    )


def test_a_cluster_that_does_not_answer(launch: Launch, state: Path) -> None:
    state.write_text(json.dumps({"refuse": "Unable to connect to the server: dial tcp: i/o timeout"}))
    said = launch("up", "machines.py", "config.py", "--yes", code=8).stderr
    assert "the cluster cannot be asked about tiny: Unable to connect to the server" in said
    assert "the command was: kubectl --namespace default get jobset tiny" in said


def test_no_kubectl(launch: Launch, state: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    assert (
        "there is no program 'kubectl' on this machine; install it"
        in launch("up", "machines.py", "config.py", code=8).stderr
    )
    for more in ((), ("--follow",)):
        said = launch("logs", "machines.py", *more, code=8).stderr
        assert "there is no program 'kubectl' on this machine; install it" in said


def test_what_does_not_fit_reaches_no_cluster(launch: Launch, state: Path) -> None:
    said = launch("up", "machines.py", str(ROOT / "configs" / "llama3_70b.py"), "--yes", code=2).stderr
    assert "does not fit v5e:2x2" in said
    assert not Path(f"{state}.calls").exists()


def test_a_dry_run_reaches_no_cluster(launch: Launch, state: Path) -> None:
    said = launch("up", "machines.py", "config.py", "--dry-run").stdout
    assert "+ kubectl --namespace default apply -f -" in said
    assert not Path(f"{state}.calls").exists()


def test_written_for_others(launch: Launch, state: Path, folder: Path) -> None:
    launch("write", "machines.py", "config.py", "--out", "out")
    assert json.loads((folder / "out" / "2-jobset.yaml").read_text())["kind"] == "JobSet"
    assert not Path(f"{state}.calls").exists()


def test_ctrl_c_while_creating(state: Path, folder: Path) -> None:
    import os
    import signal
    import time

    state.write_text(json.dumps({"slow": True}))
    process = subprocess.Popen(
        command("up", "machines.py", "config.py", "--yes"),
        cwd=folder,
        env=environment(folder) | {"PATH": os.environ["PATH"]},
        stderr=subprocess.PIPE,
        text=True,
    )
    calls = Path(f"{state}.calls")
    while not calls.exists() or "apply" not in calls.read_text():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted while creating: `lm launch delete machines.py` removes it" in err


def test_commands_say_what_failed() -> None:
    with pytest.raises(Exception, match="it went wrong: bad\nthe command was: bash -c 'echo bad >&2; exit 3'"):
        Commands().must(["bash", "-c", "echo bad >&2; exit 3"], "it went wrong")
