"""State of a part of the model, put back for a second run and left alone by it."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from samegrad.exact.part_state import PartPlaces, PartState


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(3))
        self.register_buffer("constant", torch.ones(2))
        self.norm = nn.BatchNorm1d(2)
        self.calls, self.moving, self.table = 0, torch.zeros(2), np.zeros(2)
        self.queue: deque[float] = deque([1.0, 2.0], maxlen=2)
        self.named = {"seen": [torch.zeros(()), 0]}

    def write(self) -> None:
        self.counts += 1
        self.norm(torch.randn(4, 2))
        self.calls += 1
        self.moving = self.moving + 1
        self.table += 1
        self.queue.append(3.0)
        self.named["seen"][0].add_(1)
        self.named["seen"][1] += 1
        self.made = self.moving

    def read(self) -> dict[str, Any]:
        return {
            "counts": self.counts.tolist(), "mean": self.norm.running_mean.tolist(), "calls": self.calls,
            "moving": self.moving.tolist(), "table": self.table.tolist(), "queue": list(self.queue),
            "named": [float(value) for value in self.named["seen"]], "made": hasattr(self, "made"),
        }  # fmt: skip


def test_a_second_run_sees_what_the_first_saw_and_leaves_no_trace() -> None:
    part = Holder()
    before = part.read()
    state = PartState(PartPlaces(part))
    part.write()
    state.keep_changed()
    after, buffers = part.read(), dict(part.named_buffers())
    for _ in range(2):
        with state.standing():
            assert part.read() | {"made": False} == before
            part.write()
    assert part.read() == after
    assert all(buffer is buffers[name] for name, buffer in part.named_buffers())


def test_what_an_exception_interrupts_is_put_back() -> None:
    part = Holder()
    state = PartState(PartPlaces(part))
    part.write()
    state.keep_changed()
    after = part.read()
    with pytest.raises(ZeroDivisionError), state.standing():
        part.write()
        part.other = 1
        raise ZeroDivisionError
    assert part.read() == after and not hasattr(part, "other")


def test_only_what_changed_is_kept() -> None:
    part = Holder()
    state = PartState(PartPlaces(part))
    state.keep_changed()
    # BatchNorm in training mode writes without counting versions: it counts as changed.
    assert {id(holder) for holder, _, _ in state._kept} == {id(part.norm._buffers)}
