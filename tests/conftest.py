"""Set before jax starts: the tests run on CPU, on eight simulated devices, whatever the machine has."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Also for the processes that tests start: tests compile much and compute little.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import signal

import jax
import pytest

# Whoever starts the suite in the background may have it ignored, and with it all processes that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session", autouse=True)
def compiled_programs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What one test compiles, other tests and the processes that they start find compiled."""
    folder = os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
    jax.config.update("jax_compilation_cache_dir", folder)
