"""Verbs that train a model and use it."""

import argparse
import contextlib
import json
import os
import sys
import time
from typing import Any

from lm.cli.common import add, load_config
from lm.errors import ConfigError, DataError

_BEGAN = time.monotonic()


def add_verbs(verbs: Any) -> None:
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


def _train(options: argparse.Namespace) -> None:
    if options.restarts is not None and (options.restarts < 0 or not options.supervise):
        raise ConfigError(f"--restarts is for --supervise, and at least 0; got {options.restarts}")
    if options.supervise:
        from lm.train.supervise import supervise_training

        allow = [f"--allow={one}" for one in options.allow]
        sys.exit(supervise_training([options.config, *options.overrides], allow, restarts=options.restarts))
    from lm import config as configs
    from lm.parallel.processes import joined

    config = load_config(options)
    with joined(configs.leaves(config)) as processes:
        from lm.train.loop import train

        train(config, stream=sys.stdout, processes=processes, expect=_expect, allow=options.allow, began=_BEGAN)


def _expect(*args: Any) -> Any:
    from lm.plan.expected import expect  # here even a failure to import it ends no run

    return expect(*args)


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
