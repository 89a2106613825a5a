"""How long it takes to lower the train step: it must depend neither on the number of layers nor on that of chips.

    python tests/benchmarks/lowering.py

Needs no TPU, only libtpu: pip install -e '.[plan]'. Lowering is all that happens before the compiler: from the config
to the program, for a model like Llama 3 8B.
"""

import os
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[2]))

from lm import config as configs
from lm.experiment import Config
from lm.parallel.mesh import make_mesh
from lm.plan.compile import abstract_batch
from lm.plan.topology import topology
from lm.train.state import abstract_state
from lm.train.step import jit_train_step

ROOT = Path(__file__).parents[2]
CASES = [
    ("v5p:2x2x1", 4, []),
    ("v5p:2x2x1", 32, []),
    ("v5p:2x2x1", 128, []),
    ("v5p:4x4x4", 32, []),
    ("v5p:8x8x8", 32, []),
    ("v5p:16x16x24", 32, ["--mesh.fsdp=512", "--mesh.data=12"]),
]


def main() -> None:
    print("topology       chips  layers  lowering")
    for name, layers, overrides in [CASES[0], *CASES]:  # the first one warms up
        devices = topology(name).devices
        sizes = [f"--model.layers={layers}", f"--train.batch_size={2 * len(devices)}"]
        config = configs.load(str(ROOT / "configs/llama3_8b.py"), Config, [*sizes, *overrides])
        start = time.monotonic()
        mesh = make_mesh(config.mesh, devices)
        jit_train_step(config, mesh).lower(abstract_state(config, mesh), abstract_batch(config, mesh))
        print(f"{name:<13} {len(devices):6} {layers:7} {time.monotonic() - start:8.2f} s", flush=True)


if __name__ == "__main__":
    main()
