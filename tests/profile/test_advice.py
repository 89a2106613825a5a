"""What to try: each line for a trace that deserves it, and none for one that does not."""

import dataclasses

import pytest

from lm.experiment import Config
from lm.model.flops import flops_per_token
from lm.parallel.mesh import MeshConfig
from lm.profile.advice import advice
from lm.profile.read import Profile
from lm.profile.report import lines, values
from lm.profile.summary import OperationRow, summarize
from lm.profile.trace import trace_of
from lm.train.config import TrainConfig

from .made import Made, annotated, gpu, tpu


def profile(made: Made, **changes: object) -> Profile:
    found = Profile("t", "t/x.xplane.pb", summarize(trace_of(made.space)), None, "", 1, None, None)
    return dataclasses.replace(found, **changes)


def with_kinds(made: Made, parts: dict[str, str] | None = None, **seconds: float) -> Profile:
    """A trace in which operations of these kinds (a_b is `a b`) took so long, in these parts of the model."""
    found = profile(made)
    names = {kind: kind.replace("_", " ").replace("comma", ",") for kind in seconds}
    rows = tuple(
        OperationRow(
            f"{kind}.1",
            value,
            1,
            names[kind],
            (parts or {}).get(kind, "attention"),
            False,
            kind == "again",
            "x.py:1",
            "",
        )
        for kind, value in seconds.items()
    )
    kinds = tuple(
        dataclasses.replace(found.summary.kinds[0], name=names[kind], seconds=s) for kind, s in seconds.items()
    )
    by_part = tuple(dataclasses.replace(found.summary.kinds[0], name=row.part, seconds=row.seconds) for row in rows)
    summary = dataclasses.replace(found.summary, kinds=kinds, parts=by_part, operations=rows, exchanges=())
    return dataclasses.replace(found, summary=summary)


def waiting(cause: str | None) -> Made:
    made = tpu(3, gap=50)
    made.space.planes.pop()
    annotated(made, [20, 21, 22], 150, waits={cause: 50.0} if cause else {})
    return made


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        ("input", ": for 25% while it waits for the next batch: raise data.loader_workers"),
        ("others", "waits for other processes: the log names the one"),
        ("save", "checkpoint.every"),
        ("evaluation", "eval.every"),
        (None, "train.batch_size"),
    ],
)
def test_devices_that_wait_for_the_host(cause: str | None, words: str) -> None:
    found = advice(profile(waiting(cause)))
    assert any(line.startswith("devices wait for the host for 25%") and words in line for line in found)


def test_collectives_that_nothing_hides() -> None:
    found = advice(profile(tpu()))
    assert found[0].startswith("all-reduce: nothing is computed beside it for 20% of the step: more tokens per device")
    split = dataclasses.replace(Config(), mesh=MeshConfig(tensor=4))
    found = advice(profile(tpu(), config=split))
    assert "less of mesh.tensor" in found[0]
    assert "all-gather: nothing is computed beside it for 5%" in found[1]


@pytest.mark.parametrize(
    ("kind", "words"),
    [("all-to-all", "mesh.expert"), ("collective-permute", "mesh.stage"), ("reduce-scatter", "less of mesh.fsdp")],
)
def test_what_each_collective_comes_from(kind: str, words: str) -> None:
    made = tpu()
    for one in made.space.planes[0].event_metadata.values():
        if one.display_name == "all-reduce.3":
            one.display_name, one.stats[0].str_value = f"{kind}.3", kind
    found = advice(profile(made))
    assert found[0].startswith(kind)
    assert words in found[0]


def test_kernels_with_gaps_between_them() -> None:
    found = advice(profile(gpu()))
    made = gpu()
    for line in made.space.planes[1].lines:
        for event in line.events:
            event.duration_ps //= 4
    gaps = advice(profile(made))
    assert not any("nothing runs" in line for line in found)
    assert any("nothing runs between two operations" in line and "train.unroll" in line for line in gaps)


def test_slow_products() -> None:
    config = dataclasses.replace(Config(), train=TrainConfig(batch_size=1600))
    tokens = config.train.batch_size * config.train.sequence_length
    flops = flops_per_token(config.model, config.train.sequence_length).parameters * tokens

    def reaching(rate: float) -> list[str]:
        devices = round(flops / (rate * 459e12 * 40e-6))  # products take 40 us
        return advice(profile(tpu(), config=config, device_kind="TPU v5p", devices=devices))

    assert any("matrix products reach 58% of the peak: parts of width" in line for line in reaching(0.58))
    assert not any("of the peak" in line for line in reaching(0.62))


