"""SLURM: one job, put in the queue again when it was stopped, preempted, or ran out of time."""

import dataclasses
import hashlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

from launch.commands import Commands
from launch.hosts import THIS, Host, Hosts
from launch.owner import shell
from launch.patience import patiently
from launch.ssh import Ssh
from launch.ssh import command as ssh_command
from launch.target import NONE, RUNNING, Run, Target, ended, of_others, raise_ended, shell_path, write_files
from launch.tree import unpack
from lm.errors import Stopped

STOP_SECONDS = 900
_OTHERS, _UNKNOWN = 20, 21


@dataclasses.dataclass(frozen=True)
class Slurm:
    """A job of so many nodes, with one process on each, which has all devices that the job gets there."""

    login: str = ""
    """Host from which jobs are submitted, as ssh takes it; empty: this machine."""
    ssh_options: tuple[str, ...] = ()
    """For ssh to it, as in its config."""
    folder: str = "~/lm-launches"
    """For launches; all nodes must reach it. Relative paths of the config start at the launch's folder in it."""
    nodes: int = 1
    processes_per_node: int = 1
    """More than one: each gets its part of the node's GPUs."""
    gpus_per_node: int = 0
    cpus_per_process: int = 0
    """0: what the cluster gives."""
    partition: str = ""
    account: str = ""
    time: str = ""
    """Longest time of one start, as 24:00:00; the job goes on afterwards."""
    notice_seconds: int = 180
    """Before that time is over, the run is asked to save."""
    options: tuple[str, ...] = ()
    """More of sbatch, as qos=high or exclusive."""

    @property
    def gpus(self) -> int:
        """In all, as far as that is said here."""
        return self.nodes * self.gpus_per_node

    def check(self) -> Iterator[tuple[str, str]]:
        for name in ("nodes", "processes_per_node", "notice_seconds"):
            if getattr(self, name) < 1:
                yield name, f"must be at least 1, got {getattr(self, name)}"
        for name in ("gpus_per_node", "cpus_per_process"):
            if getattr(self, name) < 0:
                yield name, f"must be at least 0, got {getattr(self, name)}"
        if self.gpus_per_node % self.processes_per_node:
            yield "gpus_per_node", f"{self.gpus_per_node} cannot be shared by {self.processes_per_node} processes"
        if not self.folder.startswith(("/", "~/")):
            yield "folder", f"must start with / or ~/, got {self.folder!r}"
        if self.time and not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", self.time):
            yield "time", f"must be as 30, 24:00:00 or 7-00:00:00, got {self.time!r}"
        for option in self.options:
            if option.startswith("-") or not option or "\n" in option:
                yield "options", f"stand without --, as qos=high; got {option!r}"


def target(name: str, slurm: Slurm, commands: Commands) -> "SlurmJob":
    """The launch of this name on the cluster."""
    host = THIS
    if slurm.login:
        host = Host(slurm.login, (*ssh_command(Ssh(hosts=(slurm.login,), options=slurm.ssh_options)), slurm.login))
    return SlurmJob(name, commands, slurm, Hosts([host], commands))


