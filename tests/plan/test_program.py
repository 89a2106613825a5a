"""The facts read from programs whose cost is known, compiled for TPU slices that are not here."""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lm.plan.compile import uncached
from lm.plan.program import Program, read_program
from lm.plan.topology import topology

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'lm[plan]'"
)
N = 1024
ARRAY = 2 * N * N
"""Bytes of a bfloat16 [N, N]."""


def mesh_over(name: str, slices: int = 1) -> Mesh:
    devices = np.array(topology(name, slices=slices).devices).reshape(2, 4)
    return Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


@pytest.fixture(scope="module", params=["v5e:2x4", "v5p:2x2x2", "tpu7x:2x2x1"])
def mesh(request: pytest.FixtureRequest) -> Mesh:
    return mesh_over(request.param)


def facts(mesh: Mesh, function: Callable[..., Any], *arguments: tuple[P, tuple[int, ...]], out: Any = None) -> Program:
    """Of a function that sees one device's parts of bfloat16 arrays; `out` is P() unless given."""
    specs = tuple(spec for spec, _ in arguments)
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=P() if out is None else out, check_vma=False)
    shapes = [jax.ShapeDtypeStruct(size, jnp.bfloat16, sharding=NamedSharding(mesh, spec)) for spec, size in arguments]
    with uncached():
        return read_program(jax.jit(mapped).lower(*shapes).compile(), mesh)


def summary(program: Program) -> list[tuple[Any, ...]]:
    return [(c.kind, c.axes, c.group_size, c.operand_bytes, c.result_bytes, c.times) for c in program.collectives]


def test_a_product(mesh: Mesh) -> None:
    program = facts(mesh, jnp.matmul, (P(), (N, 2 * N)), (P(), (2 * N, N)))
    assert program.product_flops == 2 * N * 2 * N * N
    assert program.collectives == ()
    assert program.cycles["products"] == program.total_cycles > 0
    assert (program.memory.arguments, program.memory.outputs) == (4 * ARRAY, ARRAY)


def test_batched_products(mesh: Mesh) -> None:
    def products(q: jax.Array, k: jax.Array) -> jax.Array:
        scores = jax.nn.relu(jnp.einsum("bshd,bthd->bhst", q, k))
        return jnp.einsum("bhst,bthd->bshd", scores, k)

    shape = (3, 256, 4, 128)
    program = facts(mesh, products, (P(), shape), (P(), shape))
    assert program.product_flops == 2 * (2 * 3 * 4 * 256 * 256 * 128)


def test_a_scan_of_products_counts_every_turn(mesh: Mesh) -> None:
    def scanned(x: jax.Array, ws: jax.Array) -> jax.Array:
        return lax.scan(lambda x, w: (x @ w, None), x, ws)[0]

    program = facts(mesh, scanned, (P(), (N, N)), (P(), (7, N, N)))
    assert program.product_flops == 7 * 2 * N**3
    assert program.cycles["products"] % 7 == 0
    assert not program.unknown_loops


