"""Verbs of configs, and of where they will run."""

import argparse
import os
import sys
from typing import TYPE_CHECKING, Any

from lm.cli.common import add, add_group, load_config
from lm.errors import ConfigError

if TYPE_CHECKING:
    from lm.experiment import Config


_LAUNCH = {
    "up": "do all that is needed, and start the run or go on with it",
    "status": "what is there, and how it goes",
    "logs": "the end of the log",
    "stop": "end the run so that it saves and can go on",
    "delete": "remove what was launched; what the run has written stays",
    "write": "write what would be handed in, to a folder",
}


def add_verbs(verbs: Any) -> None:
    verb = add(verbs, "plan", _plan, "what training would cost on a TPU slice that is not here", overrides=True)
    verb.add_argument("config", metavar="CONFIG")
    verb.add_argument("--topology", required=True, metavar="NAME", help="chip and sides of a slice, as v5p:4x4x4")
    verb.add_argument("--slices", type=int, default=1, metavar="N")
    verb.add_argument("--tokens", type=float, metavar="T", help="to train on; default: what the config says")
    verb.add_argument("--price", type=float, metavar="DOLLARS", help="of one chip for an hour")
    verb.add_argument("--search", action="store_true", help="find the best mesh, accumulation, remat and offload")
    verb.add_argument("--json", action="store_true", help="print one JSON object")

    launch = add_group(
        verbs, "launch", "train on other machines: ssh, SLURM, GKE, Cloud TPU VMs; or here, in the background"
    )
    for name, about in _LAUNCH.items():
        verb = add(launch, name, _launch, about, overrides=True)
        verb.add_argument("machines", metavar="MACHINES", help="a .py file with the target; see launch/README.md")
        if name in ("up", "write"):
            verb.add_argument("config", metavar="CONFIG")
            verb.add_argument(
                "--allow", action="append", default=[], choices=("code", "versions"), help="as for `lm train`"
            )
        if name in ("up", "logs"):
            verb.add_argument("--follow", action="store_true", help="show the log until the run ends")
        if name == "write":
            verb.add_argument("--out", metavar="DIR", help="default: the name of the launch")
        if name in ("up", "delete"):
            verb.add_argument("--yes", action="store_true", help="do not ask")
        if name != "write":
            verb.add_argument("--take-over", action="store_true", help="also what somebody else has launched")
        verb.add_argument("--dry-run", action="store_true", help="print the commands, and do nothing")
        verb.set_defaults(launch=name)

    configs = add_group(verbs, "config", "look at configs")
    verb = add(configs, "show", _config_show, "all values, and what each parameter gets", overrides=True)
    verb.add_argument("config", metavar="CONFIG")
    verb.add_argument("--json", action="store_true", help="the values only, as config.json has them")
    verb.add_argument("--sharding", action="store_true", help="where each parameter lies, and bytes per device")
    verb.add_argument("--devices", type=int, metavar="N", help="with --sharding: on so many; default: those here")
    verb = add(configs, "diff", _config_diff, "the values that differ")
    verb.add_argument("a", metavar="A")
    verb.add_argument("b", metavar="B")


def _plan(options: argparse.Namespace) -> None:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # whatever is here, it is not what is planned for
    config = load_config(options)
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
        return load_config(argparse.Namespace(config=options.config, overrides=overrides))

    given = {
        name: getattr(options, name)
        for name in ("follow", "yes", "out", "allow", "take_over")
        if hasattr(options, name)
    }
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
    config = load_config(options)
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
