"""What `lm profile` counts, beside what TensorBoard's profile page shows for the same trace.

    pip install -e '.[profile]'
    python tests/benchmarks/profile_agreement.py                    # trains a small model here, and traces it
    python tests/benchmarks/profile_agreement.py X.xplane.pb …      # traces of devices, such as other people's

For a CPU the page has no statistics of operations, only the trace viewer: of each operation all events in it are added
up and compared. Then the same operations are written as a TPU and as a GPU would have them, for which the page's
statistics (hlo_stats) are compared too, as they are for the files given: per operation, and by the page's categories.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from lm import config as configs
from lm.experiment import Config
from lm.profile.programs import Programs
from lm.profile.trace import Trace, _stats, trace_of
from lm.profile.xplane import parse
from tests.profile.made import Made

OPTIONS = (
    "--data.paths", "python-stdlib", "--run.seed", "1", "--train.steps", "14", "--train.batch_size", "4",
    "--train.sequence_length", "256", "--model.layers", "3", "--model.width", "128", "--model.heads", "4",
    "--model.vocab_size", "258", "--data.tokenizer.kind", "bytes", "--sample.tokens", "0", "--eval.every", "0",
    "--profile.steps", "6:12",
)  # fmt: skip

Seconds = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="*", type=Path, metavar="X.xplane.pb")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.traces:
            for path in options.traces:
                compare(path.name, path.read_bytes(), Path(folder))
            return
        data = traced(Path(folder) / "run")
        compare_events(data, Path(folder))
        for name, made in (("as of a GPU", as_gpu(data)), ("as of a TPU", as_tpu(data))):
            compare(name, made.serialized(), Path(folder))


def traced(run: Path) -> bytes:
    from lm.train.loop import train

    config = configs.override(Config(), [*OPTIONS, "--run.dir", str(run)])
    configs.check(config)
    train(config, stream=None)
    (file,) = run.rglob("*.xplane.pb")
    return file.read_bytes()


def compare_events(data: bytes, folder: Path) -> None:
    """With the trace viewer, which draws each event."""
    events = json.loads(page(data, "trace_viewer", folder))["traceEvents"]
    theirs: Seconds = defaultdict(float)
    for event in events:
        if event.get("ph") == "X" and "hlo_op" in event.get("args", {}):
            theirs[event["name"]] += event["dur"] * 1e-6
    loops = {name for name in theirs if name.startswith(("while", "call", "conditional"))}
    report("trace viewer, on a CPU", per_operation(trace_of(parse("XSpace", data))), theirs, without=loops)


def compare(name: str, data: bytes, folder: Path) -> None:
    """With the page's statistics of operations."""
    rows = table(page(data, "hlo_stats", folder))
    theirs, categories = defaultdict[str, float](float), dict[str, str]()
    for row in rows:
        if row["hlo_op_name"] != "IDLE":
            theirs[row["hlo_op_name"]] += row["total_self_time"] * 1e-6
            categories[row["hlo_op_name"]] = row["category"]
    trace = trace_of(parse("XSpace", data))
    ours = per_operation(trace)
    report(f"{name}, {len(trace.devices)} x {trace.platform}", ours, theirs)
    by_category = defaultdict[str, list[float]](lambda: [0.0, 0.0])
    for operation, seconds in theirs.items():
        by_category[categories[operation]][0] += ours.get(operation, 0.0)
        by_category[categories[operation]][1] += seconds
    for category, (mine, seconds) in sorted(by_category.items(), key=lambda item: -item[1][1]):
        print(f"    {category:<32}{mine * 1e3:>12.3f}{seconds * 1e3:>12.3f}{difference(mine, seconds):>10}")
    print()


def per_operation(trace: Trace) -> Seconds:
    found: Seconds = defaultdict(float)
    for device in trace.devices:
        for span in device.spans:
            found[span.operation.name] += span.seconds
    return found


def report(name: str, ours: Seconds, theirs: Seconds, without: Collection[str] = ()) -> None:
    theirs = {operation: seconds for operation, seconds in theirs.items() if operation not in without}
    common = {operation: seconds for operation, seconds in ours.items() if operation in theirs}
    apart = [abs(ours[one] - theirs[one]) / theirs[one] for one in common if theirs[one]]
    total, shown = sum(common.values()), sum(theirs.values())
    print(f"{name}: {len(theirs)} operations")
    print(f"    {'':<32}{'lm, ms':>12}{'page, ms':>12}")
    print(f"    {'all':<32}{total * 1e3:>12.3f}{shown * 1e3:>12.3f}{difference(total, shown):>10}")
    print(f"    {'the operation furthest apart':<56}{max(apart, default=0.0):>10.2%}")
    only = {operation: seconds for operation, seconds in ours.items() if operation not in theirs}
    if only:
        print(f"    {'only lm (' + ', '.join(sorted(only)[:3]) + ')':<32}{sum(only.values()) * 1e3:>12.3f}")
    if missing := [operation for operation in theirs if operation not in ours]:
        print(f"    only the page: {', '.join(missing[:5])}")
    if without:
        print(f"    left out: {len(without)} loops, whose events on a CPU are a thread that waits for others")


