"""Two spot slices of 64 v5p chips in a GKE cluster.

lm launch up launch/examples/gke.py configs/llama3_8b.py --mesh.data 2 --run.dir gs://bucket/llama3_8b
"""

from launch.config import Machines
from launch.gke import Gke

config = Machines(
    name="llama3-8b",
    gke=Gke(
        image="us-east5-docker.pkg.dev/project/lm/lm:1",
        topology="v5p:4x4x4",
        slices=2,
        spot=True,
        service_account="trainer",
    ),
)
