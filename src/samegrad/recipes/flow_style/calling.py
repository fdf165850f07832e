"""How the flow is called on a batch or some of its rows: plainly, under autocast, compiled."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from samegrad.recipes._recipe.precision import autocast, narrow_dtype

from .data import StyleBatch
from .model import LGTUNet, Styled


class Calling:
    """``calling(model, batch)`` styles the batch's rows under the autocast that ``dtype`` names, if it names one."""

    def __init__(self, dtype: str = "float32") -> None:
        self.dtype = dtype

    def __call__(self, model: nn.Module, batch: StyleBatch) -> Styled:
        with autocast(narrow_dtype(self.dtype), batch.noised.device):
            return self._call(model, batch)

    def counts(self) -> Mapping[str, float]:
        """What compiling came to, by name; empty where nothing is compiled."""
        return {}

    def _call(self, model: nn.Module, batch: StyleBatch) -> Styled:
        styled: Styled = model(batch.noised, batch.start, batch.target_style, batch.dropped)
        return styled


class CompiledCalling(Calling):
    """The same with the velocity network compiled; the model itself is not wrapped, so its state keeps its names.

    While somebody looks into the network by hooks it runs as written: every other set of hooks would be compiled anew.
    ``recompile_limit`` is dynamo's, for these calls only.
    """

    def __init__(
        self, dtype: str, network: LGTUNet, *, mode: str, fullgraph: bool, recompile_limit: int
    ) -> None:
        super().__init__(dtype)
        self._compiled = torch.compile(network, mode=mode, fullgraph=fullgraph)
        self._recompile_limit = recompile_limit
        self._before = _counted()

    def counts(self) -> Mapping[str, float]:
        return {name: count - self._before[name] for name, count in _counted().items()}

    def _call(self, model: nn.Module, batch: StyleBatch) -> Styled:
        if _looked_into(model):
            return super()._call(model, batch)
        with torch._dynamo.config.patch(recompile_limit=self._recompile_limit):
            styled: Styled = model(
                batch.noised, batch.start, batch.target_style, batch.dropped, network=self._compiled
            )
        return styled


def _looked_into(model: nn.Module) -> bool:
    return any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())


def _counted() -> dict[str, int]:
    """Dynamo's own counts in this process."""
    from torch._dynamo.utils import counters

    return {
        "compiled_graphs": int(counters["stats"]["unique_graphs"]),
        "graph_breaks": sum(int(count) for count in counters["graph_break"].values()),
    }
