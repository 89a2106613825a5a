"""Verbs of training data."""

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from lm.cli.common import add, add_group, load_config

if TYPE_CHECKING:
    from lm.data.batches import Batches
    from lm.data.progress import Progress
    from lm.experiment import Config


def add_verbs(verbs: Any) -> None:
    data = add_group(verbs, "data", "build and look at training data")
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


def _data_build(options: argparse.Namespace) -> None:
    from lm.data.corpus import build_corpus, build_corpus_share
    from lm.data.progress import Terminal
    from lm.data.shares import parse_share

    config = load_config(options)
    progress = Terminal() if sys.stdout.isatty() else print
    if options.part is None:
        build_corpus(config.data, config.data_dir, progress)
    else:
        build_corpus_share(config.data, config.data_dir, progress, parse_share(options.part))


def _data_verify(options: argparse.Namespace) -> None:
    from lm.data.corpus import open_corpus
    from lm.data.scan import verify

    config = load_config(options)
    count = verify(open_corpus(config.data_dir, config.data), print)
    print(f"all {count} shards in {config.data_dir} are as they were built")


def _data_tokenizer(options: argparse.Namespace) -> None:
    from etils import epath

    from lm.data.fertility import report
    from lm.files import write_atomically

    tokenizer = report(load_config(options).data, print)
    if options.out is not None:
        write_atomically(epath.Path(options.out), tokenizer.serialize())
        print(f"written to {options.out}")


def _data_show(options: argparse.Namespace) -> None:
    from lm.data.batches import ALL_ROWS
    from lm.data.show import parse_rows, show

    config = load_config(options)
    rows = ALL_ROWS if options.rows is None else parse_rows(options.rows, config.train.batch_size)
    for line in show(_batches(config, options.config), options.step, rows):
        print(line)


def _data_stats(options: argparse.Namespace) -> None:
    from lm.data.stats import lines, stats

    config = load_config(options)
    found = stats(_batches(config, options.config), config.train.steps, config.data.workers, _on_stderr())
    print(json.dumps(found.to_dict()) if options.json else "\n".join(lines(found)))


def _data_find(options: argparse.Namespace) -> None:
    from lm.data.find import find, lines

    config = load_config(options)
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
