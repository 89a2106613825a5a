"""Steps computed twice, on simulated devices of which one is made to be wrong."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from lm.errors import CorruptionError
from lm.parallel.mesh import MeshConfig, make_mesh
from lm.parallel.processes import ALONE
from lm.train.corruption import Verification, _odd

Corrupt = Callable[[Any], Any]

SPECS = {
    "norm": PartitionSpec(),
    "count": PartitionSpec(),
    "kernel": PartitionSpec(None, "fsdp"),
    "rows": PartitionSpec(("data", "fsdp")),
}


class Run:
    """A small step on some devices. `wrong` may change what it gives, by how often it was computed before."""

    def __init__(self, mesh: MeshConfig, memory: str = "device"):
        self.mesh = make_mesh(mesh, jax.devices()[: math.prod(mesh.sizes.values())])
        drawn = {
            "norm": jnp.linspace(0, 1, 6),
            "count": jnp.int32(3),
            "kernel": jnp.linspace(-1, 1, 32).reshape(4, 8),
            "rows": jnp.linspace(0, 5, 8, dtype=jnp.bfloat16),
        }
        shardings = {name: jax.NamedSharding(self.mesh, spec) for name, spec in SPECS.items()}
        shardings["kernel"] = shardings["kernel"].with_memory_kind(memory)

        def step(state: Any, batch: jax.Array) -> tuple[Any, Any]:
            kernel = jax.device_put(state["kernel"], jax.memory.Space.Device)
            new = {"norm": state["norm"] * batch, "count": state["count"] + 1, "rows": state["rows"] * 2}
            kept = jax.device_put(kernel * 2, shardings["kernel"])
            return new | {"kernel": kept}, {"loss": kernel.sum() * batch}

        self.batch = jax.device_put(jnp.float32(1.5), shardings["norm"])
        self.draw = lambda: jax.device_put(jax.tree.map(np.array, drawn), shardings)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.draw())
        lowered = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None)).lower(abstract, self.batch)
        self.train_step = lowered.compile()
        self.wrong: dict[int, Corrupt] = {}
        self.computed = 0
        self.verification = Verification(self.step, abstract, lowered.out_info[1], self.mesh, ALONE)

    def step(self, state: Any, batch: Any) -> tuple[Any, Any]:
        state, metrics = self.train_step(state, batch)
        corrupt = self.wrong.get(self.computed, lambda state: state)
        self.computed += 1
        return corrupt(state), metrics

    def message(self, state: Any = None) -> str:
        """Of a step that is found wrong."""
        self.verification.step(9, state or self.draw(), self.batch)
        with pytest.raises(CorruptionError) as error:
            self.verification.check(9)
        assert error.value.exit_code == 7
        return str(error.value)


def flip(path: str, device: int) -> Corrupt:
    """One bit of one array, on one device of those that hold it."""

    def on_one(x: jax.Array) -> jax.Array:
        parts = [np.array(shard.data) for shard in x.addressable_shards]
        parts[device].view(np.uint32).reshape(-1)[-1] ^= 1
        where = [shard.data.sharding for shard in x.addressable_shards]
        placed = [jax.device_put(part, there) for part, there in zip(parts, where, strict=True)]
        return jax.make_array_from_single_device_arrays(x.shape, x.sharding, placed)

    return lambda state: state | {path: on_one(state[path])}


@pytest.fixture
def alone() -> Run:
    return Run(MeshConfig(fsdp=1))


@pytest.fixture
def four() -> Run:
    """Of which two by two hold the same columns, and all four the same norm."""
    return Run(MeshConfig(data=2, fsdp=2))


def test_the_steps_are_those_that_are_not_verified(alone: Run, four: Run) -> None:
    for run in (alone, four):
        state, metrics = run.train_step(run.draw(), run.batch)
        expected = run.train_step(state, run.batch)
        state = run.draw()
        for k in range(2):
            state, metrics = run.verification.step(k, state, run.batch)
            run.verification.check(k)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, (state, metrics), expected))
        assert run.computed == 4


@pytest.mark.parametrize("devices", [1, 2])
def test_state_in_the_memory_of_the_host(devices: int) -> None:
    run = Run(MeshConfig(data=devices, fsdp=2), "pinned_host")
    run.verification.step(0, run.draw(), run.batch)
    run.verification.check(0)
    run.wrong = {3: flip("kernel", 0)}
    assert "; in kernel\n" in run.message()


def test_another_result_the_second_time(alone: Run) -> None:
    alone.verification.step(8, alone.draw(), alone.batch)
    alone.verification.check(8)
    for which in (2, 3):  # it does not matter which of them is wrong
        alone.computed, alone.wrong = 2, {which: flip("norm", 0)}
        message = alone.message()
        assert "gave something else on cpu:0 of this process; in norm\n" in message
        assert "found right is step 8: " in message
        assert "copies" not in message


def test_the_device_is_named(four: Run) -> None:
    four.wrong = {0: flip("norm", 2)}
    message = four.message()
    assert "gave something else on cpu:2 of this process; in norm\n" in message
    assert "found right is none since this start: " in message
    assert "copies" not in message  # what was wrong is gone


def test_a_wrong_value_that_all_have_taken_in(four: Run) -> None:
    four.wrong = {1: lambda state: jax.tree.map(lambda x: x + 1, state)}
    assert "gave something else on all 4 devices: one is wrong, " in four.message()


def test_a_copy_that_differs(four: Run) -> None:
    message = four.message(flip("norm", 3)(four.draw()))
    assert "computed twice" not in message
    assert "copies that must be alike differ on cpu:3 of this process; of norm\n" in message


def test_of_two_copies_neither_is_right(four: Run) -> None:
    state = four.draw()
    holders = [shard.index for shard in state["kernel"].addressable_shards]
    twin = next(i for i in (0, 2, 3) if holders[i] == holders[1])
    message = four.message(flip("kernel", 1)(state))
    first, second = sorted((1, twin))
    expected = f"copies that must be alike differ on cpu:{first} of this process, cpu:{second} of this process; of "
    assert f"{expected}kernel" in message


def test_nothing_is_waited_for_before_its_step(four: Run) -> None:
    four.wrong = {1: flip("norm", 0)}
    four.verification.step(5, four.draw(), four.batch)
    four.verification.check(4)
    with pytest.raises(CorruptionError):
        four.verification.check(5)


def test_the_majority_is_right() -> None:
    assert _odd({0: "a", 1: "a"}) == ()
    assert _odd({0: "a", 3: "b", 5: "a"}) == (3,)
    assert _odd({0: "a", 1: "b"}) == (0, 1)
    assert _odd({0: "a", 1: "a", 2: "b", 3: "b"}) == (0, 1, 2, 3)
    assert _odd({0: "a", 1: "b", 2: "c"}) == (0, 1, 2)
