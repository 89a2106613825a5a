"""How healthy the steps between two logged ones were, and each depth of the model at the last."""

from collections.abc import Mapping

import numpy as np

from lm.experiment import Config
from lm.train.groups import groups_of


class Health:
    """Counts what every step tells and only some log."""

    def __init__(self, config: Config):
        self._clip_norm, self._depths = config.optim.clip_norm, groups_of(config.model).depths
        self._steps = self._clipped = self._skipped = 0

    def see(self, values: Mapping[str, float], *, applied: bool) -> None:
        """The next step."""
        self._steps += 1
        self._skipped += not applied
        self._clipped += applied and self._clip_norm is not None and values["grad_norm"] >= self._clip_norm

    def values(self, depth_norms: np.ndarray) -> dict[str, float]:
        """For metrics.jsonl; `depth_norms` [3, depths] of the last step, of gradient, parameters and update."""
        steps = max(self._steps, 1)
        found = {"clipped_share": self._clipped / steps, "skipped_share": self._skipped / steps}
        self._steps = self._clipped = self._skipped = 0
        gradients, weights, updates = np.asarray(depth_norms, np.float64)
        found["update_ratio"] = float(np.linalg.norm(updates) / np.maximum(np.linalg.norm(weights), 1e-30))
        ratios = updates / np.maximum(weights, 1e-30)
        found |= {f"grad_norm/{name}": float(norm) for name, norm in zip(self._depths, gradients, strict=True)}
        return found | {f"update_ratio/{name}": float(ratio) for name, ratio in zip(self._depths, ratios, strict=True)}