class SlurmJob(Target):
    """A job, and its folder: the code by its digest, config, script, log, exit code, and the number of the job."""

    def __init__(self, name: str, commands: Commands, slurm: Slurm, host: Hosts):
        super().__init__(name, commands)
        self.slurm = slurm
        self.host = host
        self.base = shell_path(f"{slurm.folder.rstrip('/')}/{name}")

    def up(self, run: Run) -> None:
        nothing = f"nothing was submitted; what was copied goes with `{self.verb('delete')}`"
        with self.commands.stage("looking at the cluster", "nothing was changed"):
            self._do("command -v sbatch squeue scontrol scancel flock tar gzip > /dev/null", "no SLURM there")
        digest = run.digest(self.script(run))
        with self.commands.stage("looking for another launch of this name", nothing):
            said = self._do(self._claim(digest), f"{self.name} was not submitted")
            if "same" in said:
                self.commands.say(f"{self.name} is job {said.split()[-1]} already: {self.verb('status')}")
                return
        with self.commands.stage(f"copying the code ({len(run.archive) / 2**20:.1f} MiB)", nothing):
            script = f"cd {self.base} && cat > {_config(run)}"
            self._do(script, "the config could not be copied", run.config.encode())
            self._do(unpack(self.base, run.code), "the code could not be copied", run.archive)
        perhaps = f"it may have been submitted: `{self.verb('status')}` tells, `{self.verb('stop')}` ends it"
        with self.commands.stage("submitting", perhaps):
            said = self._do(self._submit(run, digest), f"{self.name} was not submitted")
        self.commands.say(f"{self.name} is job {said.strip()}: {self.verb('status')}, {self.verb('logs --follow')}")

    def status(self) -> None:
        script = f"""\
{self._queued}
cd {self.base} 2> /dev/null || {{ echo there is no launch {self.name}; exit 0; }}
if queued; then
    squeue -h -j "$job" -o "job %i: %T, for %M of %l, on %D node(s) %N %r"
    tail -n 1 log.txt 2> /dev/null
    exit 0
fi
echo "code $(cat exit 2> /dev/null || echo none)"
sacct -n -X -D -j "$job" -o JobID,State,ExitCode,Elapsed 2> /dev/null
tail -n 1 log.txt 2> /dev/null || true"""
        for line in self._do(script, "the cluster did not answer").splitlines():
            self.commands.say(ended(line.split()[1]) if line.startswith("code ") else line)

    def logs(self, *, follow: bool) -> None:
        if not follow:
            log = self._do(f"tail -n 100 {self.base}/log.txt", f"{self.name} has no log yet")
            self.commands.say(log.rstrip("\n"))
            return
        try:
            end = self._follow()
        except KeyboardInterrupt:
            self.commands.say(f"the run goes on; {self.verb('stop')} ends it")
            return
        if not self.commands.dry_run:
            raise_ended(self.name, [end])

    def _follow(self) -> str:
        """Shows the log until the job is no longer queued; the exit code. A connection that is lost is no end."""
        ask = f"""\
{self._queued}
cd {self.base} || exit 1
queued && echo {RUNNING} || cat exit 2> /dev/null || echo {NONE}"""
        lines, end = 100, RUNNING
        while end == RUNNING:
            script = f"""\
{self._queued}
cd {self.base} || exit 1
touch log.txt
tail -n {lines} -F log.txt & shown=$!
trap 'kill $shown' EXIT
while (queued 2> /dev/null); [ $? != 1 ]; do sleep 2; done
sleep 1"""
            self.commands.follow(self.host.hosts[0].command(script))
            end = patiently(lambda: self._do(ask, "how it goes is not known"), self.commands.say).strip()
            lines = 5
        return end

    def stop(self) -> None:
        script = f"""\
{self._queued}
cd {self.base} || exit 1
mine >&2 || exit {_OTHERS}
touch stop
queued || exit 0
case $(squeue -h -j "$job" -o %T) in
    PENDING | REQUEUED) scancel "$job" ;;
    *) scancel --signal=TERM "$job" ;;
esac
for ((i = 0; i < {STOP_SECONDS}; i++)); do queued || exit 0; sleep 1; done
echo "job $job has not ended after 15 minutes: scancel $job ends it without saving" >&2
exit 1"""
        waits = f"it was asked to stop and may still be saving: `{self.verb('status')}` tells"
        with self.commands.stage("stopping, which saves first", waits):
            self._do(script, f"{self.name} was not stopped", seconds=STOP_SECONDS + 60)
        self.status()

    def delete(self) -> None:
        where = f"{self.slurm.folder.rstrip('/')}/{self.name}"
        self.commands.ask(f"Remove code and log of {self.name}, in the folder {where} of {self.host.hosts[0].name}?")
        script = f"""\
{self._queued}
cd {self.base} 2> /dev/null || exit 0
mine >&2 || exit {_OTHERS}
queued && {{ echo "job $job is in the queue or runs; first stop it" >&2; exit 1; }}
rm -rf code-* new* owner* config-*.json job.sh job digest exit stop lock log.txt
cd .. && rmdir {self.base} 2> /dev/null || ls {self.base}"""
        with self.commands.stage(f"removing {self.name}", f"`{self.verb('delete')}` removes the rest"):
            left = self._do(script, f"{self.name} was not removed")
        if left.strip():
            self.commands.say(f"what the run has written stays: {' '.join(left.split())}")

    def write(self, run: Run, folder: Path) -> None:
        self.commands.say(
            f"to be submitted in the folder that has {_config(run)} and the code in code-{run.code}: sbatch job.sh"
        )
        write_files({_config(run): run.config, "job.sh": self.script(run)}, folder, self.commands)

    def script(self, run: Run) -> str:
        """What sbatch is given; it starts in the launch's folder."""
        s = self.slurm
        count = s.nodes * s.processes_per_node
        options = [
            f"job-name={self.name}",
            f"nodes={s.nodes}",
            f"ntasks={count}",
            f"ntasks-per-node={s.processes_per_node}",
            *([f"gpus-per-node={s.gpus_per_node}"] if s.gpus_per_node else []),
            *([f"cpus-per-task={s.cpus_per_process}"] if s.cpus_per_process else []),
            *([f"partition={s.partition}"] if s.partition else []),
            *([f"account={s.account}"] if s.account else []),
            *([f"time={s.time}"] if s.time else []),
            "requeue",
            f"signal=B:TERM@{s.notice_seconds}",
            "output=log.txt",
            "open-mode=append",
            *s.options,
        ]
        share = ""
        if s.gpus_per_node and s.processes_per_node > 1:
            each = s.gpus_per_node // s.processes_per_node
            share = (
                f"CUDA_VISIBLE_DEVICES=$(seq -s, $((SLURM_LOCALID * {each})) $((SLURM_LOCALID * {each} + {each - 1}))) "
            )
        cpus = f" --cpus-per-task={s.cpus_per_process}" if s.cpus_per_process else ""  # srun does not take it over
        train = f"JAX_PROCESS_ID=$SLURM_PROCID {share}exec {run.command(_config(run), supervise=True)}"
        lines = [
            "#!/bin/bash",
            *(f"#SBATCH --{option}" for option in options),
            'echo "--- job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)) on $SLURM_JOB_NODELIST, $(date)"',
            'echo "$SLURM_JOB_ID" > job',  # the answer to who has submitted it may have been lost
            "rm -f exit",
            *run.prelude({"JAX_PLATFORMS": "cuda"} if s.gpus_per_node else {}, f'"$PWD/code-{run.code}"'),
            'first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            'export JAX_COORDINATOR_ADDRESS="$first:$((20000 + SLURM_JOB_ID % 10000))"',
            f"export JAX_NUM_PROCESSES={count}",
            f"srun --label{cpus} bash -c {shlex.quote(train)} < /dev/null &",
            "all=$!",
            "# Time is nearly over, or the job is preempted: all processes save, and end with 75.",
            "trap 'scancel --signal=TERM \"$SLURM_JOB_ID\"' TERM",
            "while kill -0 $all 2> /dev/null; do wait $all; done",
            "wait $all; code=$?  # a signal ends a wait before that, with a code that is not the run's",
            "echo $code > exit",
            f'[ $code = {Stopped.exit_code} ] && [ ! -e stop ] && scontrol requeue "$SLURM_JOB_ID"',
            "exit $code",
        ]
        return "\n".join(lines) + "\n"

    def _claim(self, digest: str) -> str:
        """Shell that makes the name ours, and prints `same JOB` if that is in the queue already."""
        return f"""\
{self._queued}
mkdir -p {self.base} && cd {self.base} || exit 1
claim >&2 || exit {_OTHERS}
queued || exit 0
[ "$(cat digest)" = {digest} ] || {{
    echo "job $job has this name, with another config or other code; first {self.verb("stop")}" >&2; exit 1; }}
echo same "$job\""""

    def _submit(self, run: Run, digest: str) -> str:
        return f"""\
{self._queued}
cd {self.base} || exit 1
exec 9> lock && flock 9
queued && {{ echo "job $job was submitted in the meantime" >&2; exit 1; }}
rm -f stop exit job
printf %s {shlex.quote(self.script(run))} > job.sh && echo {digest} > digest || exit 1
job=$(sbatch --parsable job.sh < /dev/null 9>&-) || {{
    sleep 5  # an answer that was lost: the job may be there all the same
    queued || exit 1
}}
echo "${{job%%;*}}" > job && cat job"""

    @property
    def _queued(self) -> str:
        """Bash that tells whether the job is waiting or running, and which it is; a cluster forgets those that ended.

        It is looked for by its name and folder too: the number may never have been told.
        """
        return f"""\
{shell(self.owner, take_over=self.commands.take_over)}
queued() {{
    job=$(cat job 2> /dev/null)
    list=$(squeue -h --me -o "%i|%j|%Z") || exit {_UNKNOWN}
    while IFS="|" read -r id name place; do
        [ -n "$id" ] || continue
        [ "$id" = "$job" ] || [ "$name $place" = "{self.name} $(pwd -P)" ] && {{ job=$id; return 0; }}
    done <<< "$list"
    return 1
}}"""

    def _do(self, script: str, what: str, given: bytes | None = None, seconds: float = 1800) -> str:
        return self.host.each(script, what, given=given, seconds=seconds, codes={_OTHERS: of_others("{said}")})[0]


def _config(run: Run) -> str:
    """The file of the config: another launch of this name leaves it alone."""
    return f"config-{hashlib.sha256(run.config.encode()).hexdigest()[:12]}.json"
