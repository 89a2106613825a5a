"""A first language model in minutes on two CPU cores: the Python standard library learns to write itself.

    lm train configs/quickstart.py

The text is the source code of the library of the Python that runs this: nothing is downloaded.
"""

from lm.checkpoint.config import CheckpointConfig
from lm.data.config import DataConfig, TokenizerConfig
from lm.experiment import Config, RunConfig
from lm.model.config import ModelConfig
from lm.optim.config import OptimConfig
from lm.train.config import EvalConfig, SampleConfig, TrainConfig

VOCABULARY = 2048

config = Config(
    run=RunConfig(dir="runs/quickstart"),
    model=ModelConfig(
        vocab_size=VOCABULARY,
        layers=4,
        width=192,
        heads=4,
        activation="squared_relu",
        qk_norm="per_head",
        embeddings="untied",
        init="lecun",
    ),
    data=DataConfig(
        paths=("python-stdlib",),
        holdout_fraction=0.004,
        tokenizer=TokenizerConfig(vocab_size=VOCABULARY),
    ),
    optim=OptimConfig(learning_rate=4e-3, beta2=0.98, warmup_steps=30, schedule="linear", final_fraction=0.0),
    train=TrainConfig(steps=300, batch_size=8, sequence_length=256, unroll=4),
    checkpoint=CheckpointConfig(every=100),
    eval=EvalConfig(every=100, batches=0),
    sample=SampleConfig(prompt="def "),
)
