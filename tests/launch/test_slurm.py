"""Jobs on a real SLURM of one machine, which the test starts: preempted, put in the queue again, killed, stopped."""

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.local import free_port

from .conftest import Launch, command, environment, interrupted, losses, undisturbed

MACHINES = """
import sys
from launch.config import Machines
from launch.slurm import Slurm

config = Machines(
    name="tiny",
    slurm=Slurm(processes_per_node={processes}, partition="low"),
    python=sys.executable,
    environment=("JAX_PLATFORMS=cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS=true"),
)
"""
CONFIG = """\
ClusterName=test
SlurmctldHost=localhost
SlurmUser=root
SlurmctldPort={port}
SlurmdPort={next}
AuthType=auth/munge
AuthInfo=socket={folder}/socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
NodeName=localhost NodeHostname=localhost CPUs=2 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL State=UP PriorityTier=10 PreemptMode=OFF
"""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """SLURM_CONF names a cluster of this machine, with two processors: the partition `high` preempts `low`."""
    path = os.environ["PATH"] + ":/usr/sbin"
    missing = [name for name in PROGRAMS if not shutil.which(name, path=path)]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root, and SLURM: apt-get install slurm-wlm munge (missing: {', '.join(missing) or 'root'})")
    folder = Path(tempfile.mkdtemp(prefix="slurm", dir="/tmp"))
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, port=free_port(), next=free_port()))
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o600)
    files = {
        "key-file": "key",
        "socket": "socket",
        "pid-file": "munged.pid",
        "log-file": "munged.log",
        "seed-file": "seed",
    }
    munged = ["munged", "--force", "--foreground", *(f"--{option}={folder / name}" for option, name in files.items())]
    before = dict(os.environ)
    os.environ |= {"PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}
    commands = (munged, ["slurmctld", "-D"], ["slurmd", "-D", "-N", "localhost"])
    started: list[subprocess.Popen[bytes]] = []
    try:
        for command in commands:
            started.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            time.sleep(1)
        until = time.monotonic() + 30
        while "idle" not in run("sinfo", "-h", "-o", "%T"):
            if time.monotonic() > until:
                log = (folder / "slurmctld.log").read_text()
                pytest.skip(f"SLURM does not start on this machine: {log.splitlines()[-1:]}")
            time.sleep(0.5)
        yield
    finally:
        subprocess.run(["scancel", "--me"], capture_output=True)
        time.sleep(1)
        for process in reversed(started):
            process.terminate()
            process.wait(30)
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(folder, ignore_errors=True)


def run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def machines(folder: Path, cluster: None) -> Iterator[Path]:
    path = folder / "machines.py"
    path.write_text(MACHINES.format(processes=1))
    yield path
    run("scancel", "--me")
    wait(lambda: not run("squeue", "-h", "--me"))


def wait(happened: Callable[[], object], seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, run("scontrol", "show", "job")
        time.sleep(0.2)


def job(folder: Path) -> str:
    return (folder / "lm-launches" / "tiny" / "job").read_text().strip()


def log(folder: Path) -> str:
    path = folder / "lm-launches" / "tiny" / "log.txt"
    return path.read_text() if path.exists() else ""


def state(folder: Path) -> str:
    return run("squeue", "-h", "-j", job(folder), "-o", "%T")


def starts_again(folder: Path) -> None:
    """A job that was put in the queue again waits for two minutes, which the test does not."""

    def started() -> bool:
        run("scontrol", "update", f"JobId={job(folder)}", "StartTime=now")
        return "start 2 on localhost" in log(folder)

    wait(started)


MANY = ("--train.steps=100000", "--checkpoint.every=1000")
LONG = ("--train.steps=60", "--checkpoint.every=10", "--train.sequence_length=128", "--train.batch_size=16")


@pytest.mark.slow
def test_preempted_it_is_queued_again_and_goes_on(launch: Launch, machines: Path, folder: Path) -> None:
    said = launch("up", machines, "config.py", *MANY).stdout
    assert f"tiny is job {job(folder)}: " in said
    wait((folder / "run" / "metrics.jsonl").exists)
    assert "RUNNING" in launch("status", machines).stdout
    assert f"is job {job(folder)} already" in launch("up", machines, "config.py", *MANY).stdout
    refused = launch("up", machines, "config.py", code=8).stderr
    assert f"job {job(folder)} has this name, with another config or other code; first lm launch stop" in refused
    assert "is in the queue or runs; first stop it" in launch("delete", machines, "--yes", code=8).stderr

    urgent = run("sbatch", "--parsable", "-p", "high", "-n", "2", "-o", "/dev/null", "--wrap", "sleep 3")
    wait(lambda: "stopped and saved" in log(folder) or "stopped by SIGTERM" in log(folder))
    wait(lambda: not run("squeue", "-h", "-j", urgent))
    starts_again(folder)
    done = len(losses(folder / "run"))
    wait(lambda: len(losses(folder / "run")) > done)
    assert "stopped and saved" in launch("stop", machines).stdout
    assert not run("squeue", "-h", "--me"), "stopped, it is not queued again"


def wrapped(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, script: str) -> None:
    """Puts a script in the place of a program of SLURM, which is "$real" in it."""
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / name).write_text(f"#!/bin/bash\nreal={shutil.which(name)}\n{script}\n")
    (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")


def test_an_answer_of_sbatch_that_is_lost(
    launch: Launch, machines: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrapped(
        folder,
        monkeypatch,
        "sbatch",
        '"$real" "$@" > /dev/null; echo "sbatch: error: Batch job submission failed: Socket timed out" >&2; exit 1',
    )
    said = launch("up", machines, "config.py", *MANY).stdout
    assert f"tiny is job {job(folder)}: " in said
    (folder / "lm-launches" / "tiny" / "job").unlink()  # as when `up` was killed before it had the answer
    assert "RUNNING" in launch("status", machines).stdout or "PENDING" in launch("status", machines).stdout
    assert "already" in launch("up", machines, "config.py", *MANY).stdout
    assert len(run("squeue", "-h", "--me").splitlines()) == 1
    launch("stop", machines)
    assert not run("squeue", "-h", "--me")


@pytest.mark.slow
def test_a_view_that_is_lost_is_no_end(
    launch: Launch, machines: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = f"[ ! -e {folder}/lost ] || {{ touch {folder}/asked; echo timed out >&2; exit 1; }}"
    wrapped(folder, monkeypatch, "squeue", f'{lost}; exec "$real" "$@"')
    launch("up", machines, "config.py", *LONG)
    follow = subprocess.Popen(
        command("logs", machines, "--follow"), cwd=folder, env=environment(folder), stdout=subprocess.PIPE, text=True
    )
    wait((folder / "run" / "metrics.jsonl").exists)
    (folder / "lost").write_text("")
    time.sleep(5)
    (folder / "lost").unlink()
    assert (folder / "asked").exists()
    out, _ = follow.communicate(timeout=120)
    assert follow.returncode == 0, out
    assert "all 60 steps are done" in out


@pytest.mark.slow
def test_it_ends_as_if_nothing_had_been(launch: Launch, machines: Path, folder: Path) -> None:
    """Asked to save as before its time is over, then killed without warning, then launched again."""
    more = (*LONG, "--model.width=64", "--model.layers=2")
    launch("up", machines, "config.py", *more)
    wait((folder / "run" / "metrics.jsonl").exists)
    run("scancel", "--batch", "--signal=TERM", job(folder))
    starts_again(folder)
    done = len(losses(folder / "run"))
    wait(lambda: len(losses(folder / "run")) > done)
    listed = run("scontrol", "listpids", job(folder)).splitlines()[1:]
    for line in listed:
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(line.split()[0]), signal.SIGKILL)
    wait(lambda: not state(folder))
    assert "ended without a word: killed, or its machine failed" in launch("status", machines).stdout
    followed = launch("up", machines, "config.py", *more, "--follow").stdout
    assert "all 60 steps are done" in followed
    assert "ended with 0: done" in launch("status", machines).stdout
    expected = undisturbed(folder, *more)
    assert losses(folder / "run") == expected
    launch("delete", machines, "--yes")
    assert not (folder / "lm-launches" / "tiny").exists()


@pytest.mark.slow
def test_two_processes(launch: Launch, machines: Path, folder: Path) -> None:
    machines.write_text(MACHINES.format(processes=2))
    followed = launch("up", machines, "config.py", "--follow").stdout
    assert "0: all 12 steps are done" in followed
    assert "2 x cpu" in followed


@pytest.mark.slow
def test_from_a_laptop_through_a_login_node(launch: Launch, machines: Path, folder: Path, two: tuple) -> None:
    host, servers = two
    login = host("login", f'ForceCommand SLURM_CONF={os.environ["SLURM_CONF"]} bash -c "$SSH_ORIGINAL_COMMAND"')
    text = machines.read_text().replace("Slurm(", f"Slurm(login={login!r}, ssh_options={servers.options!r}, ")
    machines.write_text(text)
    assert "all 12 steps are done" in launch("up", machines, "config.py", "--follow").stdout
    assert (folder / "login" / "lm-launches" / "tiny" / "log.txt").exists()
    assert "ended with 0: done" in launch("status", machines).stdout
    owner = folder / "login" / "lm-launches" / "tiny" / "owner"
    mine = owner.read_text()
    owner.write_text("0123 eve@laptop\n")
    for verb in (("up", machines, "config.py"), ("stop", machines), ("delete", machines, "--yes")):
        assert "a launch of this name is there, of eve@laptop" in launch(*verb, code=8).stderr
    owner.write_text(mine)
    launch("delete", machines, "--yes")
    assert not (folder / "login" / "lm-launches" / "tiny").exists()


def test_what_the_cluster_refuses(launch: Launch, machines: Path) -> None:
    refused = launch("up", machines, "config.py", "--slurm.partition=none", code=8).stderr
    assert "tiny was not submitted:\n    this machine: sbatch: error: " in refused
    assert "Invalid partition name specified" in refused
    assert "there is no launch" in launch("status", machines, "--slurm.folder=/tmp/nothing").stdout


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("--slurm.nodes=0", "slurm.nodes: must be at least 1"),
        ("--slurm.time=tomorrow", "slurm.time: must be as 30, 24:00:00 or 7-00:00:00"),
        ("--slurm.options=--qos=high", "slurm.options: stand without --"),
        ("--slurm.gpus_per_node=3", "slurm.gpus_per_node: 3 cannot be shared by 2 processes"),
        ("--slurm.gpus_per_node=8", "batch of 4 cannot be split over mesh axes fsdp of 8"),
    ],
)
def test_jobs_that_cannot_be(launch: Launch, folder: Path, argument: str, said: str) -> None:
    (folder / "machines.py").write_text(MACHINES.format(processes=2))
    assert said in launch("up", "machines.py", "config.py", argument, code=2).stderr


@pytest.mark.parametrize(
    ("slow", "said"),
    [
        ("command -v", "interrupted while looking at the cluster: nothing was changed"),
        ("tar -xzf", "nothing was submitted; what was copied goes with `lm launch delete machines.py`"),
        (
            "sbatch --parsable",
            "interrupted while submitting: it may have been submitted: `lm launch status machines.py`",
        ),
    ],
)
def test_ctrl_c_tells_what_is_left(folder: Path, monkeypatch: pytest.MonkeyPatch, slow: str, said: str) -> None:
    (folder / "bin").mkdir()
    for name in ("sbatch", "squeue", "scontrol", "scancel"):
        (folder / "bin" / name).write_text("#!/bin/sh\n")
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    (folder / "machines.py").write_text(MACHINES.format(processes=1))
    assert said in interrupted(folder, slow, "up", "machines.py", "config.py")


def test_no_slurm_here(launch: Launch, folder: Path) -> None:
    if shutil.which("sbatch"):
        pytest.skip("SLURM is here")
    (folder / "machines.py").write_text(MACHINES.format(processes=1))
    assert "no SLURM there" in launch("up", "machines.py", "config.py", code=8).stderr


def test_the_code_of_the_run_outlives_the_signal_that_ends_it(launch: Launch, folder: Path) -> None:
    """Asked to save, the run may end while the job still handles the signal."""
    (folder / "machines.py").write_text(MACHINES.format(processes=1))
    launch("write", "machines.py", "config.py", "--out", "out")
    stubs = {
        "srun": "while [ ! -e asked ]; do sleep 0.05; done; exit 75",
        "scancel": "touch asked; sleep 1",
        "scontrol": "echo localhost",
    }
    (folder / "bin").mkdir()
    for name, text in stubs.items():
        (folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / "bin" / name).chmod(0o755)
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    mine = os.environ | {"PATH": path, "SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "a"}
    script = subprocess.Popen(["bash", "job.sh"], cwd=folder / "out", env=mine)
    time.sleep(1)
    script.terminate()
    assert script.wait(20) == 75
    assert (folder / "out" / "exit").read_text() == "75\n"
    assert (folder / "out" / "job").read_text() == "1\n"


def test_another_config_is_another_file(launch: Launch, folder: Path) -> None:
    """So that an `up` that is refused changes nothing for the job that there is."""
    (folder / "machines.py").write_text(MACHINES.format(processes=1))
    for steps in (1, 2):
        launch("write", "machines.py", "config.py", "--out", "out", f"--train.steps={steps}")
        assert len(found := sorted((folder / "out").glob("config*.json"))) == steps
        assert any(path.name in (folder / "out" / "job.sh").read_text() for path in found)


def test_the_script_is_bash(launch: Launch, folder: Path) -> None:
    (folder / "machines.py").write_text(MACHINES.format(processes=2))
    launch(
        "write",
        "machines.py",
        "config.py",
        "--out",
        "out",
        "--slurm.gpus_per_node=8",
        "--slurm.options=qos=high",
        "--train.batch_size=8",
    )
    subprocess.run(["bash", "-n", folder / "out" / "job.sh"], check=True)
    script = (folder / "out" / "job.sh").read_text()
    for line in ("--requeue", "--signal=B:TERM@180", "--gpus-per-node=8", "--qos=high", "--ntasks=2"):
        assert f"\n#SBATCH {line}\n" in script
    assert "export JAX_PLATFORMS=cuda\n" in script
    assert "CUDA_VISIBLE_DEVICES=$(seq -s, $((SLURM_LOCALID * 4)) $((SLURM_LOCALID * 4 + 3)))" in script
