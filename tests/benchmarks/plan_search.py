"""`lm plan --search` against compiling everything: is what it finds the best of a small space?

    python tests/benchmarks/plan_search.py

Meshes without stages, accumulations and two ways of saving of a small model on 4 chips are all compiled, which the
search would only rank, and the fastest of them compared with the one that the search picks after compiling a few. Both
without the compiler option that makes compiling three times as long.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[2]))

from lm.experiment import Config
from lm.model.config import ModelConfig
from lm.parallel.mesh import MeshConfig
from lm.plan import search as searching
from lm.plan.plan import plan
from lm.plan.report import as_json
from lm.plan.search import search, settings
from lm.plan.topology import topology
from lm.train import compiler
from lm.train.config import TrainConfig

NAME = "v5e:2x2"
CONFIG = Config(
    model=ModelConfig(
        layers=4, width=512, heads=4, kv_heads=2, hidden=2048, vocab_size=8192, embeddings="untied", dtype="bfloat16"
    ),
    train=TrainConfig(batch_size=16, sequence_length=1024, steps=10),
    mesh=MeshConfig(fsdp=-1),
)


def main() -> None:
    for options in compiler.OPTIONS.values():
        options.pop("xla_tpu_scoped_vmem_limit_kib", None)
    # A space small enough to be compiled as a whole.
    searching.REMAT = (searching.REMAT[0], searching.REMAT[2])
    searching.MOST_ACCUMULATION = 2
    searching.MOST_PARTS = {"tensor": 2, "context": 2, "stage": 1}
    where = topology(NAME)
    found: dict[str, dict[str, Any]] = {}

    def compile_one(config: Config) -> dict[str, Any]:
        key = " ".join(settings(config, CONFIG))
        if key not in found:
            found[key] = as_json(plan(config, NAME, advise=False))
        return found[key]

    start = time.monotonic()
    result = search(CONFIG, where.machine, compile_one, print)
    assert result.winner is not None
    searched, compiled = time.monotonic() - start, len(found)
    everything = [
        searching._candidate(CONFIG, where.machine, *one, way)
        for one in searching.meshes_for(CONFIG, where.machine)
        for way in searching.REMAT
    ]
    print(f"{len(everything)} candidates; all are compiled now")
    for one in filter(None, everything):
        values = compile_one(one.config)
        print(
            f"  {values['step_seconds'] or float('inf'):.6f} compiled, {one.prediction.step_seconds:.6f} predicted: "
            f"{' '.join(settings(one.config, CONFIG))}",
            flush=True,
        )
    times = {key: values["step_seconds"] for key, values in found.items() if values["fits"]}
    best = min(times, key=lambda key: times[key])
    ratio = result.winner.seconds / times[best]
    print(
        f"search: {compiled} compiled in {searched:.0f} s; everything: {len(found)} in {time.monotonic() - start:.0f} s"
    )
    print(f"found {result.winner.seconds:.6f} s, the best is {times[best]:.6f} s ({best}): {ratio - 1:+.2%}")


if __name__ == "__main__":
    main()
