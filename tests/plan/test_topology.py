"""Names, shapes and devices of TPU slices."""

import importlib.metadata
import importlib.util
import math

import pytest

from lm.chips import TPUS
from lm.errors import ConfigError
from lm.plan import topology as module
from lm.plan.topology import parse_name, shapes, topology

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'lm[plan]'"
)


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "devices", "chips", "hosts", "kind", "wrapped"),
    [
        ("v4:4x4x4", 64, 64, 16, "TPU v4", True),
        ("v4:2x4x4", 32, 32, 8, "TPU v4", False),
        ("v5e:1x1", 1, 1, 1, "TPU v5 lite", False),
        ("v5e:2x4", 8, 8, 1, "TPU v5 lite", False),
        ("v5e:16x16", 256, 256, 64, "TPU v5 lite", True),
        ("v5p:2x2x1", 4, 4, 1, "TPU v5", False),
        ("v5p:4x4x8", 128, 128, 32, "TPU v5", True),
        ("v5p:16x16x24", 6144, 6144, 1536, "TPU v5", True),
        ("v6e:8x16", 128, 128, 32, "TPU v6 lite", False),
        ("v6e:16x16", 256, 256, 64, "TPU v6 lite", True),
        ("tpu7x:4x4x4", 128, 64, 16, "TPU7x", True),
    ],
)
def test_slices(name: str, devices: int, chips: int, hosts: int, kind: str, wrapped: bool) -> None:
    found = topology(name)
    assert (len(found.devices), found.chips, found.hosts) == (devices, chips, hosts)
    assert {device.device_kind for device in found.devices} == {kind}
    assert len({device.process_index for device in found.devices}) == hosts
    assert found.wrap == (wrapped,) * len(found.shape)


@needs_libtpu
def test_several_slices() -> None:
    found = topology("v5e:2x4", slices=3)
    assert (len(found.devices), found.chips, found.hosts) == (24, 24, 3)
    assert [device.slice_index for device in found.devices] == [0] * 8 + [1] * 8 + [2] * 8  # type: ignore[attr-defined]


def test_there_is_no_slice_of_no_slices() -> None:
    with pytest.raises(ConfigError, match="slices must be at least 1, got 0"):
        topology("v5e:2x4", slices=0)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("v5p:8x4x4", "v5p:4x4x8"),
        ("v5p:4x4x5", "v5p:4x4x4"),
        ("v6e:16x8", "v6e:8x16"),
        ("v5e:32x32", "v5e:16x16"),
        ("v5p:32x32x32", "v5p:16x16x24"),
        ("v7x:4x4x4", "tpu7x:4x4x4"),
        ("v5litepod:4x4", "v5e:4x4"),
        ("v5p-128", "v5p:4x4x4"),
        ("v6e-256", "v6e:16x16"),
        ("v4", "v4:4x4x4"),
        ("V5P:4X4X4", "v5p:4x4x4"),
        ("v5p:0x4x4", "v5p:2x2x4"),
    ],
)
def test_a_name_that_does_not_exist(name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name}'; the nearest: {nearest}(,|\.)"):
        parse_name(name)


@pytest.mark.parametrize("name", ["", "h100", ":", "v5p:", "4x4x4", "v5p:4x4x4\n", "-", "v6e:²x2"])
def test_other_nonsense_names_slices_that_exist(name: str) -> None:
    with pytest.raises(ConfigError, match="no TPU topology") as error:
        parse_name(name)
    suggested = str(error.value).split("the nearest: ")[1].split(". ")[0].split(", ")
    assert [parse_name(one)[0].name for one in suggested]


@pytest.mark.parametrize("chip", TPUS.values(), ids=lambda chip: chip.name)
def test_shapes(chip: module.Chip) -> None:
    found = shapes(chip)
    assert len(set(found)) == len(found)
    assert math.prod(found[-1]) == chip.pod
    assert all(
        len(shape) == chip.dimensions and list(shape) == sorted(shape, reverse=shape == (2, 2, 1)) for shape in found
    )


def test_libtpu_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(ConfigError, match=r"not installed: pip install 'lm\[plan\]', or libtpu==0\.0\.\d+\.\* alone"):
        topology("v5e:4x8")


def test_libtpu_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0.1")
    with pytest.raises(
        ConfigError, match=r"libtpu 0\.0\.1 does not go with jax .*: pip install 'libtpu==0\.0\.\d+\.\*'"
    ):
        topology("v5e:4x8")