def test_much_arithmetic() -> None:
    found = advice(with_kinds(tpu(), elementwise=6e-5, matrix_products=4e-5))
    assert any("60% of the operations' time is arithmetic" in line and "most in attention" in line for line in found)
    update = advice(with_kinds(tpu(), {"elementwise": "optimizer and checks"}, elementwise=6e-5, matrix_products=4e-5))
    assert any("the update takes 60%" in line for line in update)


def test_what_is_computed_again() -> None:
    slow = with_kinds(tpu(), again=2e-5, elementwise=6e-5)
    assert any("25% is spent on computing again" in line and "train.saved" in line for line in advice(slow))


def test_copies() -> None:
    made = with_kinds(tpu(), copies_and_layout=2e-5, matrix_products=8e-5)
    assert any("20% of the operations' time moves data" in line and "x.py:1" in line for line in advice(made))
    assert any("train.unroll" in line for line in advice(dataclasses.replace(made, config=Config())))


def test_attention_without_its_kernel() -> None:
    plain = advice(with_kinds(tpu(), {"elementwise": "loss"}, matrix_products=3e-5, elementwise=1e-5))
    assert any("without its kernel" in line for line in plain)
    in_part = with_kinds(tpu(), matrix_products=3e-5, attention_kernel=1e-5)
    assert not any("without its kernel" in line for line in advice(in_part))
    assert not any("without its kernel" in line for line in advice(profile(tpu())))


def test_tables() -> None:
    found = advice(with_kinds(tpu(), gathercomma_scattercomma_sort=2e-5, matrix_products=8e-5))
    assert any("gathers, scatters or sorts" in line for line in found)


def test_transfers() -> None:
    made = gpu()
    for line in made.space.planes[1].lines:
        if "H2D" in line.name:
            for event in line.events:
                event.offset_ps, event.duration_ps = event.offset_ps + 5 * 10**6, 10 * 10**6
    assert any("train.offloaded" in line for line in advice(profile(made)))


def test_a_step_that_takes_longer_than_predicted() -> None:
    found = advice(profile(tpu(), expected_step_seconds=50e-6))
    assert found[-1].startswith("a step takes 2.00 times what was predicted")
    assert not any("predicted" in line for line in advice(profile(tpu(), expected_step_seconds=90e-6)))


def test_a_step_in_which_nothing_stands_out() -> None:
    good = with_kinds(tpu(), {"matrix_products": "feed-forward"}, matrix_products=8e-5, elementwise=1e-5)
    assert advice(good) == []
    assert "  - nothing stands out" in lines(good)


def test_the_screen() -> None:
    text = lines(profile(tpu(), config=Config(), device_kind="TPU v5p", devices=4, expected_step_seconds=80e-6))
    assert text[0] == "trace t: steps 20 to 21, on 1 of 4 x TPU v5p"
    assert text[1] == "step       0.1 ms   (predicted 0.08 ms)"
    assert text[2].startswith("MFU ")
    assert "matrix products                       0.040   40.0%        1" in text
    assert "all-gather                            0.040      0.005          5.0%" in text
    assert max(map(len, text)) < 160


def test_parts_of_the_peak() -> None:
    config = Config()
    tokens = config.train.batch_size * config.train.sequence_length
    flops = flops_per_token(config.model, config.train.sequence_length)
    of = {"config": config, "devices": 50, "expected_step_seconds": 80e-6}
    found = profile(tpu(), device_kind="TPU v5p", **of)
    peak = 50 * 459e12
    assert found.mfu == pytest.approx(flops.causal * tokens / 100e-6 / peak)
    assert found.expected_mfu == pytest.approx(flops.causal * tokens / 80e-6 / peak)
    assert found.products_rate == pytest.approx(flops.parameters * tokens / 40e-6 / peak)
    two_a_chip = profile(tpu(), device_kind="TPU7x", **of)
    assert two_a_chip.mfu == pytest.approx(flops.causal * tokens / 100e-6 / (50 * 2307e12 / 2))
    for unknown in (profile(tpu(), device_kind="cpu", **of), profile(tpu(), device_kind="TPU v5p", devices=50)):
        assert (unknown.mfu, unknown.expected_mfu, unknown.products_rate) == (None, None, None)


def test_the_object() -> None:
    found = values(profile(tpu(), expected_step_seconds=80e-6))
    assert found["summary"]["steps"] == (20, 21)
    assert found["summary"]["kinds"][0]["name"] == "matrix products"
    assert "config" not in found
    assert found["what_to_try"]
