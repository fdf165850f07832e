"""The modules that the engine is tested on, traced: to the byte, or refused for a reason that is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from samegrad.declared import declare
from samegrad.errors import CannotTrace
from samegrad.measure import cuda_dispatch, shared_storages, trace_reading
from samegrad.measure.trace import plainly, trace_step

from ..exact import batchnorm_zoo
from ..exact.module_zoo import BY_PARTS, BY_ROWS
from ..exact.test_module_zoo import batch, forward, loss_on, seeded
from .traced import counted_peaks

NEED_VALUES = {
    "experts without a limit", "a sum over rows", "a loop as long as the row says", "experts with a limit",
    "a deque of averages", "sparse embedding",
}  # fmt: skip
# Its CPU kernel makes a count of 8 bytes more than its shapes say.
NEARLY = {"embedding bag": 8, "embedding bag with offsets": 8}

Made = Callable[[], tuple[nn.Module, Any, dict[str, Any]]]


def by_name(make: Callable[[], nn.Module]) -> Made:
    return lambda: (make(), batch(), {"loss_fn": loss_on("mse"), "forward": forward})


def with_batchnorm(name: str) -> Made:
    def made() -> tuple[nn.Module, Any, dict[str, Any]]:
        model, rows = batchnorm_zoo.made(name)
        return model, rows, {"loss_fn": lambda outputs, _: batchnorm_zoo.row_loss(outputs)}

    return made


ZOO: dict[str, Made] = {
    **{name: by_name(make) for name, make in BY_ROWS.items()},
    **{name: by_name(coupled.make) for name, coupled in BY_PARTS.items()},
    **{name: with_batchnorm(name) for name in batchnorm_zoo.NETWORKS},
}


@pytest.mark.parametrize("name", ZOO)
def test_a_module_is_traced_to_the_byte_or_refused(name: str) -> None:
    seeded(0)
    model, rows, options = ZOO[name]()
    weights = list(model.parameters())
    declared = declare(model, optimizer=torch.optim.SGD(weights, 0.01, momentum=0.9) if weights else None, **options)
    if name in NEED_VALUES:
        with pytest.raises(CannotTrace, match="values"):
            trace_step(declared, rows, device="cpu")
        return
    trace = trace_step(declared, rows, device="cpu")
    traced = [trace_reading.peak_bytes(trace, step=step) for step in (0, 1)]
    counted = counted_peaks(declared, rows, plainly())
    assert [c - t for c, t in zip(counted, traced)] == [NEARLY.get(name, 0)] * 2


def test_a_loss_counted_by_its_shape_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_dispatch, "_EVERYWHERE", shared_storages.STAND_INS)
    model, rows, options = by_name(next(iter(BY_ROWS.values())))()
    declared = declare(model, **options)
    trace = trace_step(declared, rows, device="cpu")
    traced = [trace_reading.peak_bytes(trace, step=step) for step in (0, 1)]
    assert counted_peaks(declared, rows, plainly()) != traced
