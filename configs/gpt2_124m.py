"""GPT-2 124M (Radford et al. 2019), trained as nanoGPT and llm.c do: half a million tokens per step.

    lm config show configs/gpt2_124m.py
    lm train configs/gpt2_124m.py --data.paths 'text/*.jsonl.zst' --data.tokenizer.path tokenizer.json

The tokenizer is GPT-2's, as a Hugging Face tokenizer.json (50,257 ids).
"""

from lm.checkpoint.config import CheckpointConfig
from lm.data.config import DataConfig, TokenizerConfig
from lm.experiment import Config, RunConfig
from lm.model.config import ModelConfig
from lm.optim.config import OptimConfig
from lm.train.config import EvalConfig, TrainConfig

config = Config(
    run=RunConfig(dir="runs/gpt2_124m"),
    model=ModelConfig(
        vocab_size=50_257,
        layers=12,
        width=768,
        heads=12,
        activation="gelu_tanh",
        norm="layer",
        norm_parameters="scale_and_bias",
        bias="all",
        positions="learned",
        context=1024,
        embeddings="tied",
        init="gpt2",
    ),
    data=DataConfig(
        paths=("text",),
        tokenizer=TokenizerConfig(kind="huggingface", path="tokenizer.json"),
        holdout_fraction=0.0005,
    ),
    optim=OptimConfig(
        learning_rate=6e-4,
        schedule="cosine",
        warmup_steps=700,
        beta2=0.95,
        weight_decay=0.1,
        final_fraction=0.1,
    ),
    train=TrainConfig(steps=18_865, batch_size=512, sequence_length=1024),
    checkpoint=CheckpointConfig(every=1000, keep_last=2),
    eval=EvalConfig(every=250),
)
