"""What a compiled step costs: seconds, memory and what bounds it. A model on top of what the compiler says.

Read from the compiler: bytes of collectives, cycles, FLOPs of products, memory. Published: the rates of the chip.
Modelled: everything that turns these into seconds, the attention kernels, and the traffic of the memory.
"""

import dataclasses
import math
from collections import defaultdict
from typing import Any

import jax
from jax.sharding import Mesh

from lm.experiment import Config
from lm.kernels.attention.splash import LANES, block_sizes
from lm.model.config import ModelConfig
from lm.model.flops import flops_per_token, parameter_count
from lm.parallel.layout import layout_of
from lm.parallel.mesh import AnyMesh
from lm.plan.collectives import Collective
from lm.plan.program import Program
from lm.plan.topology import Topology
from lm.train.state import abstract_state

ATTENTION_EFFICIENCY = 0.35
"""Share of the peak that attention kernels reach, on the FLOPs of `attention_flops`. The compiler has no cycles for
them. What a published step of Llama 3.1 8B on v6e leaves for attention makes about a third; elsewhere it is a guess."""

NETWORKS = ("links", "data_center")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind over one network, for one device and step."""

    kind: str
    network: str
    runs: int
    bytes: int
    """Of whole, unsharded arrays."""
    wire_bytes: float
    """That a device sends."""
    seconds: float
    asynchronous_seconds: float
    """Of those, what runs while something is computed."""


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one step, as if each ran alone."""

    products: float
    attention: float
    other: float
    copies: float
    synchronous: dict[str, float]
    """By network: communication that the program waits for."""
    asynchronous: dict[str, float]

    @property
    def exposed(self) -> dict[str, float]:
        """By network: asynchronous communication that products and attention are too short to hide."""
        room = self.products + self.attention
        return {network: max(0.0, seconds - room) for network, seconds in self.asynchronous.items()}

    @property
    def parts(self) -> dict[str, float]:
        """Seconds that add up to the step, by what bounds them."""
        waiting = {network: self.synchronous[network] + self.exposed[network] for network in NETWORKS}
        return {"compute": self.products + self.attention, "memory": self.other + self.copies, **waiting}

    @property
    def step(self) -> float:
        """The overlap model: what a device computes and copies runs one after the other. Synchronous collectives add
        to it. Asynchronous ones hide behind products and attention, of each network as much as these take; what is
        left adds as well. Nothing is hidden behind other operations or copies, and no host ever delays the step."""
        return sum(self.parts.values())

    @property
    def bound_by(self) -> str:
        """compute, memory, links or data_center: what takes the most of the step."""
        return max(self.parts, key=lambda name: self.parts[name])


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """Bytes on one chip."""

    parameters: int
    optimizer: int
    gradients: int
    """Modelled: float32, as many as parameters. The compiler may use their place for something else before."""
    rest: int
    """Activations, what is computed with, the batch and the program."""
    total: int
    """The compiler's peak."""
    capacity: int
    host: int
    """In the memory of the host, for each chip."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """One step on a whole topology."""

    chips: int
    tokens: int
    """Per step."""
    model_flops: float
    """Per step, all chips; causal, without recomputation."""
    product_flops: float
    """Per step and chip, recomputation included."""
    attention_flops: float
    """Per step and chip, of the kernels."""
    hbm_bytes: float
    """Per step and chip."""
    hbm_seconds: float
    traffic: tuple[Traffic, ...]
    times: Times
    peak_flops: float
    """Of a chip."""

    @property
    def mfu(self) -> float:
        return self.model_flops / (self.times.step * self.chips * self.peak_flops)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.times.step

    def days(self, tokens: float) -> float:
        return tokens / self.tokens_per_second / 86400

    def chip_hours(self, tokens: float) -> float:
        return self.days(tokens) * 24 * self.chips


def estimate(program: Program, config: Config, where: Topology, mesh: Mesh) -> Estimate:
    """The cost of a step that was compiled for `mesh` over the devices of `where`."""
    chip, per_chip = where.chip, where.chip.devices
    tokens = config.train.batch_size * config.train.sequence_length
    attention = attention_flops(program, config, mesh)
    traffic = find_traffic(program, where, mesh)
    hidden = {n: sum(row.asynchronous_seconds for row in traffic if row.network == n) for n in NETWORKS}
    total = {n: sum(row.seconds for row in traffic if row.network == n) for n in NETWORKS}
    moved = hbm_bytes(config, mesh) * per_chip
    return Estimate(
        chips=where.chips,
        tokens=tokens,
        model_flops=flops_per_token(config.model, config.train.sequence_length).causal * tokens,
        product_flops=float(program.product_flops) * per_chip,
        attention_flops=attention * per_chip,
        hbm_bytes=moved,
        hbm_seconds=moved / chip.hbm_bandwidth,
        traffic=traffic,
        times=Times(
            products=program.cycles.get("products", 0) / chip.clock,
            attention=attention / (chip.peak_flops / per_chip * ATTENTION_EFFICIENCY),
            other=program.cycles.get("other", 0) / chip.clock,
            copies=program.cycles.get("copies", 0) / chip.clock,
            synchronous={n: total[n] - hidden[n] for n in NETWORKS},
            asynchronous=hidden,
        ),
        peak_flops=chip.peak_flops,
    )


# Communication


def find_traffic(program: Program, where: Topology, mesh: Mesh) -> tuple[Traffic, ...]:
    """Collectives by kind and network, those that take longest first."""
    rows: dict[tuple[str, str], list[tuple[Collective, float]]] = defaultdict(list)
    for one in program.collectives:
        rows[one.kind, one.network].append((one, collective_seconds(one, where, mesh) * one.times))
    table = [
        Traffic(
            kind=kind,
            network=network,
            runs=sum(one.times for one, _ in found),
            bytes=sum(one.bytes * one.times for one, _ in found),
            wire_bytes=sum(one.wire_bytes * one.times for one, _ in found),
            seconds=sum(seconds for _, seconds in found),
            asynchronous_seconds=sum(seconds for one, seconds in found if one.asynchronous),
        )
        for (kind, network), found in rows.items()
    ]
    return tuple(sorted(table, key=lambda row: -row.seconds))


def collective_seconds(one: Collective, where: Topology, mesh: Mesh) -> float:
    """One run at the published rates, without latency.

    On links, rings along every dimension of the torus that the group spans, both ways where its ends are linked; an
    all-to-all takes what has to cross the middle of the longest dimension; a permutation uses one link. Devices of
    one chip share its links.
    """
    chip = where.chip
    if one.network == "data_center":
        return one.wire_bytes / (chip.network_bandwidth / chip.devices)
    link = chip.link_bandwidth / chip.devices
    if one.kind == "collective-permute":
        return one.wire_bytes / link
    spans = _spans(one, where, mesh)
    if one.kind in ("all-to-all", "ragged-all-to-all"):
        across = max((size / (8 if ring else 4) for size, ring in spans), default=1 / (2 * chip.dimensions))
        return one.bytes * across / link
    lanes = sum(2 if ring else 1 for _, ring in spans) or 2 * chip.dimensions
    return one.wire_bytes / (lanes * link)


def _spans(one: Collective, where: Topology, mesh: Mesh) -> list[tuple[int, bool]]:
    """Chips along each dimension of the torus that a group spans, and whether these are a ring; longest first."""
    index = tuple(slice(None) if axis in one.axes else 0 for axis in mesh.axis_names)
    devices = list(mesh.devices[index].flat)
    own = [d for d in devices if getattr(d, "slice_index", 0) == getattr(devices[0], "slice_index", 0)]
    sizes = [len({device.coords[i] for device in own}) for i in range(len(where.shape))]
    spans = [
        (size, wrapped and size == side and size > 2)
        for size, side, wrapped in zip(sizes, where.shape, where.wrap, strict=True)
        if size > 1
    ]
    spans.sort(reverse=True)
    # Where a collective is over a part of its axes only, it goes along as many dimensions as that needs.
    chips = one.group_size * math.prod(sizes) / len(own)
    needed = next((i for i in range(len(spans)) if math.prod(s for s, _ in spans[:i]) >= chips), len(spans))
    return spans[: max(needed, 1)]


# Attention and memory traffic: models


def attention_flops(program: Program, config: Config, mesh: AnyMesh) -> float:
    """FLOPs of the attention kernels on one device: whole tiles, masked parts included, and heads padded to 128.

    For each run as the program has it, so recomputation counts. Two products forward, five in the backward kernel.
    Zero where attention is computed without kernels: then it is among the products.
    """
    forward = sum(k.times for k in program.kernels if "splash" in k.name and "_fwd" in k.name)
    backward = sum(k.times for k in program.kernels if "splash" in k.name and "_dkv" in k.name)
    if not forward + backward:
        return 0.0
    model, train, layout = config.model, config.train, layout_of(config.mesh, mesh)
    rows = train.batch_size / train.accumulation / layout.parts("batch")
    if layout.stages > 1:
        rows /= layout.microbatches
    parts, length = layout.parts("sequence"), train.sequence_length
    heads = model.heads / layout.parts("heads") * rows
    width = -(-model.head_width // LANES) * LANES
    flops = 0.0
    for window in model.pattern:
        size = block_sizes(length // parts, length, window, model.head_width)
        first = 4 * _covered(length, size.block_q, size.block_kv, window)
        second = 10 * _covered(length, size.block_q_dkv, size.block_kv_dkv, window)
        flops += (forward * first + backward * second) * width * heads / parts
    return flops / len(model.pattern)


def _covered(length: int, queries: int | None, keys: int | None, window: int) -> int:
    """Pairs of a query and a key that tiles of this size compute."""
    queries, keys = queries or length, keys or length
    return visible_tiles(length, queries, keys, window) * queries * keys


def visible_tiles(length: int, queries: int, keys: int, window: int = 0) -> int:
    """Tiles of queries x keys, of a square of `length` x `length`, of which the causal mask leaves something."""
    count = 0
    for start in range(0, length, queries):
        first = max(0, start - window + 1) // keys if window else 0
        count += (min(start + queries, length) - 1) // keys - first + 1
    return count


def hbm_bytes(config: Config, mesh: AnyMesh) -> float:
    """Bytes that a device has to read and write in a step at the least.

    The state and its gradients once each way; weights as they are computed with (bfloat16, gathered) written once and
    read once or twice in every pass over a microbatch; what each product reads and gives, in bfloat16. What happens
    between products is taken to be fused into them.
    """
    model, train, layout = config.model, config.train, layout_of(config.mesh, mesh)
    state = 3 * 4 * parameter_count(model) + 4 * parameter_count(model)
    split = mesh.size / mesh.shape["data"]
    passes = 2 + (train.remat != "none")
    weights = parameter_count(model) / mesh.shape["tensor"] / layout.stages * 2 * (2 * passes + 1)
    activations = train.batch_size * train.sequence_length / mesh.size
    activations *= model.layers * product_sizes(model) * (passes + 1) + 3 * (model.width + model.vocab_size)
    return 2 * state / split + weights * train.accumulation + 2 * activations


def product_sizes(model: ModelConfig) -> int:
    """Elements for each token that the products of one layer read and give."""
    attention = model.heads * model.head_width
    projected = attention + 2 * model.key_value_heads * model.head_width
    ups = 2 if model.gated else 1
    hidden = model.hidden_width
    return (model.width + projected) + (attention + model.width) + (model.width + ups * hidden) + (hidden + model.width)


# Memory


def memory_use(program: Program, config: Config, where: Topology, mesh: AnyMesh) -> MemoryUse:
    """What lies on a chip at the peak, by kind."""
    parameters, optimizer = state_bytes(config, mesh)
    on_device = optimizer if config.train.optimizer_memory == "device" else 0
    peak = program.memory.peak
    gradients = max(0, min(parameters, peak - parameters - on_device))
    n = where.chip.devices
    return MemoryUse(
        parameters=parameters * n,
        optimizer=on_device * n,
        gradients=gradients * n,
        rest=(peak - parameters - on_device - gradients) * n,
        total=peak * n,
        capacity=where.hbm_bytes * n,
        host=program.memory.host * n,
    )


def state_bytes(config: Config, mesh: AnyMesh) -> tuple[int, int]:
    """Of parameters and of the optimizer's state, on one device or its host."""
    state = abstract_state(config, mesh)
    return _bytes(state.params), _bytes(state.opt_state)


def _bytes(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
