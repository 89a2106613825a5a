"""Which candidates there are, how they are ranked, and what happens to those that are compiled."""

import dataclasses
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from lm import config as configs
from lm.chips import GIB, TPUS
from lm.errors import ConfigError, LmError
from lm.experiment import Config
from lm.model.config import ModelConfig
from lm.parallel.layout import layout_of
from lm.parallel.mesh import MeshConfig, Rule, abstract_mesh
from lm.plan.analytic import predict
from lm.plan.kept import kept
from lm.plan.machine import Machine
from lm.plan.report import for_run
from lm.plan.search import FINALISTS, SAME, Candidate, meshes_for, rank, search, settings
from lm.plan.search_report import as_json, as_text
from lm.train.config import TrainConfig
from lm.train.state import abstract_state
from lm.train.step import check_batch

CONFIG = Config(
    model=ModelConfig(layers=8, width=2048, heads=16, kv_heads=4, hidden=8192, vocab_size=32_000, embeddings="untied"),
    train=TrainConfig(batch_size=64, sequence_length=4096, steps=10, remat="full"),
    mesh=MeshConfig(fsdp=-1),
)
MACHINE = Machine(TPUS["v5e"], (4, 4))
needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'lm[plan]'"
)


def test_every_candidate_could_be_trained() -> None:
    """The checks of training itself find nothing wrong with any of them."""
    found = list(meshes_for(CONFIG, MACHINE))
    assert len(found) == len({(tuple(sizes.items()), a, m.microbatches, m.repeats) for m, sizes, a in found}) > 100
    for mesh, sizes, accumulation in found:
        config = dataclasses.replace(
            CONFIG, mesh=mesh, train=dataclasses.replace(CONFIG.train, accumulation=accumulation)
        )
        devices = abstract_mesh(mesh, MACHINE.devices)
        assert dict(devices.shape) == sizes
        check_batch(config, devices, layout_of(mesh, devices))
    for mesh in {mesh for mesh, _, _ in found}:
        abstract_state(dataclasses.replace(CONFIG, mesh=mesh), abstract_mesh(mesh, MACHINE.devices))


def test_slices_are_crossed_by_data_or_stage() -> None:
    for _, sizes, _ in meshes_for(CONFIG, dataclasses.replace(MACHINE, slices=2)):
        assert sizes["data"] * sizes["stage"] % 2 == 0


def test_the_ranking() -> None:
    considered, found = rank(CONFIG, MACHINE)
    assert considered > len(found) > 50
    seconds = [one.seconds for one in found]
    assert all(late > early * (1 - SAME) for early, late in itertools.pairwise(seconds))
    assert all(one.prediction.memory.total < 15.75 * GIB for one in found)
    for one in found[:20]:  # what is computed stays as it is
        train, base = one.config.train, CONFIG.train
        assert (train.batch_size, train.sequence_length, train.steps) == (base.batch_size, base.sequence_length, 10)
        assert (one.config.model, one.config.optim, one.config.data) == (CONFIG.model, CONFIG.optim, CONFIG.data)


def test_settings_make_the_candidate() -> None:
    """What is printed, given to `lm train` or `lm plan`, is the config that was found."""
    for one in rank(CONFIG, MACHINE)[1][:30]:
        words = [word.strip("'") for line in settings(one.config, CONFIG) for word in line.split(" ", 1)]
        assert configs.override(CONFIG, words) == one.config


def compiled(seconds: float | None) -> dict[str, Any]:
    parts = {"compute": seconds or 0.0, "memory": 0.0, "links": 0.0, "data_center": 0.0, "host": 0.0}
    return {
        "fits": seconds is not None,
        "step_seconds": seconds,
        "seconds": parts,
        "mfu": 0.5,
        "memory": {"total_bytes": 10 * GIB},
        "compile_seconds": 1.0,
    }


