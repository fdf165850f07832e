"""The best weights of a training, by a value of each epoch."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn


class BestWeights:
    """The weights of the best validation value so far, on the host, and when to stop waiting for a better one.

    ``patience``: how many values in a row may fail to improve; None never stops. Smaller is better. A value that is
    not finite never counts as best.
    """

    def __init__(self, model: nn.Module, *, patience: int | None) -> None:
        self._model = model
        self.patience = patience
        self.best_value = math.inf
        self.best_index: int | None = None
        self.waited = 0
        self._count = 0
        self._weights: dict[str, Tensor] = {}

    def update(self, value: float) -> bool:
        """Takes the next validation value; True when it is time to stop."""
        index, self._count = self._count, self._count + 1
        if math.isfinite(value) and value < self.best_value:
            self.best_value, self.best_index, self.waited = value, index, 0
            self._weights = {k: v.detach().to("cpu", copy=True) for k, v in self._model.state_dict().items()}
            return False
        self.waited += 1
        return self.patience is not None and self.waited >= self.patience

    def restore(self) -> None:
        """Puts the best weights into the model; without any finite value the model stays as it is."""
        if self._weights:
            self._model.load_state_dict(self._weights)

    def state(self) -> dict[str, Any]:
        """What resuming needs besides ``weights``, as plain numbers."""
        return {
            "best_value": self.best_value if math.isfinite(self.best_value) else None,
            "best_index": self.best_index,
            "waited": self.waited,
            "count": self._count,
        }

    def weights(self) -> dict[str, Tensor]:
        return dict(self._weights)

    def load_state(self, state: dict[str, Any], weights: dict[str, Tensor]) -> None:
        best = state["best_value"]
        self.best_value = math.inf if best is None else best
        self.best_index, self.waited, self._count = state["best_index"], state["waited"], state["count"]
        self._weights = dict(weights)
