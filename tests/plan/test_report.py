"""`lm plan`, from the command line: what it prints, and what it says about what cannot be."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

from lm.cli import main
from lm.experiment import Config
from lm.model.config import ModelConfig
from lm.parallel.mesh import MeshConfig, abstract_mesh
from lm.plan.chips import GIB
from lm.plan.collectives import Collective
from lm.plan.estimate import Estimate, Times, Traffic
from lm.plan.program import Memory, Program
from lm.plan.report import needed_memory, program_warnings, size_warnings, smallest_changes
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
    parts = sum(memory[f"{part}_bytes"] for part in ("parameters", "optimizer", "gradients", "rest"))
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
    assert found["bound_by"] == max(found["seconds"], key=found["seconds"].get)
    assert found["compile_seconds"] > 0
    assert isinstance(found["warnings"], list)


@needs_libtpu
def test_as_text_on_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert lm_plan(topology="v5e:1x1", model__vocab_size=600) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert len(lines) < 50
    assert max(map(len, lines)) < 160
    assert lines[0] == "v5e:1x1: 1 chips, 1 hosts; mesh one device"
    for word in ("parameters", "optimizer", "peak", "products", "predicted step", "MFU", "tokens/s", "bound by"):
        assert word in out
    assert "all-gather" not in out
    assert "model.vocab_size = 600 is padded" in out


@needs_libtpu
def test_too_little_memory_is_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"train__batch_size": 1024, "train__sequence_length": 4096, "train__remat": "none"}
    assert lm_plan("--json", **sizes) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    memory = found["memory"]
    assert memory["over_bytes"] == memory["total_bytes"] - memory["capacity_bytes"] > 0
    assert (found["step_seconds"], found["bound_by"]) == (None, "capacity")
    assert found["flops_per_step"] is None
    assert found["changes"][0].startswith("--train.remat full: ")

    assert lm_plan(**sizes) == 0
    out = capsys.readouterr().out
    assert "does not fit: needs " in out
    assert "--train.accumulation 2" in out


@needs_libtpu
@pytest.mark.parametrize(
    ("topology", "options", "sizes", "words"),
    [
        ("v5e:2x3", [], {}, ["v5e:2x3", "v5e:2x2"]),
        ("v5e:2x2", [], {"mesh__fsdp": 3}, ["mesh"]),
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


def config(remat: str = "none", **train: object) -> Config:
    return Config(
        model=ModelConfig(layers=16, width=1024, heads=8, hidden=4096, vocab_size=2048),
        train=TrainConfig(batch_size=16, sequence_length=2048, remat=remat, **train),  # type: ignore[arg-type]
        mesh=MeshConfig(fsdp=-1),
    )


def test_the_smallest_change() -> None:
    mesh = abstract_mesh(MeshConfig(fsdp=-1), 4)
    names = lambda *arguments: [text.partition(":")[0] for text in smallest_changes(*arguments)]  # noqa: E731
    # 268 million parameters: 1 GiB of state and gradients on each of four devices.
    assert names(config(), mesh, 6 * GIB, 4 * GIB)[:2] == ["--train.remat full", "--train.accumulation 2"]
    assert names(config("full"), mesh, 6 * GIB, 5 * GIB)[0] == "--train.accumulation 2"
    assert names(config("full"), mesh, 6 * GIB, int(2.5 * GIB))[0] == "--train.accumulation 4"
    alone = dataclasses.replace(config("full"), train=dataclasses.replace(config("full").train, accumulation=4))
    assert names(alone, mesh, int(1.5 * GIB), int(1.2 * GIB)) == ["--train.optimizer_memory host"]
    # State and gradients alone are too much: 1 GiB, and a quarter of what is above them in 6.
    assert names(config("full"), mesh, 6 * GIB, GIB // 4) == ["16 times as many chips, --train.accumulation 4"]


def traffic(kind: str, seconds: float) -> Traffic:
    return Traffic(kind, "links", 1, 1, 1.0, seconds, 0.0)


def estimate(*, synchronous: float = 0.0, rows: tuple[Traffic, ...] = ()) -> Estimate:
    times = Times(0.5, 0.5, 0, 0, {"links": synchronous, "data_center": 0.0}, {"links": 0.0, "data_center": 0.0})
    return Estimate(4, 4096, 1e12, 1e12, 0.0, 1.0, 1.0, rows, times, 1e14)


def test_warnings_of_a_program() -> None:
    mesh = abstract_mesh(MeshConfig(fsdp=-1), 4)
    memory = Memory(0, 0, 0, 0, 0, 0, 0)

    def warned(found: Estimate, *collectives: Collective, loops: tuple[str, ...] = ()) -> list[str]:
        return list(program_warnings(Program(collectives, {}, 0, (), memory, loops), found, config(), mesh))

    reduced = Collective("all-reduce", "a", "name/of/it", 2**21, 2**21, 4, ("fsdp",), False, 0, "", times=16)
    assert warned(estimate(synchronous=0.2)) == []
    assert warned(estimate(), dataclasses.replace(reduced, times=1)) == []
    assert warned(estimate(), dataclasses.replace(reduced, result_bytes=2**20)) == []
    (warning,) = warned(estimate(), reduced, reduced)
    assert "name/of/it over fsdp" in warning
    assert "1 others" in warning
    (warning,) = warned(estimate(), dataclasses.replace(reduced, kind="all-to-all"))
    assert "rearranged between devices" in warning
    (warning,) = warned(estimate(synchronous=0.5))
    assert warning.startswith("33% of the step waits")
    (warning,) = warned(estimate(rows=(traffic("all-gather", 1.5), traffic("reduce-scatter", 0.5))))
    assert warning.startswith("1,024 tokens per device and microbatch are too few")
    assert "about 2,048" in warning
    (warning,) = warned(estimate(), loops=("while/body",))
    assert "lower bounds: while/body" in warning


def test_warnings_of_sizes() -> None:
    mesh = abstract_mesh(MeshConfig(fsdp=-1), 4)
    assert size_warnings(config(), mesh) == ()
    odd = dataclasses.replace(config(), model=ModelConfig(layers=2, width=768, heads=12, hidden=2048, vocab_size=50304))
    (warning,) = size_warnings(odd, mesh)
    assert warning.startswith("model.head_dim = 64 is padded to multiples of 128, 100.0% more")
    tensor = MeshConfig(fsdp=1, tensor=4)
    split = dataclasses.replace(
        config(), mesh=tensor, model=ModelConfig(width=1024, heads=8, hidden=2304, vocab_size=4096)
    )
    (warning,) = size_warnings(split, abstract_mesh(tensor, 4))
    assert warning.startswith("model.hidden = 2304 in 4 parts of 576 is padded to multiples of 128, 11.1% more; 2560")
    copies = dataclasses.replace(config(), mesh=MeshConfig(data=4, fsdp=1))
    (warning,) = size_warnings(copies, abstract_mesh(copies.mesh, 4))
    # Four attention matrices, three of the feed-forward layer and the embeddings; norms are too small.
    assert warning.startswith("8 parameters, 1.008 GiB together, are on every device, of them ")
