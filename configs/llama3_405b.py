"""Llama 3 405B (Meta 2024): 406 billion parameters, 8,192 tokens of context, batches of 25 million tokens.

    lm config show configs/llama3_405b.py --sharding --devices 6144
    lm train configs/llama3_405b.py --data.dir gs://bucket/tokens --run.dir gs://bucket/run

Made for a whole pod of 6,144 chips of TPU v5p: one sequence for every two chips, which share its heads. The tokenizer
is Meta's, as a Hugging Face tokenizer.json: point data.tokenizer.path at it.
"""

from lm.checkpoint.config import CheckpointConfig
from lm.data.config import DataConfig, TokenizerConfig
from lm.experiment import Config, RunConfig
from lm.model.config import ModelConfig
from lm.optim.config import OptimConfig
from lm.parallel.mesh import MeshConfig
from lm.train.config import EvalConfig, SampleConfig, TrainConfig

config = Config(
    run=RunConfig(dir="runs/llama3_405b"),
    model=ModelConfig(
        vocab_size=128_256,
        layers=126,
        width=16_384,
        heads=128,
        kv_heads=8,
        hidden=53_248,
        activation="swiglu",
        norm="rms",
        norm_epsilon=1e-5,
        positions="rotary",
        rope_theta=500_000.0,
        embeddings="untied",
    ),
    data=DataConfig(
        paths=("text",),
        tokenizer=TokenizerConfig(kind="huggingface", path="tokenizer.json"),
        holdout_fraction=0.0005,
    ),
    optim=OptimConfig(learning_rate=8e-5, schedule="cosine", warmup_steps=8000, final_fraction=0.01, weight_decay=0.1),
    train=TrainConfig(steps=620_000, batch_size=3072, sequence_length=8192, remat="full", z_loss=1e-5),
    mesh=MeshConfig(fsdp=-1, tensor=2),
    checkpoint=CheckpointConfig(every=500, keep_last=2, keep_every=10_000),
    eval=EvalConfig(every=1000),
    sample=SampleConfig(tokens=0),
)
