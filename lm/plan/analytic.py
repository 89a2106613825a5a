"""What a step costs, from sizes alone: well under a millisecond for each setting, and no compiler.

The same quantities that `estimate` reads from a compiled program are counted here, from the shapes of the model and
from what each device holds, computes and exchanges (lm/parallel/layout.py, lm/model/linear.py). A few constants,
fitted to compiled programs, make bytes and cycles of the counts; tests/benchmarks/plan_accuracy.py compares.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax

from lm.experiment import Config
from lm.kernels.attention.splash import LANES, block_sizes, takes
from lm.model.config import ModelConfig
from lm.model.flops import flops_per_token
from lm.model.loss import LOGITS_ON_ACCELERATORS
from lm.model.transformer import abstract_params, compute_dtype, parameter_axes
from lm.parallel.layout import GATHERED
from lm.parallel.sharding import rules
from lm.plan.estimate import (
    NETWORKS,
    Estimate,
    MemoryUse,
    Times,
    Traffic,
    block_flops,
    block_pairs,
    link_seconds,
    splash_flops,
)
from lm.plan.machine import Machine, Spans, between_slices, spans_by_axis
from lm.plan.rates import rates_of

F32 = 4


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One step of a config on a mesh, modelled."""

    estimate: Estimate
    memory: MemoryUse

    @property
    def step_seconds(self) -> float:
        return self.estimate.times.step

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.memory.capacity


def predict(config: Config, machine: Machine, sizes: dict[str, int]) -> Prediction:
    """The step of `config` on a mesh of these sizes, by axis. The sizes must be ones that `make_mesh` accepts."""
    work = count_work(config, sizes, machine.platform)
    return Prediction(_estimate(config, machine, sizes, work), _memory(config, machine, work))


# Counts: exact, for one device


class Exchange(NamedTuple):
    """Collectives of one kind over some mesh axes, in one step."""

    kind: str
    axes: tuple[str, ...]
    bytes: float
    """Of whole arrays, all runs together."""
    runs: float
    hidden: bool
    """Whether products run beside it."""


@dataclasses.dataclass(frozen=True)
class Work:
    """What one device holds, computes and exchanges in a step. Bytes, FLOPs, numbers of elements."""

    parameters: float
    """Bytes, as many as of their gradients."""
    layer_parameters: float
    """Of these, the layers'."""
    batch: float
    """Bytes of the rows that it is given."""
    item: int
    """Bytes of an element that is computed with."""
    saved: float
    """Bytes kept for the backward pass, on the device."""
    offloaded: float
    """The same, on the host."""
    moving: float
    """What the device has more because of these: what is on its way, and the inputs of all layers once more. One layer
    is taken out of the loop for the transfers, and it reads them in another layout."""
    carried: float
    """Bytes that go to the host for the backward pass in all of the step, and come back."""
    layer_weights: float
    """Elements of one layer, gathered."""
    copies: float
    """Bytes of what is stored and there once more: all layers' weights, cast for all that gather them; and tables with
    their optimizer state in another layout, if the parts that are stored are not whole lanes wide."""
    feed_forward: float
    """Elements that the backward pass of a feed-forward layer has beside the residual stream, for one run."""
    kernel: float
    """The same of attention, scores aside."""
    hidden: float
    """Elements of the residual stream of one run."""
    scores: float
    """Of attention, for one run of a layer, where they are stored."""
    table: float
    """Elements of the output weights, gathered."""
    transposed: bool
    """Whether they are gathered in another layout than the products read."""
    logits: float
    """Elements computed at once."""
    loss_left: float
    """Bytes of the gradient of the output weights, or of what it is computed from, in the layers' backward pass."""
    layer_flops: float
    """Of the products of all layers, recomputation included, and of what a pipeline computes while it is idle."""
    loss_flops: float
    attention_flops: float
    elementwise: float
    """Bytes read and written between the products of layers."""
    loss_bytes: float
    """Bytes read and written for the loss."""
    exchanges: tuple[Exchange, ...]


