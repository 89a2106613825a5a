"""Options of the compiler: which devices get which."""

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from jax.sharding import Mesh

from lm.train.compiler import OPTIONS, compiler_options


def mesh_of(platform: str, kind: str) -> Mesh:
    device: Any = SimpleNamespace(platform=platform, device_kind=kind)
    return cast(Mesh, SimpleNamespace(devices=np.array([[device]])))


@pytest.mark.parametrize("kind", OPTIONS)
def test_tpus_are_deterministic_as_they_are(kind: str) -> None:
    mesh = mesh_of("tpu", kind)
    assert compiler_options(mesh) == compiler_options(mesh, deterministic=True) != {}


def test_gpus_are_where_it_is_asked_for() -> None:
    mesh = mesh_of("gpu", "NVIDIA H200")
    assert compiler_options(mesh) == {}
    assert compiler_options(mesh, deterministic=True) == {"xla_gpu_deterministic_ops": True}
