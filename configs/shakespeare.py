"""A byte-level model of Shakespeare's size for one text file: 0.8 million parameters, a minute or two on a CPU.

    lm train configs/shakespeare.py --data.paths input.txt

Sizes and optimizer are those of nanoGPT's character-level CPU example (4 layers, width 128, 2,000 steps of 12 x 64
tokens), with rotary positions, RMSNorm and QK-norm, and a higher learning rate. The last tenth is held out.
"""

from lm.checkpoint.config import CheckpointConfig
from lm.data.config import DataConfig, TokenizerConfig
from lm.experiment import Config, RunConfig
from lm.model.config import ModelConfig
from lm.optim.config import OptimConfig
from lm.train.config import EvalConfig, TrainConfig

config = Config(
    run=RunConfig(dir="runs/shakespeare"),
    model=ModelConfig(
        vocab_size=258,
        layers=4,
        width=128,
        heads=4,
        activation="squared_relu",
        qk_norm="per_head",
        positions="rotary",
        embeddings="untied",
        init="lecun",
    ),
    data=DataConfig(
        paths=("input.txt",),
        tokenizer=TokenizerConfig(kind="bytes"),
        holdout_by="tail",
        holdout_fraction=0.1,
    ),
    optim=OptimConfig(learning_rate=4e-3, beta2=0.99, warmup_steps=100, schedule="linear", final_fraction=0.0),
    train=TrainConfig(steps=2000, batch_size=12, sequence_length=64, unroll=4),
    checkpoint=CheckpointConfig(every=500),
    eval=EvalConfig(every=500),
)
