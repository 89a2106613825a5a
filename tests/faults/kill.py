"""`python tests/faults/kill.py --kills 500 [--seed 0] [--processes 2]`: runs that are killed, until they are done.

Each run is a real `lm train` of a tiny config. Its process is killed by SIGKILL, started again, perhaps killed again,
and so on until it ends by itself. Where it is killed is drawn from a seed:

    moment   at any time of its life
    point    when a named function is entered, or has returned (POINTS)
    file     before any one of its operations on files, or in the middle of a write

Half of the runs meet batches whose loss is not finite, and go back twice. Whatever was done to it, a run must go on
from the newest checkpoint that was committed, and end with the same bits and metrics as one that nothing happened to.
A table says for each phase how many kills there were, and what they did; the exit code is 1 when any did harm.

What makes hundreds of lives affordable: this process imports everything once, and forks them.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import importlib
import json
import mmap
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

POINTS = {
    "lock": "lm.train.run_directory:RunDirectory.__enter__",
    "look at the run": "lm.train.loop:refuse_other_run",
    "journal": "lm.train.journal:Journal.__init__",
    "data build": "lm.train.feed:build_corpus",
    "data open": "lm.train.feed:open_corpus",
    "restore": "lm.checkpoint.checkpoints:Checkpoints.restore_newest",
    "restore: load": "lm.checkpoint.checkpoints:load",
    "config.json": "lm.train.loop:write_unless_there",
    "metrics: cut": "lm.train.summaries:Summaries.__init__",
    "compile": "lm.train.loop:_Run.compile",
    "step": "lm.train.loop:_Run.run_steps",
    "step: meet": "lm.parallel.processes:Processes.meet_before",
    "metrics: append": "lm.train.summaries:Summaries.scalars",
    "evaluation": "lm.train.loop:_Run.evaluate",
    "save: copy": "lm.checkpoint.checkpoints:Checkpoints._start",
    "save: commit": "lm.checkpoint.checkpoints:Checkpoints._commit",
    "save: folder": "lm.checkpoint.checkpoints:Checkpoints._make",
    "save: begin": "lm.checkpoint.writing:Writing.begin",
    "save: write": "lm.checkpoint.writing:Writing.wait",
    "save: finish": "lm.checkpoint.writing:Writing.finish",
    "save: attach": "lm.checkpoint.checkpoints:write_atomically",
    "save: list": "lm.checkpoint.checkpoints:file_sizes",
    "save: read back": "lm.checkpoint.manifest:FileChecksum.of",
    "save: manifest": "lm.checkpoint.manifest:Manifest.write",
    "prune": "lm.checkpoint.checkpoints:Checkpoints._prune",
    "prune: remove": "lm.checkpoint.checkpoints:remove",
    "save: wait": "lm.checkpoint.checkpoints:Checkpoints.wait",
    "rewind": "lm.train.loop:_Run.rewind",
    "rewind: set aside": "lm.checkpoint.checkpoints:Checkpoints.set_aside_after",
    "rewind: rename": "lm.checkpoint.checkpoints:set_aside",
    "rewind: ledger": "lm.train.loop:_Run.take_data",
    "end": "lm.train.loop:_Run.finish",
    "metrics: amend": "lm.train.summaries:Summaries.amend_last",
}
"""Named functions, outer ones before those that they call."""

CONFIG = """
from lm.checkpoint.config import CheckpointConfig
from lm.data.config import DataConfig, TokenizerConfig
from lm.experiment import Config, RunConfig
from lm.model.config import ModelConfig
from lm.optim.config import OptimConfig
from lm.train.config import EvalConfig, LogConfig, RecoveryConfig, SampleConfig, TrainConfig

