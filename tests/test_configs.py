"""Every config that is shipped loads; the large ones are built, counted and lowered by shape alone."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from lm import config as configs
from lm.experiment import Config
from lm.model.flops import flops_per_token, parameter_count
from lm.parallel.mesh import MeshConfig, make_mesh
from lm.parallel.sharding import batch_sharding
from lm.train.describe import describe
from lm.train.state import abstract_state
from lm.train.step import jit_train_step

FOLDER = Path(__file__).parent.parent / "configs"


def load(name: str) -> Config:
    return configs.load(str(FOLDER / f"{name}.py"), Config)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_a_config_loads_and_is_itself_again_from_json(path: Path) -> None:
    config = load(path.stem)
    assert configs.from_dict(Config, configs.to_dict(config)) == config
    assert f"parameters             {parameter_count(config.model):,}" in describe(config)
    assert config.run.dir == f"runs/{path.stem}"


@pytest.mark.parametrize(
    ("name", "parameters", "look_ups"),
    [("gpt2_124m", 124_439_808, 1024 * 768), ("llama3_8b", 8_030_261_248, 128_256 * 4096)],
)
def test_published_sizes(name: str, parameters: int, look_ups: int) -> None:
    config = load(name)
    assert parameter_count(config.model) == parameters
    model = config.model
    flops = flops_per_token(model, config.train.sequence_length)
    # Norms and biases take part in no product; tables that are only looked up do not either.
    assert flops.parameters == pytest.approx(6 * (parameters - look_ups), rel=2e-3)
    attention = 12 * model.layers * model.width * config.train.sequence_length
    assert flops.full - flops.parameters == attention
    assert flops.causal - flops.parameters == attention / 2


@pytest.mark.parametrize(
    ("name", "mesh", "state_bytes"),
    [("gpt2_124m", MeshConfig(fsdp=1), 1.5e9), ("llama3_8b", MeshConfig(fsdp=8), 12.1e9)],
)
def test_the_train_step_of_a_large_config_lowers(name: str, mesh: MeshConfig, state_bytes: float) -> None:
    config = load(name)
    on = make_mesh(mesh, jax.devices()[: mesh.fsdp])
    state = abstract_state(config, on)
    shape = (config.train.batch_size, config.train.sequence_length)
    kinds = dict.fromkeys(("tokens", "targets", "segments", "positions"), jnp.int32) | {"loss_mask": jnp.float32}
    batch = {name: jax.ShapeDtypeStruct(shape, kind, sharding=batch_sharding(on)) for name, kind in kinds.items()} | {
        "bytes": jax.ShapeDtypeStruct(shape[:1], jnp.int32, sharding=batch_sharding(on))
    }
    lowered = jit_train_step(config, on).lower(state, batch)
    out, metrics = lowered.out_info
    assert jax.tree.map(lambda x: (x.shape, x.dtype), out) == jax.tree.map(lambda x: (x.shape, x.dtype), state)
    assert metrics["loss"].shape == ()
    per_device = sum(
        jnp.dtype(leaf.dtype).itemsize * jnp.prod(jnp.array(leaf.sharding.shard_shape(leaf.shape), jnp.float32))
        for leaf in jax.tree.leaves(state)
    )
    assert float(per_device) == pytest.approx(state_bytes, rel=0.02)
