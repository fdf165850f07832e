"""State in attributes: what is seen to change, what is not, and what comes back."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from samegrad.exact.undisturbed import ModuleState


class Holder(nn.Module):
    def __init__(self, held: Any) -> None:
        super().__init__()
        self.held = held


def _set(index: Any, value: Any) -> Callable[[Any], None]:
    return lambda held: held.__setitem__(index, value)


# What is held, and what is done to it in place.
CHANGED: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "an entry of a list": (lambda: [1.0, 2.0], _set(0, 3.0)),
    "a tensor of a list, replaced": (lambda: [torch.ones(2)], _set(0, torch.zeros(2))),
    "a tensor of a list, in place": (lambda: [torch.ones(2)], lambda held: held[0].zero_()),
    "a list that grows": (list, lambda held: held.append(None)),
    "an entry of a dict": (lambda: {"a": 1}, _set("a", 2)),
    "a key of a dict": (lambda: OrderedDict(a=1), lambda held: held.update(b=held.pop("a"))),
    "a list in a dict": (lambda: {"a": [1, 2]}, lambda held: held["a"].reverse()),
    "a deque": (lambda: deque([1, 2], maxlen=2), lambda held: held.append(3)),
    "a set": (lambda: {1, 2}, lambda held: held.symmetric_difference_update({2, 3})),
    "an array": (lambda: np.ones(3), _set(1, np.nan)),
    "a tensor": (lambda: torch.ones(3), lambda held: held.mul_(2)),
    "a tensor in a tuple": (lambda: (torch.ones(3), 1), lambda held: held[0].mul_(2)),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_change_is_seen_and_undone_in_the_same_object(name: str) -> None:
    make, change = CHANGED[name]
    module = nn.Sequential(Holder(make()))
    held, state = module[0].held, ModuleState([module])
    assert state.changed() == []
    change(held)
    assert state.changed() == ["0.held"]
    state.restore()
    assert state.changed() == [] and module[0].held is held
    torch.testing.assert_close(_plain(held), _plain(make()))


def _plain(held: Any) -> Any:
    return sorted(held) if isinstance(held, set) else list(held) if isinstance(held, deque) else held


# What is held, and what happens to it that is no change.
THE_SAME: dict[str, tuple[Any, Callable[[Any], None]]] = {
    "the same number again": ([1.0, float("nan")], _set(1, float("nan"))),
    "the same tensor, made again": ({"mask": torch.ones(3)}, _set("mask", torch.ones(3))),
    "nested, made again": ([[1, (2.0, torch.ones(1))]], _set(0, [1, (2.0, torch.ones(1))])),
    "other weights in a list of them": ([nn.Parameter(torch.ones(2))], _set(0, nn.Parameter(torch.ones(2)))),
    "an object of another kind": ([object()], _set(0, object())),
    "the same array, written": (np.array([np.nan, 1.0]), _set(0, np.nan)),
}


@pytest.mark.parametrize("name", THE_SAME)
def test_what_is_made_again_is_no_change(name: str) -> None:
    held, change = THE_SAME[name]
    module = Holder(held)
    state = ModuleState([module])
    change(held)
    assert state.changed() == []


def test_a_buffer_that_is_written_and_stays_the_same_is_written_and_not_changed() -> None:
    module = nn.Module()
    module.register_buffer("kept", torch.ones(3))
    state = ModuleState([module])
    module.kept.mul_(1)
    assert state.changed_places() == [] and state.written_places() == [("", "kept")]
    state.restore()
    assert state.written_places() == []
    module.kept.add_(1)
    assert state.written_places() == state.changed_places() == [("", "kept")]
    state.restore()
    assert state.written_places() == []
