"""Set before jax starts: the tests run on CPU, on eight simulated devices, whatever the machine has."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # tests compile much and compute little
