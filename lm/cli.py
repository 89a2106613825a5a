"""`lm VERB …`: one thin function per verb. What is heavy to import is imported inside, so that help is instant."""

import argparse
import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lm.errors import ConfigError, DataError, LmError, Stopped, StorageError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from lm.data.batches import Batches
    from lm.data.progress import Progress
    from lm.experiment import Config
    from lm.train.forecast import Expected
    from lm.train.run_directory import RunDirectory

ABOUT = "Pretrains decoder-only transformer language models."
EPILOG = """\
CONFIG is a .py file with a `config`, a .json file, or a run directory.
Every value in it can be overridden: lm train CONFIG --train.steps 50 --run.dir=runs/a
exit codes: 0 done, 2 config or usage, 3 data, 4 diverged, 5 storage, 6 a hang, or another process ended or did not
            come, 7 a device computes wrongly, 8 machines failed a launch, 75 stopped and resumable
"""
_LAUNCH = {
    "up": "do all that is needed, and start the run or go on with it",
    "status": "what is there, and how it goes",
    "logs": "the end of the log",
    "stop": "end the run so that it saves and can go on",
    "delete": "remove what was launched; what the run has written stays",
    "write": "write what would be handed in, to a folder",
}
_BEGAN = time.monotonic()
_OVERRIDE = re.compile(r"--[A-Za-z_]\w*(\.\w+)+(=.*)?", re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command line and returns the exit code."""
    given, overrides = _take_overrides(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options, unknown = parser.parse_known_args(given)
    if (unknown or overrides) and not options.takes_overrides:
        parser.error(f"unrecognized arguments: {' '.join([*unknown, *overrides])}")
    options.overrides = [*overrides, *unknown]
    _keep_compiled_programs()
    try:
        options.run(options)
        sys.stdout.flush()
    except (LmError, Stopped) as error:
        if str(error):  # where all processes of a run stop, one says so
            print(f"lm: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        return 130
    return 0


def _keep_compiled_programs() -> None:
    """Tells jax, before it is imported, to keep what it compiles; what the environment says about it goes first."""
    folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "lm", "compiled")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", folder)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def _take_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates `--section.key value` and `--section.key=value` from the rest, wherever they stand."""
    rest, overrides, queue = [], [], list(arguments)
    while queue:
        word = queue.pop(0)
        if not _OVERRIDE.fullmatch(word):
            rest.append(word)
            continue
        overrides.append(word)
        if "=" not in word and queue and not _OVERRIDE.fullmatch(queue[0]):
            overrides.append(queue.pop(0))
    return rest, overrides


def _parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("lm", description=ABOUT, epilog=EPILOG, formatter_class=style)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def add(
        group: Any,
        name: str,
        run: Callable[[argparse.Namespace], None],
        about: str,
        *,
        overrides: bool = False,
    ) -> argparse.ArgumentParser:
        verb: argparse.ArgumentParser = group.add_parser(
            name,
            help=about,
            description=about,
            epilog=EPILOG if overrides else None,
            formatter_class=style,
            allow_abbrev=False,
        )
        verb.set_defaults(run=run, takes_overrides=overrides)
        return verb

    def add_group(name: str, about: str) -> Any:
        group = verbs.add_parser(name, help=about, description=about, formatter_class=style)
        return group.add_subparsers(title="verbs", required=True, metavar="VERB")

    verb = add(verbs, "train", _train, "train, or go on with a run that was stopped", overrides=True)
    verb.add_argument("config", metavar="CONFIG")
    verb.add_argument(
        "--allow",
        action="append",
        default=[],
        choices=("code", "versions"),
        help="go on with a run that other code, or other versions of libraries, have trained so far",
    )
    verb.add_argument("--supervise", action="store_true", help="start it again after faults, while it gets further")
    verb.add_argument(
        "--restarts", type=int, metavar="N", help="with --supervise: in a row without progress; default: 10"
    )

    verb = add(verbs, "eval", _eval, "held-out loss, perplexity and bits per byte of a run")
    verb.add_argument("trained", metavar="RUN")
    verb.add_argument("--step", type=int, help="checkpoint to take; default: the newest")
    verb.add_argument("--data", metavar="DIR", help="other built data, with the same tokenizer")
    verb.add_argument("--split", choices=("heldout", "train"), default="heldout")
    verb.add_argument("--json", action="store_true", help="print one JSON object")

    verb = add(verbs, "generate", _generate, "continue texts with a trained model")
    verb.add_argument("trained", metavar="RUN")
    verb.add_argument("--prompt", action="append", default=[], help="may be given several times")
    verb.add_argument("--prompt-file", metavar="FILE", help="a prompt from a file; - is standard input")
    verb.add_argument("--step", type=int, help="checkpoint to take; default: the newest")
    verb.add_argument("--max-tokens", type=int, default=200)
    verb.add_argument("--temperature", type=float, default=1.0, help="0 takes the most likely token")
    verb.add_argument("--top-k", type=int, default=0, help="only the K most likely tokens; 0: all")
    verb.add_argument("--top-p", type=float, default=1.0, help="the fewest tokens that have this probability")
    verb.add_argument("--min-p", type=float, default=0.0, help="only tokens with this share of the highest")
    verb.add_argument("--seed", type=int, default=0)
    verb.add_argument("--stop", action="append", default=[], help="end before this text; may be repeated")
    verb.add_argument("--scores", action="store_true", help="probability and entropy of each token")
    verb.add_argument("--threshold", type=float, default=0.1, help="with --scores: mark tokens less likely than this")

    verb = add(verbs, "plan", _plan, "what training would cost on a TPU slice that is not here", overrides=True)
    verb.add_argument("config", metavar="CONFIG")
    verb.add_argument("--topology", required=True, metavar="NAME", help="chip and sides of a slice, as v5p:4x4x4")
    verb.add_argument("--slices", type=int, default=1, metavar="N")
    verb.add_argument("--tokens", type=float, metavar="T", help="to train on; default: what the config says")
    verb.add_argument("--price", type=float, metavar="DOLLARS", help="of one chip for an hour")
    verb.add_argument("--search", action="store_true", help="find the best mesh, accumulation, remat and offload")
    verb.add_argument("--json", action="store_true", help="print one JSON object")

    launch = add_group("launch", "train on other machines: ssh, SLURM, GKE, Cloud TPU VMs; or here, in the background")
    for name, about in _LAUNCH.items():
        verb = add(launch, name, _launch, about, overrides=True)
        verb.add_argument("machines", metavar="MACHINES", help="a .py file with the target; see launch/README.md")
        if name in ("up", "write"):
            verb.add_argument("config", metavar="CONFIG")
        if name in ("up", "logs"):
            verb.add_argument("--follow", action="store_true", help="show the log until the run ends")
        if name == "write":
            verb.add_argument("--out", metavar="DIR", help="default: the name of the launch")
        if name in ("up", "delete"):
            verb.add_argument("--yes", action="store_true", help="do not ask")
        verb.add_argument("--dry-run", action="store_true", help="print the commands, and do nothing")
        verb.set_defaults(launch=name)

    configs = add_group("config", "look at configs")
    verb = add(configs, "show", _config_show, "all values, and what each parameter gets", overrides=True)
    verb.add_argument("config", metavar="CONFIG")
    verb.add_argument("--json", action="store_true", help="the values only, as config.json has them")
    verb.add_argument("--sharding", action="store_true", help="where each parameter lies, and bytes per device")
    verb.add_argument("--devices", type=int, metavar="N", help="with --sharding: on so many; default: those here")
    verb = add(configs, "diff", _config_diff, "the values that differ")
    verb.add_argument("a", metavar="A")
    verb.add_argument("b", metavar="B")

    data = add_group("data", "build and look at training data")
    verb = add(data, "build", _data_build, "tokenize the sources of a config", overrides=True)
    verb.add_argument("config", metavar="CONFIG")
    verb.add_argument("--part", metavar="I/N", help="on machine I of N, from 1/N to N/N: its share of all parts")
    verb = add(data, "verify", _data_verify, "read all that was built, and compare checksums", overrides=True)
    verb.add_argument("config", metavar="RUN_OR_CONFIG")
    verb = add(data, "tokenizer", _data_tokenizer, "train or load a config's tokenizer, and measure it", overrides=True)
    verb.add_argument("config", metavar="CONFIG")
    verb.add_argument("--out", metavar="FILE", help="write it there")
    verb = add(data, "show", _data_show, "the text of the batch of any step", overrides=True)
    verb.add_argument("config", metavar="RUN_OR_CONFIG")
    verb.add_argument("--step", type=int, required=True, metavar="K", help="counted from 0, as in metrics.jsonl")
    verb.add_argument("--rows", metavar="A:B", help="only these, counted from 0; default: the whole batch")
    verb = add(data, "stats", _data_stats, "sizes, lengths, copies, ids, and what a run reads of it", overrides=True)
    verb.add_argument("config", metavar="RUN_OR_CONFIG")
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    verb = add(data, "find", _data_find, "in which steps a text was seen", overrides=True)
    verb.add_argument("config", metavar="RUN_OR_CONFIG")
    verb.add_argument("text", metavar="TEXT", help="as it is in a document, exactly")
    verb.add_argument("--limit", type=int, default=10, metavar="N", help="of the places to show; default: 10")
    verb.add_argument("--json", action="store_true", help="print one JSON object")

    checkpoints = add_group("checkpoint", "look at checkpoints, copy one, remove some")
    verb = add(checkpoints, "list", _checkpoint_list, "each step: its status, size, age, and the digest of its state")
    verb.add_argument("trained", metavar="RUN")
    verb.add_argument("--json", action="store_true", help="print one JSON list")
    verb = add(checkpoints, "verify", _checkpoint_verify, "read all files, and compare checksums; 5 if one is bad")
    verb.add_argument("trained", metavar="RUN")
    verb.add_argument("--step", type=int, help="only that of this step; default: all")
    verb = add(checkpoints, "show", _checkpoint_show, "what one holds: arrays, versions, data")
    verb.add_argument("trained", metavar="RUN")
    verb.add_argument("--step", type=int, help="default: the newest")
    verb.add_argument("--json", action="store_true", help="print one JSON object")
    verb = add(checkpoints, "copy", _checkpoint_copy, "make a run of one checkpoint, to go on from there or to keep")
    verb.add_argument("trained", metavar="RUN")
    verb.add_argument("target", metavar="DEST", help="a directory that is new or empty")
    verb.add_argument("--step", type=int, required=True, metavar="K")
    verb = add(checkpoints, "prune", _checkpoint_prune, "remove older ones, of a run that is not going on")
    verb.add_argument("trained", metavar="RUN")
    verb.add_argument("--keep-last", type=int, required=True, metavar="N", help="the newest ones to keep")
    verb.add_argument("--keep-every", type=int, default=0, metavar="N", help="and those at multiples of N steps")
    verb.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    return parser


def _load(options: argparse.Namespace) -> "Config":
    from lm import config
    from lm.experiment import Config

    # A run may have been moved, and its relative path was seen from elsewhere: it is where it is now.
    here = [] if options.config.endswith((".py", ".json")) else [f"--run.dir={options.config}"]
    given = any(re.match(r"--run\.dir(=|$)", override) for override in options.overrides)
    return config.load(options.config, Config, options.overrides if given else [*options.overrides, *here])


def _train(options: argparse.Namespace) -> None:
    if options.restarts is not None and (options.restarts < 0 or not options.supervise):
        raise ConfigError(f"--restarts is for --supervise, and at least 0; got {options.restarts}")
    if options.supervise:
        from lm.train.supervise import supervise_training

        allow = [f"--allow={one}" for one in options.allow]
        sys.exit(supervise_training([options.config, *options.overrides], allow, restarts=options.restarts))
    from lm import config as configs
    from lm.parallel.processes import joined

    config = _load(options)
    with joined(configs.leaves(config)) as processes:
        from lm.train.loop import train

        train(config, stream=sys.stdout, processes=processes, expect=_expect, allow=options.allow, began=_BEGAN)


def _expect(config: "Config", mesh: "Mesh") -> "Expected | None":
    from lm.plan.expected import expect

    return expect(config, mesh)


def _eval(options: argparse.Namespace) -> None:
    from lm.parallel.processes import joined

    with joined(_given(options)) as processes:
        from lm.evaluate.perplexity import perplexity
        from lm.train.load import load_trained

        trained = load_trained(options.trained, step=options.step, processes=processes)
        result = perplexity(trained, data_dir=options.data, split=options.split)
    if not processes.primary:
        return
    values = {
        "step": trained.step,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.tokens,
        "bytes": result.bytes,
    }
    if options.json:
        print(json.dumps(values))
    else:
        for name, value in values.items():
            print(f"{name:<14} {value:.6f}" if isinstance(value, float) else f"{name:<14} {value}")


def _generate(options: argparse.Namespace) -> None:
    from lm.generate.sampling import Sampling
    from lm.parallel.processes import joined

    sampling = Sampling(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        seed=options.seed,
    )
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(joined(_given(options)))
        from lm.generate.command import run
        from lm.generate.generate import Generator
        from lm.train.load import load_trained

        trained = load_trained(options.trained, step=options.step, processes=processes)
        run(
            Generator(trained.config.model, trained.params, trained.tokenizer),
            _prompts(options),
            max_tokens=options.max_tokens,
            sampling=sampling,
            stop=options.stop,
            threshold=options.threshold if options.scores else None,
            out=None if processes.primary else stack.enter_context(open(os.devnull, "w")),
        )


def _given(options: argparse.Namespace) -> dict[str, object]:
    """What all processes of one command must have been given alike."""
    return {name: value for name, value in vars(options).items() if name != "run"}


def _prompts(options: argparse.Namespace) -> list[str]:
    if options.prompt_file is None:
        return options.prompt or [""]
    try:
        if options.prompt_file == "-":
            return [*options.prompt, sys.stdin.read()]
        with open(options.prompt_file, encoding="utf-8") as file:
            return [*options.prompt, file.read()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the prompt in {options.prompt_file}: {error}") from error


def _plan(options: argparse.Namespace) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # whatever is here, it is not what is planned for
    config = _load(options)
    from lm.plan.plan import plan
    from lm.plan.report import print_plan

    if options.search:
        _search(options, config)
        return
    found = plan(config, options.topology, slices=options.slices, tokens=options.tokens, price=options.price)
    print_plan(found, as_object=options.json)


def _search(options: argparse.Namespace, config: "Config") -> None:
    from lm.plan.search import search_on
    from lm.plan.search_report import print_search

    found = search_on(config, options.topology, slices=options.slices, tokens=options.tokens, price=options.price)
    print_search(found, config, as_object=options.json)
    if found.interrupted:  # the compiler goes on in its thread, and cannot be told to stop
        sys.stdout.flush()
        os._exit(130)


def _launch(options: argparse.Namespace) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed here
    from launch.command import launch

    def load(overrides: list[str]) -> "Config":
        return _load(argparse.Namespace(config=options.config, overrides=overrides))

    given = {name: getattr(options, name) for name in ("follow", "yes", "out") if hasattr(options, name)}
    launch(
        options.launch,
        options.machines,
        options.overrides,
        load=load if "config" in options else None,
        dry_run=options.dry_run,
        **given,
    )


def _config_show(options: argparse.Namespace) -> None:
    from lm import config as configs

    if options.devices is not None and (options.devices < 1 or not options.sharding):
        raise ConfigError(f"--devices is for --sharding, and at least 1; got {options.devices}")
    config = _load(options)
    if options.json:
        print(configs.to_json(config), end="")
        return
    from lm.train.describe import describe, describe_sharding

    if options.sharding:
        from lm.parallel.mesh import abstract_mesh

        print(describe_sharding(config, abstract_mesh(config.mesh, options.devices)))
        return
    print(configs.show(config))
    print()
    print(describe(config))


def _config_diff(options: argparse.Namespace) -> None:
    from lm import config as configs
    from lm.experiment import Config

    differences = configs.diff(configs.load(options.a, Config), configs.load(options.b, Config))
    print(configs.format_diff(differences) if differences else "no difference")


def _data_build(options: argparse.Namespace) -> None:
    from lm.data.corpus import build_corpus, build_corpus_share
    from lm.data.progress import Terminal
    from lm.data.shares import parse_share

    config = _load(options)
    progress = Terminal() if sys.stdout.isatty() else print
    if options.part is None:
        build_corpus(config.data, config.data_dir, progress)
    else:
        build_corpus_share(config.data, config.data_dir, progress, parse_share(options.part))


def _data_verify(options: argparse.Namespace) -> None:
    from lm.data.corpus import open_corpus
    from lm.data.scan import verify

    config = _load(options)
    count = verify(open_corpus(config.data_dir, config.data), print)
    print(f"all {count} shards in {config.data_dir} are as they were built")


def _data_tokenizer(options: argparse.Namespace) -> None:
    from etils import epath

    from lm.data.fertility import report
    from lm.files import write_atomically

    tokenizer = report(_load(options).data, print)
    if options.out is not None:
        write_atomically(epath.Path(options.out), tokenizer.serialize())
        print(f"written to {options.out}")


def _data_show(options: argparse.Namespace) -> None:
    from lm.data.batches import ALL_ROWS
    from lm.data.show import parse_rows, show

    config = _load(options)
    rows = ALL_ROWS if options.rows is None else parse_rows(options.rows, config.train.batch_size)
    for line in show(_batches(config, options.config), options.step, rows):
        print(line)


def _data_stats(options: argparse.Namespace) -> None:
    from lm.data.stats import lines, stats

    config = _load(options)
    found = stats(_batches(config, options.config), config.train.steps, config.data.workers, _on_stderr())
    print(json.dumps(found.to_dict()) if options.json else "\n".join(lines(found)))


def _data_find(options: argparse.Namespace) -> None:
    from lm.data.find import find, lines

    config = _load(options)
    steps, what = _steps_done(options.config, config)
    found = find(_batches(config, options.config), options.text, steps, options.limit, _on_stderr())
    if options.json:
        print(json.dumps(found.to_dict()))
        return
    for line in lines(found):
        print(line)
    print(f"steps: {what}")


def _batches(config: "Config", source: str) -> "Batches":
    """Of a config, or of a run: without the batches that it left out, as its newest checkpoint says."""
    from lm.data.batches import Batches
    from lm.data.corpus import open_corpus

    corpus, skips = open_corpus(config.data_dir, config.data), None
    if not source.endswith((".py", ".json")):
        from lm.checkpoint.checkpoints import list_checkpoints
        from lm.train import ledger
        from lm.train.run_directory import RunDirectory

        folder = RunDirectory(source).checkpoints
        if good := [info.step for info in list_checkpoints(folder) if info.problem is None]:
            skips = ledger.of_checkpoint(folder, max(good)).skips
    return Batches(corpus, config.train.batch_size, config.train.sequence_length, config.run.seed, skips)


def _steps_done(source: str, config: "Config") -> tuple[int, str]:
    """By a run, as its newest checkpoint says; of a config, or of a run that has none yet, all that are planned."""
    planned = config.train.steps
    if source.endswith((".py", ".json")):
        return planned, f"all {planned:,} that the config plans"
    from lm.checkpoint.checkpoints import list_checkpoints
    from lm.train.run_directory import RunDirectory

    done = [info.step for info in list_checkpoints(RunDirectory(source).checkpoints) if info.problem is None]
    if not done:
        return planned, f"all {planned:,} that are planned; the run has no checkpoint yet"
    return max(done), f"the first {max(done):,} of {planned:,}, which the newest checkpoint has done"


def _on_stderr() -> "Progress":
    from lm.data.progress import Terminal

    return Terminal(sys.stderr) if sys.stderr.isatty() else lambda line: print(line, file=sys.stderr)


def _checkpoint_list(options: argparse.Namespace) -> None:
    from lm.checkpoint.commands import list_lines, listed
    from lm.train.journal import read, run_of

    run, local_dir = _run_of(options), ""
    with contextlib.suppress(ValueError, LookupError, TypeError):  # without its config, a run has checkpoints still
        local_dir = json.loads(run.config.read_bytes())["checkpoint"]["local_dir"]
    rows = listed(run.checkpoints, local_dir=local_dir, run=run_of(read(run.journal)))
    print(json.dumps(rows) if options.json else "\n".join(list_lines(rows)))


def _checkpoint_verify(options: argparse.Namespace) -> None:
    from lm.checkpoint.commands import verified

    bad = 0
    for step, problem in verified(_run_of(options).checkpoints, options.step):
        print(f"{step:>10}  {'good' if problem is None else f'bad: {problem}'}", flush=True)
        bad += problem is not None
    if bad:
        raise StorageError(f"{bad} of the checkpoints in {options.trained} cannot be used: see above")


def _checkpoint_show(options: argparse.Namespace) -> None:
    from lm.checkpoint.commands import show_lines, shown

    facts = shown(_run_of(options).checkpoints, options.step)
    print(json.dumps(facts) if options.json else "\n".join(show_lines(facts)))


def _checkpoint_copy(options: argparse.Namespace) -> None:
    from etils import epath

    from lm.checkpoint.commands import copy

    run = _run_of(options)
    copy(run.checkpoints, options.step, run.path, epath.Path(options.target), print)


def _checkpoint_prune(options: argparse.Namespace) -> None:
    from lm.checkpoint.commands import prune

    with _run_of(options) as run:
        prune(
            run.checkpoints,
            keep_last=options.keep_last,
            keep_every=options.keep_every,
            dry_run=options.dry_run,
            say=print,
        )


def _run_of(options: argparse.Namespace) -> "RunDirectory":
    from lm.train.run_directory import RunDirectory, is_run

    if not is_run(options.trained):
        raise ConfigError(f"{options.trained} is not a run, it has no config.json")
    return RunDirectory(options.trained)
