"""The machine that a mesh lies on, and what is predicted for it."""

import dataclasses
import importlib.util
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from lm.chips import CHIPS
from lm.experiment import Config
from lm.model.config import ModelConfig
from lm.parallel.mesh import MeshConfig, make_mesh
from lm.plan import expected as module
from lm.plan.expected import expect, machine_of
from lm.plan.machine import Machine
from lm.plan.topology import topology
from lm.train.config import TrainConfig
from lm.train.forecast import Expected

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'lm[plan]'"
)

CONFIG = Config(
    model=ModelConfig(layers=2, width=64, heads=2, vocab_size=256),
    train=TrainConfig(batch_size=8, sequence_length=64, steps=10),
    mesh=MeshConfig(fsdp=-1),
)


def made(kind: str, count: int, platform: str) -> Any:
    """What `machine_of` reads of a mesh over devices that nothing here can make."""
    grid = np.empty(count, dtype=object)
    grid[:] = [SimpleNamespace(device_kind=kind, platform=platform) for _ in range(count)]
    return SimpleNamespace(devices=grid)


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "slices"),
    [("v4:4x4x4", 1), ("v5e:2x4", 2), ("v5e:16x16", 1), ("v5p:2x2x1", 1), ("v6e:8x16", 1), ("tpu7x:4x4x8", 1)],
)
def test_tpus(name: str, slices: int) -> None:
    there = topology(name, slices=slices)
    mesh = make_mesh(MeshConfig(data=slices, fsdp=-1), there.devices)
    assert machine_of(mesh) == Machine(there.chip, there.shape, slices, there.wrap, "tpu")


def test_gpus_are_one_group() -> None:
    assert machine_of(made("NVIDIA H100 80GB HBM3", 8, "gpu")) == Machine(CHIPS["h100"], (8,), 1, (False,), "gpu")


def test_more_gpus_than_links_join_reach_each_other_over_the_network() -> None:
    found = machine_of(made("NVIDIA H100 80GB HBM3", 16, "gpu"))
    assert found is not None
    assert found.chip == dataclasses.replace(CHIPS["h100"], link_bandwidth=CHIPS["h100"].network_bandwidth)


@pytest.mark.parametrize(("kind", "platform"), [("NVIDIA GeForce RTX 4090", "gpu"), ("TPU v3", "tpu")])
def test_nothing_is_predicted_for_a_chip_that_is_not_known(kind: str, platform: str) -> None:
    assert expect(CONFIG, made(kind, 1, platform)) is None


@pytest.mark.parametrize("count", [1, 4])
def test_cpu_devices_share_the_machine(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(module, "measured_cpu", lambda devices: asked.append(devices) or CHIPS["v4"])
    found = machine_of(make_mesh(CONFIG.mesh, jax.devices()[:count]))
    assert found == Machine(CHIPS["v4"], (count,), 1, (False,), "cpu")
    assert asked == [count]


@needs_libtpu
def test_a_device_has_its_part_of_the_chip(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def predict(*given: Any) -> Any:
        seen.append(given)
        return SimpleNamespace(step_seconds=0.5, memory=SimpleNamespace(total=2**30, again=2**28))

    monkeypatch.setattr(module, "predict", predict)
    monkeypatch.setattr(module, "_lines", lambda found, mesh: ("a plan",))
    mesh = make_mesh(MeshConfig(data=2, fsdp=-1), topology("tpu7x:2x2x1").devices)
    found = expect(CONFIG, mesh)
    assert found is not None
    assert found == Expected(0.5, memory_bytes=2**29, again_bytes=2**27, lines=("a plan",))
    sizes = {"stage": 1, "data": 2, "fsdp": 4, "expert": 1, "context": 1, "tensor": 1}
    assert seen == [(CONFIG, machine_of(mesh), sizes)]


@pytest.mark.parametrize("count", [1, 4])
def test_the_model_takes_the_machine_that_is_here(count: int) -> None:
    """Nothing is asserted of the time: it depends on what else the machine does."""
    found = expect(CONFIG, make_mesh(CONFIG.mesh, jax.devices()[:count]))
    assert found is not None
    assert found.step_seconds > 0
    assert found.memory_bytes > 0
    assert {line.split()[0] for line in found.lines} >= {"mesh", "step", "bound", "memory", "parameters"}


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA B200"])
def test_the_model_takes_gpus(kind: str) -> None:
    mesh = made(kind, 8, "gpu")
    mesh.shape = dict.fromkeys(("stage", "data", "expert", "context", "tensor"), 1) | {"fsdp": 8}
    assert expect(CONFIG, mesh) is not None
