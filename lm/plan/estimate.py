"""What a compiled step costs: seconds, memory and what bounds it. A model on top of what the compiler says.

Read from the compiler: bytes of collectives and of the memory's traffic, cycles, FLOPs of products, memory. Published:
the rates of the chip. Modelled: everything that turns these into seconds, and the attention kernels.
"""

import dataclasses
import functools
import math
from collections import defaultdict
from typing import Any

import jax
from jax.sharding import Mesh

from lm.chips import Chip
from lm.experiment import Config
from lm.kernels.attention.blocks import blocks
from lm.kernels.attention.splash import LANES, block_sizes
from lm.model.config import ModelConfig
from lm.model.flops import flops_per_token
from lm.parallel.layout import layout_of
from lm.parallel.mesh import AnyMesh
from lm.plan.collectives import Collective
from lm.plan.machine import Spans
from lm.plan.program import Program
from lm.plan.rates import rates_of
from lm.plan.topology import Topology
from lm.train.state import abstract_state

NETWORKS = ("links", "data_center")
HOST_EXPOSED = 0.25
"""Share of what goes to the host and back that the step waits for at least: a guess, on the careful side."""


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
    host: float = 0.0
    """To and from the memory of the host, while layers are computed."""
    update: float = 0.0
    """The same for the optimizer's state, beside which there are no products."""

    @property
    def exposed(self) -> dict[str, float]:
        """By network, and for the host: what runs beside products and attention, where these are too short for it.

        The host is written to in the forward pass, about a third of them, and read in the backward pass."""
        room = self.products + self.attention
        found = {network: max(0.0, seconds - room) for network, seconds in self.asynchronous.items()}
        one_way = self.host / 2
        left = max(0.0, one_way - room / 3) + max(0.0, one_way - room * 2 / 3)
        return found | {"host": max(left, HOST_EXPOSED * self.host)}

    @property
    def parts(self) -> dict[str, float]:
        """Seconds that add up to the step, by what bounds them."""
        waiting = {network: self.synchronous[network] + self.exposed[network] for network in NETWORKS}
        computing = {"compute": self.products + self.attention, "memory": self.other + self.copies}
        return {**computing, **waiting, "host": self.exposed["host"] + self.update}

    @property
    def step(self) -> float:
        """The overlap model: what a device computes and copies runs one after the other. Synchronous collectives add
        to it. Asynchronous ones hide behind products and attention, of each network as much as these take, and
        so does what goes to the host and back; what is left adds as well. Nothing is hidden behind other operations or
        copies, and the input is always there."""
        return sum(self.parts.values())

    @property
    def bound_by(self) -> str:
        """compute, memory, links, data_center or host: what takes the most of the step."""
        return max(self.parts, key=lambda name: self.parts[name])


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """Bytes on one chip."""

    parameters: int
    optimizer: int
    gradients: int
    saved: int
    """Activations that the backward pass reads."""
    rest: int
    """What is computed with, the batch and the program."""
    again: int
    """The state once more, while a step is computed twice (`recovery.verify_every`)."""
    total: int
    """What has to fit."""
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
    rates = rates_of(chip)
    bandwidth = chip.hbm_bandwidth / per_chip

    def seconds(kind: str) -> float:
        # The compiler's cycles for what is no product are up to five times what its bytes take: on the larger chips
        # they are the same for bfloat16 as for float32. Copies that run beside products have bytes and no cycles.
        return min(
            program.cycles.get(kind, 0) / chip.clock, program.hbm_bytes.get(kind, 0) / (bandwidth * rates.memory)
        )

    moved = sum(program.hbm_bytes.values())
    fetched = 2 * state_bytes(config, mesh)[1] if config.train.optimizer_memory == "host" else 0
    return Estimate(
        chips=where.chips,
        tokens=tokens,
        model_flops=flops_per_token(config.model, config.train.sequence_length).causal * tokens,
        product_flops=float(program.product_flops) * per_chip,
        attention_flops=attention * per_chip,
        hbm_bytes=moved * per_chip,
        hbm_seconds=moved / bandwidth,
        traffic=traffic,
        times=Times(
            products=program.cycles.get("products", 0) / (chip.clock * rates.sustained),
            attention=attention / (chip.peak_flops / per_chip * rates.attention),
            other=seconds("other"),
            copies=seconds("copies"),
            synchronous={n: total[n] - hidden[n] for n in NETWORKS},
            asynchronous=hidden,
            host=max(0, program.host_bytes - fetched) / (chip.host_bandwidth / per_chip),
            update=fetched / (chip.host_bandwidth / per_chip),
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
    """One run at the published rates, without latency."""
    spans = _spans(one, where, mesh) if one.network == "links" else []
    return link_seconds(one.kind, one.bytes, one.wire_bytes, spans, where.chip, one.network)


def link_seconds(kind: str, size: float, wire: float, spans: Spans, chip: Chip, network: str) -> float:
    """A collective of `size` bytes, of which a device sends `wire`, in a group that spans these lines.

    On links, rings along every dimension of the torus that the group spans, both ways where its ends are linked; an
    all-to-all takes what has to cross the middle of the longest dimension; a permutation uses one link. Devices of
    one chip share its links.
    """
    if network == "data_center":
        return wire / (chip.network_bandwidth / chip.devices)
    link = chip.link_bandwidth / chip.devices
    if kind == "collective-permute" or chip.dimensions == 1:
        return wire / link
    if kind in ("all-to-all", "ragged-all-to-all"):
        across = max((size / (8 if ring else 4) for size, ring in spans), default=1 / (2 * chip.dimensions))
        return size * across / link
    lanes = sum(2 if ring else 1 for _, ring in spans) or 2 * chip.dimensions
    return wire / (lanes * link)


def _spans(one: Collective, where: Topology, mesh: Mesh) -> Spans:
    """Of a group, longest first."""
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


# Attention: a model


def attention_flops(program: Program, config: Config, mesh: AnyMesh) -> float:
    """FLOPs of the attention kernels on one device, for each run as the program has it, so recomputation counts.

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
    heads = model.heads / layout.parts("heads") * rows
    return splash_flops(model, train.sequence_length, layout.parts("sequence"), heads, forward, backward)


def splash_flops(model: ModelConfig, length: int, parts: int, heads: float, forward: float, backward: float) -> float:
    """FLOPs of so many runs of the kernels: whole tiles, masked parts included, and heads padded to 128.

    `heads` are those of all sequences that a device computes at once, each split in `parts`. Two products forward,
    five in the backward kernel.
    """
    width = -(-model.head_width // LANES) * LANES
    flops = 0.0
    for window in model.pattern:
        first, second = _tile_pairs(length, parts, window, model.head_width)
        flops += (forward * 4 * first + backward * 10 * second) * width * heads / parts
    return flops / len(model.pattern)


def block_flops(model: ModelConfig, length: int, heads: float, forward: float, backward: float) -> float:
    """The same where no kernel is: products with the scores stored, two forward and four in the backward pass."""
    pairs = sum(block_pairs(length, window) for window in model.pattern) / len(model.pattern)
    return (forward * 4 + backward * 8) * pairs * model.head_width * heads


@functools.cache
def block_pairs(length: int, window: int) -> int:
    """Pairs of a query and a key for which a score is computed and stored."""
    return sum((stop - start) * (last - first) for start, stop, first, last in blocks(length, window))


@functools.cache
def _tile_pairs(length: int, parts: int, window: int, head_width: int) -> tuple[int, int]:
    """Pairs of a query and a key that the tiles of the forward and of the backward kernel compute."""
    size = block_sizes(length // parts, length, window, head_width)
    return (
        _covered(length, size.block_q, size.block_kv, window),
        _covered(length, size.block_q_dkv, size.block_kv_dkv, window),
    )


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


# Memory


def memory_use(program: Program, config: Config, where: Topology, mesh: AnyMesh) -> MemoryUse:
    """What lies on a chip at the peak, by kind."""
    parameters, optimizer = state_bytes(config, mesh)
    on_device = optimizer if config.train.optimizer_memory == "device" else 0
    peak = program.memory.total
    left = max(0, peak - parameters - on_device)
    saved = min(left, program.saved_bytes or 0)
    gradients = min(left - saved, parameters if program.gradient_bytes is None else program.gradient_bytes)
    n = where.chip.devices
    again = second_state_bytes(config, mesh)
    return MemoryUse(
        parameters=parameters * n,
        optimizer=on_device * n,
        gradients=gradients * n,
        saved=saved * n,
        rest=(peak - parameters - on_device - gradients - saved) * n,
        again=again * n,
        total=(peak + again) * n,
        capacity=where.hbm_bytes * n,
        host=(program.memory.host + (optimizer - on_device) * bool(again)) * n,
    )


def second_state_bytes(config: Config, mesh: AnyMesh) -> int:
    """What a device holds beside a step that is computed twice (lm/train/corruption.py); 0 where none is."""
    if not config.recovery.verify_every:
        return 0
    parameters, optimizer = state_bytes(config, mesh)
    return parameters + (optimizer if config.train.optimizer_memory == "device" else 0)


def state_bytes(config: Config, mesh: AnyMesh) -> tuple[int, int]:
    """Of parameters and of the optimizer's state, on one device or its host."""
    state = abstract_state(config, mesh)
    return _bytes(state.params), _bytes(state.opt_state)


def _bytes(tree: Any) -> int:
    leaves = jax.tree.leaves(tree)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)
