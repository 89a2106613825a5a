"""What is done with a model while it is trained, beside training it: held-out loss, a look inside, a sample."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import Mesh

from lm.experiment import Config
from lm.model.loss import Batch
from lm.train.feed import Feed
from lm.train.heldout import HeldOut, held_out_loss
from lm.train.probe import TEXTS, Probe
from lm.train.progress import human_count
from lm.train.sample import sample_text
from lm.train.state import TrainState, in_one_stack
from lm.train.step import make_eval_step
from lm.train.summaries import NoSummaries, Summaries, verbatim

Log = Summaries | NoSummaries


class Evaluator:
    """All of it but the sample is compiled when this is made. All processes of a run call its methods together.

    Args:
      alive: called with the steps done, before each batch: few are ahead of the devices.
    """

    def __init__(
        self,
        config: Config,
        mesh: Mesh,
        abstract: TrainState,
        feed: Feed,
        *,
        say: Callable[[str], None],
        alive: Callable[[int], None],
    ):
        self._config, self._feed, self._say, self._alive = config, feed, say, alive
        self._probe = None
        if feed.held_out is not None:
            step = jax.jit(make_eval_step(config, mesh, len(feed.held_out.sources)))
            self._step = step.lower(abstract.params, feed.held_out_shapes()).compile()
            if config.log.detail == "all":
                self._probe = Probe(config, mesh, abstract, feed.held_out_begin(TEXTS), feed.tokenizer, say)

    def after(self, k: int, state: TrainState, log: Log) -> dict[str, float]:
        """Values for metrics.jsonl, of the state after step k, on `eval.batches` batches."""
        if self._feed.held_out is None:
            return {}
        count = len(self._feed.held_out)
        wanted = min(self._config.eval.batches or count, count)
        result = self._held_out(state, [int(i) for i in np.linspace(0, count - 1, wanted).round()], k + 1)
        self._say(f"after step {k}: held-out loss {result.loss:.4f}, {result.bits_per_byte:.4f} bits per byte")
        self._sample(state, k, log)
        return result.values() | self._look(state, k, log)

    def at_the_end(self, state: TrainState, log: Log) -> None:
        """On all held-out text; adds to what was logged of the last step. Shown at the step after it, as
        `Summaries.amend_last` does: a start that finds all steps done shows it once more, in its place."""
        steps = self._config.train.steps
        if self._feed.held_out is not None:
            result = self._held_out(state, list(range(len(self._feed.held_out))), steps)
            log.amend_last(steps - 1, result.values() | self._look(state, steps, log))
            self._say(
                f"held-out: {result.bits_per_byte:.4f} bits per byte, loss {result.loss:.4f} nats per token, "
                f"perplexity {result.perplexity:.2f}, over {human_count(result.bytes)} bytes never trained on"
            )
        if text := self._sample(state, steps, log):
            self._say("sample:\n" + "\n".join("    " + line for line in text.splitlines()))

    def _held_out(self, state: TrainState, which: list[int], step: int) -> HeldOut:
        assert self._feed.held_out is not None

        def put(batch: dict[str, np.ndarray]) -> Batch:
            self._alive(step)
            return self._feed.put(batch)

        with self._feed.held_out_batches(which) as loader:
            batches = (put(batch) for _, batch in loader)
            return held_out_loss(self._step, state.params, batches, self._feed.held_out.sources)

    def _look(self, state: TrainState, k: int, log: Log) -> dict[str, float]:
        return self._probe.look(state, k, log) if self._probe else {}

    def _sample(self, state: TrainState, k: int, log: Log) -> str:
        if not self._config.sample.tokens:
            return ""
        params = in_one_stack(state.params, self._config.mesh.repeats)
        text = sample_text(self._config, params, self._feed.tokenizer)
        if text:
            log.text(k, "sample", verbatim(text))
        return text
