"""Runs on a device that is wrong: they end with exit code 7 and name it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from launch.local import environment, free_port
from lm.checkpoint.checkpoints import list_checkpoints

from .conftest import Lm

# As `python -m lm`, but before step 9 one bit of a parameter flips, on the second device of process 1.
FLIPS = """
import dataclasses, os, sys
import jax, numpy as np
from lm.cli import main
from lm.train.corruption import Verification

step = Verification.step

def flip_and_step(self, k, state, batch):
    if k == 9 and os.environ["JAX_PROCESS_ID"] == "1":
        x = state.params["final_norm"]["scale"]
        parts = [np.array(shard.data) for shard in x.addressable_shards]
        parts[1].view(np.uint32)[0] ^= 1 << 20
        parts = [jax.device_put(part, shard.device) for part, shard in zip(parts, x.addressable_shards)]
        x = jax.make_array_from_single_device_arrays(x.shape, x.sharding, parts)
        state = dataclasses.replace(state, params=state.params | {"final_norm": {"scale": x}})
    return step(self, k, state, batch)

Verification.step = flip_and_step
sys.exit(main())
"""


def digests(run: Path) -> dict[int, str]:
    return {info.step: info.digest for info in list_checkpoints(run / "checkpoints") if info.problem is None}


def test_a_verified_run_is_the_same(lm: Lm, workplace: Path, undisturbed: Path) -> None:
    lm("train", "tiny.py", "--run.dir=verified", "--recovery.verify_every=4")
    assert digests(workplace / "verified") == digests(undisturbed) != {}


def test_a_bit_that_flips_in_one_of_two_processes(workplace: Path) -> None:
    port = free_port()
    command = [sys.executable, "-c", FLIPS, "train", "tiny.py", "--recovery.verify_every=5", "--eval.every=0"]
    command += ["--mesh.data=4", "--mesh.fsdp=1", "--run.dir=flipped"]
    running = [
        subprocess.Popen(
            command,
            cwd=workplace,
            env=os.environ | environment(index, 2, 2, port),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    ended = [process.communicate(timeout=240) for process in running]
    assert [process.returncode for process in running] == [7, 7], ended
    for _, errors in ended:
        assert "lm: step 9 was not computed as it must be:" in errors
        assert f"differ on cpu:2049 of process 1 on {socket.gethostname()}; of params/final_norm/scale" in errors
        assert "of process 0" not in errors
        assert "found right is step 4: " in errors
        assert "Traceback" not in errors
    assert max(digests(workplace / "flipped")) <= 9
