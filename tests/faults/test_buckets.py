"""Checkpoints in a bucket, which an emulator of Google's storage keeps on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import lm as package
from launch.local import free_port

PROGRAM = """
import os, sys

port = int(sys.argv[1])
from gcp_storage_emulator.server import create_server
create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket").start()

import jax
import jax.numpy as jnp
from lm.checkpoint.checkpoints import Checkpoints
from lm.checkpoint.config import CheckpointConfig

def checkpoints():
    return Checkpoints("gs://bucket/run/checkpoints", CheckpointConfig(every=1), {"config.json": b"{}"}, print)

def fail(*error):
    sys.__excepthook__(*error)
    os._exit(1)  # the emulator would go on

sys.excepthook = fail
state = {"a": jnp.arange(10.0), "step": jnp.int32(1)}
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
saving = checkpoints()
saving.save(state, 1)
saving.wait()
step, restored = checkpoints().restore_newest(abstract)
print("restored", step, restored["a"].tolist() == state["a"].tolist(), flush=True)
os._exit(0)
"""


def test_what_is_saved_there_is_restored() -> None:
    for name in ("gcsfs", "gcp_storage_emulator"):
        pytest.importorskip(name, reason=f"needs the package {name}")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    variables = {
        "STORAGE_EMULATOR_HOST": url,  # of gcsfs
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "FSSPEC_GCS_TOKEN": "anon",  # nobody is asked for another one
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "NO_GCE_CHECK": "true",
    }
    path = os.pathsep.join([str(Path(package.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(port)],
        env=os.environ | variables | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "restored 1 True\n" in ended.stdout, ended.stdout + ended.stderr
