"""What to try, from the figures of a trace: each line names the figure, and the setting that it is about."""

from collections.abc import Callable, Iterator

from lm.profile.kinds import ATTENTION, COLLECTIVES, COPIES, ELEMENTWISE, HOST, INDEXED, PRODUCTS, REDUCTIONS
from lm.profile.read import Profile

MUCH = 0.05
"""Of a step, from which on something is worth a line."""
SLOW_PRODUCTS = 0.6
"""Of the peak: below it, products are too small or of the wrong shape."""
MANY_ELEMENTWISE = 0.35
"""Of the operations' time; a step of a large model has half of it or less."""
UNEXPECTED = 1.25
"""Times the step time that was predicted."""


def advice(profile: Profile) -> list[str]:
    """Lines, the ones about most of the step first; none when nothing stands out."""
    found = [line for rule in _RULES for line in rule(profile)]
    return [text for _, text in sorted(found, key=lambda line: -line[0])]


_Lines = Iterator[tuple[float, str]]


def _waits_for_host(profile: Profile) -> _Lines:
    summary = profile.summary
    share = summary.between / summary.step_seconds
    if share < MUCH:
        return
    waits = sorted(((seconds, what) for what, seconds in summary.waits.items()), reverse=True)
    named = [(seconds / summary.step_seconds, what) for seconds, what in waits if seconds > 0.2 * summary.between]
    idle = f"devices wait for the host for {share:.0%} of the step"
    for part, what in named:
        if what in _HOST_WAITS:
            yield part, f"{idle}: for {part:.0%} {_HOST_WAITS[what]}"
    if not any(what in _HOST_WAITS for _, what in named):
        yield (
            share,
            f"{idle}, which is busy with the loop itself: steps of {summary.step_seconds * 1e3:.3g} ms are short; more "
            "work in each (train.batch_size) makes it matter less. Is another program using this host's cores?",
        )


_HOST_WAITS = {
    "input": "while it waits for the next batch: raise data.loader_workers, or put data.dir on a faster disk; "
    "`lm data stats` tells padding and rows",
    "others": "while it waits for other processes: the log names the one that holds the others up",
    "save": "while it saves: checkpoint.every, checkpoint.local_seconds",
    "evaluation": "while it evaluates: eval.every, eval.batches, sample.tokens",
}


def _inside(profile: Profile) -> _Lines:
    share = profile.summary.inside / profile.summary.step_seconds
    if share < MUCH:
        return
    text = f"{share:.0%} of the step nothing runs between two operations"
    small = profile.summary.busy / max(sum(row.times for row in profile.summary.kinds), 1)
    if profile.summary.platform == "gpu":
        text += (
            f" ({small * 1e6:.0f} us each, on average): kernels are launched slower than they run; a larger batch per "
            "device, less of train.accumulation, or train.unroll to give the compiler longer runs"
        )
    elif profile.summary.platform == "cpu":
        text += ": the threads of the host wait for each other, or other programs have its cores"
    else:
        text += ": the device waits for what it exchanges, or for memory; see the trace viewer around the gaps"
    yield share, text


def _collectives(profile: Profile) -> _Lines:
    summary, config = profile.summary, profile.config
    for one in summary.exchanges:
        share = one.exposed / summary.step_seconds
        if one.kind not in COLLECTIVES or share < MUCH:
            continue
        text = f"{one.kind}: nothing is computed beside it for {share:.0%} of the step"
        if one.kind in ("all-gather", "reduce-scatter", "all-reduce"):
            text += ": more tokens per device and microbatch hide it (train.batch_size, less of train.accumulation)"
        if config is not None and config.mesh.tensor > 1:
            text += "; less of mesh.tensor, whose exchanges are in every layer"
        elif one.kind in ("all-gather", "reduce-scatter"):
            text += "; less of mesh.fsdp and more of mesh.data gathers less, if the memory is there"
        elif one.kind == "all-to-all":
            text += ": a smaller mesh.expert or mesh.context, on devices that are next to each other"
        elif one.kind == "collective-permute":
            text += ": less of mesh.stage or mesh.context, or more of mesh.microbatches"
        yield share, text + ". `lm plan --search` compares meshes"


