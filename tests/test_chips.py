"""The table of chips, and what is measured where it has no entry."""

from types import SimpleNamespace

import pytest

from lm import chips
from lm.chips import CHIPS, chip_of, measured_cpu
from lm.model.flops import peak_flops


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_the_chip_of_a_device(kind: str, name: str) -> None:
    assert chip_of(kind) == CHIPS[name]


def test_no_device_is_of_two_chips() -> None:
    kinds = [kind for chip in CHIPS.values() for kind in chip.device_kinds]
    assert len(set(kinds)) == len(kinds)


def test_the_peak_of_a_device() -> None:
    assert peak_flops("TPU v5") == 459e12
    assert peak_flops("TPU7x") == 1153.5e12  # two devices to a chip
    assert peak_flops("NVIDIA H200") == 989e12


@pytest.mark.parametrize("kind", ["cpu", "", "TPU v3", "NVIDIA H100"])
def test_a_device_that_is_not_in_the_table(kind: str) -> None:
    assert chip_of(kind) is None
    assert peak_flops(kind) is None


def test_the_rates_of_a_cpu_are_shared_by_its_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chips, "_best_seconds", lambda run: 0.001)
    one, four = measured_cpu(1), measured_cpu(4)
    assert one.peak_flops == pytest.approx(2 * 512**3 / 0.001)
    assert one.hbm_bandwidth == pytest.approx(2 * 16 * 2**20 / 0.001)  # read and written
    for field in ("peak_flops", "hbm_bandwidth", "link_bandwidth"):
        assert getattr(four, field) == pytest.approx(getattr(one, field) / 4)
    assert four.hbm_bytes == one.hbm_bytes // 4


def test_the_best_of_a_few_runs_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    # When to stop; then for each run whether there is time (not asked before the first two), its start and its end.
    times = iter([0.0, 0.001, 0.006, 0.007, 0.010, 0.015, 0.016, 0.018, 0.021])
    monkeypatch.setattr(chips, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    assert chips._best_seconds(lambda: None) == pytest.approx(0.002)


def test_a_cpu_is_measured() -> None:
    found = measured_cpu(1)
    assert 1e6 < found.hbm_bandwidth < 1e13
    assert 1e6 < found.peak_flops < 1e15
