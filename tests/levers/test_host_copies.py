"""What comes back ahead of backward: in time, within its room, and let go of where nothing asks for it."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from samegrad.levers import _host_copies
from samegrad.levers._host_copies import Arriving, HostCopy, WayBack
from samegrad.levers._saved_tensors import SavedTensors
from samegrad.measure import copies_beside

Patch = pytest.MonkeyPatch
D = torch.float64
# Of each storage of a chain; no two are alike, so that they tell which one it is.
SIZES = [70, 30, 50, 20, 90, 10, 60, 40, 80, 35, 25, 55]


class Keeps(torch.autograd.Function):
    """The sum of its first input and of all of ``kept``, which it saves and whose sum its gradient is times."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *kept: Tensor) -> Tensor:
        ctx.save_for_backward(*kept)
        return x + sum(t.sum() for t in kept)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor | None, ...]:
        kept = ctx.saved_tensors
        return cotangent * sum(t.cos().sum() for t in kept), *([None] * len(kept))


@pytest.fixture
def course(monkeypatch: Patch) -> list[tuple[str, int]]:
    """What happens to storages, by how many entries of float64 they have: they come, or are asked for."""
    noted: list[tuple[str, int]] = []
    comes, asked = HostCopy.coming, HostCopy.brought_back

    def coming(self: HostCopy) -> Arriving:
        noted.append(("comes", self.size_bytes // 8))
        return comes(self)

    def brought_back(self: HostCopy, place: int) -> torch.UntypedStorage:
        noted.append(("asked", self.size_bytes // 8))
        return asked(self, place)

    monkeypatch.setattr(HostCopy, "coming", coming)
    monkeypatch.setattr(HostCopy, "brought_back", brought_back)
    return noted


@contextlib.contextmanager
def ahead_after_each(found: list[tuple[int, int]]) -> Iterator[list[WayBack]]:
    """Notes, after each time something was asked for, the bytes that are ahead and that may be."""
    ways: list[WayBack] = []
    right = WayBack.look_ahead_of

    def noted(self: WayBack, place: int) -> None:
        right(self, place)
        found.append((self.ahead_bytes, self.most_ahead_bytes))
        ways.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WayBack, "look_ahead_of", noted)
        yield ways


def kept_of(sizes: list[int]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size, dtype=D) for size in sizes]


def chain(x: Tensor, sizes: list[int] = SIZES) -> Tensor:
    for kept in kept_of(sizes):
        x = Keeps.apply(x, kept)
    return x.sum()


def leaf() -> Tensor:
    return torch.ones(3, dtype=D, requires_grad=True)


def on_host(forward: Any, x: Tensor) -> Any:
    with SavedTensors(0, [x]).travelling():
        return forward(x)


def test_storages_come_before_they_are_asked_for_and_once(course: list[tuple[str, int]]) -> None:
    x = leaf()
    [expected] = torch.autograd.grad(chain(x), x)
    [ours] = torch.autograd.grad(on_host(chain, x), x)
    assert torch.equal(ours, expected)
    assert [size for what, size in course if what == "asked"] == SIZES[::-1]
    assert [size for what, size in course if what == "comes"] == SIZES[::-1]
    # Backward begins with the last, and nothing came ahead of it.
    ahead = [size for size in SIZES if course.index(("comes", size)) < course.index(("asked", size))]
    assert ahead == SIZES[:-1]


def test_what_is_ahead_stays_within_its_room_and_uses_it() -> None:
    found: list[tuple[int, int]] = []
    y = on_host(chain, leaf())
    with ahead_after_each(found) as ways:
        y.backward()
    room = 8 * (90 + 80)
    assert {most for _, most in found} == {room} and max(ahead for ahead, _ in found) <= room
    # As many of those before it as have room, after the first that was asked for.
    assert found[0][0] == 8 * (25 + 35 + 80) and found[-1][0] == 0 and ways[0].ahead_bytes == 0


def test_no_more_than_so_many_are_ahead() -> None:
    found: list[tuple[int, int]] = []
    y = on_host(lambda x: chain(x, [500, *[1] * 40]), leaf())
    with ahead_after_each(found):
        y.backward()
    assert max(ahead for ahead, _ in found[:20]) == 8 * _host_copies.MOST_AHEAD


def test_planted_room_without_end_is_caught(monkeypatch: Patch) -> None:
    monkeypatch.setattr(WayBack, "_has_room", lambda *_: True)
    for test in (test_what_is_ahead_stays_within_its_room_and_uses_it, test_no_more_than_so_many_are_ahead):
        with pytest.raises(AssertionError):
            test()


def test_planted_way_back_that_looks_nowhere_is_caught(monkeypatch: Patch) -> None:
    monkeypatch.setattr(WayBack, "look_ahead_of", lambda *_: None)
    with pytest.raises(AssertionError):
        test_what_is_ahead_stays_within_its_room_and_uses_it()


def test_a_storage_with_several_uses_comes_once(course: list[tuple[str, int]]) -> None:
    def forward(x: Tensor) -> Tensor:
        for kept in kept_of(SIZES):
            # Nothing holds it between one use and the next.
            x = Keeps.apply(Keeps.apply(x, kept), kept[::2])
        return x.sum()

    x = leaf()
    [expected] = torch.autograd.grad(forward(x), x)
    [ours] = torch.autograd.grad(on_host(forward, x), x)
    assert torch.equal(ours, expected)
    assert [size for what, size in course if what == "comes"] == SIZES[::-1]
    assert [size for what, size in course if what == "asked"] == [size for size in SIZES[::-1] for _ in range(2)]


def test_planted_storages_that_are_not_held_for_their_next_use_are_caught(
    course: list[tuple[str, int]], monkeypatch: Patch
) -> None:
    monkeypatch.setattr(HostCopy, "there", lambda self: None)
    with pytest.raises(AssertionError):
        test_a_storage_with_several_uses_comes_once(course)


@pytest.mark.parametrize("seed", range(6))
def test_another_order_of_need_is_right_too(seed: int, course: list[tuple[str, int]]) -> None:
    """Nodes that keep several storages each, of which some are shared, in a graph that joins at random."""
    choose = torch.Generator().manual_seed(seed)

    def pick(count: int) -> int:
        return int(torch.randint(count, (), generator=choose))

    joins = [(pick(k + 1), pick(k + 1), [pick(12) for _ in range(1 + pick(4))]) for k in range(14)]

    def forward(x: Tensor) -> Tensor:
        storages = kept_of(SIZES)
        made = [x]
        for one, other, kept in joins:
            made.append(Keeps.apply(made[one] * 0.5 + made[other], *[storages[k] for k in kept]))
        return made[-1].sum() + made[pick(len(made))].sum()

    x, picked = leaf(), choose.get_state()
    [expected] = torch.autograd.grad(forward(x), x)
    choose.set_state(picked)
    found: list[tuple[int, int]] = []
    y = on_host(forward, x)
    with ahead_after_each(found) as ways:
        [ours] = torch.autograd.grad(y, x)
    assert torch.equal(ours, expected)
    assert all(ahead <= most for ahead, most in found)
    assert not ways or ways[-1].ahead_bytes == 0


def test_planted_neighbour_is_caught(monkeypatch: Patch) -> None:
    """Storages handed out in the order in which they came, whatever was asked for."""
    monkeypatch.setattr(
        WayBack, "taken", lambda self, place: self._ahead.pop(min(self._ahead)) if self._ahead else None
    )
    with pytest.raises((AssertionError, RuntimeError)):
        for seed in range(6):
            test_another_order_of_need_is_right_too(seed, [])


# What nothing asks for


def two_branches(x: Tensor) -> tuple[Tensor, Tensor]:
    """The second is saved in the midst of the first, whose backward never asks for it."""
    first, second = x, x
    for k, kept in enumerate(kept_of(SIZES + SIZES)):
        if 10 <= k < 14:
            second = Keeps.apply(second, kept)
        else:
            first = Keeps.apply(first, kept)
    return first.sum(), second.sum()


def came_back(monkeypatch: Patch) -> list[weakref.ref[torch.UntypedStorage]]:
    storages = []
    right = HostCopy.coming

    def noted(self: HostCopy) -> Arriving:
        arriving = right(self)
        storages.append(weakref.ref(arriving.storage))
        return arriving

    monkeypatch.setattr(HostCopy, "coming", noted)
    return storages


def test_what_a_backward_does_not_ask_for_is_let_go_of(monkeypatch: Patch) -> None:
    x = leaf()
    [expected] = torch.autograd.grad(two_branches(x)[0], x)
    storages = came_back(monkeypatch)
    first, second = on_host(two_branches, x)
    found: list[tuple[int, int]] = []
    held: list[int] = []
    right = Keeps.backward

    def counting(ctx: Any, cotangent: Tensor) -> Any:
        held.append(sum(ref() is not None for ref in storages))
        return right(ctx, cotangent)

    monkeypatch.setattr(Keeps, "backward", staticmethod(counting))
    with ahead_after_each(found):
        [ours] = torch.autograd.grad(first, x, retain_graph=True)
    assert torch.equal(ours, expected)
    assert len(storages) > 20 and all(ahead <= most for ahead, most in found)
    # Not held until the end: at the last of the chain there is nothing ahead but what is asked for.
    assert held[-1] <= 1 and [ref for ref in storages if ref() is not None] == []
    [again] = torch.autograd.grad(second, x)
    [expected] = torch.autograd.grad(two_branches(x)[1], x)
    assert torch.equal(again, expected)


def test_when_backward_ends_or_fails_nothing_is_ahead(monkeypatch: Patch) -> None:
    x = leaf()
    storages = came_back(monkeypatch)

    def fails(cotangent: Tensor) -> None:
        raise RuntimeError("planted")

    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        before = chain(x)
        before.register_hook(fails)
        middle = x * 1
        return before + chain(middle), middle

    y, middle = on_host(forward, x)
    # It ends where there are more to come.
    torch.autograd.grad(y, middle, retain_graph=True)
    assert len(storages) > len(SIZES) and [ref for ref in storages if ref() is not None] == []
    with pytest.raises(RuntimeError, match="planted"):
        torch.autograd.grad(y, x)
    del y, middle
    gc.collect()
    assert [ref for ref in storages if ref() is not None] == []


def test_planted_way_back_without_an_end_is_caught(monkeypatch: Patch) -> None:
    monkeypatch.setattr(WayBack, "_end", lambda self: None)
    with pytest.raises(AssertionError):
        test_when_backward_ends_or_fails_nothing_is_ahead(monkeypatch)


def test_a_second_backward_looks_ahead_anew(course: list[tuple[str, int]]) -> None:
    x = leaf()
    y = on_host(chain, x)
    [first] = torch.autograd.grad(y, x, retain_graph=True)
    once = list(course)
    course.clear()
    [second] = torch.autograd.grad(y, x)
    assert torch.equal(first, second) and course == once


def test_who_looks_at_a_graph_brings_back_nothing_else(course: list[tuple[str, int]]) -> None:
    x = leaf()
    y = on_host(lambda x: x.exp().sin().exp(), x)
    assert torch.equal(y.grad_fn._saved_result, y)
    assert torch.equal(y.grad_fn.next_functions[0][0]._saved_self, x.exp())
    assert [size for what, size in course if what == "comes"] == [3]


def test_copies_on_the_host_go_with_what_was_packed(monkeypatch: Patch) -> None:
    copies: list[weakref.ref[HostCopy]] = []
    right = HostCopy._send

    def noted(self: HostCopy, there: Tensor) -> None:
        copies.append(weakref.ref(self))
        right(self, there)

    monkeypatch.setattr(HostCopy, "_send", noted)
    y = on_host(chain, leaf())
    assert len(copies) == len(SIZES)
    y.backward()
    assert [ref for ref in copies if ref() is not None] == []


# Streams, by one that only notes what it waits for


class Noting:
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.waited: list[object] = []

    def wait_event(self, event: object) -> None:
        self.waited.append(event)


def test_the_computation_waits_for_what_nobody_asked_for_before_its_memory_is_free() -> None:
    stream, event = Noting(), object()
    arriving = Arriving(torch.zeros(3).untyped_storage(), stream, event)  # type: ignore[arg-type]  # stand-ins
    del arriving
    assert stream.waited == [event]


def test_and_once_for_what_it_asked_for() -> None:
    stream, event = Noting(), object()
    arriving = Arriving(torch.zeros(3).untyped_storage(), stream, event)  # type: ignore[arg-type]  # stand-ins
    arriving.wait()
    del arriving
    assert stream.waited == [event]


def test_seconds_are_predicted_for_the_room_that_there_is() -> None:
    from samegrad.levers import _saved_tensors

    assert copies_beside.MOST_AHEAD == _host_copies.MOST_AHEAD
    assert copies_beside.MOST_LEAVING == _saved_tensors._MOST_LEAVING