def difference(ours: float, theirs: float) -> str:
    return f"{ours / theirs - 1:+.2%}" if theirs else ""


# The page


def page(data: bytes, tool: str, folder: Path) -> str:
    """What xprof, which draws the page, makes of a trace. It keeps results beside the file: a folder for each."""
    from xprof.convert import raw_to_tool_data

    file = Path(tempfile.mkdtemp(dir=folder)) / "host.xplane.pb"
    file.write_bytes(data)
    quiet, screen = os.open(os.devnull, os.O_WRONLY), os.dup(2)
    os.dup2(quiet, 2)
    try:
        found, _ = raw_to_tool_data.xspace_to_tool_data([str(file)], tool, {})
    finally:
        os.dup2(screen, 2)
    return found.decode() if isinstance(found, bytes) else found


def table(text: str) -> list[dict[str, Any]]:
    found = json.loads(text)
    found = found[0] if isinstance(found, list) else found
    names = [column["id"] for column in found["cols"]]
    return [dict(zip(names, [cell and cell["v"] for cell in row["c"]], strict=True)) for row in found["rows"]]


# The operations of a CPU, as other devices have them


def operations(data: bytes) -> Iterator[tuple[str, list[tuple[dict[str, Any], float, float]]]]:
    """By thread: the stats, begin and duration, in microseconds, of each operation."""
    (plane,) = [plane for plane in parse("XSpace", data).planes if plane.name == "/host:CPU"]
    for line in plane.lines:
        found = []
        for event in line.events:
            stats = _stats(plane, event.stats)
            if "hlo_op" in stats:
                begin = line.timestamp_ns * 1e-3 + event.offset_ps * 1e-6
                found.append((stats, begin, event.duration_ps * 1e-6))
        if found:
            yield line.name, found


def programs(data: bytes) -> tuple[Made, dict[str, int]]:
    """A trace with the same programs, and their numbers by name."""
    made, numbers = Made(), dict[str, int]()
    for number, module in Programs(parse("XSpace", data))._numbered.items():
        made.program(module._proto, number)
        numbers.setdefault(module.name, number)
    return made, numbers


def as_gpu(data: bytes) -> Made:
    """Each thread is a stream. Loops have no kernels."""
    made, numbers = programs(data)
    plane = made.plane("/device:GPU:0")
    plane.stat(plane.proto.stats, "device_vendor", "Nvidia")
    for i, (_, found) in enumerate(operations(data)):
        line = plane.line(f"Stream #{i + 1}(Compute)")
        for stats, begin, duration in sorted(found, key=lambda one: one[1]):
            if not stats["hlo_op"].startswith("while"):
                of = {"hlo_op": stats["hlo_op"], "hlo_module": stats["hlo_module"], "correlation_id": 1}
                line.add(stats["hlo_op"], begin, duration, program_id=numbers[stats["hlo_module"]], **of)
    return made


def as_tpu(data: bytes) -> Made:
    """All of a step after each other, and in a loop."""
    made, numbers = programs(data)
    plane = made.plane("/device:TPU:0")
    modules, line, at = plane.line("XLA Modules"), plane.line("XLA Ops"), 1000.0
    known, symbols = Programs(parse("XSpace", made.serialized())), dict[str, int]()  # the page tells them by number
    runs: dict[Any, list[tuple[dict[str, Any], float]]] = defaultdict(list)
    for _, found in operations(data):
        for stats, _, duration in found:
            if stats["hlo_module"] == "jit_train_step" and not stats["hlo_op"].startswith("while"):
                runs[stats["run_id"]].append((stats, duration))
    number = numbers["jit_train_step"]
    for run in runs.values():
        whole = sum(duration for _, duration in run) + 7.0
        modules.add(f"jit_train_step({number})", at, whole, run_id=1)
        loop = {"display": "while.1", "hlo_category": "while", "program_id": number, "symbol_id": 1}
        line.add("%while.1 = () while()", at, whole, common=loop)
        inside = at + 3.0
        for stats, duration in run:
            name = stats["hlo_op"]
            kind = known.find(name, program="jit_train_step").kind
            symbol = symbols.setdefault(name, len(symbols) + 2)
            common = {"display": name, "hlo_category": kind, "program_id": number, "symbol_id": symbol}
            line.add(f"%{name} = f32[] op()", inside, duration, common=common)
            inside += duration
        at += whole + 5.0
    return made


if __name__ == "__main__":
    main()
