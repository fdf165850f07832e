"""The autocast lever: what torch.autocast written by hand computes, with backward and named parts outside of it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.declared import declare
from samegrad.errors import BadInput, UsageError
from samegrad.exact import program
from samegrad.levers import autocast
from samegrad.levers._lever import Execution

from ..contract.lever_zoo import KNOBS, MODELS, ROWS, cnn, forced, mlp, plan_with, transformer
from ..contract.plain import cross_entropy, gradients, spread

Patch = pytest.MonkeyPatch
PASSES = pytest.mark.parametrize("loss_fn", [cross_entropy, spread], ids=["one pass", "two passes"])


def chunked_under_autocast(
    model: nn.Module, batch: Any, sizes: list[int], dtype: torch.dtype = torch.bfloat16
) -> dict[str, Tensor]:
    """Gradients of the mean of cross entropy, chunk by chunk, written as one writes it by hand.

    Chunks are weighted by their rows and divided at the end, since whole numbers round nothing.
    """
    counts = [float(size) for size in sizes] if len(sizes) > 1 else [1.0]
    twin = copy.deepcopy(model)
    start = 0
    for size, count in zip(sizes, counts):
        rows = batch[0][start : start + size], batch[1][start : start + size]
        with torch.autocast("cpu", dtype=dtype):
            loss = cross_entropy(twin(rows[0]), rows)
        loss.backward(torch.tensor(count, dtype=loss.dtype))
        start += size
    return {name: p.grad / sum(counts) for name, p in twin.named_parameters() if p.grad is not None}


SIZES = pytest.mark.parametrize("sizes", [[ROWS], [5, 5, 3], [6, 1, 4, 2]], ids=str)


class Scaler:
    """Scales by a power of two, as a GradScaler does, without a device."""

    def scale(self, loss: Tensor) -> Tensor:
        return loss * 1024.0


def under_autocast(
    model: nn.Module, batch: Any, sizes: list[int], dtype: str, loss_fn: Any = cross_entropy, **more: Any
) -> dict[str, Tensor]:
    split = {"split_rows": {"rows": sizes}} if len(sizes) > 1 else {}
    scaler = Scaler() if dtype == "float16" else None
    model.zero_grad()
    with forced(model, loss_fn, autocast={"dtype": dtype} | more, **split) as step:
        step.backward(batch, scaler=scaler)
    scale = 1024.0 if scaler else 1.0
    return {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}


# torch has no LSTM in float16 on the CPU.
NARROWED = [(kind, "bfloat16") for kind in MODELS] + [(kind, "float16") for kind in MODELS if kind != "lstm"]


@pytest.mark.parametrize(("kind", "dtype"), NARROWED)
@SIZES
def test_autocast_is_autocast_written_by_hand(kind: str, dtype: str, sizes: list[int]) -> None:
    model, batch = MODELS[kind](torch.float32)
    narrow = getattr(torch, dtype)
    ours = under_autocast(model, batch, sizes, dtype)
    expected = chunked_under_autocast(model, batch, sizes, narrow)
    assert ours.keys() == expected.keys()
    # In float16 the scaled backward rounds elsewhere, below the smallest normal number.
    bounds = {"rtol": 1e-5, "atol": 1e-7} if dtype == "bfloat16" else {"rtol": 1e-2, "atol": 1e-5}
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, expected[name], **bounds, msg=name)


@SIZES
@pytest.mark.parametrize("kind", MODELS)
def test_two_passes_are_the_whole_step_under_autocast_up_to_its_rounding(kind: str, sizes: list[int]) -> None:
    model, batch = MODELS[kind](torch.float32)
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = spread(twin(batch[0]), batch)
    loss.backward()
    ours = under_autocast(model, batch, sizes, "bfloat16", spread)
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=0.05, atol=0.02, msg=name)
        if len(sizes) == 1:
            assert torch.equal(ours[name], parameter.grad)


class SeesBackward(torch.autograd.Function):
    """The identity that notes whether backward runs under autocast."""

    seen: list[bool] = []

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        SeesBackward.seen.append(torch.is_autocast_enabled("cpu"))
        return cotangent


class Watched(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return SeesBackward.apply(x)


def autocast_in_backward(loss_fn: Any, sizes: list[int]) -> set[bool]:
    model, batch = mlp(torch.float32)
    model.insert(2, Watched())
    SeesBackward.seen.clear()
    under_autocast(model, batch, sizes, "bfloat16", loss_fn)
    assert SeesBackward.seen
    return set(SeesBackward.seen)


@PASSES
@SIZES
def test_backward_runs_outside_autocast(loss_fn: Any, sizes: list[int]) -> None:
    assert autocast_in_backward(loss_fn, sizes) == {False}


@PASSES
@SIZES
def test_planted_autocast_that_is_left_on_in_backward_is_caught(
    loss_fn: Any, sizes: list[int], monkeypatch: Patch
) -> None:
    right = autocast.Autocast.apply

    @contextlib.contextmanager
    def wrong(self: Any, execution: Execution) -> Iterator[Execution]:
        with right(self, execution) as inner, torch.autocast("cpu", dtype=torch.bfloat16):
            yield dataclasses.replace(inner, declared=execution.declared)

    monkeypatch.setattr(autocast.Autocast, "apply", wrong)
    monkeypatch.setattr(program, "_no_autocast", lambda _: contextlib.nullcontext())
    assert True in autocast_in_backward(loss_fn, sizes)


def test_all_four_go_together_with_a_split() -> None:
    model, batch = cnn(torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    with forced(model, cross_entropy, optimizer=optimizer, split_rows={"rows": [5, 8]}, **KNOBS) as step:
        step.backward(batch)
    expected = chunked_under_autocast(model, batch, [5, 8])
    for name, gradient in gradients(model).items():
        assert gradient is not None
        torch.testing.assert_close(gradient, expected[name], atol=2e-3, rtol=2e-2)


def test_recomputed_blocks_run_again_under_autocast_bit_for_bit() -> None:
    torch.manual_seed(0)
    block = lambda narrow, wide: nn.Sequential(nn.Conv2d(narrow, wide, 3), nn.BatchNorm2d(wide), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))
    model = nn.Sequential(block(3, 8), block(8, 6), head)
    batch = cnn(torch.float32)[1]
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = spread(twin(batch[0]), batch)
    loss.backward()
    with forced(model, spread, recompute={"blocks": ["0", "1"]}, autocast=KNOBS["autocast"]) as step:
        step.backward(batch)
    for name, parameter in twin.named_parameters():
        assert torch.equal(gradients(model)[name], parameter.grad), name


@pytest.mark.parametrize("sizes", [[ROWS], [5, 8]], ids=str)
def test_training_in_float16_with_torchs_own_scaler_is_training_written_by_hand(sizes: list[int]) -> None:
    model, batch = mlp(torch.float32)
    plain = copy.deepcopy(model)
    split = {"split_rows": {"rows": sizes}} if len(sizes) > 1 else {}
    for network, ours in ((model, True), (plain, False)):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        # The first steps overflow, and are skipped.
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=3)
        step = forced(network, cross_entropy, optimizer=optimizer, autocast={"dtype": "float16"}, **split)
        for _ in range(12):
            if ours:
                step.backward(batch, scaler=scaler)
            else:
                with torch.autocast("cpu", dtype=torch.float16):
                    loss = cross_entropy(network(batch[0]), batch)
                scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        step.close()
        assert scaler.get_scale() < 2.0**22
    assert not torch.equal(plain[0].weight, mlp(torch.float32)[0][0].weight)
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), weight, rtol=1e-2, atol=1e-3, msg=name)


# Parts in full precision


class NotesDtypes(nn.Module):
    """The identity that notes what it is given, and whether autocast is on."""

    seen: list[tuple[torch.dtype, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((x.dtype, torch.is_autocast_enabled("cpu")))
        return x


class FullByHand(nn.Module):
    """A module as one writes it by hand to be computed in float32."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.inner(x.float())