def test_the_compiler_has_the_last_word() -> None:
    """The first does not fit, the third is the fastest: it wins, and one more is compiled than fit."""
    answers = iter([compiled(None), compiled(3.0), compiled(1.0), compiled(2.0)])
    found = search(CONFIG, MACHINE, lambda _: next(answers), lambda _: None)
    assert next(answers, None) is None
    assert [one.seconds for one in found.best[:FINALISTS]] == [1.0, 2.0, 3.0]
    assert found.winner is found.best[0]
    assert len(found.best) == 10
    assert len(found.rejected) == 1
    text = as_text(found, CONFIG)
    assert "needs more memory than there is" in text
    for line in settings(found.best[0].config, CONFIG):
        assert f"  {line}\n" in text
    assert max(map(len, text.splitlines())) <= 150
    values = as_json(found, CONFIG)
    assert values["step_seconds"] == 1.0
    assert values["search"]["winner"] == settings(found.best[0].config, CONFIG)
    assert json.loads(json.dumps(values)) == values


def test_interrupted_it_shows_what_it_has() -> None:
    answers = iter([compiled(2.0)])

    def compile_one(_: Config) -> dict[str, Any]:
        for answer in answers:
            return answer
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)  # as a compiler that cannot be interrupted
        raise AssertionError

    start = time.monotonic()
    found = search(CONFIG, MACHINE, compile_one, lambda _: None)
    assert time.monotonic() - start < 50
    assert found.interrupted
    assert found.winner is not None
    assert found.winner.seconds == 2.0
    assert "interrupted" in as_text(found, CONFIG)


def test_what_the_compiler_raises_is_raised() -> None:
    def compile_one(_: Config) -> dict[str, Any]:
        raise ConfigError("what was wrong")

    with pytest.raises(ConfigError, match="what was wrong"):
        search(CONFIG, MACHINE, compile_one, lambda _: None)


def test_one_that_cannot_be_compiled_does_not_end_the_search() -> None:
    answers: list[Any] = [compiled(3.0), LmError("the compiler failed"), compiled(1.0), compiled(2.0)]

    def compile_one(_: Config) -> dict[str, Any]:
        answer = answers.pop(0)
        if isinstance(answer, LmError):
            raise answer
        return answer

    said: list[str] = []
    found = search(CONFIG, MACHINE, compile_one, said.append)
    assert [one.seconds for one in found.best[:FINALISTS]] == [1.0, 2.0, 3.0]
    assert "  not possible: the compiler failed" in said
    assert (found.rejected, answers) == ((), [])


def test_none_that_was_compiled_fits() -> None:
    found = search(CONFIG, MACHINE, lambda _: compiled(None), lambda _: None)
    assert found.winner is None
    assert "none that was compiled fits" in as_text(found, CONFIG)
    assert as_json(found, CONFIG)["fits"] is False


def test_rules_under_which_devices_would_be_idle_are_left_out() -> None:
    """Where rows are not split over data, only one part of it is of use."""
    mesh = dataclasses.replace(CONFIG.mesh, rules=(Rule("batch", ("fsdp",)),))
    found = list(meshes_for(dataclasses.replace(CONFIG, mesh=mesh), MACHINE))
    assert found
    assert {sizes["data"] for _, sizes, _ in found} == {1}


def test_what_is_kept_is_for_any_price_and_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And another train step, or a file that is no JSON, is compiled again."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def ask(config: Config) -> dict[str, Any]:
        return kept(config, "v5e:2x2", 1, lambda: calls.append(config) or {"number": len(calls)})

    elsewhere = dataclasses.replace(CONFIG, run=dataclasses.replace(CONFIG.run, dir="elsewhere"))
    other = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, accumulation=2))
    assert [ask(one)["number"] for one in (CONFIG, elsewhere, other)] == [1, 1, 2]
    for path in (tmp_path / "lm" / "plans").iterdir():
        path.write_text("{")
    assert ask(CONFIG) == ask(CONFIG) == {"number": 3}


def test_what_is_kept_is_priced_anew() -> None:
    before = {"tokens_per_second": 10.0, "chips": 4, "tokens": 1.0, "days": 7.0}
    after = for_run(before, 864_000.0, 2.0)
    assert after == before | {"tokens": 864_000.0, "days": 1.0, "chip_hours": 96.0, "dollars": 192.0}
    assert for_run({"tokens_per_second": None}, 5.0, None) == {"tokens_per_second": None, "tokens": 5.0}


