"""What is looked at now and then, beside the loss: the inside of the model on a fixed text, and its parameters.

The text is the begin of the held-out one. Nothing of this touches the train step: it is a program of its own, compiled
at the start, that runs after evaluations. What it gives does not grow with the layers of a model.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.data.tokenizers import Tokenizer
from lm.experiment import Config
from lm.model.observe import Observed, observe, shown_layers
from lm.model.transformer import bind, compute_dtype
from lm.train import events
from lm.train.groups import groups_of, layer_depths
from lm.train.histograms import EDGES, Histograms, histograms
from lm.train.images import attention_maps, token_losses
from lm.train.state import TrainState
from lm.train.summaries import NoSummaries, Summaries

TEXTS, TOKENS = 4, 128
PICTURES = 50
"""Of a run, at most: so long ones keep small event files."""


class Looked(NamedTuple):
    observed: Observed | None
    """None in a pipeline: its layers would all be gathered on each device."""
    weights: Histograms
    momenta: Histograms | None
    """Of the mean of the last gradients that the optimizer keeps, where that is on the device."""


def jit_look(config: Config, mesh: Mesh) -> jax.stages.Wrapped:
    """From parameters, mean gradients or None, and texts, to what is seen, on every device.

    The compiler splits it: for so few tokens, it exchanges them and not weights.
    """
    dtype = compute_dtype(config.model, mesh.devices.flat[0].platform)

    def look(params: Any, momenta: Any, batch: dict[str, jax.Array]) -> Looked:
        observed = None
        if config.mesh.stage == 1:
            observed = observe(bind(config.model, params), batch, dtype)
        spread = None if momenta is None else histograms(momenta, config.model)
        return Looked(observed, histograms(params, config.model), spread)

    return jax.jit(look, out_shardings=NamedSharding(mesh, PartitionSpec()))


class Probe:
    """Compiled once; `look` is called by all processes of a run, and each gets all of it.

    Args:
      batch: as of `lm.data.batches.Evaluation`, of which the begin is looked at.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        abstract: TrainState,
        batch: dict[str, np.ndarray],
        tokenizer: Tokenizer,
        say: Callable[[str], None],
    ):
        self._config, self._tokenizer, self._say = config, tokenizer, say
        length = min(TOKENS, config.train.sequence_length)
        names = ("tokens", "targets", "segments", "positions", "loss_mask")
        self._text = {name: np.ascontiguousarray(batch[name][:TEXTS, :length]) for name in names}
        everywhere = NamedSharding(mesh, PartitionSpec())
        self._batch = {
            name: jax.make_array_from_callback(x.shape, everywhere, x.__getitem__) for name, x in self._text.items()
        }
        self._has_momenta = config.train.optimizer_memory != "host"
        look = jit_look(config, mesh)
        self._look = look.lower(abstract.params, self._momenta(abstract), self._batch).compile()
        evaluations = config.train.steps // config.eval.every if config.eval.every else 1
        self._every = -(-evaluations // PICTURES) or 1

    def look(self, state: TrainState, step: int, summaries: Summaries | NoSummaries) -> dict[str, float]:
        """Values for metrics.jsonl; pictures and histograms go to TensorBoard, now and then and when all steps are
        done: `step` is the last done one, or at the end the one after it."""
        found: Looked = jax.device_get(self._look(state.params, self._momenta(state), self._batch))
        every, last = self._config.eval.every * self._every, step == self._config.train.steps
        if last or (step + 1) % every == 0:
            self._try_to_show(found, step, summaries)
        return self._values(found.observed) if found.observed else {}

    def _momenta(self, state: TrainState) -> Any:
        return optax.tree.get(state.opt_state, "mu", None) if self._has_momenta else None

    def _values(self, seen: Observed) -> dict[str, float]:
        values = {
            "attention_entropy": float(seen.entropy.mean()),
            "attention_logit": float(seen.largest_logit.max()),
            "output_logit": float(seen.largest_output_logit),
        }
        depths, of_layer = groups_of(self._config.model).depths, layer_depths(self._config.model)
        for number in np.unique(of_layer):
            own = of_layer == number
            values[f"attention_entropy/{depths[number]}"] = float(seen.entropy[own].mean())
            values[f"attention_logit/{depths[number]}"] = float(seen.largest_logit[own].max())
        return values

    def _try_to_show(self, found: Looked, step: int, summaries: Summaries | NoSummaries) -> None:
        """A picture that cannot be drawn ends no run. Only the process that writes draws."""
        if isinstance(summaries, NoSummaries):
            return
        try:
            self._show(found, step, summaries)
        except Exception as error:
            self._say(f"step {step} is not shown in pictures: {type(error).__name__}: {error}")

    def _show(self, found: Looked, step: int, summaries: Summaries | NoSummaries) -> None:
        seen, model = found.observed, self._config.model
        for name, one in (("parameters", found.weights), ("mean gradients", found.momenta)):
            scales, counts = (np.asarray(part) for part in one) if one else ((), ())
            for depth, scale, count in zip(groups_of(model).depths, scales, counts, strict=False):
                if scale > 0 and np.isfinite(scale):
                    ends = scale * np.array([2 * EDGES[0], *EDGES, 2 * EDGES[-1]])
                    bins = np.stack([ends[:-1], ends[1:], count], axis=1)
                    summaries.show(step, events.histogram(f"{name}/{depth}", bins))
        if seen is None:
            return
        maps = attention_maps(np.asarray(seen.maps), shown_layers(model.layers))
        summaries.show(step, events.image("attention", maps))
        pieces = [self._tokenizer.piece(int(token)) for token in self._text["targets"][0]]
        losses = token_losses(pieces, np.asarray(seen.likelihoods[0]), self._text["loss_mask"][0] > 0)
        summaries.show(step, events.image("loss of each token", losses))
