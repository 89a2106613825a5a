"""The facts of one step, read from the compiled program: communication, estimated cycles, kernels, memory.

Everything here was computed by the compiler; nothing is a model. A loop's body counts as often as it runs, of the
branches of a conditional the one that costs most. Bytes are per chip (per device, where a chip has two) and step.
"""

import dataclasses
import re
from collections import Counter, defaultdict
from typing import Any

from jax.sharding import Mesh

from lm.plan.collectives import Collective, find_collectives
from lm.plan.hbm import HBM, HOST, is_transfer, moved
from lm.plan.hlo import Computation, Instruction, Module, parse
from lm.plan.loops import trip_count
from lm.plan.products import PRODUCTS, product_flops
from lm.plan.stacks import find_stacks

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_COPIES = (
    *("copy", "transpose", "slice", "dynamic-slice", "dynamic-update-slice", "copy-start", "slice-start"),
    *("dynamic-slice-start", "dynamic-update-slice-start", "async-start"),
)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device, as the compiler laid them out; `host` in the memory of the host.

    What has to fit is `total`. At the limit of a chip the compiler refuses a program by its peak, and says this figure
    in the error; the sum of arguments, outputs and temporary may be far above it, since `temporary` also counts what
    never lies in the memory at one time. The code is not counted.
    """

    arguments: int
    outputs: int
    alias: int
    """Outputs that lie where arguments lay (donated)."""
    temporary: int
    code: int
    peak: int
    """The most at one time, code aside: arguments + outputs - alias + temporary where the compiler does not say."""
    host: int

    @property
    def total(self) -> int:
        """What must fit."""
        return self.peak


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A custom call, such as a Pallas kernel, and how often a step runs it."""

    target: str
    name: str
    settings: str
    """What the kernel says about itself, such as its tile sizes."""
    times: int


@dataclasses.dataclass(frozen=True)
class Program:
    """What one step does on one device."""

    collectives: tuple[Collective, ...]
    cycles: dict[str, int]
    """Estimated cycles by kind of operation: products, copies, other. Pallas kernels and collectives have none."""
    product_flops: int
    """Operations of all products that are computed, recomputed ones included, those in kernels not."""
    kernels: tuple[Kernel, ...]
    memory: Memory
    unknown_loops: tuple[str, ...]
    """Loops whose trip count could not be read: counted once, so that everything in them is a lower bound."""
    hbm_bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    """Read and written in the memory of the device, by kind of operation: products, copies, other, kernels,
    collectives. The least that is moved: an operand counts once for each operation that reads it."""
    host_bytes: int = 0
    """Read and written in the memory of the host."""
    saved_bytes: int | None = None
    """What the loop over layers leaves in the memory for the loop of the backward pass. None where there are no such
    loops."""
    gradient_bytes: int | None = None
    """The gradients of stacked parameters, as the loop of the backward pass leaves them."""

    @property
    def total_cycles(self) -> int:
        return sum(self.cycles.values())


def read_program(compiled: Any, mesh: Mesh) -> Program:
    """The facts of a compiled function (`jax.stages.Compiled`) over the devices of `mesh`."""
    return read_text(compiled.as_text(), mesh, memory_of(compiled))


def read_text(text: str, mesh: Mesh, memory: Memory) -> Program:
    """The facts of the program printed in `text`."""
    module = parse(text)
    reader = _Reader(module, mesh)
    facts = reader.read(module.entry)
    stacks = find_stacks(module)
    return Program(
        collectives=tuple(
            dataclasses.replace(collective, times=times) for collective, times in facts.collectives.values()
        ),
        cycles=dict(facts.cycles),
        product_flops=facts.flops,
        kernels=tuple(Kernel(*key, times) for key, times in facts.kernels.most_common()),
        memory=memory,
        unknown_loops=tuple(reader.unknown_loops),
        hbm_bytes=dict(facts.hbm),
        host_bytes=facts.host,
        saved_bytes=stacks.saved if stacks else None,
        gradient_bytes=stacks.gradients if stacks else None,
    )


def memory_of(compiled: Any) -> Memory:
    stats = compiled.memory_analysis()
    arguments, outputs = stats.argument_size_in_bytes, stats.output_size_in_bytes
    alias, temporary = stats.alias_size_in_bytes, stats.temp_size_in_bytes
    return Memory(
        arguments=arguments,
        outputs=outputs,
        alias=alias,
        temporary=temporary,
        code=stats.generated_code_size_in_bytes,
        peak=getattr(stats, "peak_memory_in_bytes", 0) or arguments + outputs - alias + temporary,
        host=stats.host_argument_size_in_bytes
        + stats.host_output_size_in_bytes
        - stats.host_alias_size_in_bytes
        + stats.host_temp_size_in_bytes,
    )


