"""Traces of a few steps, for TensorBoard's profile page and `lm profile`: configured ones, and those asked for.

One process traces, what it and its devices do: in a run of many all do the same, and a trace of each of a thousand
hosts would be read by nobody. A trace is in RUN/tensorboard/plugins/profile/<time>/, where TensorBoard looks for it,
once it is whole. A profiler that fails ends no run: that is said, and training goes on.
"""

import contextlib
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
from etils import epath

from lm.files import is_url, reason, write_atomically
from lm.train.config import MOST_PROFILED_STEPS, ProfileConfig
from lm.train.profile_request import Answer, Request, Watch
from lm.train.progress import human_bytes, human_seconds
from lm.train.run_directory import RunDirectory

ANNOTATION = "train"
"""Of each step, with its number; TensorBoard knows steps by such annotations."""
FOLDER = ("plugins", "profile")
"""Of TensorBoard's folder: where its plugin for profiles looks."""
COPY_SECONDS = 120.0
"""The end of a run waits so long for a trace to reach its bucket."""
_TEMPORARY = ".profile."


class Profiler:
    """Begins and ends traces between steps.

    Before each step k, and with None after the last, the loop asks `turns(k)`, which costs nothing; if so, it waits for
    the devices and calls `turn(k)`; in any case `mark(k)`. `close` may be called in the middle of a trace too.
    """

    def __init__(self, config: ProfileConfig, directory: RunDirectory, say: Callable[[str], None]):
        self._steps, self._directory, self._say = config.range, directory, say
        self._traced = range(0)  # while a trace is taken, its steps
        self._temporary = Path()  # and where it is written
        self._request: Request | None = None  # the newest that nothing was done for yet; changed by `_swap`
        self._mutex = threading.Lock()
        self._for: Request | None = None  # what the trace is taken for; None: the config
        self._annotation: jax.profiler.StepTraceAnnotation | None = None
        self._writer: threading.Thread | None = None
        if not is_url(directory.path):
            for left in Path(directory.path).glob(f"{_TEMPORARY}*"):  # by a run that was killed
                shutil.rmtree(left, ignore_errors=True)
        self._watch = Watch(directory.path, self._wanted)

    def turns(self, k: int | None) -> bool:
        """Whether a trace begins or ends before step k."""
        if self._traced:
            return k not in self._traced
        return k is not None and (k in self._steps or self._request is not None)

    def turn(self, k: int | None) -> None:
        """Ends the trace, and begins the one that is due. The devices have done all steps before k."""
        if self._traced:
            self._end()
        if k is None:
            return
        if k in self._steps:
            self._begin(range(k, self._steps.stop), None)
            self._steps = range(0)  # once: going back to a checkpoint takes no second one
        elif (request := self._swap(None)) is not None:
            self._begin(range(k, k + min(request.steps, MOST_PROFILED_STEPS)), request)

    def mark(self, k: int | None) -> None:
        """From now on what happens belongs to step k."""
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
            self._annotation = None
        if self._traced and k is not None:
            self._annotation = jax.profiler.StepTraceAnnotation(ANNOTATION, step_num=k)
            self._annotation.__enter__()

    def close(self) -> None:
        self._watch.close()
        if self._traced:  # an error has ended the steps
            steps, self._traced = self._traced, range(0)
            self.mark(None)
            with contextlib.suppress(Exception):
                jax.profiler.stop_trace()
            self._failed(steps, self._for, self._temporary, "the run has ended")
        if (request := self._swap(None)) is not None:
            self._answer(request, problem="the run has ended")
        if self._writer is not None:
            self._writer.join(COPY_SECONDS)

    def _wanted(self, request: Request) -> None:
        if (before := self._swap(request)) is not None:
            self._answer(before, problem="another trace was asked for")

    def _swap(self, request: Request | None) -> Request | None:
        with self._mutex:
            before, self._request = self._request, request
        return before

    def _begin(self, steps: range, request: Request | None) -> None:
        # Only annotations and operations: to follow Python's calls would slow down what is to be measured.
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level, options.host_tracer_level = 0, 1
        self._temporary = Path()
        if self._writer is not None and self._writer.is_alive():  # it may hang, and nothing waits for it
            self._failed(steps, request, self._temporary, "the one before is still being written")
            return
        try:
            # Where it can be beside its place, so that it gets there in one step.
            beside = None if is_url(self._directory.path) else self._directory.path
            self._temporary = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=beside))
            jax.profiler.start_trace(self._temporary, profiler_options=options)
        except Exception as error:
            self._failed(steps, request, self._temporary, reason(error))
            return
        self._traced, self._for = steps, request
        self._say(f"profile: traces {_named(steps)}")

    def _end(self) -> None:
        steps, request, temporary, self._traced = self._traced, self._for, self._temporary, range(0)
        self.mark(None)
        begin = time.monotonic()
        try:
            jax.profiler.stop_trace()
        except Exception as error:
            self._failed(steps, request, temporary, reason(error))
            return
        seconds = time.monotonic() - begin
        # In a thread: a bucket takes its time, and one that hangs must not keep the process.
        arguments = (temporary, steps, request, seconds)
        self._writer = threading.Thread(target=self._publish, args=arguments, name="profile writer", daemon=True)
        self._writer.start()

    def _publish(self, temporary: Path, steps: range, request: Request | None, seconds: float) -> None:
        """Moves a trace to its place."""
        try:
            (made,) = temporary.joinpath(*FOLDER).iterdir()
            target = traces_folder(self._directory) / made.name
            files = sorted(made.iterdir())  # what readers look for, *.xplane.pb, is the last
            size = sum(file.stat().st_size for file in files)
            target.parent.mkdir(parents=True, exist_ok=True)
            if is_url(target):
                for file in files:
                    write_atomically(target / file.name, file.read_bytes())
            else:
                os.rename(made, target)
        except Exception as error:
            self._failed(steps, request, temporary, reason(error))
            return
        shutil.rmtree(temporary, ignore_errors=True)
        self._say(
            f"profile: {_named(steps)} are in {target} ({human_bytes(size)}, {human_seconds(seconds)} to write); "
            f"`lm profile {self._directory.path}` says where their time went"
        )
        if request is not None:
            self._answer(request, trace=made.name)

    def _failed(self, steps: range, request: Request | None, temporary: Path, why: str) -> None:
        self._say(f"profile: no trace of {_named(steps)}: {why}")
        if temporary != Path():
            shutil.rmtree(temporary, ignore_errors=True)
        if request is not None:
            self._answer(request, problem=why)

    def _answer(self, request: Request, *, trace: str = "", problem: str = "") -> None:
        if request.id:
            self._watch.answer(Answer(request.id, trace, problem))


def _named(steps: range) -> str:
    return f"steps {steps.start} to {steps.stop - 1}" if len(steps) > 1 else f"step {steps.start}"


def traces_folder(directory: RunDirectory) -> epath.Path:
    """Where TensorBoard's plugin looks for traces: one folder each, named by its time."""
    return directory.tensorboard.joinpath(*FOLDER)