CHIPS = ["v4:2x2x1", "v5e:1x1", "v5p:2x2x1", "v6e:1x1", "tpu7x:2x2x1"]


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize(
    ("function", "shapes", "donated", "size", "flops"),
    [
        (jnp.add, [(N, N), (N, N)], (), 3 * ARRAY, 0),
        (lambda x: x.T, [(N, 2 * N)], (), 2 * 2 * ARRAY, 0),
        (jnp.matmul, [(N, 2 * N), (2 * N, N)], (), 5 * ARRAY, 4 * N**3),
        # A layer at a time: each of seven matrices is read once.
        (
            lambda x, ws: lax.scan(lambda x, w: (x @ w, None), x, ws)[0],
            [(8, N), (7, N, N)],
            (),
            7 * ARRAY,
            7 * 16 * N**2,
        ),
        # Seven of eight arrays are read, and written over those of the other.
        (
            lambda a, b: lax.fori_loop(0, 7, lambda i, a: lax.dynamic_update_index_in_dim(a, jnp.sin(b[i]), i, 0), a),
            [(8, 4 * N, N), (8, 4 * N, N)],
            (0,),
            7 * 2 * 4 * ARRAY,
            0,
        ),
        # A few rows of a table too large for any core are read; the product reads these and a matrix.
        (lambda t, w: t[jnp.arange(N) ^ 1] @ w, [(128 * N, N), (N, N)], (), 3 * ARRAY, 2 * N**3),
    ],
    ids=["add", "transpose", "product", "scan", "update in place", "gather"],
)
def test_bytes_in_the_memory(
    chip: str,
    function: Callable[..., jax.Array],
    shapes: list[tuple[int, ...]],
    donated: tuple[int, ...],
    size: int,
    flops: int,
) -> None:
    """All that a program reads and writes; what it keeps near the core moves no bytes, what it puts back, twice."""
    mesh = Mesh(np.array(topology(chip).devices[:1]), ("one",), axis_types=(AxisType.Auto,))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P())) for shape in shapes]
    with uncached():
        program = read_program(jax.jit(function, donate_argnums=donated).lower(*arguments).compile(), mesh)
    assert program.product_flops == flops
    assert program.host_bytes == 0
    small = 2**19  # indices, counters, and what a loop with few rows carries
    put_back = 2 * ARRAY if flops == 2 * N**3 else 0
    moved = sum(program.hbm_bytes.values())
    assert any(wanted <= moved < wanted + small for wanted in {size, size + put_back})


@pytest.mark.parametrize("chip", ["v5e:1x1", "v5p:2x2x1"])
def test_bytes_to_and_from_the_host(chip: str) -> None:
    """Layers are read from the host one at a time, and what each gives goes there."""
    mesh = Mesh(np.array(topology(chip).devices[:1]), ("one",), axis_types=(AxisType.Auto,))
    here, there = NamedSharding(mesh, P()), NamedSharding(mesh, P(), memory_kind="pinned_host")

    def step(x: jax.Array, w: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = jnp.tanh(x @ jax.device_put(w, jax.memory.Space.Device))
        return x, jax.device_put(x, jax.memory.Space.Host)

    arguments = (
        jax.ShapeDtypeStruct((2 * N, N), jnp.bfloat16, sharding=here),
        jax.ShapeDtypeStruct((5, N, N), jnp.bfloat16, sharding=there),
    )
    with uncached():
        scanned = jax.jit(lambda x, ws: lax.scan(step, x, ws), out_shardings=(here, there))
        program = read_program(scanned.lower(*arguments).compile(), mesh)
    assert program.host_bytes == 5 * (ARRAY + 2 * ARRAY)
    assert program.memory.host == 5 * (ARRAY + 2 * ARRAY)


COLLECTIVES = [
    (lambda x: lax.all_gather(x, "fsdp", tiled=True), P("fsdp"), P(), "all-gather", ("fsdp",), 4, ARRAY // 4, ARRAY),
    (
        lambda x: lax.all_gather(x, ("data", "fsdp"), tiled=True),
        P(("data", "fsdp")),
        P(),
        "all-gather",
        ("data", "fsdp"),
        8,
        ARRAY // 8,
        ARRAY,
    ),
    (lambda x: lax.psum(x, "data"), P(), P(), "all-reduce", ("data",), 2, ARRAY, ARRAY),
    (
        lambda x: lax.psum_scatter(x, "fsdp", tiled=True),
        P(),
        P("fsdp"),
        "reduce-scatter",
        ("fsdp",),
        4,
        ARRAY,
        ARRAY // 4,
    ),
    (
        lambda x: lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)]),
        P("fsdp"),
        P("fsdp"),
        "collective-permute",
        ("fsdp",),
        2,
        ARRAY // 4,
        ARRAY // 4,
    ),
    (lambda x: lax.all_to_all(x, "fsdp", 0, 1, tiled=True), P(), P(), "all-to-all", ("fsdp",), 4, ARRAY, ARRAY),
]


