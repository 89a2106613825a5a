"""Chips: what one of each kind has and does, as published, and how they are wired. The only table of them."""

import dataclasses
import math
import os
import time
from collections.abc import Callable

GIB = 2**30
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip. Rates are per second and chip, bytes or dense FLOPs; links are counted one way."""

    name: str
    device_kinds: tuple[str, ...]
    """What JAX calls its devices."""
    devices: int
    """Devices that JAX shows for each chip."""
    hbm_bytes: int
    """What a program may use of the memory, per chip: a little below what is sold."""
    peak_flops: float
    """bfloat16; float32 on CPUs."""
    hbm_bandwidth: float
    link_bandwidth: float
    """One link to one neighbour, one way."""
    dimensions: int
    """Of the torus: 2 (4 neighbours) or 3 (6). 1: one link, to a switch that leads to every other chip."""
    network_bandwidth: float
    """Data centre network, one way: the way to other slices, or other hosts with GPUs."""
    pod: int
    """Most chips that links join: in one slice, or in one host with GPUs."""
    clock: float = 0.0
    """Of its cores, in cycles per second: what the TPU compiler's estimated cycles are counted in."""
    host_bytes: int = 0
    """Memory of the host, for each of its chips; 0: not known."""
    host_bandwidth: float = 16e9
    """To the memory of the host, one way. Given nowhere for TPUs: MaxText's setting for Llama 3.1 8B on v6e moves
    12 GB/s beside its step."""


def chip_of(device_kind: str) -> Chip | None:
    """The chip whose devices JAX calls so; None where it is not in the table, as CPUs are not."""
    return next((chip for chip in CHIPS.values() if device_kind in chip.device_kinds), None)


def measured_cpu(devices: int) -> Chip:
    """One of so many simulated devices that share this machine, measured in about 0.1 s: its part of what all cores
    do. What devices exchange, they copy in memory.

    Another program that runs at the same time makes it look slower: each rate is that of the best of a few tries.
    """
    import jax  # not for those who only look something up
    import jax.numpy as jnp
    import numpy as np

    side = 512
    ones = jnp.ones((side, side), jnp.float32)
    product = jax.jit(lambda x: x @ x).lower(ones).compile()
    peak = 2 * side**3 / _best_seconds(lambda: product(ones).block_until_ready()) / devices
    source = np.ones(16 * MIB, np.uint8)
    target = np.ones_like(source)
    bandwidth = 2 * source.nbytes / _best_seconds(lambda: np.copyto(target, source)) / devices
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // devices
    return Chip("cpu", ("cpu",), 1, memory, peak, bandwidth, bandwidth, 1, bandwidth, devices)


def _best_seconds(run: Callable[[], object]) -> float:
    """Of one run, the fastest of those that fit in 20 ms, and of two at least."""
    until, best, runs = time.perf_counter() + 0.02, math.inf, 0
    while runs < 2 or time.perf_counter() < until:
        start = time.perf_counter()
        run()
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return best


# Memory limits: what libtpu 0.0.42 says is available when a program needs too much (two devices a chip on TPU7x).
# The rest: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}, tables of specifications, 2026. They give links per
# chip, both ways together: v5e 400 GB/s over 4 links, v5p and TPU7x 1,200 over 6, v6e 800 over 4; so 50, 100, 100
# and 100 GB/s for one link one way. v4: 50 GB/s a link (arXiv 2304.01433, table 4). Network per chip: v5p 50 Gbit/s,
# v6e and TPU7x 100; v5e 6.4 Tbit/s for a pod of 256 chips; v4 is given nowhere: as v5p.
# Clock: the peak over the FLOPs that a device does in a cycle (2^17 on v5e, 2^18 on v4 and v5p, 2^19 on v6e and TPU7x).
# The compiler's cycles for a product of 8192 x 8192 come within 2 % of this peak on v5e and v5p, 8 % on v4, 12 % on
# v6e and 24 % on TPU7x, always below it.
# Memory of hosts: the machine types with four chips, ct4p, ct5lp, ct5p, ct6e and tpu7x.
_TPUS = (
    Chip("v4", ("TPU v4",), 1, int(30.75 * GIB), 275e12, 1200e9, 50e9, 3, 6.25e9, 4096, 1.05e9, 407 * 10**9 // 4),
    Chip(
        "v5e",
        ("TPU v5 lite", "TPU v5e"),
        1,
        int(15.75 * GIB),
        197e12,
        819e9,
        50e9,
        2,
        3.125e9,
        256,
        1.5e9,
        192 * 10**9 // 4,
    ),
    Chip(
        "v5p",
        ("TPU v5", "TPU v5p"),
        1,
        int(95.74 * GIB),
        459e12,
        2765e9,
        100e9,
        3,
        6.25e9,
        6144,
        1.75e9,
        448 * 10**9 // 4,
    ),
    Chip(
        "v6e",
        ("TPU v6 lite", "TPU v6e"),
        1,
        int(31.25 * GIB),
        918e12,
        1638e9,
        100e9,
        2,
        12.5e9,
        256,
        1.75e9,
        720 * 10**9 // 4,
    ),
    Chip(
        "tpu7x", ("TPU7x",), 2, int(2 * 94.75 * GIB), 2307e12, 7380e9, 100e9, 3, 12.5e9, 9216, 2.2e9, 960 * 10**9 // 4
    ),
)

# Peak (dense; where the sheets give it with sparsity, half), memory bandwidth and NVLink: NVIDIA's data sheets, which
# give NVLink both ways together: 600, 900 and 1,800 GB/s. All of it goes through a switch, so it is one link to
# everywhere; two H100 PCIe are joined by a bridge. Memory: what the driver shows. B200's bandwidth: 7,680 bits at
# 3,996 MHz, twice a cycle. Network: the adapters of a DGX shared out, 200 Gbit/s for each A100 and 400 for later ones;
# H100 PCIe comes in no such machine: as A100.
_GPUS = (
    Chip("a100-40gb", ("NVIDIA A100-SXM4-40GB",), 1, 40960 * MIB, 312e12, 1555e9, 300e9, 1, 25e9, 8),
    Chip("a100-80gb", ("NVIDIA A100-SXM4-80GB",), 1, 81920 * MIB, 312e12, 2039e9, 300e9, 1, 25e9, 8),
    Chip("h100", ("NVIDIA H100 80GB HBM3",), 1, 81559 * MIB, 989e12, 3350e9, 450e9, 1, 50e9, 8),
    Chip("h100-pcie", ("NVIDIA H100 PCIe",), 1, 81559 * MIB, 756e12, 2000e9, 300e9, 1, 25e9, 2),
    Chip("h200", ("NVIDIA H200",), 1, 143771 * MIB, 989e12, 4800e9, 450e9, 1, 50e9, 8),
    Chip("b200", ("NVIDIA B200",), 1, 183359 * MIB, 2250e12, 7672e9, 900e9, 1, 50e9, 8),
)

TPUS = {chip.name: chip for chip in _TPUS}
CHIPS = TPUS | {chip.name: chip for chip in _GPUS}
