"""`lm VERB …`: one thin function per verb. What is heavy to import is imported inside, so that help is instant."""

import argparse
import os
import re
import sys
from collections.abc import Sequence

from lm.cli import checkpoints, data, planning, profiles, reports, tracking, training
from lm.cli.common import EPILOG, STYLE
from lm.errors import LmError, Stopped

ABOUT = "Pretrains decoder-only transformer language models."
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
    parser = argparse.ArgumentParser("lm", description=ABOUT, epilog=EPILOG, formatter_class=STYLE)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")
    for part in (training, reports, profiles, tracking, planning, data, checkpoints):
        part.add_verbs(verbs)
    return parser