@pytest.mark.parametrize(
    ("function", "spec", "out", "kind", "axes", "size", "operand", "result"),
    COLLECTIVES,
    ids=[f"{row[3]}-{'-'.join(row[4])}" for row in COLLECTIVES],
)
def test_one_collective(
    mesh: Mesh,
    function: Callable[[jax.Array], jax.Array],
    spec: P,
    out: P,
    kind: str,
    axes: tuple[str, ...],
    size: int,
    operand: int,
    result: int,
) -> None:
    program = facts(mesh, function, (spec, (N, N)), out=out)
    assert summary(program) == [(kind, axes, size, operand, result, 1)]
    share = {"collective-permute": 1.0, "all-reduce": 2 * (size - 1) / size}.get(kind, (size - 1) / size)
    assert program.collectives[0].wire_bytes == share * max(operand, result)
    assert program.collectives[0].network == "links"
    # Some chips gather into a memory of the core.
    assert operand <= program.hbm_bytes["collectives"] <= operand + result


def test_collectives_in_loops_of_loops(mesh: Mesh) -> None:
    def inner(x: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
        part = lax.psum_scatter(x @ lax.all_gather(w, "fsdp", tiled=True), "data", tiled=True)
        return x + lax.ppermute(lax.all_gather(part, "data", tiled=True), "data", [(0, 1), (1, 0)]), None

    def outer(x: jax.Array, ws: jax.Array) -> jax.Array:
        return lax.scan(lambda x, _: lax.scan(inner, x, ws), x, None, length=3)[0]

    program = facts(mesh, outer, (P(), (N, N)), (P(None, "fsdp"), (5, N, N)))
    assert sorted(summary(program)) == [
        ("all-gather", ("data",), 2, ARRAY // 2, ARRAY, 15),
        ("all-gather", ("fsdp",), 4, ARRAY // 4, ARRAY, 15),
        ("collective-permute", ("data",), 2, ARRAY, ARRAY, 15),
        ("reduce-scatter", ("data",), 2, ARRAY, ARRAY // 2, 15),
    ]
    assert program.product_flops == 15 * 2 * N**3
    assert all("while/body" in c.op_name for c in program.collectives)


def test_of_a_conditional_one_branch_counts(mesh: Mesh) -> None:
    def either(x: jax.Array) -> jax.Array:
        reduce, gather = lambda x: lax.psum(x, "fsdp"), lambda x: lax.all_gather(x[: N // 4], "fsdp", tiled=True)
        return lax.cond(x[0, 0] > 0, reduce, gather, x)

    assert summary(facts(mesh, either, (P(), (N, N)))) == [("all-reduce", ("fsdp",), 4, ARRAY, ARRAY, 1)]


def test_a_loop_without_a_count_is_reported(mesh: Mesh) -> None:
    def until(x: jax.Array) -> jax.Array:
        return lax.while_loop(lambda x: x[0, 0] < 3, lambda x: lax.psum(x, "fsdp") * 2, x)

    program = facts(mesh, until, (P(), (N, N)))
    assert [c.times for c in program.collectives] == [1]
    assert [name.rpartition("/")[2] for name in program.unknown_loops] == ["while"]


@pytest.mark.parametrize("name", ["v5e:2x4", "v5p:2x2x2"])
def test_what_is_computed_meanwhile(name: str) -> None:
    """A permutation and a product that do not wait for each other run at once."""

    def step(carried: tuple[jax.Array, jax.Array], w: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        x, passed = carried
        return (jax.nn.relu(x @ w), lax.ppermute(passed, "fsdp", [(i, (i + 1) % 4) for i in range(4)])), None

    def steps(x: jax.Array, ws: jax.Array) -> tuple[jax.Array, jax.Array]:
        return lax.scan(step, (x, x * 2), ws)[0]

    program = facts(
        mesh_over(name), steps, (P("data"), (8 * N, 4 * N)), (P(), (3, 4 * N, 4 * N)), out=(P("data"), P("data"))
    )
    (permute,) = program.collectives
    assert (permute.kind, permute.times, permute.asynchronous) == ("collective-permute", 3, True)
    assert permute.hidden_cycles * 3 >= program.cycles["products"] > 0
    alone = facts(mesh_over(name), COLLECTIVES[4][0], (P("fsdp"), (N, N)), out=P("fsdp"))  # type: ignore[arg-type]
    assert not alone.collectives[0].asynchronous


def test_a_gather_that_runs_inside_products_counts_once() -> None:
    def step(carried: tuple[jax.Array, jax.Array], w: jax.Array) -> tuple[tuple[jax.Array, jax.Array], None]:
        x, gathered = carried
        return (jax.nn.relu(x @ gathered), lax.all_gather(w, "fsdp", tiled=True)), None

    def steps(x: jax.Array, ws: jax.Array) -> jax.Array:
        return lax.scan(step, (x, jnp.zeros((4 * N, 4 * N), x.dtype)), ws)[0][0]

    arguments = (P("data"), (8 * N, 4 * N)), (P(None, "fsdp"), (3, 4 * N, 4 * N))
    program = facts(mesh_over("v5e:2x4"), steps, *arguments, out=P("data"))
    assert summary(program) == [("all-gather", ("fsdp",), 4, 4 * ARRAY, 16 * ARRAY, 3)]
    assert program.collectives[0].asynchronous
    assert program.collectives[0].hidden_cycles > 0


@pytest.fixture(scope="module")
def two_slices() -> Mesh:
    return mesh_over("v5p:2x2x1", slices=2)


@pytest.mark.parametrize(
    ("function", "spec", "out", "kind", "operand", "result"),
    [
        (lambda x: lax.psum(x, "data"), P(), P(), "all-reduce", ARRAY, ARRAY),
        (lambda x: lax.all_gather(x, "data", tiled=True), P("data"), P(), "all-gather", ARRAY // 2, ARRAY),
        (lambda x: lax.psum_scatter(x, "data", tiled=True), P(), P("data"), "reduce-scatter", ARRAY, ARRAY // 2),
        (lambda x: lax.all_to_all(x, "data", 0, 1, tiled=True), P(), P(), "all-to-all", ARRAY, ARRAY),
        (
            lambda x: lax.ppermute(x, "data", [(0, 1), (1, 0)]),
            P("data"),
            P("data"),
            "collective-permute",
            ARRAY // 2,
            ARRAY // 2,
        ),
    ],
    ids=["all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute"],
)
def test_between_slices(
    two_slices: Mesh,
    function: Callable[[jax.Array], jax.Array],
    spec: P,
    out: P,
    kind: str,
    operand: int,
    result: int,
) -> None:
    program = facts(two_slices, function, (spec, (N, N)), out=out)
    assert summary(program) == [(kind, ("data",), 2, operand, result, 1)]
    assert program.collectives[0].network == "data_center"


def test_a_sum_over_slices_and_links(two_slices: Mesh) -> None:
    """Scattered over the links of a slice, summed between slices, gathered again."""
    program = facts(two_slices, lambda x: lax.psum(x, ("data", "fsdp")), (P(), (N, N)))
    assert [(*row, c.network) for row, c in zip(summary(program), program.collectives, strict=True)] == [
        ("reduce-scatter", ("fsdp",), 4, ARRAY, ARRAY // 4, 1, "links"),
        ("all-reduce", ("data",), 2, ARRAY // 4, ARRAY // 4, 1, "data_center"),
        ("all-gather", ("fsdp",), 4, ARRAY // 4, ARRAY, 1, "links"),
    ]
