"""Whether a run directory may be continued with the config at hand."""

import jax
import numpy as np

from lm.config import Difference, diff, format_diff
from lm.errors import ConfigError
from lm.experiment import Config
from lm.optim.schedules import learning_rate


def refuse_if_changed(saved: Config, config: Config, *, done: int) -> None:
    """Raises ConfigError, with the differences, when continuing after `done` steps would be another run.

    What is marked free in the config may change. So may the number of steps and the schedule where the learning
    rate of the steps already done would have been the same; and the sources of a mixture, of which `ledger` judges.
    """
    differences = [d for d in diff(saved, config) if not d.free]
    if saved.data.sources and config.data.sources:
        differences = [d for d in differences if not d.key.startswith(("data.sources", "data.mixture"))]
    schedule = [d for d in differences if _is_schedule(d)]
    if schedule and _same_rates(saved, config, done):
        differences = [d for d in differences if not _is_schedule(d)]
    if differences:
        raise ConfigError(
            f"{config.run.dir} holds a run with {done} steps done and another config:\n"
            f"{format_diff(differences)}\n"
            "to go on with it, take the values it was started with; for a new run, choose another --run.dir"
        )


def _is_schedule(difference: Difference) -> bool:
    return difference.key == "train.steps" or difference.key in {
        f"optim.{name}" for name in ("schedule", "warmup_steps", "decay_steps", "final_fraction")
    }


def _same_rates(saved: Config, config: Config, done: int) -> bool:
    if done == 0:
        return True
    # Schedules are made of a few pieces: a thousand samples and the last step tell them apart.
    steps = np.array([*range(0, done, max(done // 1000, 1)), done - 1], np.int32)
    before, after = (jax.vmap(learning_rate(c.optim, c.train.steps))(steps) for c in (saved, config))
    return bool((before == after).all())
