import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.checkpoint.digest import leaf_paths, start_digest, state_digest

SALT = (0x9E3779B9, 0x7F4A7C15, 0xBF58476D, 0x94D049BB)
POSITION = (0x85EBCA6B, 0xC2B2AE35, 0x27D4EB2F, 0x165667B1)


def mix(h: int) -> int:
    h = (h ^ (h >> 16)) * 0x21F0AAAD % 2**32
    h = (h ^ (h >> 15)) * 0xD35A2D97 % 2**32
    return h ^ (h >> 15)


def reference_lanes(x: np.ndarray) -> str:
    """One element after the other, in Python integers."""
    unsigned = np.ascontiguousarray(x).reshape(-1).view(f"u{x.dtype.itemsize}")
    sums = [0, 0, 0, 0]
    for index, bits in enumerate(unsigned.tolist()):
        for lane in range(4):
            position = mix(index) * POSITION[lane] % 2**32
            sums[lane] += mix((bits + SALT[lane]) % 2**32 ^ position)
    return "".join(f"{total % 2**32:08x}" for total in sums)


ARRAYS = {
    "float32": jnp.linspace(-3, 3, 60, dtype=jnp.float32).reshape(3, 4, 5),
    "bfloat16": jnp.linspace(-3, 3, 14).astype(jnp.bfloat16).reshape(2, 7),
    "float16": jnp.linspace(-3, 3, 5, dtype=jnp.float16),
    "float8": jnp.linspace(-3, 3, 5).astype(jnp.float8_e4m3fn),
    "int32": jnp.arange(-3, 3),
    "int8": jnp.arange(-3, 3, dtype=jnp.int8),
    "key": jnp.array([1, 2**32 - 1], jnp.uint32),
    "mask": jnp.array([True, False, True]),
    "scalar": jnp.int32(7),
    "empty": jnp.zeros((0, 3)),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_lanes_are_those_of_the_reference(name: str) -> None:
    x = ARRAYS[name]
    leaf = state_digest({"a": x}).leaves["a"]
    assert leaf.lanes == reference_lanes(np.asarray(x))
    assert (leaf.shape, leaf.dtype) == (x.shape, x.dtype.name)


@pytest.mark.parametrize("devices", [1, 4])
def test_arrays_may_lie_in_the_memory_of_the_host(devices: int) -> None:
    mesh = jax.make_mesh((devices,), ("a",), devices=jax.devices()[:devices])
    x = jnp.linspace(-3, 3, 16).reshape(4, 4)
    there = jax.device_put(x, jax.NamedSharding(mesh, jax.P("a"), memory_kind="pinned_host"))
    assert state_digest({"a": there, "b": x}).digest == state_digest({"a": x, "b": x}).digest


def test_64_bit_elements_are_two_words() -> None:
    with jax.enable_x64(True):
        x = jnp.array([1.5, -2.25, np.nan], jnp.float64)
        digest = state_digest({"a": x})
    assert digest.leaves["a"].lanes == reference_lanes(np.asarray(x).view(np.uint32))
    assert digest.nonfinite == ("a",)


def nan(bits: int) -> jax.Array:
    return jax.lax.bitcast_convert_type(jnp.uint32(bits), jnp.float32)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ({"w": jnp.float32(0.0)}, {"w": jnp.float32(-0.0)}),
        ({"w": nan(0x7FC00000)}, {"w": nan(0x7FC00001)}),
        ({"w": jnp.float32(1e-45)}, {"w": jnp.float32(0)}),
        ({"w": jnp.zeros(4, jnp.int32)}, {"w": jnp.zeros(4, jnp.uint32)}),
        ({"w": jnp.zeros((2, 3))}, {"w": jnp.zeros((3, 2))}),
        ({"w": jnp.zeros((2, 3))}, {"v": jnp.zeros((2, 3))}),
        ({"w": jnp.array([1, 2, 3])}, {"w": jnp.array([1, 3, 2])}),
        ({"v": jnp.zeros(1), "w": jnp.ones(1)}, {"v": jnp.ones(1), "w": jnp.zeros(1)}),
        ({"w": jnp.zeros(2)}, {"w": jnp.zeros(2), "v": jnp.zeros(0)}),
    ],
)
def test_any_difference_shows(a: dict[str, jax.Array], b: dict[str, jax.Array]) -> None:
    assert state_digest(a).digest != state_digest(b).digest
    assert state_digest(a).digest == state_digest(dict(a)).digest


def test_every_single_bit_shows_in_every_lane() -> None:
    base = np.random.default_rng(0).integers(0, 2**32, 8, np.uint32)
    flipped = [base.copy() for _ in range(8 * 32)]
    for i, x in enumerate(flipped):
        x[i // 32] ^= np.uint32(1 << i % 32)
    digests = [state_digest({"a": jnp.asarray(x)}).leaves["a"] for x in [base, *flipped]]
    lanes = np.array([[leaf.lanes[k : k + 8] for k in range(0, 32, 8)] for leaf in digests])
    for lane in lanes.T:
        assert len(set(lane)) == len(lane)


def test_nonfinite_arrays_are_named() -> None:
    state = {"a": jnp.ones(3), "b": jnp.array([1, jnp.inf]), "c": jnp.array([jnp.nan], jnp.bfloat16)}
    assert state_digest(state).nonfinite == ("b", "c")


def test_paths_are_readable() -> None:
    assert leaf_paths({"params": {"w": (1, 2)}}) == ["params/w/0", "params/w/1"]


def test_arrays_may_be_donated_at_once() -> None:
    x = jnp.arange(2**18, dtype=jnp.float32)
    expected = state_digest({"a": x}).digest
    finish = start_digest({"a": x})
    jax.jit(lambda x: x * 2, donate_argnums=0)(x).block_until_ready()
    assert finish().digest == expected


@pytest.mark.parametrize("x", [jnp.ones(2, jnp.complex64), jax.random.key(0)])
def test_other_types_are_refused(x: jax.Array) -> None:
    with pytest.raises(TypeError, match="params/x: no digest"):
        state_digest({"params": {"x": x}})


def test_index_of_more_than_32_bits_by_shape_only() -> None:
    from lm.checkpoint.digest import reduce_to_lanes

    sums, finite = jax.eval_shape(reduce_to_lanes, jax.ShapeDtypeStruct((2**20, 2**20), jnp.bfloat16))
    assert (sums.shape, sums.dtype, finite.shape) == ((4,), jnp.uint32, ())


def test_sharding_changes_nothing_and_no_array_is_gathered() -> None:
    code = """
        import jax, jax.numpy as jnp
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from lm.checkpoint.digest import _program, state_digest
        w = jax.random.normal(jax.random.key(0), (64, 24, 128))
        x = {"w": w, "b": jnp.arange(16).astype(jnp.bfloat16)}
        expected = state_digest(x)
        for kind in AxisType.Auto, AxisType.Explicit:
            mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
            for spec in P("a", "b"), P(None, None, ("b", "a")), P():
                specs = {"w": spec, "b": P("a")}
                y = jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), x, specs)
                with jax.set_mesh(mesh):
                    assert state_digest(y) == expected, (kind, spec)
                compiled = _program(jax.tree.leaves(y))
                assert compiled.memory_analysis().temp_size_in_bytes < x["w"].nbytes / 64
        assert jax.device_count() == 8
        print("same")
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "same\n", done.stderr
