"""Two hosts that ssh reaches. run.dir of the config must be the same place for both: a shared folder, or a bucket.

lm launch up launch/examples/ssh.py configs/llama3_8b.py --run.dir gs://bucket/llama3_8b --follow
"""

from launch.config import Machines
from launch.ssh import Ssh

config = Machines(
    name="llama3-8b",
    ssh=Ssh(hosts=("user@node1", "user@node2")),
    setup=("source ~/venv/bin/activate",),
    environment=("XLA_PYTHON_CLIENT_MEM_FRACTION=0.92",),
)
