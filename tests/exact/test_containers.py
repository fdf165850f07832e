"""Containers of users' own classes are found as they were, whatever their methods mean."""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.exact import containers
from samegrad.exact.attributes import Attribute

from ..contract.plain import cross_entropy, labelled


class ByClass(dict):
    """Files what is put under an object by the name of the object's class, as a registry of transformers does."""

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(type(key).__name__, value)


class Doubling(list):
    def append(self, value: Any) -> None:
        super().append(2 * value)

    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError("written once")

    def __iter__(self) -> Any:
        return reversed(self)


class Lower(set):
    def add(self, value: str) -> None:
        super().add(value.lower())

    def update(self, *others: Any) -> None:
        raise TypeError("one by one")


class Recent(deque):
    """The last three."""

    def __init__(self) -> None:
        super().__init__(maxlen=3)

    def extend(self, values: Any) -> None:
        raise TypeError("one by one")


def by_class() -> Any:
    made = ByClass(kept=1)
    made[nn.Linear(1, 1)] = {"outputs": [1, 2]}
    return made


def doubling() -> Any:
    made = Doubling()
    for number in (1, 2, 3):
        made.append(number)
    return made


def lower() -> Any:
    made = Lower()
    made.add("A")
    return made


def recent() -> Any:
    made = Recent()
    for number in range(5):
        made.append(number)
    return made


def ordered() -> Any:
    made = OrderedDict(a=1, b=2, c=3)
    made.move_to_end("a")
    return made


def grouped() -> Any:
    made = defaultdict(list)
    made["a"].append(1)
    return made


MAKE: list[Callable[[], Any]] = [
    by_class, doubling, lower, recent, ordered, grouped, lambda: Counter("aab"), lambda: [1, [2]], lambda: {1, 2},
    lambda: deque([1, 2], maxlen=2),
]  # fmt: skip
EVERY_KIND = pytest.mark.parametrize("make", MAKE, ids=lambda make: type(make()).__name__)
WRITES: dict[type, Callable[[Any], object]] = {
    OrderedDict: lambda value: OrderedDict.__setitem__(value, "new", 9),
    list: lambda value: list.append(value, 9), dict: lambda value: dict.__setitem__(value, "new", 9),
    set: lambda value: set.add(value, "new"), deque: lambda value: deque.append(value, 9),
}  # fmt: skip


def write_into(value: Any) -> None:
    next(write for kind, write in WRITES.items() if isinstance(value, kind))(value)


@EVERY_KIND
def test_what_is_unchanged_is_the_same_and_stays_so(make: Callable[[], Any]) -> None:
    value, expected = make(), containers.plain(make())
    kept = Attribute.of(value)
    assert kept.same(value)
    assert kept.restored() is value
    assert containers.plain(value) == expected and list(containers.plain(value)) == list(expected)


@EVERY_KIND
def test_what_was_written_is_found_and_put_back(make: Callable[[], Any]) -> None:
    value, expected = make(), containers.plain(make())
    kept = Attribute.of(value)
    write_into(value)
    assert not kept.same(value)
    kept.restored()
    assert containers.plain(value) == expected and list(containers.plain(value)) == list(expected)


@EVERY_KIND
def test_a_twin_is_of_the_same_class_and_apart(make: Callable[[], Any]) -> None:
    value, expected = make(), containers.plain(make())
    twin = containers.twin(value)
    assert type(twin) is type(value) and containers.plain(twin) == expected
    if isinstance(value, deque):
        assert twin.maxlen == value.maxlen
    if isinstance(value, defaultdict):
        assert twin.default_factory is value.default_factory
    write_into(twin)
    assert containers.plain(value) == expected


REGISTRY = ByClass()


class Registered(nn.Module):
    """Adds a term to its outputs where its class is found in a registry that its code holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.layer(x)
        return outputs + outputs.square() if type(self).__name__ in REGISTRY else outputs


def test_planning_leaves_a_registry_that_the_forward_reads_as_it_was() -> None:
    model = Registered().double()
    REGISTRY[model] = ["term"]
    batch = labelled(13, torch.float64)
    plain = model(batch[0])

    def forward(network: nn.Module, rows: Any) -> Tensor:
        assert type(model).__name__ in REGISTRY
        outputs: Tensor = network(rows[0])
        return outputs

    with sg.Step(model, cross_entropy, forward=forward, budget="1MiB") as step:
        step.prepare(batch)
        assert dict(REGISTRY) == {"Registered": ["term"]}
        assert torch.equal(model(batch[0]), plain)
        assert sg.verify_step(step, batch).same
        assert dict(REGISTRY) == {"Registered": ["term"]}
