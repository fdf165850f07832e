"""Sums of absolute gradients are of parameters only: a number that another tensor gets later mixes nothing in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import samegrad as sg
from samegrad.exact import stage_run
from samegrad.exact.chunk_map import ChunkMap, Magnitudes

from ..contract.lever_zoo import forced, normalised
from ..contract.plain import spread

Patch = pytest.MonkeyPatch


def sizes_noted(monkeypatch: Patch) -> dict[int, set[torch.Size]]:
    """The shapes that are added up under each number while a step with BatchNorm in lockstep is verified."""
    shapes: dict[int, set[torch.Size]] = {}
    right = Magnitudes.add

    def add(self: Magnitudes, shared: int, size: Tensor | None) -> None:
        if size is not None:
            shapes.setdefault(shared, set()).add(size.shape)
        right(self, shared, size)

    monkeypatch.setattr(Magnitudes, "add", add)
    model, batch = normalised(torch.float64, 0.0)
    step = forced(model, spread, exact_batchnorm={"rows": 5})
    layout = step.declared.layout(batch)
    step.split_for(batch, layout).keeping_magnitudes().totals(batch, layout, step.sizes_for(batch))
    assert sum(len(found) for found in shapes.values()) >= 2
    return shapes


def test_each_number_is_one_parameters(monkeypatch: Patch) -> None:
    shapes = sizes_noted(monkeypatch)
    # Two BatchNorm layers and two convolutions, a weight and a bias of each; the head has no chunks of its own.
    assert len(shapes) <= 10 and all(len(found) == 1 for found in shapes.values())


def test_planted_numbers_of_statistics_are_seen(monkeypatch: Patch) -> None:
    right = ChunkMap.pulled_back

    def wrong(self: ChunkMap, inputs: Any, cotangents: Any, wanted: Any, ids: Any) -> Any:
        return right(self, inputs, cotangents, wanted, [7 if number is None else number for number in ids])

    monkeypatch.setattr(ChunkMap, "pulled_back", wrong)
    assert stage_run.ChunkMap is ChunkMap
    with pytest.raises((AssertionError, RuntimeError)):
        test_each_number_is_one_parameters(monkeypatch)


def test_verifying_in_lockstep_is_the_same_every_time() -> None:
    model, batch = normalised(torch.float32, 0.0)
    step = forced(model, spread, exact_batchnorm={"rows": 5}, autocast={})
    assert all(sg.verify_step(step, batch).same for _ in range(8))
