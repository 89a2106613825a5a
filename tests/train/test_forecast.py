"""A prediction beside what is measured: numbers for metrics.jsonl, and a line for people."""

import contextlib
import re
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from lm.train import meter as meter_module
from lm.train.forecast import Expected, Forecast
from lm.train.meter import Meter

EXPECTED = Expected(step_seconds=0.41, memory_bytes=1_200_000_000)


@pytest.fixture(scope="module")
def compiled() -> jax.stages.Compiled:
    """Takes two arrays of 4 MB, one of them donated, and gives one: 8 MB."""
    ones = jax.ShapeDtypeStruct((1000, 1000), jnp.float32)
    return jax.jit(lambda a, b: a + 2 * b, donate_argnums=0).lower(ones, ones).compile()


def counting(peak: int) -> Any:
    return SimpleNamespace(platform="tpu", memory_stats=lambda: {"peak_bytes_in_use": peak, "bytes_in_use": 1})


def test_a_device_that_does_not_count_is_said_to_use_what_the_program_needs(compiled: jax.stages.Compiled) -> None:
    found = Forecast(EXPECTED, compiled, jax.devices()[0])
    assert found.values() == {
        "memory_bytes": 8_000_000,
        "expected_step_seconds": 0.41,
        "expected_memory_bytes": 1_200_000_000,
    }


def test_what_is_beside_a_step_that_is_computed_twice_counts(compiled: jax.stages.Compiled) -> None:
    expected = Expected(0.41, 12_000_000, again_bytes=3_000_000)
    assert Forecast(expected, compiled, jax.devices()[0]).memory_bytes == 11_000_000
    assert Forecast(expected, compiled, counting(10)).memory_bytes == 10


def test_what_is_temporary_counts() -> None:
    ones = jax.ShapeDtypeStruct((1000, 1000), jnp.float32)
    compiled = jax.jit(lambda a: jnp.sort(a @ a, axis=0).sum()).lower(ones).compile()
    assert Forecast(None, compiled, jax.devices()[0]).values()["memory_bytes"] > 7_000_000


def test_a_device_that_counts_is_asked_each_time(compiled: jax.stages.Compiled) -> None:
    device = counting(10)
    found = Forecast(None, compiled, device)
    assert found.values() == {"memory_bytes": 10}
    device.memory_stats = lambda: {"peak_bytes_in_use": 20}
    assert found.values() == {"memory_bytes": 20}


def test_a_backend_that_has_no_memory_statistics(compiled: jax.stages.Compiled) -> None:
    def fail() -> None:
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED")

    device: Any = SimpleNamespace(platform="cpu", memory_stats=fail)
    assert Forecast(None, compiled, device).values() == {"memory_bytes": 8_000_000}


@pytest.mark.parametrize(
    ("expected", "measured", "line"),
    [
        (0.41, 0.44, "predicted 0.41 s a step and 1.20 GB, measured 0.44 s (+7%) and 1.30 GB (+8%)"),
        (0.0051, 0.00434, "predicted 5.1 ms a step and 1.20 GB, measured 4.34 ms (-15%) and 1.30 GB (+8%)"),
        (12.345, 12.345, "predicted 12.3 s a step and 1.20 GB, measured 12.3 s (+0%) and 1.30 GB (+8%)"),
    ],
)
def test_the_line(compiled: jax.stages.Compiled, expected: float, measured: float, line: str) -> None:
    found = Forecast(Expected(expected, 1_200_000_000), compiled, counting(1_300_000_000))
    assert found.compared(measured) == line


def test_without_a_prediction_there_is_no_line(compiled: jax.stages.Compiled) -> None:
    assert Forecast(None, compiled, counting(10)).compared(1.0) is None


def test_memory_that_nobody_knows_is_left_out() -> None:
    silent: Any = SimpleNamespace(platform="cpu", memory_stats=lambda: None, memory_analysis=lambda: None)
    found = Forecast(EXPECTED, silent, silent)
    assert "memory_bytes" not in found.values()
    assert found.compared(0.41) == "predicted 0.41 s a step and 1.20 GB, measured 0.41 s (+0%)"


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_prediction_that_is_none(value: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"step_seconds is {value}")):
        Expected(step_seconds=value, memory_bytes=1)
    with pytest.raises(ValueError, match=re.escape(f"memory_bytes is {value}")):
        Expected(step_seconds=1.0, memory_bytes=value)  # type: ignore[arg-type]


def test_the_mean_step_leaves_out_the_first_interval_and_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(meter_module, "time", SimpleNamespace(monotonic=lambda: now))
    meter = Meter(tokens_per_step=1, flops_per_token=1.0, peak_flops=None)
    meter.start(5)
    now = 7.0
    meter.read(5)
    assert (meter.intervals, meter.mean_step_seconds) == (1, None)
    now = 8.0
    meter.read(9)
    assert (meter.intervals, meter.mean_step_seconds) == (2, 0.25)
    with meter.spending("save"):
        now = 100.0
    now = 102.0
    meter.read(13)
    assert meter.mean_step_seconds == pytest.approx(3 / 8)


def test_what_a_process_spends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(meter_module, "time", SimpleNamespace(monotonic=lambda: now))
    meter = Meter(tokens_per_step=1, flops_per_token=1.0, peak_flops=None)
    meter.start(0)

    def four_steps(last: int, **seconds: float) -> dict[str, float]:
        nonlocal now
        for what, value in seconds.items():
            with contextlib.nullcontext() if what == "host" else meter.spending(what):
                now += value
        meter.read(last)
        return meter.own

    nothing = dict.fromkeys(("input", "host", "save", "evaluation", "profile"), 0.0)
    first = four_steps(3, input=1.0, devices=20.0, host=2.0, save=8.0)
    assert first == nothing | {"input": 0.25, "host": 0.5, "save": 2.0}
    assert meter.latest["step_seconds"] == 23 / 4
    second = four_steps(7, input=3.0, evaluation=4.0)
    assert second == nothing | {"input": 0.5, "host": 0.25, "save": 1.0, "evaluation": 0.5}
    meter.turn()  # a save counts long enough to be seen where steps are many and saves few
    assert four_steps(11, devices=1.0)["save"] == 8.0 / 12
    meter.turn()
    assert four_steps(15, devices=1.0) == nothing
