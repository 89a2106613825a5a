"""What the step was predicted to take, time and memory, beside what it takes."""

import dataclasses
import math
from collections.abc import Callable

import jax
from jax.sharding import Mesh

from lm.experiment import Config
from lm.train.progress import human_bytes


@dataclasses.dataclass(frozen=True)
class Expected:
    """Of one device."""

    step_seconds: float
    memory_bytes: int
    again_bytes: int = 0
    """Of these, what is there only while a step is computed twice."""
    lines: tuple[str, ...] = ()
    """The whole plan, for a person."""

    def __post_init__(self) -> None:
        for name in ("step_seconds", "memory_bytes"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}")


Expect = Callable[[Config, Mesh], Expected | None]
"""Predicts the step of a config on the devices of a mesh; None where their chip is not known."""


class Forecast:
    """Holds the prediction against the first device here. Reading it waits for nothing."""

    def __init__(self, expected: Expected | None, compiled: jax.stages.Compiled, device: jax.Device):
        self._expected, self._device = expected, device
        self._of_program = None if _peak_memory(device) else _program_memory(compiled, device.platform)

    @property
    def lines(self) -> tuple[str, ...]:
        """The prediction for a person; none where nothing was predicted."""
        return self._expected.lines if self._expected else ()

    def values(self) -> dict[str, float]:
        """For metrics.jsonl."""
        found: dict[str, float] = {}
        if memory := self.memory_bytes:
            found["memory_bytes"] = memory
        if self._expected:
            found["expected_step_seconds"] = self._expected.step_seconds
            found["expected_memory_bytes"] = self._expected.memory_bytes
        return found

    @property
    def memory_bytes(self) -> int | None:
        """The peak so far, where the device counts it (evaluations included); else what the compiled step needs, and
        beside it when it is computed twice."""
        if self._of_program is None:
            return _peak_memory(self._device)
        return self._of_program + (self._expected.again_bytes if self._expected else 0)

    def compared(self, step_seconds: float) -> str | None:
        """Both in one line; None where nothing was predicted."""
        if self._expected is None:
            return None
        seconds, memory = self._expected.step_seconds, self._expected.memory_bytes
        line = (
            f"predicted {_seconds(seconds)} a step and {human_bytes(memory)}, "
            f"measured {_seconds(step_seconds)} ({step_seconds / seconds - 1:+.0%})"
        )
        measured = self.memory_bytes
        return line + (f" and {human_bytes(measured)} ({measured / memory - 1:+.0%})" if measured else "")


def _peak_memory(device: jax.Device) -> int | None:
    try:
        return (device.memory_stats() or {}).get("peak_bytes_in_use")
    except jax.errors.JaxRuntimeError:  # a backend that does not count
        return None


def _program_memory(compiled: jax.stages.Compiled, platform: str) -> int | None:
    """The most at one time on one device, or what it adds up to where the compiler does not say; donated once."""
    found = compiled.memory_analysis()
    if found is None:
        return None
    # On CPUs it is said without what is temporary.
    if platform != "cpu" and (peak := getattr(found, "peak_memory_in_bytes", 0)):
        return int(peak)
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return int(held + found.temp_size_in_bytes)


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 0.1 else f"{seconds * 1e3:.3g} ms"
