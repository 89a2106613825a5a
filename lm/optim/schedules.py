"""Learning rate as a function of the step."""

import optax

from lm.optim.config import OptimConfig


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """The schedule of a run of `steps` steps; takes the step, counted from 0, as int or traced int32.

    Step w - 1 of a warm-up of w steps and the step after it have the full rate, step 0 has 1/w of it; the last
    step, steps - 1, has `final_fraction` of it (constant schedules aside).
    """
    peak, final, warmup = (
        config.learning_rate,
        config.learning_rate * config.final_fraction,
        config.warmup_steps,
    )
    rest = max(steps - warmup, 1)
    if config.schedule == "constant":
        after = optax.constant_schedule(peak)
    elif config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, final, rest)
    else:
        decay = min(max(steps // 5, 1) if config.decay_steps is None else config.decay_steps, rest)
        after = optax.linear_schedule(peak, final, decay, transition_begin=rest - decay)
    if warmup:
        after = optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])
    return lambda step: after(step + 1)
