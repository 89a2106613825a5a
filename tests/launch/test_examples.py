"""The machines files that users start from."""

from pathlib import Path

import pytest

from launch.command import target_of
from launch.commands import Commands
from launch.config import TARGETS, Machines
from lm import config as configs

from .conftest import ROOT

EXAMPLES = sorted((ROOT / "launch" / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_right(path: Path) -> None:
    machines = configs.load(str(path), Machines)
    assert machines.target[0] == path.stem
    assert f"\nlm launch up launch/examples/{path.name} configs/" in path.read_text()
    assert target_of(machines, Commands(dry_run=True)).name == machines.name


def test_every_target_has_an_example_and_a_page() -> None:
    assert {path.stem for path in EXAMPLES} == set(TARGETS)
    readme = (ROOT / "launch" / "README.md").read_text()
    assert all(f"\n## {name}\n" in readme for name in TARGETS)


def test_what_the_config_of_a_run_calls_its_sections_is_no_target() -> None:
    from launch.config import SECTIONS
    from lm.experiment import Config

    assert not SECTIONS & set(configs.to_dict(Config())), "or nobody knows which an override is for"