class _Facts:
    """Sums over one computation and what it calls, run once."""

    def __init__(self) -> None:
        self.collectives: dict[str, tuple[Collective, int]] = {}
        self.cycles: Counter[str] = Counter()
        self.hbm: Counter[str] = Counter()
        self.host = 0
        self.flops = 0
        self.kernels: Counter[tuple[str, str, str]] = Counter()

    def add(self, other: "_Facts", times: int) -> None:
        for key, (collective, count) in other.collectives.items():
            before = self.collectives.get(key, (collective, 0))[1]
            self.collectives[key] = collective, before + count * times
        for kind, cycles in other.cycles.items():
            self.cycles[kind] += cycles * times
        for kind, size in other.hbm.items():
            self.hbm[kind] += size * times
        self.host += other.host * times
        self.flops += other.flops * times
        for kernel, count in other.kernels.items():
            self.kernels[kernel] += count * times

    @property
    def cost(self) -> tuple[float, int]:
        return sum(c.wire_bytes * times for c, times in self.collectives.values()), sum(self.cycles.values())


class _Reader:
    def __init__(self, module: Module, mesh: Mesh) -> None:
        self.module = module
        self.mesh = mesh
        self.unknown_loops: list[str] = []
        self.known: dict[str, _Facts] = {}

    def read(self, computation: Computation) -> _Facts:
        if computation.name in self.known:
            return self.known[computation.name]
        facts = self.known[computation.name] = _Facts()
        for collective in find_collectives(computation, self.module, self.mesh, cycles_of):
            facts.collectives[f"{computation.name}/{collective.name}"] = collective, 1
            if not is_transfer(computation.instructions[collective.name]):  # it runs inside of a fusion or call
                facts.hbm["collectives"] += collective.operand_bytes + collective.result_bytes
        for instruction in computation.instructions.values():
            self.add(facts, instruction, computation)
        return facts

    def add(self, facts: _Facts, instruction: Instruction, computation: Computation) -> None:
        products = self.products(instruction, computation)
        facts.flops += sum(products)
        kind = _kind(instruction, products)
        if cycles := cycles_of(instruction):
            facts.cycles[kind] += cycles
        bytes_by_memory = moved(instruction, computation, self.module)
        facts.host += bytes_by_memory[HOST]
        if size := bytes_by_memory[HBM]:
            facts.hbm[kind] += size
        called = instruction.called
        if instruction.opcode == "while":
            trips = trip_count(instruction, computation, self.module)
            if trips is None:
                self.unknown_loops.append(instruction.op_name or instruction.name)
            facts.add(self.read(self.module.computations[called["body"][0]]), 1 if trips is None else trips)
        elif "branches" in called:
            branches = [self.read(self.module.computations[name]) for name in called["branches"]]
            facts.add(max(branches, key=lambda one: one.cost), 1)
        elif instruction.opcode == "call":
            facts.add(self.read(self.module.computations[called["to_apply"][0]]), 1)
        elif instruction.opcode == "custom-call":
            target = instruction.attribute(r'custom_call_target="([^"]*)"') or ""
            settings = instruction.attribute(r'"xprof_metadata":"((?:[^"\\]|\\.)*)"') or ""
            facts.kernels[target, _kernel_name(instruction), settings.replace('\\"', "").strip("{}")] += 1

    def products(self, instruction: Instruction, computation: Computation) -> list[int]:
        """FLOPs of the products that an instruction is or, as a fusion, holds."""
        if instruction.opcode in PRODUCTS:
            return [product_flops(instruction, computation)]
        if instruction.opcode not in ("fusion", "async-start"):
            return []
        held = (self.module.computations[name] for name in instruction.called.get("calls", ()))
        return [
            flops for inside in held for one in inside.instructions.values() for flops in self.products(one, inside)
        ]


def _kind(instruction: Instruction, products: list[int]) -> str:
    if is_transfer(instruction):
        return "collectives"
    if instruction.opcode == "custom-call":
        return "kernels"
    return "products" if products else "copies" if instruction.opcode in _COPIES else "other"


def cycles_of(instruction: Instruction) -> int:
    """The compiler's estimate for one run of an instruction; 0 where it makes none."""
    match = _CYCLES.search(instruction.attributes)
    return int(match[1]) if match else 0


def _kernel_name(instruction: Instruction) -> str:
    """A Pallas kernel is called by its name; for others the source operation says most."""
    return instruction.op_name.removesuffix("/pallas_call").rpartition("/")[2] or instruction.name.partition(".")[0]


def by_kind_and_axes(
    collectives: tuple[Collective, ...],
) -> dict[tuple[str, tuple[str, ...], str], list[Collective]]:
    """Collectives grouped by kind, mesh axes and network, those with most bytes on the wire first."""
    table = defaultdict(list)
    for collective in collectives:
        table[collective.kind, collective.axes, collective.network].append(collective)
    return dict(sorted(table.items(), key=lambda item: -sum(row.wire_bytes * row.times for row in item[1])))
