"""Does the model learn what it should? nanoGPT's character model on tinyshakespeare, and our recipe of the same size.

    python tests/benchmarks/tinyshakespeare.py INPUT_TXT [--recipe nanogpt] [--learning-rate 1e-3 4e-3] [--seeds 3]

INPUT_TXT is the 1,115,394 bytes of tinyshakespeare. Trains on the first 90% of its bytes and evaluates the final
weights on all of the rest in windows of 64 that do not overlap. nanoGPT itself (PyTorch, the same shapes, tokens and
optimizer) gives 1.901 nats per character at learning rate 1e-3 and 1.771 and 1.786 (two seeds) at 4e-3.

The vocabulary is the 65 characters of the text and three special ids; the beginning and the end of the document are
one target more than the characters: 111,541 in place of 111,539.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path

from lm.checkpoint.config import CheckpointConfig
from lm.data.config import DataConfig, TokenizerConfig
from lm.experiment import Config, RunConfig
from lm.model.config import ModelConfig
from lm.optim.config import OptimConfig
from lm.train.config import EvalConfig, SampleConfig, TrainConfig
from lm.train.loop import train

SHAPE = {"vocab_size": 68, "layers": 4, "width": 128, "heads": 4}
MODELS = {
    "nanogpt": ModelConfig(
        **SHAPE,
        activation="gelu",
        norm="layer",
        norm_parameters="scale",
        positions="learned",
        context=64,
        embeddings="tied",
        init="gpt2",
    ),
    "ours": ModelConfig(
        **SHAPE, activation="squared_relu", qk_norm="per_head", embeddings="untied", init="lecun"
    ),
}  # fmt: skip
OPTIMIZERS = {
    "nanogpt": OptimConfig(beta2=0.99, weight_decay=0.1, warmup_steps=100, schedule="cosine", final_fraction=0.1),
    "ours": OptimConfig(beta2=0.99, weight_decay=0.1, warmup_steps=100, schedule="linear", final_fraction=0.0),
}


def run(text: Path, folder: Path, recipe: str, rate: float, seed: int) -> dict[str, float]:
    """Trains once; returns the final held-out values and the speed."""
    config = Config(
        run=RunConfig(dir=str(folder / f"{recipe}-{rate}-{seed}"), seed=seed),
        model=MODELS[recipe],
        data=DataConfig(
            paths=(str(text),),
            dir=str(folder / "data"),
            tokenizer=TokenizerConfig(model_type="char"),
            holdout_by="tail",
            holdout_fraction=0.1,
        ),
        optim=dataclasses.replace(OPTIMIZERS[recipe], learning_rate=rate),
        train=TrainConfig(steps=2000, batch_size=12, sequence_length=64, unroll=4),
        checkpoint=CheckpointConfig(every=0),
        eval=EvalConfig(every=0),
        sample=SampleConfig(tokens=0),
    )
    train(config, stream=None)
    lines = [json.loads(line) for line in Path(config.run.dir, "metrics.jsonl").read_text().splitlines()]
    seconds = [line["step_seconds"] for line in lines if "step_seconds" in line]
    return lines[-1] | {"step_seconds": statistics.median(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--recipe", choices=tuple(MODELS), default="nanogpt")
    parser.add_argument("--learning-rate", type=float, nargs="+", default=[1e-3, 4e-3])
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for rate in options.learning_rate:
            losses = []
            for seed in range(options.seeds):
                result = run(options.text, Path(folder), options.recipe, rate, seed)
                losses.append(result["heldout_loss"])
                print(
                    f"{options.recipe} rate {rate:g} seed {seed}: {result['heldout_loss']:.4f} nats per character, "
                    f"{result['heldout_bits_per_byte']:.4f} bits per byte, "
                    f"{1e3 * result['step_seconds']:.1f} ms per step",
                    flush=True,
                )
            print(f"{options.recipe} rate {rate:g}: mean of {len(losses)} {statistics.fmean(losses):.4f}", flush=True)


if __name__ == "__main__":
    main()