@SIZES
@pytest.mark.parametrize("kind", ["mlp", "cnn", "transformer"])
def test_a_part_in_full_precision_is_as_written_by_hand(kind: str, sizes: list[int]) -> None:
    model, batch = MODELS[kind](torch.float32)
    ours = under_autocast(model, batch, sizes, "bfloat16", full_precision=["1", "3"])
    by_hand = copy.deepcopy(model)
    by_hand[1], by_hand[3] = FullByHand(by_hand[1]), FullByHand(by_hand[3])
    expected = chunked_under_autocast(by_hand, batch, sizes)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name.replace("inner.", "")], value, rtol=1e-5, atol=1e-7, msg=name)
    elsewhere = under_autocast(model, batch, sizes, "bfloat16")
    assert any(not torch.equal(ours[name], elsewhere[name]) for name in ours)


def test_all_parts_in_full_precision_are_the_plain_step_bit_for_bit() -> None:
    model, batch = transformer(torch.float32)
    twin = copy.deepcopy(model)
    cross_entropy(twin(batch[0]), batch).backward()
    ours = under_autocast(model, batch, [ROWS], "bfloat16", full_precision=["0", "1", "2", "3"])
    assert all(torch.equal(ours[name], p.grad) for name, p in twin.named_parameters())


def test_a_part_in_full_precision_is_so_where_a_block_runs_again_in_backward() -> None:
    batch = cnn(torch.float32)[1]
    block = nn.Sequential(nn.Conv2d(3, 4, 3), NotesDtypes(), nn.BatchNorm2d(4), nn.ReLU())
    model = nn.Sequential(block, nn.Flatten(), nn.Linear(140, 3))
    for full_precision, expected in ((["0.1"], (torch.float32, False)), ([], (torch.bfloat16, True))):
        knobs = {"full_precision": full_precision}
        with forced(model, cross_entropy, recompute={"blocks": ["0"]}, autocast=knobs) as step:
            step.backward(batch)
            NotesDtypes.seen.clear()
            step.backward(batch)
        assert NotesDtypes.seen == [expected, expected]


