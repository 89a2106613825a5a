"""What verbs share: how they are declared, and the configs and runs that they are given."""

import argparse
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lm.errors import ConfigError

if TYPE_CHECKING:
    from lm.experiment import Config
    from lm.train.run_directory import RunDirectory

EPILOG = """\
CONFIG is a .py file with a `config`, a .json file, or a run directory.
Every value in it can be overridden: lm train CONFIG --train.steps 50 --run.dir=runs/a
exit codes: 0 done, 2 config or usage, 3 data, 4 diverged, 5 storage, 6 a hang, or another process ended or did not
            come, 7 a device computes wrongly, 8 machines failed a launch, 75 stopped and resumable
"""
STYLE = argparse.RawDescriptionHelpFormatter


def add(
    group: Any, name: str, run: Callable[[argparse.Namespace], None], about: str, *, overrides: bool = False
) -> argparse.ArgumentParser:
    """A verb of the group, to give its arguments to."""
    verb: argparse.ArgumentParser = group.add_parser(
        name,
        help=about,
        description=about,
        epilog=EPILOG if overrides else None,
        formatter_class=STYLE,
        allow_abbrev=False,
    )
    verb.set_defaults(run=run, takes_overrides=overrides)
    return verb


def add_group(verbs: Any, name: str, about: str) -> Any:
    """A verb with verbs of its own."""
    group = verbs.add_parser(name, help=about, description=about, formatter_class=STYLE)
    return group.add_subparsers(title="verbs", required=True, metavar="VERB")


def load_config(options: argparse.Namespace) -> "Config":
    from lm import config
    from lm.experiment import Config

    # A run may have been moved, and its relative path was seen from elsewhere: it is where it is now.
    here = [] if options.config.endswith((".py", ".json")) else [f"--run.dir={options.config}"]
    given = any(re.match(r"--run\.dir(=|$)", override) for override in options.overrides)
    return config.load(options.config, Config, options.overrides if given else [*options.overrides, *here])


def run_directory(options: argparse.Namespace) -> "RunDirectory":
    from lm.train.run_directory import RunDirectory, is_run

    if not is_run(options.trained):
        raise ConfigError(f"{options.trained} is not a run, it has no config.json")
    return RunDirectory(options.trained)
