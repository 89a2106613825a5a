"""What `lm plan` advises: changes that make a step fit, and warnings."""

import dataclasses

import pytest

from lm import config as configs
from lm.chips import GIB, TPUS
from lm.experiment import Config
from lm.model.config import ModelConfig
from lm.parallel.mesh import MeshConfig, abstract_mesh
from lm.plan.advice import Change, program_warnings, size_warnings, smallest_changes
from lm.plan.analytic import predict
from lm.plan.collectives import Collective
from lm.plan.estimate import Estimate, Times, Traffic
from lm.plan.machine import Machine
from lm.plan.program import Memory, Program
from lm.train.config import TrainConfig


def config(remat: str = "none", **train: object) -> Config:
    return Config(
        model=ModelConfig(layers=16, width=1024, heads=8, hidden=4096, vocab_size=2048),
        train=TrainConfig(batch_size=16, sequence_length=2048, remat=remat, **train),  # type: ignore[arg-type]
        mesh=MeshConfig(fsdp=-1),
    )


def on(count: int, capacity: float) -> tuple[Machine, dict[str, int]]:
    """So many chips with so much memory, and a fully sharded mesh over them."""
    chip = dataclasses.replace(TPUS["v5e"], hbm_bytes=int(capacity))
    return Machine(chip, (count,)), dict(abstract_mesh(MeshConfig(fsdp=-1), count).shape)


def test_the_smallest_change() -> None:
    def names(before: Config, share: float) -> list[str]:
        """For memory of this share of what the model says that is needed."""
        needed = predict(before, *on(4, 1)).memory.total
        found = smallest_changes(before, *on(4, share * needed), needed)
        return [change.text(1).partition(":")[0] for change in found]

    assert names(config(), 0.8)[0] == "--train.remat full"
    large = dataclasses.replace(config("full").train, batch_size=128)
    assert names(dataclasses.replace(config("full"), train=large), 0.7)[0] == "--train.accumulation 2"
    assert names(dataclasses.replace(config("full"), train=large), 0.45)[0].startswith("--train.accumulation 4")
    alone = dataclasses.replace(config("full"), train=dataclasses.replace(large, batch_size=4))
    assert names(alone, 0.9) == ["2 times as many chips, nothing else"]  # the update needs all of the state again
    # State and gradients alone are too much.
    (only,) = names(config("full"), 0.3)
    assert only.endswith("times as many chips, --train.accumulation 4")


def test_changes_are_as_large_as_the_model_says() -> None:
    """What the compiler found, less what the model saves."""
    machine, sizes = on(4, 6 * GIB)
    before = config()
    found = smallest_changes(before, machine, sizes, 8 * GIB)
    assert found
    for change in found:
        after = predict(configs.override(before, change.options), machine, sizes).memory.total
        saved = predict(before, machine, sizes).memory.total - after
        assert change.needed == max(after, 8 * GIB - saved) <= 6 * GIB


def test_changes_are_options_that_a_config_takes() -> None:
    """Also where lists of names are for another remat policy."""
    saving = dataclasses.replace(config("names").train, saved=("query", "feed_forward_up"))
    before = dataclasses.replace(config("names"), train=saving)
    changes = smallest_changes(before, *on(4, 5 * GIB), int(5.5 * GIB))
    assert changes
    for change in changes:
        configs.check(configs.override(before, change.options).train)
    after = configs.override(before, changes[0].options)
    assert (after.train.remat, after.train.saved) == ("full", ())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (Change(("--a", "1"), 1.5 * GIB), "--a 1: about 3.000 GiB per chip m"),
        (Change(("--a", "1"), GIB, fits=True), "--a 1: compiled: fits with 2.000 GiB per chip c"),
        (Change(("--a", "1"), GIB, fits=False), "--a 1: compiled: does not fit, needs 2.000 GiB per chip c"),
        (Change((), GIB, chips=4), "4 times as many chips, nothing else: about 2.000 GiB per chip m"),
        (Change(("--a", "1"), GIB, failed="no"), "--a 1: not possible here: no"),
    ],
)
def test_the_line_of_a_change(change: Change, text: str) -> None:
    assert change.text(2) == text


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


def test_a_warning_of_stored_scores() -> None:
    short = dataclasses.replace(config(), train=dataclasses.replace(config().train, sequence_length=2000))
    (warning,) = size_warnings(short, abstract_mesh(MeshConfig(fsdp=-1), 4))
    assert warning.startswith("attention stores its scores")
