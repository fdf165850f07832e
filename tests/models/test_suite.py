"""The checks that all models pass, on steps with a fault planted: each must fail its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samegrad.exact import regions, split
from samegrad.exact.module_hooks import ModuleHooks
from samegrad.measure.recorder import Recorder

from . import suite
from .suite import Case
from .test_own_models import CASES

GRAPHS, LANGUAGE = CASES["graphs"], CASES["LSTM layers"]


def a_little_more(patch: pytest.MonkeyPatch) -> None:
    """Every gradient of a split step grows by a billionth."""
    taken = split.SplitStep.totals

    def totals(self: Any, *args: Any, **options: Any) -> Any:
        found = taken(self, *args, **options)
        with torch.no_grad():
            for total in found.totals:
                if total is not None:
                    total *= 1 + 1e-9
        return found

    patch.setattr(split.SplitStep, "totals", totals)


def another_tensor_again(patch: pytest.MonkeyPatch) -> None:
    filled = regions.Saved.filled

    def another(self: regions.Saved, value: Tensor) -> None:
        filled(self, value * (1 + 1e-9) if value.is_floating_point() else value)

    patch.setattr(regions.Saved, "filled", another)


def temporaries_that_stay(patch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    note = Recorder._note

    def keeping(self: Recorder, func: Any, *rest: Any) -> None:
        kept.append(rest[-1])
        note(self, func, *rest)

    patch.setattr(Recorder, "_note", keeping)


def hooks_that_stay(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ModuleHooks, "restore", lambda self: None)


class HooksItself(nn.Module):
    """The model of ``GRAPHS``, which hooks its head in its first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.graphs = GRAPHS.make()

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        if not getattr(self, "hooked", False):
            self.graphs.get_submodule("head").register_forward_hook(lambda *_: None)
            self.hooked = True
        scores: Tensor = self.graphs(x, edges)
        return scores


PLANTED: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], Case]] = {
    "ragged chunks are the plain step": (a_little_more, GRAPHS),
    "levers together are the whole step": (a_little_more, GRAPHS),
    "recomputed blocks are the plain step bit for bit": (another_tensor_again, GRAPHS),
    "followed to the byte": (temporaries_that_stay, GRAPHS),
    "measuring leaves everything as it was": (hooks_that_stay, dataclasses.replace(GRAPHS, make=HooksItself)),
}


@pytest.mark.parametrize("check", PLANTED)
def test_a_planted_fault_is_caught_by_its_check(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant, case = PLANTED[check]
    suite.CHECKS[check](case)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        suite.CHECKS[check](case)


WRONG: dict[str, Case] = {
    "the blocks are units": dataclasses.replace(GRAPHS, blocks=("layers.7",)),
    "followed on cuda or refused by name": dataclasses.replace(GRAPHS, not_traced="values"),
    "the head is found or refused by name": dataclasses.replace(LANGUAGE, head="layers.0"),
}


@pytest.mark.parametrize("check", WRONG)
def test_what_is_expected_and_does_not_come_is_caught(check: str) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        suite.CHECKS[check](WRONG[check])


def test_every_check_has_a_twin() -> None:
    assert PLANTED.keys() | WRONG.keys() == suite.CHECKS.keys()
