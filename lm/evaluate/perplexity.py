"""Perplexity and bits per byte of a trained model on held-out text."""

import dataclasses
import math

import jax

from lm.data.batches import Evaluation
from lm.data.corpus import open_corpus
from lm.data.loader import Loader
from lm.errors import DataError
from lm.parallel.rows import local_rows, whole_batch
from lm.parallel.sharding import batch_sharding
from lm.train.heldout import HeldOut, held_out_loss
from lm.train.load import Trained
from lm.train.step import make_eval_step


def perplexity(trained: Trained, *, data_dir: str | None = None, split: str = "heldout") -> HeldOut:
    """Loss over all of a split of built data, in windows of the training length, each target counted once.

    `data_dir`: other data, built with the same tokenizer; None: that of the run. Raises DataError when the
    split is empty or the tokenizer is another one.
    """
    config, directory = trained.config, data_dir or trained.config.data_dir
    corpus = open_corpus(directory, config.data if data_dir is None else None)
    if corpus.tokenizer.fingerprint != trained.tokenizer.fingerprint:
        raise DataError(f"{directory} was built with another tokenizer than the model was trained with")
    size = trained.mesh.size * math.ceil(config.train.batch_size / trained.mesh.size)  # the devices share it evenly
    windows = Evaluation(corpus, split, size, config.train.sequence_length)
    batches = dataclasses.replace(config.train, batch_size=size, accumulation=1)
    eval_step = jax.jit(make_eval_step(dataclasses.replace(config, train=batches), trained.mesh, len(windows.sources)))
    sharding = batch_sharding(trained.mesh)
    rows = local_rows(sharding, size)
    with Loader(windows, range(len(windows)), rows, stall_seconds=config.data.stall_seconds) as loader:
        parts = (whole_batch(batch, rows, size, sharding) for _, batch in loader)
        return held_out_loss(eval_step, trained.params, parts, windows.sources)
