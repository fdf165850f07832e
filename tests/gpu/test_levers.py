"""Levers that leave the chunks as they are, on one GPU: the bits, the bytes that are saved, copies and streams."""

from __future__ import annotations

import copy
import gc
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.levers import unsuited_levers
from samegrad.levers._saved_tensors import SavedTensors
from samegrad.levers._travelling_state import TravellingState

from ..contract.lever_zoo import KNOBS, MODELS, cnn, forced
from ..contract.plain import assert_bitwise, cross_entropy, gradients, same, spread

pytestmark = pytest.mark.gpu

PASSES = pytest.mark.parametrize("loss_fn", [cross_entropy, spread], ids=["one pass", "two passes"])
SPLITS = pytest.mark.parametrize("split", [{}, {"split_rows": {"rows": [6, 1, 4, 2]}}], ids=["whole", "split"])
KINDS = pytest.mark.parametrize("kind", MODELS)


@pytest.fixture(autouse=True)
def deterministic() -> Any:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def on_gpu(kind: str, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> tuple[nn.Module, Any]:
    model, batch = MODELS[kind](dtype, dropout)
    return model.cuda(), tuple(leaf.cuda() for leaf in batch)


def after_a_step(kind: str, loss_fn: Any, dtype: torch.dtype, **levers: dict[str, Any]) -> dict[str, Tensor | None]:
    model, batch = on_gpu(kind, dtype, dropout=0.3)
    torch.manual_seed(3)
    optimizer = torch.optim.Adam(model.parameters())
    with forced(model, loss_fn, optimizer=optimizer, **levers) as step:
        step.backward(batch)
    return gradients(model)


@KINDS
@PASSES
@SPLITS
@pytest.mark.parametrize("lever", ["offload_saved", "optimizer_state"])
def test_the_same_bits(kind: str, loss_fn: Any, split: Any, lever: str) -> None:
    expected = after_a_step(kind, loss_fn, torch.float32, **split)
    for _ in range(3):
        assert_bitwise(after_a_step(kind, loss_fn, torch.float32, **{lever: KNOBS[lever]}, **split), expected)


@PASSES
@SPLITS
def test_channels_last_is_the_same_sum(loss_fn: Any, split: Any) -> None:
    expected = after_a_step("cnn", loss_fn, torch.float64, **split)
    ours = after_a_step("cnn", loss_fn, torch.float64, layout={}, **split)
    largest = max(float(g.abs().max()) for g in expected.values() if g is not None)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12 * largest)


@KINDS
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_is_autocast_written_by_hand(kind: str, dtype: str) -> None:
    model, batch = on_gpu(kind)
    plain = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**8)
    with torch.autocast("cuda", dtype=getattr(torch, dtype)):
        loss = spread(plain(batch[0]), batch)
    scaler.scale(loss).backward()
    with forced(model, spread, autocast={"dtype": dtype}) as step:
        step.backward(batch, scaler=scaler)
    assert_bitwise(gradients(model), gradients(plain))


# A chain whose activations are most of what it holds.
ROWS, WIDTH, LAYERS = 4096, 1024, 12


def chain() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    model = nn.Sequential(*layers, nn.Linear(WIDTH, 3)).cuda()
    return model, (torch.randn(ROWS, WIDTH, device="cuda"), torch.randint(0, 3, (ROWS,), device="cuda"))


def peak_bytes(step: sg.Step, batch: Any) -> tuple[int, int]:
    """Bytes allocated and bytes reserved for a backward, once it has settled."""
    step.backward(batch)
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step.backward(batch)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def test_saved_tensors_leave_the_device() -> None:
    model, batch = chain()
    activation_bytes = ROWS * WIDTH * 4
    peaks = []
    for levers in ({}, {"offload_saved": {"smallest_bytes": 2**20}}):
        with forced(model, cross_entropy, **levers) as step:
            peaks.append(peak_bytes(step, batch))
    (allocated, reserved), (allocated_less, reserved_less) = peaks
    assert allocated - allocated_less >= (LAYERS - 6) * activation_bytes
    # Segments hold more than what is in use, by another part in either run.
    assert reserved - reserved_less >= (LAYERS - 8) * activation_bytes


def test_pinned_memory_is_used_again_in_the_next_step() -> None:
    model, batch = chain()
    with forced(model, cross_entropy, offload_saved={"smallest_bytes": 2**20}) as step:
        # A block is free again when the copies from and to it are done.
        for _ in range(3):
            step.backward(batch)
            torch.cuda.synchronize()
        before = torch.cuda.host_memory_stats()["num_host_alloc"]
        for _ in range(3):
            step.backward(batch)
            torch.cuda.synchronize()
    assert torch.cuda.host_memory_stats()["num_host_alloc"] == before


def test_a_busy_device_gives_back_what_was_saved() -> None:
    """Memory that was freed while it still travels is given to others, who write on it at once."""
    x = torch.randn(2**22, device="cuda", requires_grad=True)
    for seed in range(5):
        torch.manual_seed(seed)
        with SavedTensors(0, [x]).travelling():
            y = x
            for _ in range(12):
                y = (y * 1.01).sin()
                torch.full((2**22,), float("nan"), device="cuda")
            loss = y.sum()
        [ours] = torch.autograd.grad(loss, x)
        z = x
        for _ in range(12):
            z = (z * 1.01).sin()
        [expected] = torch.autograd.grad(z.sum(), x)
        assert torch.equal(ours, expected)