def count_work(config: Config, sizes: dict[str, int], platform: str = "tpu") -> Work:
    """The counts for a device of a mesh of these sizes."""
    model, train = config.model, config.train
    item = compute_dtype(model, platform).itemsize
    table = rules(config.mesh)
    parts = {name: math.prod(sizes[axis] for axis in axes) for name, axes in table.items()}
    stages, repeats = sizes["stage"], config.mesh.repeats
    microbatches = config.mesh.pipeline_microbatches if stages > 1 else 1
    runs = repeats * microbatches + stages - 1 if stages > 1 else 1
    layers = model.layers / (stages * repeats if stages > 1 else 1)
    times = train.accumulation * runs * layers  # that a layer is computed forward
    tensor = parts["residual"] // parts["sequence"]

    rows = train.batch_size / parts["batch"]
    tokens = rows / train.accumulation / microbatches * train.sequence_length / parts["sequence"]
    stream = tokens * model.width / tensor
    parameters, tables, matrices, layer_weights = 0.0, 0.0, 0.0, 0.0
    for axes, shape in stored_sizes(model):
        size = math.prod(shape)
        held = F32 * size / math.prod(parts[name] for name in axes)
        parameters += held
        tables += held * ("layers" not in axes)
        if axes[0] == "layers" and len(axes) > 2:
            matrices += held / F32
            computed = math.prod(parts[name] for name in axes if name not in GATHERED and name != "layers")
            layer_weights += size / computed / (model.layers - model.layers % len(model.pattern))

    products, kept, attended = _layer(config, parts)
    again = sum(inputs * outputs for name, inputs, outputs in products if name not in kept)
    weights = sum(inputs * outputs for _, inputs, outputs in products)
    recompute = 0.0 if train.remat == "none" else again
    layer_flops = times * 2 * tokens * (3 * weights + recompute + _rotations(config, parts, platform))
    vocabulary = model.vocab_size / parts["vocab"]
    loss_tokens = rows * train.sequence_length / parts["sequence"] / stages
    if parts["vocab"] == 1:
        loss_tokens /= tensor
    loss_flops = 6 * loss_tokens * model.width * vocabulary
    forward = times * (1 + (train.remat != "none" and not attended))
    heads = model.heads / parts["heads"] * tokens * parts["sequence"] / train.sequence_length
    scores = 0.0
    if platform == "tpu" and takes_splash(model, train.sequence_length, parts["sequence"]):
        attention = splash_flops(model, train.sequence_length, parts["sequence"], heads, forward, times)
    else:
        heads /= parts["sequence"]
        attention = block_flops(model, train.sequence_length, heads, forward, times)
        pairs = sum(block_pairs(train.sequence_length, window) for window in model.pattern) / len(model.pattern)
        scores = pairs * heads

    results = sum(inputs + outputs for _, inputs, outputs in products)
    # A pipeline also keeps what it receives and hands on each time, and all microbatches, as they come and go.
    flow = 2 * runs + 4 * microbatches if stages > 1 else 0
    saved, offloaded = _saved(config, parts, tensor, platform)
    feed_forward, kernel = _backward(config, parts, platform)
    passes = 3 + (train.remat != "none")
    loss_chunk = min(LOGITS_ON_ACCELERATORS, loss_tokens / train.accumulation * vocabulary)
    chunks = max(1.0, loss_tokens * vocabulary / loss_chunk)
    relaid = 0.0
    if platform == "tpu" and (columns := model.width // parts["embed"]) % LANES:
        relaid = (1 + (model.embeddings == "untied")) * 3 * F32 * vocabulary * -(-columns // LANES) * LANES
    scattered = F32 * vocabulary * model.width / (parts["embed"] if _scatters_early(config, sizes, table) else 1)
    # In one chunk, the product that gives the gradient waits as well, and what it is made of.
    operands = F32 * loss_chunk + item * loss_tokens / train.accumulation * model.width
    return Work(
        parameters=parameters,
        layer_parameters=parameters - tables,
        batch=rows * train.sequence_length * 5 * 4,
        item=item,
        saved=item * ((saved * tokens + (scores if train.remat == "none" else 0)) * layers * runs + flow * stream),
        offloaded=item * offloaded * tokens * layers * runs,
        moving=item * (stream * layers * runs + offloaded * tokens) if offloaded else 0.0,
        carried=item * offloaded * tokens * times,
        layer_weights=layer_weights,
        copies=(item * matrices if item < F32 else 0.0) + relaid,
        feed_forward=tokens * feed_forward,
        kernel=tokens * kernel,
        hidden=stream,
        scores=scores,
        table=vocabulary * model.width,
        transposed=relaid > 0,
        logits=loss_chunk,
        loss_left=scattered if chunks > train.accumulation else operands,
        layer_flops=layer_flops,
        loss_flops=loss_flops,
        attention_flops=attention,
        elementwise=times * passes * (item * (tokens * results + 4 * stream) + 2 * F32 * scores),
        loss_bytes=loss_tokens * vocabulary * F32 * 4 + chunks * vocabulary * model.width * F32 * 2,
        exchanges=tuple(
            _exchanges(config, sizes, table, item, times, tokens, layer_weights, vocabulary, parameters, tables)
        ),
    )


def _scatters_early(config: Config, sizes: dict[str, int], table: dict[str, tuple[str, ...]]) -> bool:
    """Whether the gradient of the output weights is summed over devices before the layers' backward pass.

    As a rule the compiler puts that after it. It was seen before where the look-up of the embedding adds to the same
    gradient, and a reduce-scatter is what it becomes: over one axis, into parts that are whole lanes wide.
    """
    over = [sizes[axis] for axis in table["embed"] if sizes[axis] > 1]
    return config.model.embeddings == "tied" and len(over) == 1 and config.model.width // math.prod(over) % LANES == 0


@functools.cache
def stored_sizes(model: ModelConfig) -> tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]:
    """Of each parameter: the names of its axes, and its shape."""
    names = jax.tree.leaves(parameter_axes(model), is_leaf=lambda node: isinstance(node, tuple))
    leaves = jax.tree.leaves(abstract_params(model))
    return tuple((one, leaf.shape) for one, leaf in zip(names, leaves, strict=True))


def _layer(config: Config, parts: dict[str, int]) -> tuple[list[tuple[str, float, float]], set[str], bool]:
    """The products of a layer (the result's name, inputs, outputs, for one token), those that the backward pass does
    not compute again, and whether attention is one of these."""
    model, train = config.model, config.train
    d, f = model.width, model.hidden_width / parts["mlp"]
    heads = model.heads * model.head_width / parts["heads"]
    grouped = model.key_value_heads * model.head_width / parts["kv_heads"]
    products: list[tuple[str, float, float]] = [
        ("query", d, heads),
        ("key", d, grouped),
        ("value", d, grouped),
        ("attention_output", heads, d),
        ("feed_forward_up", d, f),
        *([("feed_forward_gate", d, f)] if model.gated else []),
        ("feed_forward_down", f, d),
    ]
    kept = {*train.saved, *train.offloaded}
    if model.norm_placement == "pre":
        kept.add("feed_forward_down")  # only added to the residual stream: nothing needs it again
    return products, kept, "attention" in kept


def _rotations(config: Config, parts: dict[str, int], platform: str) -> float:
    """Multiplications of the products that apply rotary positions on TPUs, for one token: forward, backward, again."""
    model, train = config.model, config.train
    if platform != "tpu" or model.positions != "rotary":
        return 0.0
    kept = {*train.saved, *train.offloaded}
    found = 0.0
    for name, heads in (("query", model.heads / parts["heads"]), ("key", model.key_value_heads / parts["kv_heads"])):
        found += heads * model.head_width**2 * (2 + (train.remat != "none" and name not in kept))
    return found


def _saved(config: Config, parts: dict[str, int], tensor: int, platform: str) -> tuple[float, float]:
    """Elements for each token and layer that are kept for the backward pass: on the device, and on the host."""
    model, train = config.model, config.train
    heads, grouped = _heads(model, parts, platform)
    f = model.hidden_width / parts["mlp"]
    stream = model.width / tensor
    sums = 2 * model.heads / parts["heads"]  # of exponentials, float32
    size = {
        "query": heads,
        "key": grouped,
        "value": grouped,
        "attention": heads + sums,
        "attention_output": stream,
        "feed_forward_up": f,
        "feed_forward_gate": f,
    }
    kept = stream
    if train.remat == "none":
        # What norms read, float32, and give; what attention reads and gives, keys and values of whole sequences; the
        # latter again in the shape in which the output weights read it; and the hidden layer.
        kept = 4 * stream + 2 * model.width + 2 * heads + 2 * grouped * parts["sequence"] + sums
        kept += model.heads * model.head_width / parts["heads"] + HIDDEN_KEPT[model.activation] * f
    return (
        kept + sum(size[name] for name in train.saved),
        sum(size[name] for name in train.offloaded),
    )


def _backward(config: Config, parts: dict[str, int], platform: str) -> tuple[float, float]:
    """Elements for each token that are there at once in the backward pass of a layer, beside the residual stream: in
    that of the feed-forward layer, and in that of attention."""
    model, train = config.model, config.train
    heads, grouped = _heads(model, parts, platform)
    whole = 3 * model.width if parts["residual"] > parts["sequence"] else 0  # of what `tensor` splits, gathered
    # The hidden layer, its gradient, and those of what it is made of; where nothing is recomputed, only the latter.
    results = 1 + model.gated + 2 * (train.remat != "none")
    feed_forward = results * model.hidden_width / parts["mlp"] + 2 * (heads + grouped) + whole
    kernel = 2 * heads + 4 * grouped * parts["sequence"] + whole
    if platform == "tpu" and takes_splash(model, train.sequence_length, parts["sequence"]):
        kernel += heads * max(_key_tiles(model, window, train.sequence_length, parts) for window in model.pattern)
    return feed_forward, kernel


def _key_tiles(model: ModelConfig, window: int, length: int, parts: dict[str, int]) -> int:
    """Of the backward kernel, which writes a gradient of the queries for each, to be summed after it."""
    sizes = block_sizes(length // parts["sequence"], length, window, model.head_width)
    return length // (sizes.block_kv_dkv or length)


def _heads(model: ModelConfig, parts: dict[str, int], platform: str) -> tuple[float, float]:
    """Elements of the queries, and of the keys, of a token; a TPU pads heads to its lanes."""
    width = -(-model.head_width // LANES) * LANES if platform == "tpu" else model.head_width
    return model.heads * width / parts["heads"], model.key_value_heads * width / parts["kv_heads"]


def takes_splash(model: ModelConfig, length: int, parts: int) -> bool:
    """Whether attention is the TPU kernel's."""
    shape = (1, length // parts, model.heads, model.head_width)
    return takes(shape, (1, length, model.key_value_heads, model.head_width))


def _exchanges(
    config: Config,
    sizes: dict[str, int],
    table: dict[str, tuple[str, ...]],
    item: int,
    times: float,
    tokens: float,
    layer_weights: float,
    vocabulary: float,
    parameters: float,
    tables: float,
) -> list[Exchange]:
    model, train = config.model, config.train

    def on(name: str) -> tuple[str, ...]:
        return tuple(axis for axis in table[name] if sizes[axis] > 1)

    found = []
    rounds = train.accumulation
    reduced = F32 if train.reduce_dtype == "float32" else 2
    if over := on("embed"):
        elements = times * layer_weights + rounds * vocabulary * model.width
        gathered = times * 2 * layer_weights + rounds * vocabulary * model.width
        found.append(Exchange("all-gather", over, item * gathered, times * 8, True))
        found.append(Exchange("reduce-scatter", over, reduced * elements, times * 4, False))
        looked_up = (
            item * tokens * model.width * rounds * (config.mesh.pipeline_microbatches if sizes["stage"] > 1 else 1)
        )
        found.append(Exchange("all-to-all", over, 2 * looked_up, 2 * rounds, False))
    recompute = train.remat != "none"
    stream = item * tokens * model.width
    if over := tuple(axis for axis in on("residual") if axis not in on("sequence")):
        found.append(Exchange("all-gather", over, times * stream * (4 + 2 * recompute), times * 6, False))
        found.append(Exchange("reduce-scatter", over, times * stream * (4 + recompute), times * 5, False))
    if over := on("sequence"):
        grouped = model.key_value_heads * model.head_width / math.prod(sizes[axis] for axis in on("kv_heads"))
        whole = 2 * item * tokens * math.prod(sizes[axis] for axis in over) * grouped
        found.append(Exchange("all-gather", over, times * whole * (1 + recompute), 2 * times, False))
        found.append(Exchange("reduce-scatter", over, times * whole, 2 * times, False))
    if sizes["stage"] > 1:
        runs = times / (model.layers / (sizes["stage"] * config.mesh.repeats))
        stream = item * tokens * model.width / math.prod(sizes[a] for a in on("residual") if a not in on("sequence"))
        found.append(Exchange("collective-permute", ("stage",), 2 * runs * stream, 2 * runs, False))
        # At the end each stage gets its rows of the loss, and the gradients of tables are those of all stages.
        rows = train.accumulation * config.mesh.pipeline_microbatches * stream
        found.append(Exchange("reduce-scatter", ("stage",), rows, rounds, False))
        found.append(Exchange("all-gather", ("stage",), rows, rounds, False))
        found.append(Exchange("all-reduce", ("stage",), tables, 1, False))
    if over := tuple(
        axis for axis in (*table["batch"], *on("sequence")) if sizes[axis] > 1 and axis not in on("embed")
    ):
        found.append(Exchange("all-reduce", over, parameters, 1, False))
    return found


# Models of bytes and seconds


def _memory(config: Config, machine: Machine, work: Work) -> MemoryUse:
    """The peak is in one of three places: where the loss of the last chunk is computed, or in the backward pass of the
    last layer, when the gradients of nearly all layers are there, in its feed-forward layer or its attention."""
    n = machine.chip.devices
    on_host = config.train.optimizer_memory == "host"
    optimizer = 2 * work.parameters
    gathering = work.item * work.table if work.transposed else 0.0
    loss = LOSS_STREAM * work.item * work.hidden + (work.item + F32) * work.table + max(F32 * work.logits, gathering)
    # Of weights: gathered ones in one place; in the other, gradients that are not summed over devices yet.
    feed_forward = work.item * (work.feed_forward + work.layer_weights)
    attention = work.item * work.kernel + F32 * (work.layer_weights + SCORES * work.scores)
    layer = work.layer_parameters + work.loss_left + STREAM * work.item * work.hidden + max(feed_forward, attention)
    accumulated = work.parameters * (config.train.accumulation > 1)
    held = work.parameters + (0 if on_host else optimizer) + work.batch
    # The update has all of the optimizer's state on the device, and some of it twice where it came from the host.
    update = (5.5 if on_host else 5.0) * work.parameters
    total = max(held + accumulated + work.saved + work.copies + work.moving + max(loss, layer), update)
    gradients = accumulated + (work.layer_parameters if layer > loss else 0)
    twice = bool(config.recovery.verify_every)
    again = twice * (work.parameters + (0 if on_host else optimizer))
    return MemoryUse(
        parameters=round(work.parameters * n),
        optimizer=0 if on_host else round(optimizer * n),
        gradients=round(gradients * n),
        saved=round(work.saved * n),
        rest=round(max(0.0, total - held - gradients - work.saved + work.batch) * n),
        again=round(again * n),
        total=round((total + again) * n),
        capacity=machine.chip.hbm_bytes,
        host=round((work.offloaded + on_host * optimizer * (1 + twice)) * n),
    )


def _estimate(config: Config, machine: Machine, sizes: dict[str, int], work: Work) -> Estimate:
    chip, per_chip = machine.chip, machine.chip.devices
    rates = rates_of(chip)
    peak, bandwidth = chip.peak_flops / per_chip, chip.hbm_bandwidth / per_chip
    tokens = config.train.batch_size * config.train.sequence_length
    traffic = _traffic(machine, sizes, work.exchanges)
    total = {n: sum(row.seconds for row in traffic if row.network == n) for n in NETWORKS}
    hidden = {n: sum(row.asynchronous_seconds for row in traffic if row.network == n) for n in NETWORKS}
    on_host = config.train.optimizer_memory == "host"
    state = 4 * work.parameters + 3 * work.parameters
    moved = work.elementwise + work.loss_bytes + state
    products = work.layer_flops + work.loss_flops
    return Estimate(
        chips=machine.chips,
        tokens=tokens,
        model_flops=flops_per_token(config.model, config.train.sequence_length).causal * tokens,
        product_flops=products * per_chip,
        attention_flops=work.attention_flops * per_chip,
        hbm_bytes=moved * per_chip,
        hbm_seconds=moved / bandwidth,
        traffic=traffic,
        times=Times(
            products=products / (peak * rates.products * rates.sustained),
            attention=work.attention_flops / (peak * rates.attention),
            other=moved / (bandwidth * rates.memory),
            copies=0.0,
            synchronous={n: total[n] - hidden[n] for n in NETWORKS},
            asynchronous=hidden,
            host=2 * work.carried / (chip.host_bandwidth / per_chip),
            update=on_host * 4 * work.parameters / (chip.host_bandwidth / per_chip),
        ),
        peak_flops=chip.peak_flops,
    )


def _traffic(machine: Machine, sizes: dict[str, int], exchanges: tuple[Exchange, ...]) -> tuple[Traffic, ...]:
    spans, outer = spans_by_axis(machine, sizes), between_slices(machine, sizes)
    rows = []
    for one in exchanges:
        group = math.prod(sizes[axis] for axis in one.axes)
        across = math.prod(outer[axis] for axis in one.axes)
        for network, size, count in (("links", one.bytes, group // across), ("data_center", one.bytes, across)):
            if count == 1:
                continue
            ring = (2 if one.kind == "all-reduce" else 1) * (count - 1) / count
            wire = size * (1.0 if one.kind == "collective-permute" else ring)
            along: Spans = sorted((s for axis in one.axes for s in spans[axis]), reverse=True)
            seconds = link_seconds(one.kind, size, wire, along, machine.chip, network)
            hidden = HIDDEN * seconds if one.hidden else 0.0
            rows.append(Traffic(one.kind, network, round(one.runs), round(size), wire, seconds, hidden))
    return tuple(sorted(rows, key=lambda row: -row.seconds))


# Fitted to compiled programs: see tests/benchmarks/plan_accuracy.py

LOSS_STREAM, STREAM, SCORES = 3.0, 6.0, 3.0
"""Of memory: how many times the residual stream, with the loss or in the backward pass of a layer, and the scores are
there at the same time."""
HIDDEN_KEPT = {"gelu": 2.0, "squared_relu": 3.5, "gelu_tanh": 6.0, "swiglu": 6.0, "geglu": 8.0}
"""Arrays of the size of the hidden layer that autodiff keeps of it, itself included, where nothing is recomputed."""


HIDDEN = 0.95
"""Share of the weights' gathers that products run beside."""
