"""128 chips of v5p as a spot slice in your project, created, used and deleted by one command.

lm launch up launch/examples/tpu_vm.py configs/llama3_8b.py --run.dir gs://bucket/llama3_8b --follow
"""

from launch.config import Machines
from launch.tpu_vm import TpuVm

config = Machines(
    name="llama3-8b",
    tpu_vm=TpuVm(
        zone="us-east5-a",
        topology="v5p:4x4x8",
        provisioning="spot",
        request="queued",  # there is rarely capacity at once
        price=0.0,  # dollars for a chip and hour, from https://cloud.google.com/tpu/pricing
        labels=("team=pretraining",),
    ),
)
