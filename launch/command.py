"""`lm launch VERB MACHINES …`: machines and config are loaded and checked, then the target does the verb."""

import importlib
import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from launch.commands import Commands
from launch.config import SECTIONS, Machines
from launch.fits import check_fits, check_mesh
from launch.target import Run, Target
from launch.tree import pack
from lm import config as configs
from lm.experiment import Config


def launch(
    verb: str,
    machines: str,
    overrides: Sequence[str],
    *,
    load: Callable[[list[str]], Config] | None = None,
    follow: bool = False,
    out: str | None = None,
    allow: Sequence[str] = (),
    dry_run: bool = False,
    yes: bool = False,
    take_over: bool = False,
) -> None:
    """Does one verb.

    Args:
      machines: a file with a `config` that is a `Machines`.
      overrides: of the machines, and of the config, told apart by the section that they name.
      load: gives the config with its overrides; for verbs that start something.
      follow: with `logs`, and after `up`: shows the log until the run ends.
      out: the folder for `write`.
      take_over: a launch of somebody else is taken for one's own.
      allow: what may be other than when the run began, as for `lm train`.
    """
    ours, rest = split(overrides)
    found = configs.load(machines, Machines, ours if load else [*ours, *rest])
    commands = Commands(dry_run=dry_run, yes=yes, take_over=take_over)
    target = target_of(found, commands)
    more = ["--take-over"] if take_over else []
    target.again = " ".join(["lm launch {verb}", shlex.quote(machines), *map(shlex.quote, ours), *more])
    if load is None:
        {"status": target.status, "stop": target.stop, "delete": target.delete}.get(
            verb, lambda: target.logs(follow=follow)
        )()
        return
    config = load(rest)
    _, section = found.target
    if topology := getattr(section, "topology", ""):
        commands.say(check_fits(config, topology, section.slices))
    elif gpus := getattr(section, "gpus", 0):
        commands.say(check_mesh(config, gpus))
    archive, code = b"", ""
    if target.takes_code:
        with commands.stage("packing the code of this working tree", "nothing was changed anywhere"):
            archive, code = pack()
    run = Run(configs.to_json(config), found.python, found.setup, found.environment, archive, code, tuple(allow))
    if verb == "write":
        target.write(run, Path(out or found.name))
        return
    if follow:
        target.up_and_follow(run)
    else:
        target.up(run)


def target_of(machines: Machines, commands: Commands) -> Target:
    name, section = machines.target
    made: Target = importlib.import_module(f"launch.{name}").target(machines.name, section, commands)
    return made


def split(overrides: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those of the machines, and those of the config, each with its value."""
    ours: list[str] = []
    rest: list[str] = []
    into = rest
    for word in overrides:
        if match := re.match(r"--(\w+)[.=]", word):
            into = ours if match[1] in SECTIONS else rest
        into.append(word)
    return ours, rest