def _products(profile: Profile) -> _Lines:
    rate, share = profile.products_rate, profile.summary.share(PRODUCTS)
    if rate is None or rate >= SLOW_PRODUCTS or share < 0.2:
        return
    text = f"matrix products reach {rate:.0%} of the peak"
    if _again(profile) > 0.1:
        text += (
            f", {_again(profile):.0%} of their time spent on what is computed again: train.remat names with the "
            "results that fit in train.saved"
        )
    else:
        text += (
            ": parts of width, heads or feed-forward layer that are no multiples of 128, or too few tokens for each "
        )
        text += "device; `lm plan` names such sizes"
    yield share, text


def _again(profile: Profile) -> float:
    rows = [row for row in profile.summary.operations if row.kind == PRODUCTS]
    return sum(row.seconds for row in rows if row.again) / (sum(row.seconds for row in rows) or 1.0)


def _elementwise(profile: Profile) -> _Lines:
    summary = profile.summary
    share = summary.share(ELEMENTWISE) + summary.share(REDUCTIONS)
    if share < MANY_ELEMENTWISE:
        return
    again = sum(row.seconds for row in summary.operations if row.again) / summary.total
    largest = max(summary.parts, key=lambda row: row.seconds).name
    text = f"{share:.0%} of the operations' time is arithmetic on single elements, which memory bounds"
    if again > 0.1:
        text += f"; {again:.0%} is spent on computing again: keep more with train.remat and train.saved"
    elif _part_share(profile, "optimizer and checks") > 0.2:
        text += (
            f"; the update takes {_part_share(profile, 'optimizer and checks'):.0%}: it weighs less beside more tokens "
            "(train.batch_size), and mesh.fsdp splits it over devices"
        )
    else:
        text += f"; most in {largest}. Products are small beside it: a wider model, or more tokens per device"
    yield share, text


def _part_share(profile: Profile, name: str) -> float:
    return sum(row.seconds for row in profile.summary.parts if row.name == name) / profile.summary.total


def _copies(profile: Profile) -> _Lines:
    share = profile.summary.share(COPIES)
    if share < 0.1:
        return
    first = next(row for row in profile.summary.operations if row.kind == COPIES)
    place = first.source or first.op_name or first.name
    text = f"{share:.0%} of the operations' time moves data and changes layouts, most of it in {first.name} ({place})"
    if profile.config is not None and profile.config.train.unroll < profile.config.model.layers:
        text += "; slices in and out of the loop over layers go away with train.unroll"
    yield share, text


def _attention(profile: Profile) -> _Lines:
    """Attention without its kernel, on devices that have one."""
    summary = profile.summary
    share = _part_share(profile, "attention") if summary.total else 0.0
    if summary.platform == "tpu" and summary.share(ATTENTION) == 0 and share > 0.2:
        yield (
            share,
            f"attention takes {share:.0%} of the operations' time without its kernel, which needs heads of 64 or more "
            "and sequences in multiples of 128 (model.head_dim, train.sequence_length)",
        )


def _indexed(profile: Profile) -> _Lines:
    share = profile.summary.share(INDEXED)
    if share >= 0.1:
        first = next(row for row in profile.summary.operations if row.kind == INDEXED)
        yield (
            share,
            f"{share:.0%} of the operations' time gathers, scatters or sorts, most of it {first.name} "
            f"({first.source or first.op_name or 'unknown'}): tables are read row by row; a smaller vocabulary, or "
            "mesh.tensor to split it",
        )


def _host_memory(profile: Profile) -> _Lines:
    for one in profile.summary.exchanges:
        share = one.exposed / profile.summary.step_seconds
        if one.kind == HOST and share >= MUCH:
            yield (
                share,
                f"nothing is computed beside transfers to and from the host for {share:.0%} of the step: fewer names "
                "in train.offloaded, or train.optimizer_memory device",
            )


def _unexpected(profile: Profile) -> _Lines:
    expected, step = profile.expected_step_seconds, profile.summary.step_seconds
    if expected and profile.summary.platform != "cpu" and step > UNEXPECTED * expected:
        yield (
            0.0,
            f"a step takes {step / expected:.2f} times what was predicted; `lm plan` breaks its prediction down in the "
            "same kinds",
        )


_RULES: tuple[Callable[[Profile], _Lines], ...] = (
    _waits_for_host,
    _inside,
    _collectives,
    _products,
    _elementwise,
    _copies,
    _attention,
    _indexed,
    _host_memory,
    _unexpected,
)
