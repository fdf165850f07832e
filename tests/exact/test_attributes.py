"""State in attributes: what is seen to change, what is not, and what comes back."""

from __future__ import annotations

import gc
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


# Held, put in its place, and whether that is a change.
REPLACED: dict[str, tuple[Any, Any, bool]] = {
    "a number": (1, 2, True),
    "the same number": (1000, int("1000"), False),
    "not a number": (float("nan"), float("nan"), False),
    "a switch": (True, False, True),
    "nothing": (None, 0, True),
    "a tuple": ((3, 3), (3, 1), True),
    "the same tuple": ((3, 3), tuple(int(digit) for digit in "33"), False),
    "a tuple of a list": ((3, [3]), (3, [4]), True),
}


@pytest.mark.parametrize("name", REPLACED)
def test_what_is_put_in_the_place_of_a_value_is_seen_and_taken_out_again(name: str) -> None:
    before, now, changes = REPLACED[name]
    module = nn.Sequential(Holder(before))
    state = ModuleState([module])
    module[0].held = now
    assert state.changed() == (["0.held"] if changes else [])
    state.restore()
    assert module[0].held is before and state.changed() == []


def test_a_snapshot_makes_few_objects_that_pythons_collector_goes_through() -> None:
    """Every step makes one; thousands of small objects a step have it go through all of the process every few steps."""
    module = nn.Sequential(*(nn.Sequential(nn.Conv2d(2, 2, 3), nn.ReLU(), nn.Flatten()) for _ in range(50)))
    gc.collect()
    gc.disable()
    try:
        before = len(gc.get_objects())
        state = ModuleState([module])
        made = len(gc.get_objects()) - before
    finally:
        gc.enable()
    assert state.changed() == [] and made < 5 * len(list(module.modules()))