def test_a_part_that_lockstep_takes_apart_is_refused_by_name() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)), nn.Linear(5, 3))
    batch = mlp(torch.float32)[1]
    for part, lever in (("0", {"autocast": {"full_precision": ["0"]}}), ("0", {"offload_saved": {"modules": ["0"]}})):
        with (
            forced(model, cross_entropy, exact_batchnorm={"rows": 5}, **lever) as step,
            pytest.raises(sg.CannotSplit, match=f"{next(iter(lever))} names the part '{part}'"),
        ):
            step.backward(batch)
        assert "forward" not in vars(model[0])


# What is refused


def test_float16_without_a_scaler_is_refused_before_anything_runs() -> None:
    model, batch = mlp(torch.float32)
    with forced(model, cross_entropy, autocast={"dtype": "float16"}) as step:
        with pytest.raises(UsageError, match="scaler="):
            step.backward(batch)
        assert all(p.grad is None for p in model.parameters())
        step.backward(batch, scaler=Scaler())


def test_a_block_of_the_users_own_round_the_step_is_refused_and_changes_nothing() -> None:
    model, batch = mlp(torch.float32)
    with forced(model, cross_entropy, autocast={}) as step, torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(UsageError, match="autocast block of its own"):
            step.backward(batch)
        assert torch.is_autocast_enabled("cpu") and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("knobs", [{"dtype": "float8"}, {"full_precision": ["7.nothing"]}], ids=str)
def test_knobs_that_name_nothing_are_refused_by_name(knobs: dict[str, Any]) -> None:
    model, batch = mlp(torch.float32)
    with pytest.raises(BadInput, match=r"float8|7\.nothing"):
        forced(model, cross_entropy, autocast=knobs).backward(batch)


def test_it_is_taken_only_where_a_rounded_step_is_allowed() -> None:
    model, batch = mlp(torch.float32)
    with pytest.raises(UsageError, match=r"allow=Exactness\.ROUNDED"):
        sg.Step(model, cross_entropy, plan=plan_with(autocast={})).backward(batch)


def test_steps_that_gain_nothing_are_refused_with_the_reason() -> None:
    unsuited = autocast.Autocast.unsuited
    assert unsuited(declare(mlp(torch.float32)[0], cross_entropy)) is None
    assert "no parameter is float32" in (unsuited(declare(mlp(torch.bfloat16)[0], cross_entropy)) or "")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "already" in (unsuited(declare(mlp(torch.float32)[0], cross_entropy)) or "")
