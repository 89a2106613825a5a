"""What the compiler makes of a train step on a TPU slice, read from the compiled program.

    python tests/benchmarks/tpu_program.py configs/llama3_8b.py --topology v5p:4x4x4 [--slices N] [--train.remat full …]

Needs no TPU, only libtpu: pip install -e '.[plan]'. Prints memory per device, collectives by kind and mesh axis,
their bytes against the least that a fully sharded mesh needs, the compiler's estimated cycles, kernels, and the
largest collectives with the operations that they come from. Bytes are per device and step; wire: what one device
sends on a ring.
"""

import argparse
import math
import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parents[2]))

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lm import config as configs
from lm.errors import LmError
from lm.experiment import Config
from lm.model.flops import flops_per_token, parameter_count
from lm.plan.compile import compile_train_step
from lm.plan.program import Program, by_kind_and_axes, read_program
from lm.plan.topology import Topology, topology
from lm.train.state import abstract_state

GIB, MIB = 2**30, 2**20
FULLY_SHARDED = {"fsdp", "context", "expert"}
"""Mesh axes along which parameters are gathered where they are used."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--topology", default="v5p:4x4x4")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--text", help="file to write the compiled program to")
    arguments, overrides = parser.parse_known_args()
    try:
        report(arguments, configs.load(arguments.config, Config, overrides))
    except LmError as error:
        sys.exit(f"{type(error).__name__}: {error}")


def report(arguments: argparse.Namespace, config: Config) -> None:
    where = topology(arguments.topology, slices=arguments.slices)
    step = compile_train_step(config, where.devices)
    if arguments.text:
        Path(arguments.text).write_text(step.compiled.as_text())
    program = read_program(step.compiled, step.mesh)
    sizes = " x ".join(f"{name} {size}" for name, size in step.mesh.shape.items() if size > 1) or "one device"
    print(f"{arguments.config} on {arguments.slices} x {where.name}: {where.chips} chips, {where.hosts} hosts; {sizes}")
    print(f"lowered in {step.lowering_seconds:.1f} s, compiled in {step.compile_seconds:.1f} s")
    for loop in program.unknown_loops:
        print(f"WARNING: the trip count of {loop} is not known; counted once")
    print_memory(program, where)
    print_collectives(program)
    print_minimum(program, config, step.mesh)
    print_cycles(program, config, where, step.mesh)
    print_largest(program)


def print_memory(program: Program, where: Topology) -> None:
    memory = program.memory
    print(f"\nmemory per device, GiB ({where.hbm_bytes / GIB:.2f} usable)")
    for name in ("arguments", "outputs", "alias", "temporary", "code", "peak", "host"):
        print(f"  {name:<10} {getattr(memory, name) / GIB:9.3f}")


def print_collectives(program: Program) -> None:
    print(
        f"\n{'collectives':<20} {'axes':<22} {'network':<11} {'in text':>7} {'runs':>7} {'GiB':>9} {'wire GiB':>9} "
        f"{'async':>6}"
    )
    for (kind, axes, network), rows in by_kind_and_axes(program.collectives).items():
        whole = sum(row.bytes * row.times for row in rows)
        wire = sum(row.wire_bytes * row.times for row in rows)
        hidden = sum(row.wire_bytes * row.times for row in rows if row.asynchronous) / max(wire, 1)
        runs = sum(row.times for row in rows)
        print(
            f"  {kind:<18} {'+'.join(axes) or '-':<22} {network:<11} {len(rows):7} {runs:7} "
            f"{whole / GIB:9.3f} {wire / GIB:9.3f} {hidden:6.0%}"
        )


def print_minimum(program: Program, config: Config, mesh: Mesh) -> None:
    """Against two gathers of the bfloat16 weights and one reduce-scatter of their gradients for each microbatch."""
    elements = fully_sharded_elements(config, mesh) * config.train.accumulation
    reduced = jnp.dtype(config.train.reduce_dtype).itemsize
    print(f"\nalong the axes of fully sharded weights, GiB (gradients in {config.train.reduce_dtype})")
    print(f"  {'':<20} {'least':>9} {'found':>9}")
    for kind, least in (("all-gather", 4 * elements), ("reduce-scatter", reduced * elements), ("all-reduce", 0)):
        found = sum(c.bytes * c.times for c in program.collectives if c.kind == kind and FULLY_SHARDED & set(c.axes))
        ratio = f"{found / least - 1:+9.1%}" if least else ""
        print(f"  {kind:<20} {least / GIB:9.3f} {found / GIB:9.3f} {ratio}")


def fully_sharded_elements(config: Config, mesh: Mesh) -> float:
    """Elements that a device gathers to use each fully sharded parameter once."""
    total = 0.0
    for leaf in jax.tree.leaves(abstract_state(config, mesh).params):
        axes = [axis for part in leaf.sharding.spec if part for axis in ((part,) if isinstance(part, str) else part)]
        if FULLY_SHARDED & set(axes):
            total += leaf.size / math.prod(mesh.shape[axis] for axis in axes if axis not in FULLY_SHARDED)
    return total


def print_cycles(program: Program, config: Config, where: Topology, mesh: Mesh) -> None:
    tokens = config.train.batch_size * config.train.sequence_length / mesh.size
    flops = flops_per_token(config.model, config.train.sequence_length)
    print(
        f"\n{parameter_count(config.model):,} parameters, {tokens:,.0f} tokens per device, model TFLOP per device: "
        f"{flops.causal * tokens / 1e12:.2f} with causal attention; products in the program, recomputation included, "
        f"kernels not: {program.product_flops / 1e12:.2f}"
    )
    print(f"estimated cycles {program.total_cycles:.4g} (without kernels and collectives)")
    for kind, cycles in sorted(program.cycles.items(), key=lambda item: -item[1]):
        print(f"  {kind:<12} {cycles:12.4g} {cycles / max(1, program.total_cycles):6.1%}")
    print("custom calls")
    for kernel in program.kernels[:20]:
        print(f"  {kernel.times:6} x {kernel.target} {kernel.name} {kernel.settings}")


def print_largest(program: Program) -> None:
    print("\nlargest collectives: wire MiB a step, runs, MiB each, axes, operation")
    rows = sorted(program.collectives, key=lambda row: -row.wire_bytes * row.times)
    for row in rows[:10]:
        print(
            f"  {row.wire_bytes * row.times / MIB:10.1f} {row.times:6} x {row.bytes / MIB:9.2f} {row.kind:<18} "
            f"{'+'.join(row.axes):<12} {'async' if row.asynchronous else 'sync ':<5} {row.name:<28} {row.op_name} "
            f"[{row.algorithm}]"
        )


if __name__ == "__main__":
    main()