config = Config(
    run=RunConfig(dir="run"),
    model=ModelConfig(vocab_size=258, layers=1, width=8, heads=1),
    data=DataConfig(paths=("text",), tokenizer=TokenizerConfig(kind="bytes"), holdout_fraction=0.2, workers=1),
    optim=OptimConfig(warmup_steps=3),
    train=TrainConfig(steps=10, batch_size=4, sequence_length=16),
    checkpoint=CheckpointConfig(every=2, keep_last=2, patience_seconds=60),  # else a slow disk shows in what is kept
    recovery=RecoveryConfig(max_bad_steps=2),
    eval=EvalConfig(every=4, batches=2),
    sample=SampleConfig(tokens=0),
    log=LogConfig(every=1),
)
"""
POISONED = (4, 5, 6, 7)
"""Batches of runs that go back: from step 6 to checkpoint 4, and from there to 2."""
KILLED_AGAIN = 0.8
"""The probability that a life is cut short."""
END_SECONDS = 600.0
"""For a life that nobody cuts short, and for the others when one process was killed."""


@dataclasses.dataclass(frozen=True)
class Kill:
    kind: str  # "moment", "point", "file", or "none"
    where: str = ""  # the name of a point
    exit: bool = False  # when it has returned
    count: int = 0  # the how manieth time
    seconds: float = 0.0
    process: int = 0  # which one; -1: all

    def __str__(self) -> str:
        what = {
            "moment": f"after {self.seconds:.3f} s",
            "point": f"{'after' if self.exit else 'before'} {self.where}, time {self.count}",
            "file": f"at file operation {self.count}",
            "none": "never",
        }[self.kind]
        return what + (f", process {self.process}" if self.process else "")


class Board:
    """Where a life writes down how far it is, for this process to read when it is dead."""

    SIZE = 128

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 4 * self.SIZE)

    def set(self, slot: int, text: str) -> None:
        self._memory[slot * self.SIZE : (slot + 1) * self.SIZE] = text.encode()[-self.SIZE :].ljust(self.SIZE)

    def get(self, slot: int) -> str:
        return self._memory[slot * self.SIZE : (slot + 1) * self.SIZE].decode(errors="replace").strip(" \0")

    @property
    def phase(self) -> str:
        """The innermost named function; that of a save, where there is one."""
        return self.get(1) or self.get(0) or "start"


# In a life


def live(
    arguments: Sequence[str], workplace: Path, kill: Kill, board: Board, poisoned: bool, where: dict[str, str]
) -> int:
    """Runs `lm` in this process, which is to be killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # with its parent
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(workplace)
    os.environ.update(where)
    import jax

    jax.config.update("jax_num_cpu_devices", 1)
    for name, place in POINTS.items():
        watch(name, place, kill, board)
    count_files(f"{workplace}/", kill, board)
    if poisoned:
        poison()
    from lm import cli
    from lm.cli import training

    training._BEGAN = time.monotonic()
    training._expect = lambda config, mesh: None  # takes time, and writes nothing
    return cli.main([*arguments])


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def watch(name: str, place: str, kill: Kill, board: Board) -> None:
    """Notes the phase whenever the function is entered, and kills where it is said to."""
    module, _, path = place.partition(":")
    *outer, last = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in outer:
        owner = getattr(owner, part)
    static = isinstance(vars(owner)[last], classmethod) if outer else False
    before = getattr(owner, last)
    mine = kill.kind == "point" and kill.where == name
    count = 0

    def watched(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        slot = int(threading.current_thread() is not threading.main_thread())
        was = board.get(slot)
        board.set(slot, name)
        count += 1
        if mine and not kill.exit and count == kill.count:
            die()
        try:
            return before(*arguments, **options)
        finally:
            if mine and kill.exit and count >= kill.count:
                die()
            board.set(slot, was)

    setattr(owner, last, staticmethod(watched) if static else watched)


def count_files(folder: str, kill: Kill, board: Board) -> None:
    """Counts what is done to files below the folder, and kills before one, or in the middle of a write."""
    count = 0
    lock = threading.Lock()
    write, sync = os.write, os.fsync
    known = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.listdir", "os.scandir"}

    def happens(what: str, path: Any, first: Callable[[], object] = lambda: None) -> None:
        nonlocal count
        with lock:
            count += 1
            board.set(2, str(count))
            if kill.kind == "file" and count == kill.count:
                board.set(3, f"{what} {path}")
                first()
                die()

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if event in known and arguments and isinstance(arguments[0], str | os.PathLike):
            path = os.path.join(os.getcwd(), os.fspath(arguments[0])) if event != "os.chdir" else ""
            if str(path).startswith(folder):
                happens(event, path)

    def path_of(descriptor: int) -> str:
        try:
            return os.readlink(f"/proc/self/fd/{descriptor}")
        except OSError:
            return ""

    def torn_write(descriptor: int, contents: Any, /) -> int:
        if (path := path_of(descriptor)).startswith(folder) and not path.endswith("output"):
            happens("write", path, lambda: write(descriptor, bytes(contents)[: len(contents) // 2]))
        return write(descriptor, contents)

    def counted_sync(descriptor: int, /) -> None:
        if (path := path_of(descriptor)).startswith(folder):
            happens("fsync", path)
        sync(descriptor)

    os.write, os.fsync = torn_write, counted_sync
    sys.addaudithook(heard)


def poison() -> None:
    import numpy as np

    from lm.data.batches import Batches

    batch = Batches.batch

    def poisoned(self: Batches, step: int, *rows: Any) -> dict[str, np.ndarray]:
        found = batch(self, step, *rows)
        if self.skips.batch(step) in POISONED:
            found["loss_mask"] = np.full_like(found["loss_mask"], np.nan)
        return found

    Batches.batch = poisoned


# Around the lives


@dataclasses.dataclass
class Ended:
    codes: list[int]  # by process; negative: a signal
    killed: bool
    seconds: float
    boards: list[Board]
    output: str


class Harness:
    """Runs lives in a folder."""

    def __init__(self, folder: Path, processes: int):
        self.folder, self.processes = folder, processes
        self._text()
        self._references: dict[bool, Reference] = {}

    def _text(self) -> None:
        (self.folder / "tiny.py").write_text(CONFIG)
        (self.folder / "text").mkdir()
        draw = random.Random(0)
        words = ["the", "cat", "saw", "a", "dog", "on", "mat", "and", "ran", "to", "old", "tree"]
        for number in range(12):
            text = " ".join(draw.choice(words) for _ in range(60))
            (self.folder / "text" / f"{number}.txt").write_text(text + "\n")

    def reference(self, poisoned: bool) -> "Reference":
        """A run that nothing happened to."""
        if poisoned not in self._references:
            self._references[poisoned] = self._undisturbed("goes_back" if poisoned else "undisturbed", poisoned)
        return self._references[poisoned]

    def _undisturbed(self, name: str, poisoned: bool) -> "Reference":
        if not self._references:  # its first life compiles, which takes longer than all others
            self.live("compiles", Kill("none"), poisoned)
        ended = self.live(name, Kill("none"), poisoned, "--checkpoint.keep_last=100")
        assert not any(ended.codes), ended.output
        run = self.folder / name
        digests: dict[int, set[str]] = {}
        for folder in (run / "checkpoints").iterdir():
            manifest = json.loads((folder / "manifest.json").read_text())
            digests.setdefault(manifest["step"], set()).add(manifest["digest"])
        return Reference(digests, logged(run), ended.seconds, [int(board.get(2) or 0) for board in ended.boards])

    def live(self, run: str, kill: Kill, poisoned: bool, *options: str) -> Ended:
        """One life of a run, of all its processes."""
        arguments = ["train", "tiny.py", f"--run.dir={run}", *options]
        output = self.folder / f"{run}.output"
        boards = [Board() for _ in range(self.processes)]
        port = free_port() if self.processes > 1 else 0
        children = []
        for index, board in enumerate(boards):
            here = kill if kill.process in (index, -1) else Kill("none")
            where = environment(index, self.processes, port) if self.processes > 1 else {}
            children.append(self._fork(output, arguments, here, board, poisoned, where))
        began = time.monotonic()
        codes: dict[int, int] = {}
        left, killed, before = END_SECONDS, False, began
        due = began + kill.seconds if kill.kind == "moment" else float("inf")
        while len(codes) < len(children):
            for index, child in enumerate(children):
                if index not in codes:
                    found, status = os.waitpid(child, os.WNOHANG)
                    if found:
                        codes[index] = os.waitstatus_to_exitcode(status)
                        killed |= codes[index] == -signal.SIGKILL
            now = time.monotonic()
            if now >= due:
                due = float("inf")
                for index in range(len(children)) if kill.process < 0 else [kill.process]:
                    if index not in codes:
                        os.kill(children[index], signal.SIGKILL)
            left, before = left - min(now - before, 1.0), now  # while this process is stopped, so may be the others
            if left < 0:
                for index, child in enumerate(children):
                    if index not in codes:
                        os.kill(child, signal.SIGKILL)
                        os.waitpid(child, 0)
                        codes[index] = -signal.SIGALRM  # it hung
            time.sleep(0.002)
        text = output.read_text(errors="replace")
        return Ended([codes[i] for i in range(len(children))], killed, time.monotonic() - began, boards, text)

    def _fork(
        self, output: Path, arguments: Sequence[str], kill: Kill, board: Board, poisoned: bool, where: dict[str, str]
    ) -> int:
        sys.stdout.flush()
        with warnings.catch_warnings(action="ignore"):  # jax's, of forks: it has not started here
            child = os.fork()
        if child:
            return child
        code = 99
        try:
            target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(target, 1)
            os.dup2(target, 2)
            code = live(arguments, self.folder, kill, board, poisoned, where)
            sys.stdout.flush()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def chain(self, name: str, poisoned: bool, kills: Iterator[Kill]) -> Iterator["Outcome"]:
        """A run, killed again and again until a life ends by itself: one outcome for each kill, and for the end."""
        reference, run = self.reference(poisoned), self.folder / name
        before: dict[int, str] = {}
        while True:
            (self.folder / f"{name}.output").unlink(missing_ok=True)
            kill = next(kills)
            ended = self.live(name, kill, poisoned)
            outcome = Outcome(kill, ended, phase_of(kill, ended))
            said = [int(step) for step in re.findall(r"goes on from checkpoint (\d+)$", ended.output, re.MULTILINE)]
            if said and said[0] != max(before, default=0):
                outcome.lost.append(f"goes on from {said[0]}, not {max(before, default=0)}")
            if "is bad and not used" in ended.output:
                outcome.lost.append("a checkpoint was bad")
            allowed = [0, -signal.SIGKILL] + [6] * ended.killed
            wrong = [code for code in ended.codes if code not in allowed]
            if wrong:
                outcome.lost.append(f"exit codes {ended.codes}")
            now = good(run)
            aside = {path.name.partition(".")[0] for path in (run / "checkpoints").glob("*.bad*")}
            if before and max(now, default=0) < max(before) and not (poisoned and str(max(before)) in aside):
                outcome.lost.append(f"checkpoint {max(before)} was there, {sorted(now)} are left")
            for step, digest in now.items():
                if digest not in reference.digests.get(step, ()):
                    outcome.different.append(f"checkpoint {step}")
            done = not any(ended.codes)
            if done:
                if max(now, default=0) != max(reference.digests):
                    outcome.lost.append("the last checkpoint is not there")
                if logged(run) != reference.lines:
                    outcome.different.append("metrics.jsonl")
                if before and not said:
                    outcome.lost.append("it started over")
            outcome.done = done
            yield outcome
            if done or outcome.bad:
                return
            before = now


@dataclasses.dataclass(frozen=True)
class Reference:
    digests: dict[int, set[str]]
    lines: list[dict[str, Any]]
    seconds: float
    files: list[int]  # operations of each process


@dataclasses.dataclass
class Outcome:
    kill: Kill
    ended: Ended
    phase: str
    lost: list[str] = dataclasses.field(default_factory=list)
    different: list[str] = dataclasses.field(default_factory=list)
    done: bool = False

    @property
    def bad(self) -> list[str]:
        return self.lost + self.different


def phase_of(kill: Kill, ended: Ended) -> str:
    if kill.kind == "point":
        return kill.where
    dead = [board for board, code in zip(ended.boards, ended.codes, strict=True) if code == -signal.SIGKILL]
    return dead[0].phase if dead else ""


def good(run: Path) -> dict[int, str]:
    """Digests of the checkpoints that are committed and whole."""
    from etils import epath

    from lm.checkpoint.folder import saved_steps
    from lm.checkpoint.manifest import BadCheckpoint, Manifest, verify

    found = {}
    for step in saved_steps(epath.Path(run / "checkpoints")):
        folder = epath.Path(run / "checkpoints" / str(step))
        with contextlib.suppress(BadCheckpoint):
            manifest = Manifest.read(folder, step)
            verify(folder, manifest.files)
            found[step] = manifest.digest
    return found


def logged(run: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl says, but for what depends on the clock."""
    clock = ("tokens_per_second", "step_seconds", "expected_step", "input_wait", "model_flops", "goodput/", "save")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith((*clock, "checkpoint_"))} for line in lines]


def environment(index: int, count: int, port: int) -> dict[str, str]:
    address = f"127.0.0.1:{port}"
    return {
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_COORDINATOR_BIND_ADDRESS": address,
        "JAX_NUM_PROCESSES": str(count),
        "JAX_PROCESS_ID": str(index),
        "LM_START_SECONDS": "30",  # what the others wait for one that was killed before they met
    }


def free_port() -> int:
    from launch.local import free_port as found

    return found()


def drawn(draw: random.Random, reference: Reference, processes: int) -> Iterator[Kill]:
    """Where the lives of a run are cut short, without an end."""
    while draw.random() < KILLED_AGAIN:
        process = draw.choice([*range(processes), -1]) if processes > 1 else 0
        match draw.choice(["moment", "moment", "point", "file"]):
            case "moment":
                yield Kill("moment", seconds=draw.uniform(0, reference.seconds), process=process)
            case "point":
                count = draw.choice([1, 1, 2, 3])
                yield Kill("point", draw.choice([*POINTS]), draw.random() < 0.5, count, process=process)
            case _:
                yield Kill("file", count=draw.randint(1, max(reference.files[max(process, 0)], 1)), process=process)
    while True:
        yield Kill("none")


def parsed(text: str) -> Kill:
    """`NAME[:enter|exit[:COUNT]]`"""
    name, *rest = re.split(r":(?! )", text)
    if name not in POINTS:
        raise argparse.ArgumentTypeError(f"no point is called {name!r}; there are {', '.join(POINTS)}")
    return Kill("point", name, "exit" in rest, int(rest[1]) if len(rest) > 1 else 1)


def prepare(cache: Path, processes: int) -> None:
    """Imports all that a life needs, and starts nothing of it."""
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "OPENBLAS_NUM_THREADS": "1",  # a process with threads cannot be forked
    }
    if processes > 1:  # only the first would find compiled programs, and wait too long for the others
        os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    sys.path.insert(0, str(ROOT))
    sys.dont_write_bytecode = True
    for name in (
        "lm.cli",
        "lm.plan.expected",
        "lm.data.build",
        *{place.partition(":")[0] for place in POINTS.values()},
    ):
        importlib.import_module(name)


def interrupted(number: int, _: object) -> None:
    print(f"interrupted by {signal.Signals(number).name}; so far:", flush=True)
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="at least so many that are drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, metavar="N")
    parser.add_argument(
        "--at", type=parsed, action="append", default=[], metavar="POINT", help="a kill before all others"
    )
    parser.add_argument("--rewinds", action="store_true", help="the runs of --at are such that go back")
    parser.add_argument("--folder", type=Path, help="where the runs are made; those that went wrong stay there")
    options = parser.parse_args()
    folder = Path(options.folder or tempfile.mkdtemp(prefix="killed-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder / "compiled", options.processes)
    began, table = time.monotonic(), Table()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, interrupted)
    with contextlib.suppress(KeyboardInterrupt):
        harness = Harness(folder, options.processes)
        numbered = 0
        while table.kills < options.kills + len(options.at):
            if options.at and not numbered:
                poisoned, kills = options.rewinds, iter([*options.at, *[Kill("none")] * 99])
            else:
                draw = random.Random(f"{options.seed}/{numbered}")
                poisoned = draw.random() < 0.5
                kills = drawn(draw, harness.reference(poisoned), options.processes)
            name = f"run{numbered}"
            for outcome in harness.chain(name, poisoned, kills):
                table.add(outcome)
                if outcome.bad:
                    print(
                        f"{name}{' (goes back)' if poisoned else ''}: killed {outcome.kill}, in {outcome.phase}: "
                        f"{'; '.join(outcome.bad)}\n{outcome.ended.output}",
                        flush=True,
                    )
            if not outcome.bad:
                shutil.rmtree(folder / name)
                (folder / f"{name}.output").unlink()
            numbered += 1
            if options.at and numbered == 1 and not options.kills:
                break
            if numbered % 10 == 0:
                print(f"{numbered} runs, {table.kills} kills, {time.monotonic() - began:.0f} s", flush=True)
    print(table.text(), flush=True)
    if not options.folder and not table.harm:
        shutil.rmtree(folder)
    return 1 if table.harm or not table.kills else 0


class Table:
    def __init__(self) -> None:
        self._kills: Counter[str] = Counter()
        self._kinds: Counter[str] = Counter()
        self._lost: Counter[str] = Counter()
        self._different: Counter[str] = Counter()
        self._lives = self._missed = self._runs = 0

    def add(self, outcome: Outcome) -> None:
        self._lives += 1
        phase = outcome.phase or "end"
        if outcome.ended.killed:
            self._kills[phase] += 1
            self._kinds[outcome.kill.kind] += 1
        elif outcome.kill.kind != "none":
            self._missed += 1
        self._runs += outcome.done
        self._lost[phase] += bool(outcome.lost)
        self._different[phase] += bool(outcome.different)

    @property
    def kills(self) -> int:
        return self._kills.total()

    @property
    def harm(self) -> int:
        return self._lost.total() + self._different.total()

    def text(self) -> str:
        rows = [f"{'phase':<20}{'kills':>8}{'lost':>8}{'different':>12}"]
        for phase in ["start", *POINTS]:
            if self._kills[phase] or self._lost[phase] or self._different[phase]:
                numbers = self._kills[phase], self._lost[phase], self._different[phase]
                rows.append(f"{phase:<20}{numbers[0]:>8}{numbers[1]:>8}{numbers[2]:>12}")
        rows.append(f"{'all':<20}{self.kills:>8}{self._lost.total():>8}{self._different.total():>12}")
        kinds = ", ".join(f"{count} by {kind}" for kind, count in sorted(self._kinds.items()))
        rows.append(f"{kinds}; {self._missed} kills came too late; {self._runs} runs ended, of {self._lives} lives")
        return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
