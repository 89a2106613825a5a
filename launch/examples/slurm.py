"""Four nodes of a SLURM cluster with eight GPUs each, submitted from this machine by ssh to the login node.

lm launch up launch/examples/slurm.py configs/llama3_8b.py --run.dir /shared/runs/llama3_8b --follow
"""

from launch.config import Machines
from launch.slurm import Slurm

config = Machines(
    name="llama3-8b",
    slurm=Slurm(
        login="user@login.cluster",
        folder="/shared/user/launches",
        nodes=4,
        gpus_per_node=8,
        cpus_per_process=64,
        partition="gpu",
        time="24:00:00",
        options=("exclusive",),
    ),
    setup=("module load cuda", "source /shared/user/venv/bin/activate"),
)
