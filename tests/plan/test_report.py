"""`lm plan`, from the command line: what it prints, and what it says about what cannot be."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from lm import config as configs
from lm.chips import CHIPS, GIB
from lm.cli import main
from lm.data.config import DataConfig, TokenizerConfig
from lm.experiment import Config
from lm.model.config import ModelConfig
from lm.parallel.mesh import MeshConfig, abstract_mesh
from lm.plan.advice import Change
from lm.plan.plan import Plan, compiled_changes, needed_memory, plan
from lm.plan.report import as_text
from lm.plan.topology import topology
from lm.train.config import TrainConfig

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'lm[plan]'"
)
SIZES = {
    "model.layers": 2,
    "model.width": 256,
    "model.heads": 2,
    "model.kv_heads": 2,
    "model.hidden": 512,
    "model.vocab_size": 512,
    "train.batch_size": 8,
    "train.sequence_length": 256,
    "train.steps": 10,
}


def lm_plan(*options: str, topology: str = "v5e:2x2", **sizes: object) -> int:
    values = SIZES | {name.replace("__", "."): value for name, value in sizes.items()}
    config = str(Path(__file__).parents[2] / "configs" / "llama3_8b.py")
    overrides = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    return main(["plan", config, "--topology", topology, *options, *overrides])


@needs_libtpu
def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert lm_plan("--json", "--tokens", "1e9", "--price", "2") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True
    assert found["chips"] == 4
    assert {axis: size for axis, size in found["mesh"].items() if size > 1} == {"fsdp": 4}
    memory = found["memory"]
    parts = sum(memory[f"{part}_bytes"] for part in ("parameters", "optimizer", "gradients", "saved", "rest"))
    assert memory["again_bytes"] == 0
    assert 0 < parts == memory["total_bytes"] < memory["capacity_bytes"] == int(15.75 * GIB)
    tokens = 8 * 256
    matrices = 2 * (4 * 256 * 256 + 3 * 256 * 512) + 256 * 512
    assert found["flops_per_step"] == tokens * (6 * matrices + 12 * 256 * 2 * 128)
    assert found["step_seconds"] == pytest.approx(sum(found["seconds"].values()))
    assert found["mfu"] == pytest.approx(found["flops_per_step"] / (found["step_seconds"] * 4 * 197e12))
    assert found["tokens_per_second"] == pytest.approx(tokens / found["step_seconds"])
    assert found["chip_hours"] == pytest.approx(1e9 / found["tokens_per_second"] / 3600 * 4)
    assert found["dollars"] == pytest.approx(2 * found["chip_hours"])
    assert {"all-gather", "reduce-scatter"} <= set(found["collectives"])
    gathered = found["collectives"]["all-gather"]
    assert gathered["bytes"] >= 2 * 2 * 3 * 256 * 512 * 2  # three matrices of two layers, forward and backward
    assert 0 < gathered["links_seconds"] == gathered["seconds"] < found["step_seconds"]
    # Over both links of a device in a square.
    assert gathered["bytes_per_link"] == pytest.approx(gathered["wire_bytes"] / 2)
    # Weights are read at least twice, and the state read and written once.
    assert found["hbm_bytes_per_chip"] == sum(found["hbm_bytes_by_kind"].values()) > 2 * memory["parameters_bytes"]
    assert found["bound_by"] == max(found["seconds"], key=found["seconds"].get)
    assert found["compile_seconds"] > 0
    assert isinstance(found["warnings"], list)


@needs_libtpu
def test_as_text_on_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert lm_plan(topology="v5e:1x1", model__vocab_size=600) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 120
    assert lines[0].startswith("v5e:1x1: 1 chips, 1 hosts; mesh one device; compiled in ")
    for word in (
        "parameters",
        "optimizer",
        "gradients",
        "saved activations",
        "temporary",
        "peak",
        "HBM traffic",
        "products",
        "predicted step",
        "MFU",
        "tokens/s",
        "bound by",
    ):
        assert word in out
    assert "all-gather" not in out
    assert "model.vocab_size = 600 is padded" in out


@needs_libtpu
def test_too_little_memory_is_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    """By how much, and what would help."""
    sizes = {"model__vocab_size": 229376, "model__width": 2048, "model__head_dim": 128, "train__batch_size": 2}
    assert lm_plan("--json", topology="v5e:1x1", **sizes) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    memory = found["memory"]
    assert memory["over_bytes"] == memory["total_bytes"] - memory["capacity_bytes"] > 0
    # Parameters, two moments and gradients, in float32, of two tables.
    assert memory["total_bytes"] > 4 * 4 * 2 * 229376 * 2048
    assert (found["step_seconds"], found["bound_by"]) == (None, "capacity")
    assert found["flops_per_step"] is None
    (more,) = found["changes"]  # where the state alone is too much
    assert "times as many chips" in more


@needs_libtpu
def test_the_state_that_verification_holds_must_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(Path(__file__).parents[2] / "configs" / "llama3_8b.py")
    options = SIZES | {"recovery.verify_every": 9}
    config = configs.load(path, Config, [part for name, value in options.items() for part in (f"--{name}", str(value))])
    there = topology("v5e:2x2")
    roomy = plan(config, there.name)
    assert roomy.memory is not None
    again = roomy.memory.again
    assert again == roomy.memory.parameters + roomy.memory.optimizer > 0
    assert f"{'state again, to verify':<24} {again / GIB:>10.3f}" in as_text(roomy)
    little = dataclasses.replace(there, chip=dataclasses.replace(there.chip, hbm_bytes=roomy.needed_bytes - 1))
    monkeypatch.setattr("lm.plan.plan.topology", lambda name, slices: little)
    found = plan(config, there.name)
    assert found.estimate is None
    assert found.needed_bytes == roomy.needed_bytes
    first, *_ = found.changes
    assert first == Change(("--recovery.verify_every", "0"), roomy.needed_bytes - again, fits=True)


@needs_libtpu
def test_changes_are_compiled_until_one_fits() -> None:
    path = str(Path(__file__).parents[2] / "configs" / "llama3_8b.py")
    small = configs.load(path, Config, [part for name, value in SIZES.items() for part in (f"--{name}", str(value))])
    options = [("--train.accumulation", "3"), ("--train.accumulation", "2"), ("--train.accumulation", "4")]
    wrong, fitting, last = compiled_changes(small, topology("v5e:1x1"), tuple(Change(one, GIB) for one in options))
    assert "3" in wrong.failed
    assert wrong.fits is None
    assert fitting.fits is True
    assert 0 < fitting.needed < GIB / 8
    assert last == Change(options[2], GIB)
    large = configs.override(small, ["--model.vocab_size", "229376", "--model.width", "2048"])
    (change,) = compiled_changes(large, topology("v5e:1x1"), (Change(("--train.optimizer_memory", "host"), GIB),))
    assert change.fits is False
    assert change.needed > 15.75 * GIB


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "options", "sizes", "words"),
    [
        ("v5e:2x3", [], {}, ["v5e:2x3", "v5e:2x2"]),
        # Written for another number of devices.
        ("v5e:2x2", [], {"mesh__fsdp": 3}, ["mesh: fsdp 3 does not fit 4 device(s)", "-1"]),
        ("v5e:1x1", [], {"mesh__data": 4, "mesh__fsdp": 2}, ["data 4 x fsdp 2 does not fit 1 device(s)", "-1"]),
        ("v5e:2x2", [], {"train__batch_size": 6}, ["train.batch_size", "6"]),
        ("v5e:2x2", ["--slices", "0"], {}, ["slices must be at least 1"]),
        ("v5e:2x2", ["--tokens", "-5"], {}, ["--tokens"]),
        ("v5e:2x2", ["--price", "nan"], {}, ["--price"]),
    ],
)
def test_what_cannot_be(
    topology: str,
    options: list[str],
    sizes: dict[str, object],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert lm_plan(*options, topology=topology, **sizes) == 2
    error = capsys.readouterr().err
    assert error.startswith("lm: ")
    for word in words:
        assert word in error


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (29.50G) "
            "exceeds available HBM (15.75G).",
            int(29.5 * GIB),
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 512.00M of 15.75G hbm. Exceeded hbm "
            "capacity by 1.84G.",
            GIB // 2,
        ),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem. Used 17.0M of 16.0M vmem.", None),
        ("INTERNAL: exceeds", None),
    ],
)
def test_what_the_compiler_says_it_needs(message: str, size: int | None) -> None:
    assert needed_memory(message) == size


@needs_libtpu
@pytest.mark.parametrize("source", ["run", "json"])
def test_a_run_of_a_cpu_can_be_planned(source: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its config, in the directory of the run or the file there, with float32 and heads narrower than a TPU's lanes."""
    small = ModelConfig(layers=2, width=64, heads=4, hidden=128, vocab_size=258, dtype="float32")
    made = Config(
        model=small,
        data=DataConfig(paths=("text",), tokenizer=TokenizerConfig(kind="bytes")),
        train=TrainConfig(batch_size=2, sequence_length=64, steps=10),
    )
    (tmp_path / "config.json").write_text(configs.to_json(made))
    path = tmp_path if source == "run" else tmp_path / "config.json"
    assert main(["plan", str(path), "--topology", "v5e:1x1"]) == 0
    out = capsys.readouterr().out
    assert "predicted step" in out
    assert "model.head_dim = 16 is padded to multiples of 128" in out


def test_too_many_warnings_do_not_fill_the_screen() -> None:
    where = SimpleNamespace(slices=1, name="v5e:1x1", chips=1, hosts=1, chip=CHIPS["v5e"])
    mesh = abstract_mesh(MeshConfig(fsdp=-1), 1)
    warnings = tuple(f"{i}: " + "word " * 60 for i in range(30))
    plan = Plan(where, mesh, 1.0, None, 1.0, None, None, None, 32 * GIB, warnings)  # type: ignore[arg-type]
    lines = as_text(plan).splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 120
    assert any(line.endswith("more: --json has all") for line in lines)
    assert as_text(dataclasses.replace(plan, warnings=warnings[:2])).count("word") == 120
