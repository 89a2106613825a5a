"""Learning rate as a function of the step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm.optim.config import OptimConfig


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """The schedule of a run of `steps` steps; takes the step, counted from 0, as int or traced int32.

    Step 0 of a warm-up of w steps has 1/w of the full rate, step w - 1 all of it; the last step, steps - 1, has
    `final_fraction` of it. Constant schedules do not fall, and neither does a run that ends within its warm-up.
    """
    peak, final, warmup = (
        config.learning_rate,
        config.learning_rate * config.final_fraction,
        config.warmup_steps,
    )
    rest = max(steps - warmup, 1)
    after: optax.Schedule
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
    else:
        decay = min(max(steps // 5, 1) if config.decay_steps is None else config.decay_steps, rest)
        decay = rest if config.schedule == "linear" else decay

        def after(step: Any) -> jax.Array:
            # Written so that it is the peak to the last bit until it falls: a constant run may go on with it.
            return peak - (peak - final) * jnp.clip((step - (rest - decay)) / decay, 0.0, 1.0)

    if warmup:
        after = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])
    return lambda step: after(step + 1)
