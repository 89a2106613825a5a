"""What TensorBoard shows where: sections by question, a page of charts that answers them, and configs to compare."""

import re
from collections.abc import Mapping
from typing import Any

from tensorboard.compat.proto import summary_pb2
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as custom_scalars
from tensorboard.plugins.hparams import summary_v2 as hparams_plugin
from tensorboard.util import tensor_util

LEARNING, HEALTH, SPEED, WHOLE = "2 learning", "3 health", "4 speed", "5 whole"
BY_LAYER, BY_SOURCE, OTHER = "6 by layer", "7 by source", "8 other"
"""Sections: TensorBoard shows them by alphabet, and the first two opened."""

_OVERVIEW = {
    name: f"1 overview/{i} {question}: {name}"
    for i, (question, name) in enumerate(
        [
            ("learning", "loss"),
            ("healthy", "grad_norm"),
            ("fast", "tokens_per_second"),
            ("whole", "goodput/step"),
            ("learning", "heldout_bits_per_byte"),
            ("healthy", "update_ratio"),
            ("fast", "mfu"),
            ("whole", "memory_bytes"),
        ],
        start=1,
    )
}
"""The first screen has place for four, which answer the four questions; then come the next four."""
_SECTIONS = {
    LEARNING: "bits_per_byte heldout_loss learning_rate tokens targets",
    HEALTH: "param_norm update_norm clipped_share skipped_share skipped_steps attention_entropy attention_logit "
    "output_logit rewinds batches_left_out",
    SPEED: "step_seconds expected_step_seconds model_flops_per_second",
    WHOLE: "goodput expected_memory_bytes saves saves_failed saves_skipped save_blocked_seconds save_seconds "
    "checkpoint_age_seconds",
}
_OF_NAME = {name: section for section, names in _SECTIONS.items() for name in names.split()}
_OF_PART = {
    **dict.fromkeys(("grad_norm", "update_ratio", "attention_entropy", "attention_logit"), BY_LAYER),
    **dict.fromkeys(("heldout_loss", "heldout_bits_per_byte"), BY_SOURCE),
}


def tag(name: str) -> str:
    """Where a value of metrics.jsonl is shown; `grad_norm/embedding` is a part of `grad_norm`."""
    if name in _OVERVIEW:
        return _OVERVIEW[name]
    whole, _, part = name.partition("/")
    section = _OF_PART.get(whole) if part else None
    section = section or _OF_NAME.get(whole.removeprefix("local_"), OTHER)
    return f"{section}/{name}"


_CHARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "Is it learning?": {
        "loss, nats per token": ("loss", "heldout_loss"),
        "bits per byte": ("bits_per_byte", "heldout_bits_per_byte"),
        "held-out bits per byte, by source": ("heldout_bits_per_byte/*",),
        "learning rate": ("learning_rate",),
    },
    "Is it healthy?": {
        "norms": ("grad_norm", "param_norm", "update_norm"),
        "share of steps that were clipped, skipped": ("clipped_share", "skipped_share"),
        "update over weight": ("update_ratio/*",),
        "gradient norm": ("grad_norm/*",),
        "entropy of attention, nats": ("attention_entropy/*",),
        "largest logits": ("attention_logit", "output_logit"),
    },
    "Is it fast?": {
        "tokens per second": ("tokens_per_second",),
        "model FLOPs utilization": ("mfu",),
        "seconds of a step, predicted and measured": ("step_seconds", "expected_step_seconds"),
        "where they go": ("step_seconds/*",),
    },
    "Is it whole?": {
        "goodput, and where the rest went": ("goodput/step", "goodput/(?!restarts)*"),
        "restarts, rewinds": ("goodput/restarts", "rewinds"),
        "memory of a device, predicted and measured": ("memory_bytes", "expected_memory_bytes"),
        "saves": ("saves", "saves_failed", "saves_skipped"),
    },
}


def layout() -> summary_pb2.Summary:
    """The page of custom scalars."""
    found = layout_pb2.Layout(
        category=[
            layout_pb2.Category(
                title=question,
                chart=[
                    layout_pb2.Chart(
                        title=title, multiline=layout_pb2.MultilineChartContent(tag=[_pattern(name) for name in names])
                    )
                    for title, names in charts.items()
                ],
            )
            for question, charts in _CHARTS.items()
        ]
    )
    summary = summary_pb2.Summary()
    summary.value.add(
        tag=custom_scalars.CONFIG_SUMMARY_TAG,
        metadata=custom_scalars.create_summary_metadata(),
        tensor=tensor_util.make_tensor_proto(found.SerializeToString()),
    )
    return summary


def _pattern(name: str) -> str:
    whole, _, part = name.partition("/")
    if not part.endswith("*"):
        return f"^{re.escape(tag(name))}$"
    return f"^{re.escape(tag(whole + '/x').removesuffix('x'))}{part.removesuffix('*')}"


def compared(leaves: Mapping[str, Any], name: str) -> list[summary_pb2.Summary]:
    """What the page of hparams compares of a run, and what came of it. Those with one name are one row of it."""
    sections = ("run.seed", "model.", "optim.", "train.")
    values = {
        key: value if isinstance(value, bool | int | float | str) else _spelled(value)
        for key, value in leaves.items()
        if key.startswith(sections)
    }
    results = ("loss", "heldout_loss", "heldout_bits_per_byte", "tokens_per_second", "mfu", "tokens")
    metrics = [hparams_plugin.Metric(tag(one), display_name=one) for one in results]
    return [
        hparams_plugin.hparams_config_pb([hparams_plugin.HParam(key) for key in values], metrics),
        hparams_plugin.hparams_pb(values, trial_id=name),
    ]


def _spelled(value: Any) -> str:
    return "none" if value is None else repr(value)
