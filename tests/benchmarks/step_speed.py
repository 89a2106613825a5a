"""The train step against nanoGPT's own model in PyTorch, same shapes, float32, on CPU cores.

    python tests/benchmarks/step_speed.py --nanogpt MODEL_PY [--torch-python PYTHON] [--cores 0] [--shape small large]

MODEL_PY is nanoGPT's model.py, unmodified; PYTHON an interpreter that has torch. Each side is a process pinned to the
cores given (`--cores 0,1` for two threads); they take turns in blocks of steps, so that other load meets both. Both do
a full step: forward, backward, clipping at 1, AdamW. A ratio is time of ours over time of PyTorch's, below 1 is
faster; `cpu` counts the processes' CPU seconds and is the steadiest on a machine with other work.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHAPES = {
    "small": {"layers": 4, "heads": 4, "width": 128, "length": 64, "batch": 12, "steps": 12},
    "large": {"layers": 6, "heads": 6, "width": 384, "length": 256, "batch": 16, "steps": 2},
}
VOCABULARY = 65


def our_step(shape: dict[str, int]) -> Any:
    import jax
    import numpy as np

    from lm.experiment import Config
    from lm.model.config import ModelConfig
    from lm.optim.config import OptimConfig
    from lm.parallel.mesh import MeshConfig, make_mesh
    from lm.train.config import TrainConfig
    from lm.train.host_memory import keep_freed_memory
    from lm.train.state import init_state
    from lm.train.step import make_train_step

    keep_freed_memory()
    config = Config(
        model=ModelConfig(
            vocab_size=VOCABULARY, layers=shape["layers"], width=shape["width"], heads=shape["heads"],
            context=shape["length"], activation="gelu", norm="layer", positions="learned",
        ),
        optim=OptimConfig(beta2=0.99, weight_decay=0.1),
        train=TrainConfig(batch_size=shape["batch"], sequence_length=shape["length"], unroll=shape["layers"]),
    )  # fmt: skip
    state = jax.jit(lambda key: init_state(config, key))(jax.random.key(0))
    step = jax.jit(make_train_step(config, make_mesh(MeshConfig(), jax.devices()[:1])), donate_argnums=0)
    rng = np.random.default_rng(0)
    size = (shape["batch"], shape["length"])
    position = np.tile(np.arange(size[1], dtype=np.int32), (size[0], 1))
    batches = []
    for _ in range(8):
        tokens = rng.integers(0, VOCABULARY, (size[0], size[1] + 1)).astype(np.int32)
        batches.append(
            {
                "tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segments": np.ones(size, np.int32),
                "positions": position, "loss_mask": np.ones(size, np.float32),
                "bytes": np.full(size[0], size[1], np.int32),
            }
        )  # fmt: skip

    def run(i: int) -> float:
        nonlocal state
        state, metrics = step(state, batches[i % 8])
        return float(metrics["loss"])

    return run


def torch_step(shape: dict[str, int], model_py: Path) -> Any:
    import importlib.util

    import torch

    spec = importlib.util.spec_from_file_location("nanogpt", model_py)
    assert spec is not None
    assert spec.loader is not None
    nanogpt = importlib.util.module_from_spec(spec)
    sys.modules["nanogpt"] = nanogpt
    spec.loader.exec_module(nanogpt)
    torch.manual_seed(0)
    model = nanogpt.GPT(
        nanogpt.GPTConfig(
            n_layer=shape["layers"], n_head=shape["heads"], n_embd=shape["width"], vocab_size=VOCABULARY,
            block_size=shape["length"], dropout=0.0, bias=False,
        )
    )  # fmt: skip
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    data = torch.randint(0, VOCABULARY, (8, shape["batch"], shape["length"] + 1))

    def run(i: int) -> float:
        rows = data[i % 8]
        _, loss = model(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run


def serve(side: str, shape: dict[str, int], model_py: Path) -> None:
    out, sys.stdout = sys.stdout, sys.stderr
    run = our_step(shape) if side == "ours" else torch_step(shape, model_py)
    for line in sys.stdin:
        count, cpu, walls = int(line), time.process_time(), []
        for i in range(count):
            start = time.perf_counter()
            run(i)
            walls.append(time.perf_counter() - start)
        cpu = (time.process_time() - cpu) / count
        print(json.dumps({"wall": statistics.median(walls), "least": min(walls), "cpu": cpu}), file=out, flush=True)


def compare(options: argparse.Namespace, name: str, cores: str) -> None:
    threads = str(len(cores.split(",")))
    environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "JAX_PLATFORMS": "cpu"}
    pythons = {"ours": sys.executable, "torch": options.torch_python}
    workers = {
        side: subprocess.Popen(
            ["taskset", "-c", cores, python, __file__, "--serve", side, "--shape", name, "--nanogpt", options.nanogpt],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )
        for side, python in pythons.items()
    }  # fmt: skip

    def ask(side: str, count: int) -> dict[str, float]:
        worker = workers[side]
        assert worker.stdin is not None
        assert worker.stdout is not None
        print(count, file=worker.stdin, flush=True)
        return json.loads(worker.stdout.readline())

    for side in workers:
        ask(side, 3)
    results: dict[str, list[dict[str, float]]] = {side: [] for side in workers}
    for _ in range(options.blocks):
        for side in workers:
            results[side].append(ask(side, SHAPES[name]["steps"]))
    for worker in workers.values():
        worker.kill()
    pairs = list(zip(results["ours"], results["torch"], strict=True))
    ratio = {key: statistics.median(a[key] / b[key] for a, b in pairs) for key in ("wall", "cpu")}
    least = [min(block["least"] for block in results[side]) for side in ("ours", "torch")]
    print(
        f"{name} on core(s) {cores}: ours / PyTorch: wall {ratio['wall']:.2f}  cpu {ratio['cpu']:.2f}  "
        f"fastest step {least[0] / least[1]:.2f} ({1e3 * least[0]:.1f} / {1e3 * least[1]:.1f} ms)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", required=True, metavar="MODEL_PY")
    parser.add_argument("--torch-python", default=sys.executable)
    parser.add_argument("--cores", nargs="+", default=["0", "0,1"])
    parser.add_argument("--shape", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--serve", choices=("ours", "torch"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve, SHAPES[options.shape[0]], Path(options.nanogpt))
        return
    for cores in options.cores:
        for name in options.shape:
            compare(options, name, cores)


if __name__ == "__main__":
    main()