def test_an_axis_that_does_not_divide_the_devices() -> None:
    mesh = dataclasses.replace(CONFIG.mesh, expert=3)
    with pytest.raises(ConfigError, match=r"mesh\.expert = 3 does not divide 16 devices"):
        search(dataclasses.replace(CONFIG, mesh=mesh), MACHINE, lambda _: compiled(1.0), lambda _: None)


def test_that_it_hardly_fits_is_no_advice_to_take_as_many_chips() -> None:
    """The least that any candidate needs is more than a search fills, but less than there is."""
    least = min(
        predict(one, MACHINE, sizes).memory.total
        for mesh, sizes, accumulation in meshes_for(CONFIG, MACHINE)
        for one in [
            dataclasses.replace(
                CONFIG,
                mesh=mesh,
                train=dataclasses.replace(CONFIG.train, accumulation=accumulation, optimizer_memory="host"),
            )
        ]
    )
    tight = dataclasses.replace(MACHINE, chip=dataclasses.replace(MACHINE.chip, hbm_bytes=int(least * 1.05)))
    with pytest.raises(ConfigError, match="About 2 times as many chips"):
        search(CONFIG, tight, lambda _: compiled(1.0), lambda _: None)


def test_nothing_fits() -> None:
    large = dataclasses.replace(CONFIG.model, layers=80, width=8192, hidden=28_672, heads=64, head_dim=128)
    with pytest.raises(ConfigError, match=r"none of [\d,]+ candidates fits: .* times as many chips"):
        search(dataclasses.replace(CONFIG, model=large), MACHINE, lambda _: compiled(1.0), lambda _: None)


def test_nothing_divides() -> None:
    odd = dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, batch_size=7, sequence_length=4095))
    with pytest.raises(ConfigError, match=r"make train\.batch_size a multiple of 16"):
        search(odd, MACHINE, lambda _: compiled(1.0), lambda _: None)


TINY = (
    *("--model.layers", "2", "--model.width", "256", "--model.heads", "2", "--model.kv_heads", "2"),
    *("--model.hidden", "512", "--model.vocab_size", "512", "--train.batch_size", "8"),
    *("--train.sequence_length", "256", "--train.steps", "10"),
)
ROOT = Path(__file__).parents[2]


def lm_search(cache: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "lm", "plan", str(ROOT / "configs" / "llama3_8b.py"), "--topology", "v5e:2x2"]
    return subprocess.Popen(
        [*command, "--search", *options, *TINY],
        env=os.environ | {"XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@needs_libtpu
def test_from_the_command_line(tmp_path: Path) -> None:
    """Interrupted after the first compiled candidate, then again: what was compiled is not compiled twice."""
    first = lm_search(tmp_path)
    assert first.stderr is not None
    for line in first.stderr:
        if line.startswith("compiling 2"):
            first.send_signal(signal.SIGINT)
            break
    text, _ = first.communicate(timeout=120)
    assert first.returncode == 130
    assert "interrupted" in text
    assert "best, as config lines:" in text
    files = sorted((tmp_path / "lm" / "plans").iterdir())
    assert len(files) == 1
    before = files[0].stat().st_mtime_ns

    second = lm_search(tmp_path, "--json")
    out, _ = second.communicate(timeout=300)
    assert second.returncode == 0
    found = json.loads(out)
    assert found["fits"]
    assert found["chips"] == 4
    assert len(found["search"]["best"]) == 10
    assert sum(one["step_seconds"] is not None for one in found["search"]["best"]) == FINALISTS
    assert files[0].stat().st_mtime_ns == before
    assert len(list((tmp_path / "lm" / "plans").iterdir())) >= FINALISTS


def test_a_candidate_is_what_it_is_predicted_for() -> None:
    one: Candidate = rank(CONFIG, MACHINE)[1][0]
    assert dict(one.sizes) == one.config.mesh.sizes
