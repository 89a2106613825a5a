"""Options of the compiler, by kind of device: each with its reason, and what it gains."""

from jax.sharding import Mesh

Options = dict[str, str | int | bool]

_GATHER_WHILE_COMPUTING: Options = {
    # Weights of a layer are gathered in pieces inside of the products before: all but the first gather of a layer
    # disappear behind them. Each of these alone, or all without the last, change nothing.
    "xla_enable_async_all_gather": True,
    "xla_tpu_enable_async_collective_fusion": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
    "xla_tpu_overlap_compute_collective_tc": True,
}

_LARGE_TILES: Options = {
    # Room for larger tiles of products, which are read less often: 10 to 20 % fewer estimated cycles on v5p. Chips
    # with 128 MiB of vector memory only.
    "xla_tpu_scoped_vmem_limit_kib": 98304,
}

OPTIONS: dict[str, Options] = {
    "TPU v4": _GATHER_WHILE_COMPUTING,
    "TPU v5 lite": _GATHER_WHILE_COMPUTING | _LARGE_TILES,
    "TPU v5": _GATHER_WHILE_COMPUTING | _LARGE_TILES,
    "TPU v6 lite": _GATHER_WHILE_COMPUTING | _LARGE_TILES,
}
"""By jax device_kind. Other devices get none."""


_DETERMINISTIC_ON_GPU: Options = {
    # No operation that adds in whatever order its threads come (compiling fails where there is no other), and no
    # kernels chosen by how fast they were at start-up.
    "xla_gpu_deterministic_ops": True,
}


def compiler_options(mesh: Mesh, *, deterministic: bool = False) -> Options:
    """For a program that runs on this mesh."""
    device = mesh.devices.flat[0]
    options = OPTIONS.get(device.device_kind, {})
    return options | _DETERMINISTIC_ON_GPU if deterministic and device.platform == "gpu" else options
