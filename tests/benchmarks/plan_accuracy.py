"""The analytic model of `lm plan` against compiled programs: memory, FLOPs and bytes exchanged.

    python tests/benchmarks/plan_accuracy.py [NAME …] [--small-tiles]

Needs no TPU, only libtpu: pip install -e '.[plan]'. Each setting takes one to ten minutes to compile. The constants of
lm/plan/analytic.py were found on the settings called `tuned`; those called `seen` were looked at while it changed, and
the `unseen` were compiled after its last change. --small-tiles leaves out the
compiler option that makes compiling three times as long; it changes cycles, not memory.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[2]))

from lm.experiment import Config
from lm.model.config import ModelConfig
from lm.parallel.mesh import MeshConfig
from lm.plan.analytic import count_work, predict
from lm.plan.compile import compile_train_step
from lm.plan.program import read_program
from lm.plan.topology import topology
from lm.train import compiler
from lm.train.config import TrainConfig

GIB = 2**30
QKVA = ("query", "key", "value", "attention")
UPS = ("feed_forward_up", "feed_forward_gate")


class Setting(NamedTuple):
    topology: str
    sizes: tuple[int, ...]
    """Width, layers, heads, key/value heads, hidden, vocabulary."""
    length: int
    batch: int
    mesh: dict[str, int]
    remat: str = "full"
    saved: tuple[str, ...] = ()
    offloaded: tuple[str, ...] = ()
    accumulation: int = 1
    embeddings: str = "untied"
    activation: str = "swiglu"

    @property
    def config(self) -> Config:
        width, layers, heads, kv_heads, hidden, vocabulary = self.sizes
        return Config(
            model=ModelConfig(
                layers=layers,
                width=width,
                heads=heads,
                kv_heads=kv_heads,
                hidden=hidden,
                vocab_size=vocabulary,
                embeddings=self.embeddings,  # type: ignore[arg-type]
                activation=self.activation,  # type: ignore[arg-type]
            ),
            train=TrainConfig(
                batch_size=self.batch,
                sequence_length=self.length,
                accumulation=self.accumulation,
                remat=self.remat,  # type: ignore[arg-type]
                saved=self.saved,
                offloaded=self.offloaded,
                z_loss=1e-5,
            ),
            mesh=MeshConfig(**({"fsdp": 1} | self.mesh)),
        )


LLAMA_8B, LLAMA_70B = (4096, 32, 32, 8, 14336, 128256), (8192, 80, 64, 8, 28672, 128256)
TUNED = {
    "small": Setting("v5e:4x4", (1024, 8, 8, 8, 4096, 32000), 2048, 64, {"fsdp": 16}),
    "no-remat": Setting("v5p:2x2x2", (2048, 16, 16, 4, 8192, 32000), 4096, 16, {"fsdp": 8}, "none"),
    "save-attention": Setting(
        "v5p:2x2x2", (2048, 16, 16, 4, 8192, 32000), 4096, 32, {"fsdp": 8}, "names", ("attention",)
    ),
    "tensor": Setting("v6e:4x4", (4096, 8, 32, 8, 14336, 128256), 8192, 8, {"fsdp": 8, "tensor": 2}),
    "pipeline": Setting(
        "v5p:2x2x4", (2048, 16, 16, 8, 8192, 32000), 4096, 64, {"fsdp": 4, "stage": 4, "microbatches": 8}
    ),
    "llama-8b": Setting("v5p:4x4x4", LLAMA_8B, 8192, 512, {"fsdp": 64}),
    "llama-70b": Setting("v5p:8x8x8", LLAMA_70B, 8192, 1024, {"fsdp": 512}),
    "offload": Setting("v5p:2x2x4", (4096, 16, 32, 8, 14336, 32000), 8192, 32, {"fsdp": 16}, "names", (), QKVA),
    "wide": Setting("v5p:4x4x4", (8192, 8, 64, 8, 28672, 32000), 4096, 64, {"fsdp": 16, "tensor": 4}),
    "gpt": Setting(
        "v5e:2x2", (1024, 12, 16, 16, 4096, 50304), 1024, 64, {"fsdp": 4}, "none", embeddings="tied", activation="gelu"
    ),
    "gpt-wide": Setting(
        "v5p:2x2x2",
        (1536, 24, 12, 12, 6144, 50304),
        1024,
        128,
        {"fsdp": 8},
        "none",
        embeddings="tied",
        activation="gelu",
    ),
    "context": Setting("v5p:2x2x4", (2048, 12, 16, 8, 8192, 32000), 32768, 4, {"fsdp": 4, "context": 4}),
    "long": Setting("v5p:4x4x4", (4096, 32, 32, 8, 14336, 32000), 65536, 16, {"fsdp": 16, "context": 4}),
    "3b": Setting("v6e:2x4", (3072, 28, 24, 8, 8192, 128256), 8192, 16, {"fsdp": 8}, embeddings="tied"),
    "tied": Setting("v5e:4x4", (2560, 20, 20, 4, 6912, 50304), 2048, 64, {"fsdp": 16}, embeddings="tied"),
    "gemma-2b": Setting(
        "v6e:4x4",
        (2048, 18, 8, 1, 16384, 256000),
        4096,
        64,
        {"fsdp": 16},
        embeddings="tied",
        activation="geglu",
    ),
    "7b": Setting("v5p:2x2x4", (4096, 32, 32, 32, 11008, 128000), 4096, 64, {"fsdp": 16}),
    "vocabulary": Setting(
        "v5e:4x8",
        (2048, 24, 16, 4, 8192, 256000),
        2048,
        128,
        {"fsdp": 32},
        embeddings="tied",
        activation="gelu_tanh",
    ),
}
SEEN = {
    "deep-pipeline": Setting(
        "v5p:4x4x8", (6144, 48, 48, 8, 24576, 64000), 4096, 512, {"fsdp": 32, "stage": 4, "microbatches": 8}
    ),
    "accumulation": Setting("v5e:4x8", (2048, 16, 16, 16, 5504, 32000), 2048, 256, {"fsdp": 32}, accumulation=4),
    "save-hidden": Setting(
        "v5e:8x8",
        (3072, 24, 24, 8, 8192, 32000),
        2048,
        256,
        {"data": 2, "fsdp": 32},
        "names",
        ("attention", *UPS),
        accumulation=2,
    ),
    "no-remat-wide": Setting("v5p:2x2x4", (3072, 12, 24, 24, 9216, 32000), 4096, 32, {"fsdp": 16}, "none"),
    "context-16k": Setting("v5p:2x2x2", (3072, 16, 24, 8, 8192, 64000), 16384, 8, {"fsdp": 4, "context": 2}),
    "tensor-context": Setting(
        "v5p:2x4x4", (4096, 16, 32, 8, 11008, 32000), 8192, 32, {"fsdp": 8, "context": 2, "tensor": 2}
    ),
    "attention-v6e": Setting(
        "v6e:4x4",
        (2560, 32, 20, 20, 10240, 50304),
        4096,
        64,
        {"fsdp": 16},
        "names",
        ("attention",),
        activation="gelu",
    ),
    "no-remat-geglu": Setting(
        "v6e:2x4", (1536, 16, 12, 4, 6144, 64000), 2048, 32, {"fsdp": 8}, "none", activation="geglu"
    ),
    "1b": Setting("v5p:2x2x2", (2048, 24, 16, 8, 8192, 100352), 8192, 16, {"fsdp": 8}),
}
UNSEEN = {
    "v4-13b": Setting("v4:4x4x4", (5120, 40, 40, 40, 13824, 32000), 4096, 256, {"fsdp": 64}),
    "qwen-7b": Setting("v6e:4x4", (3584, 28, 28, 4, 18944, 152064), 4096, 64, {"fsdp": 16}),
    "mistral-7b": Setting(
        "v5p:2x2x4", (4096, 32, 32, 8, 14336, 32768), 8192, 64, {"fsdp": 16}, "names", ("attention",)
    ),
    "phi-3b": Setting("v5e:4x8", (2560, 32, 32, 32, 10240, 51200), 2048, 128, {"fsdp": 32}, activation="gelu_tanh"),
    "olmo-1b": Setting("v5e:4x4", (2048, 16, 16, 16, 8192, 50304), 2048, 64, {"fsdp": 16}, embeddings="tied"),
    "30b": Setting("v5p:4x4x4", (6656, 60, 52, 52, 17920, 32000), 2048, 256, {"fsdp": 64}),
    "gpt2": Setting(
        "v5e:2x4", (768, 12, 12, 12, 3072, 50304), 1024, 128, {"fsdp": 8}, "none", embeddings="tied", activation="gelu"
    ),
    "v7x-8b": Setting("tpu7x:2x2x2", LLAMA_8B, 8192, 32, {"fsdp": 16}, "names", QKVA),
    "tensor-34b": Setting("v6e:8x16", (8192, 48, 64, 8, 22016, 32000), 4096, 256, {"fsdp": 64, "tensor": 2}),
    "128k": Setting("v5p:4x4x4", (4096, 32, 32, 8, 14336, 128256), 131072, 16, {"fsdp": 8, "context": 8}),
    "stages-14b": Setting(
        "v5p:4x4x4", (5120, 40, 40, 8, 13824, 100352), 4096, 256, {"fsdp": 16, "stage": 4, "microbatches": 16}
    ),
    "parts-3b": Setting(
        "v6e:4x4",
        (3072, 28, 24, 8, 8192, 128256),
        4096,
        256,
        {"fsdp": 16},
        "names",
        UPS,
        accumulation=4,
        embeddings="tied",
    ),
}
LABELS = {"tuned": TUNED, "seen": SEEN, "unseen": UNSEEN}
ALL = TUNED | SEEN | UNSEEN


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ALL)}; default: all")
    parser.add_argument("--small-tiles", action="store_true")
    arguments = parser.parse_args()
    if arguments.small_tiles:
        for options in compiler.OPTIONS.values():
            options.pop("xla_tpu_scoped_vmem_limit_kib", None)
    head = ("setting", "", "peak GiB", "model", "", "product FLOPs", "gathered", "scattered", "compile s")
    print("{:<15} {:<6} {:>8} {:>8} {:>7} {:>14} {:>9} {:>9} {:>9}".format(*head))
    for label, settings in LABELS.items():
        for name, setting in settings.items():
            if not arguments.names or name in arguments.names:
                print(f"{name:<15} {label:<6} {compare(setting)}", flush=True)


def compare(setting: Setting) -> str:
    """The model over the program: memory, and what it counts."""
    where, config = topology(setting.topology), setting.config
    step = compile_train_step(config, where.devices)
    program = read_program(step.compiled, step.mesh)
    sizes = dict(step.mesh.shape)
    work, modelled = count_work(config, sizes), predict(config, where.machine, sizes).memory.total / where.chip.devices
    flops = (work.layer_flops + work.loss_flops) / program.product_flops
    ratios = []
    for kind in ("all-gather", "reduce-scatter"):
        found = sum(one.bytes * one.times for one in program.collectives if one.kind == kind)
        counted = sum(one.bytes for one in work.exchanges if one.kind == kind)
        ratios.append(counted / found if found else 1.0)
    peak = program.memory.total
    return (
        f"{peak / GIB:8.2f} {modelled / GIB:8.2f} {modelled / peak - 1:+7.1%} {flops:14.3f} {ratios[0]:9.3f} "
        f"{ratios[1]:9.3f} {step.compile_seconds:9.1f}"
    )


if __name__ == "__main__":
    main()
