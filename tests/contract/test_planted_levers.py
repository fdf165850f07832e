"""Levers that are wrong, planted: ``verify_step`` says DIFFERS and names the lever, in whatever plan it is taken.

Nothing here is told to the verifier: what is exchanged is the lever's own code, while a ``Step`` runs it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.exact import chunk_map, recomputed, regions
from samegrad.levers import Execution, _saved_tensors, autocast, find_levers, layout
from samegrad.levers._state_pieces import Piece
from samegrad.levers.autocast import Autocast
from samegrad.records import Same, Verdict
from samegrad.verify.kept import PUT_BACK
from samegrad.verify.tiers import KEPT_BITS, PLAIN_TWICE

from ..crossed import crossed
from .lever_zoo import forced, stale
from .plain import cross_entropy, left_alone, spread
from .test_pairs import KNOBS, made

Patch = pytest.MonkeyPatch
LEVERS = find_levers()
PASSES = pytest.mark.parametrize("loss_fn", [cross_entropy, spread], ids=["one pass", "two passes"])
# Beside each of these a wrong lever must be found.
COMPANY: dict[str, list[str]] = {
    "alone": [], "split": ["split_rows"], "recomputed": ["recompute"], "rounded": ["autocast"],
    "split and rounded": ["split_rows", "autocast"],
}  # fmt: skip


def verified(kind: str, loss_fn: Any, plant: Callable[[], None], *names: str, **knobs: dict[str, Any]) -> Verdict:
    """The verdict on a step that was right until ``plant`` was called. Nothing of the user's is changed by it."""
    model, batch = made(kind, 0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    cross_entropy(model(batch[0]), batch).backward()
    optimizer.step()
    levers = {name: KNOBS[kind][name] for name in names} | knobs
    with forced(model, loss_fn, optimizer=optimizer, **levers) as step:
        right = sg.verify_step(step, batch)
        assert right.same and right.fault == "", [check for check in right.checks if not check.passed]
        plant()
        with left_alone(model, optimizer=optimizer):
            strides = [p.stride() for p in model.parameters()]
            verdict = sg.verify_step(step, batch)
            assert strides == [p.stride() for p in model.parameters()]
        return verdict


def failed(verdict: Verdict) -> set[str]:
    return {check.name for check in verdict.checks if not check.passed}


def assert_named(verdict: Verdict, lever: str) -> None:
    assert verdict.answer is Same.DIFFERS and verdict.found is None
    assert verdict.fault.startswith(f"lever {lever}: without it the step passes"), verdict.fault


def half_a_percent(lever: type, monkeypatch: Patch) -> None:
    """``lever`` as it is, but that the gradients are half a percent larger."""
    right = lever.apply

    @contextlib.contextmanager
    def wrong(self: Any, execution: Execution) -> Iterator[Execution]:
        with right(self, execution) as inner:
            loss_fn = inner.declared.loss_fn

            def larger(outputs: Any, batch: Any) -> Tensor:
                loss = loss_fn(outputs, batch)
                return loss + 0.005 * (loss - loss.detach())

            yield dataclasses.replace(inner, declared=dataclasses.replace(inner.declared, loss_fn=larger))

    monkeypatch.setattr(lever, "apply", wrong)


@PASSES
@pytest.mark.parametrize(
    ("name", "company"),
    crossed(["autocast", "layout", "offload_saved", "optimizer_state", "recompute", "host_rows"], COMPANY),
)
def test_a_lever_whose_gradients_are_half_a_percent_larger_is_named(
    name: str, company: str, loss_fn: Any, monkeypatch: Patch
) -> None:
    names = dict.fromkeys([name, *COMPANY[company]])
    verdict = verified("cnn", loss_fn, lambda: half_a_percent(LEVERS[name], monkeypatch), *names)
    assert_named(verdict, name)


CHUNKED = ("segments", "exact_batchnorm", "chunk_loss", "split_rows")


@pytest.mark.parametrize(("kind", "way"), [(kind, way) for kind in KNOBS for way in CHUNKED if way in KNOBS[kind]])
def test_so_is_one_that_puts_parts_in_chunks(kind: str, way: str, monkeypatch: Patch) -> None:
    assert_named(verified(kind, cross_entropy, lambda: half_a_percent(LEVERS[way], monkeypatch), way), way)


# Autocast


class Off:
    """Stands for the autocast of a first run, which a second one forgets."""

    was_on = False

    @classmethod
    def now(cls, device_types: Any) -> Any:
        cls.was_on = torch.is_autocast_enabled("cpu")
        return chunk_map.Autocast.now(device_types).off()


def forget_autocast(monkeypatch: Patch) -> None:
    """Blocks run again without it, and nobody looks at dtypes: what backward needs in bfloat16 is rounded to it."""
    right = regions.Saved.filled

    def narrowed(self: Any, value: Tensor) -> None:
        right(self, value.to(torch.bfloat16) if Off.was_on and value.dtype is torch.float32 else value)

    monkeypatch.setattr(recomputed, "Autocast", Off)
    monkeypatch.setattr(regions, "_look", lambda tensor: (tensor.shape, tensor.device))
    monkeypatch.setattr(regions.Saved, "filled", narrowed)


class Gated(nn.Module):
    """A block of which only products are saved."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.first(x)) * self.second(x)


@PASSES
@pytest.mark.parametrize("rows", [None, 5], ids=["whole", "split"])
def test_a_recomputation_that_forgets_autocast_is_named(rows: int | None, loss_fn: Any, monkeypatch: Patch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Gated(16), nn.Tanh(), nn.Linear(16, 3))
    batch = torch.randn(13, 16), torch.randint(0, 3, (13,))
    levers = {"autocast": {}, "recompute": {"blocks": ["0"]}} | ({"split_rows": {"rows": rows}} if rows else {})
    with forced(model, loss_fn, **levers) as step:
        assert sg.verify_step(step, batch).same
        forget_autocast(monkeypatch)
        verdict = sg.verify_step(step, batch)
    # It looks like the noise of bfloat16: only bits can tell. Neither lever is wrong without the other.
    assert failed(verdict) == {KEPT_BITS} and verdict.answer is Same.DIFFERS
    assert "levers recompute and autocast together: without one of them the step passes" in verdict.fault


@pytest.mark.parametrize("company", ["alone", "split", "recomputed"])
@pytest.mark.parametrize("kind", ["mlp", "transformer"])
def test_autocast_that_forgets_what_stays_in_full_precision_is_named(
    kind: str, company: str, monkeypatch: Patch
) -> None:
    def forgetful() -> None:
        monkeypatch.setattr(autocast, "_in_full_precision", lambda _, forward, args, kwargs: forward(*args, **kwargs))

    head = {"mlp": "6", "transformer": "3"}[kind]
    knobs = {"dtype": "bfloat16", "full_precision": [head]}
    verdict = verified(kind, cross_entropy, forgetful, *COMPANY[company], autocast=knobs)
    assert_named(verdict, "autocast")
    # The weights' gradients are within the noise of bfloat16.
    assert failed(verdict) <= {KEPT_BITS, PLAIN_TWICE, "which parameters have a gradient"}


def test_autocast_that_narrows_nothing_is_named(monkeypatch: Patch) -> None:
    @contextlib.contextmanager
    def nothing(self: Any, execution: Execution) -> Iterator[Execution]:
        yield execution

    verdict = verified("mlp", cross_entropy, lambda: monkeypatch.setattr(Autocast, "apply", nothing), "autocast")
    assert_named(verdict, "autocast")


# What waits on the host


@PASSES
@pytest.mark.parametrize(
    ("kind", "company"),
    crossed(KNOBS, COMPANY, where=lambda kind, company: set(COMPANY[company]) <= KNOBS[kind].keys()),
)
def test_a_stale_tensor_from_the_host_is_named(kind: str, company: str, loss_fn: Any, monkeypatch: Patch) -> None:
    saved, taken = _saved_tensors.SavedTensors, list[int]()

    def plant() -> None:
        monkeypatch.setattr(saved, "_copy_of", stale(saved._copy_of, taken))

    verdict = verified(kind, loss_fn, plant, *COMPANY[company], "offload_saved")
    if not taken:
        pytest.skip("no two tensors of one size travel")
    assert_named(verdict, "offload_saved")


@pytest.mark.parametrize("company", ["alone", "split"])
def test_a_tensor_that_comes_back_as_no_number_is_named_too(company: str, monkeypatch: Patch) -> None:
    saved = _saved_tensors.SavedTensors
    right = saved._copy_of

    def lost(self: Any, tensor: Tensor) -> Any:
        copy = right(self, tensor)
        if tensor.is_floating_point():
            # As bits, not a number in any format.
            copy._bytes.fill_(255)
        return copy

    def plant() -> None:
        monkeypatch.setattr(saved, "_copy_of", lost)

    verdict = verified("mlp", cross_entropy, plant, *COMPANY[company], "offload_saved")
    assert_named(verdict, "offload_saved")


@pytest.mark.parametrize("company", ["alone", "split"])
def test_optimizer_state_that_is_lost_on_the_way_is_named_and_put_back(company: str, monkeypatch: Patch) -> None:
    right = Piece.freed

    def plant() -> None:
        monkeypatch.setattr(Piece, "freed", lambda piece: [part * 0 for part in right(piece)])

    verdict = verified("mlp", cross_entropy, plant, *COMPANY[company], "optimizer_state")
    assert_named(verdict, "optimizer_state")
    assert failed(verdict) == {PUT_BACK}
    assert "momentum_buffer of 0.weight" in next(c.worst for c in verdict.checks if not c.passed)


# Strides


@PASSES
@pytest.mark.parametrize("company", COMPANY)
def test_weights_whose_strides_say_something_else_are_named(company: str, loss_fn: Any, monkeypatch: Patch) -> None:
    def plant() -> None:
        monkeypatch.setattr(layout, "_copied", lambda values, stride: values.as_strided(values.shape, stride).clone())

    verdict = verified("cnn", loss_fn, plant, *COMPANY[company], "layout")
    assert_named(verdict, "layout")


def test_strides_that_are_not_put_back_are_named_and_put_back(monkeypatch: Patch) -> None:
    right = layout._restride

    def one_way(weight: Tensor, stride: tuple[int, ...]) -> None:
        if weight.is_contiguous():
            right(weight, stride)

    verdict = verified("cnn", cross_entropy, lambda: monkeypatch.setattr(layout, "_restride", one_way), "layout")
    assert_named(verdict, "layout")
    assert failed(verdict) == {PUT_BACK}