def test_backward_on_another_stream_waits_for_what_comes_back() -> None:
    model, batch = chain()
    plain = copy.deepcopy(model)
    cross_entropy(plain(batch[0]), batch).backward()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), forced(model, cross_entropy, offload_saved={"smallest_bytes": 0}) as step:
        step.backward(batch)
    torch.cuda.current_stream().wait_stream(side)
    assert_bitwise(gradients(model), gradients(plain))


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "foreach": {"foreach": True}, "fused": {"fused": True}, "capturable": {"capturable": True},
    "for loop": {"foreach": False},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("scaled", [False, True], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("captured", [False, True], ids=["by Python", "captured"])
def test_training_with_state_on_the_host_is_plain_training(name: str, scaled: bool, captured: bool) -> None:
    runs = []
    plain = {"split_rows": {"rows": [6, 1, 4, 2]}} if captured else {}
    for levers in (plain, plain | {"optimizer_state": {}} | ({"graphs": {}} if captured else {})):
        model, batch = on_gpu("cnn")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True, **OPTIMIZERS[name])
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        scaler = torch.amp.GradScaler("cuda", enabled=scaled)
        with forced(model, cross_entropy, optimizer=optimizer, **levers) as step:
            for _ in range(4):
                step.backward(batch, scaler=scaler)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                schedule.step()
            between = as_saved(optimizer)
            step.backward(batch, scaler=scaler)
            moments = [s["exp_avg"] for s in optimizer.state.values() if s["exp_avg"].numel() > 1]
            assert {t.device.type for t in moments} == ({"cuda"} if levers is plain else {"cpu"})
            assert all(t.is_pinned() for t in moments) == (levers is not plain)
            assert same(as_saved(optimizer), between)
        assert {s["exp_avg"].device.type for s in optimizer.state.values()} == {"cuda"}
        assert same(as_saved(optimizer), between)
        runs.append([{k: v.cpu() for k, v in model.state_dict().items()}, between])
    assert same(runs[0], runs[1])


def as_saved(optimizer: torch.optim.Optimizer) -> Any:
    """Its state as a checkpoint of it holds it, on the host."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)["state"]


def test_state_leaves_while_the_host_goes_on_and_what_is_read_afterwards_has_arrived() -> None:
    model, batch = chain()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    side = torch.cuda.Stream()
    with forced(model, cross_entropy, optimizer=optimizer, optimizer_state={}) as step:
        for index in range(4):
            with torch.cuda.stream(side if index % 2 else torch.cuda.current_stream()):
                # The device has work to do for longer than the host takes to set off the step.
                torch.cuda._sleep(200_000_000)
                step.backward(batch)
                state = [t for s in optimizer.state.values() for t in s.values() if t.numel() > 1]
                arrived = [t.clone() for t in state]
                torch.cuda.synchronize()
                assert all(torch.equal(a, b) for a, b in zip(arrived, state)) and bool(state) == (index > 0)
                assert all(t.device.type == "cpu" for t in state)
            torch.cuda.synchronize()
            optimizer.step()
            optimizer.zero_grad()


def test_state_is_off_the_device_in_forward_and_backward() -> None:
    model, batch = chain()
    state_bytes = 2 * sum(p.nbytes for p in model.parameters())
    peaks = []
    for levers in ({}, {"optimizer_state": {}}):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
        with forced(model, cross_entropy, optimizer=optimizer, **levers) as step:
            step.backward(batch)
            optimizer.step()
            peaks.append(peak_bytes(step, batch))
        del optimizer
        model.zero_grad()
    # Segments are shared with what stays, so only what is allocated falls by all of it.
    assert peaks[0][0] - peaks[1][0] >= 0.99 * state_bytes


def test_state_that_went_leaves_no_memory_with_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    reserved = {}
    for planted in (False, True):
        if planted:
            monkeypatch.setattr(TravellingState, "_make_room", lambda self, **_: None)
        model, batch = chain()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
        torch.cuda.empty_cache()
        with forced(model, cross_entropy, optimizer=optimizer, optimizer_state={}) as step:
            for _ in range(3):
                step.backward(batch)
                optimizer.step()
            reserved[planted] = torch.cuda.memory_reserved()
        del optimizer
        model.zero_grad()
    state_bytes = 2 * sum(p.nbytes for p in model.parameters())
    assert reserved[True] - reserved[False] >= 0.9 * state_bytes


@pytest.mark.parametrize("fused", [False, True])
def test_optimizers_find_their_state_where_channels_last_weights_are(fused: bool) -> None:
    runs = []
    for levers in ({}, {"layout": {}}):
        model, batch = on_gpu("cnn", torch.float64)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused, foreach=not fused)
        for index in range(6):
            with forced(model, cross_entropy, optimizer=optimizer, **(levers if 2 <= index < 4 else {})) as step:
                step.backward(batch)
                optimizer.step()
                optimizer.zero_grad()
        runs.append(copy.deepcopy(model.state_dict()))
    torch.testing.assert_close(runs[1], runs[0], rtol=1e-6, atol=1e-6)


def test_nothing_is_refused_that_helps_here() -> None:
    model, _ = cnn(torch.float32)
    model.cuda()
    step = sg.Step(model, cross_entropy, optimizer=torch.optim.Adam(model.parameters()))
    assert unsuited_levers(step.declared) == {}
