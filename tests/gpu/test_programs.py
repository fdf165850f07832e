"""Captured and compiled chunks against chunks that Python runs: bits, draws, refusals, and what they leave behind."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import samegrad as sg
from samegrad.errors import CannotSplit
from samegrad.exact import chunk_graphs

from ..contract.lever_zoo import MODELS, Make, plan_with
from ..contract.plain import Gradients, assert_bitwise, cross_entropy, gradients

pytestmark = pytest.mark.gpu

SPLITS: dict[str, Any] = {"whole": None, "split": 5, "ragged": [6, 1, 4, 2]}


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


def on_device(make: Make, dtype: torch.dtype, dropout: float = 0.0) -> tuple[nn.Module, Any]:
    model, batch = make(dtype, dropout)
    return model.to("cuda"), tuple(leaf.to("cuda") for leaf in batch)


def levers(rows: Any, *names: str) -> dict[str, dict[str, Any]]:
    return ({} if rows is None else {"split_rows": {"rows": rows}}) | {name: {} for name in names}


def made_by(model: nn.Module, batch: Any, taken: dict[str, Any], *, steps: int = 2, loss: Any = cross_entropy) -> Any:
    """Losses and gradients of a few steps in a row, with new draws in each."""
    torch.manual_seed(3)
    found: list[tuple[Tensor, Gradients]] = []
    with sg.Step(model, loss, plan=plan_with(**taken)) as step:
        for _ in range(steps):
            model.zero_grad()
            found.append((step.backward(batch), gradients(model)))
    return found


EVERY_MODEL = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
EVERY_SPLIT = pytest.mark.parametrize("rows", SPLITS.values(), ids=SPLITS)


@EVERY_MODEL
@EVERY_SPLIT
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_replayed_chunk_has_the_bits_of_one_that_python_runs(make: Make, rows: Any, dtype: torch.dtype) -> None:
    model, batch = on_device(make, dtype, dropout=0.3)
    eager = made_by(model, batch, levers(rows or [13]))
    replayed = made_by(model, batch, levers(rows, "graphs"))
    for (loss, mine), (plain_loss, plain) in zip(replayed, eager):
        torch.testing.assert_close(loss, plain_loss, rtol=0, atol=0)
        assert_bitwise(mine, plain)
    assert any(
        a is not None and b is not None and not torch.equal(a, b)
        for a, b in zip(eager[0][1].values(), eager[1][1].values())
    ), "two steps draw two masks"


@pytest.mark.parametrize("rows", [None, 5], ids=["whole", "split"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
@pytest.mark.parametrize("also", [[], ["graphs"]], ids=["compiled", "and captured"])
def test_a_compiled_chunk_is_the_same_function_under_the_same_draws(rows: Any, name: str, also: list[str]) -> None:
    model, batch = on_device(MODELS[name], torch.float64, dropout=0.3)
    eager = made_by(model, batch, levers(5))
    compiled = made_by(model, batch, levers(rows, "compile", *also))
    for (loss, mine), (plain_loss, plain) in zip(compiled, eager):
        torch.testing.assert_close(loss, plain_loss, rtol=1e-13, atol=0)
        largest = max(float(g.abs().max()) for g in plain.values() if g is not None)
        torch.testing.assert_close(dict(mine), dict(plain), rtol=0, atol=1e-13 * largest)


@pytest.mark.parametrize("taken", [["graphs"], ["compile", "graphs"]], ids=" ".join)
def test_the_verdict_of_a_captured_step_is_same(taken: list[str]) -> None:
    model, batch = on_device(MODELS["transformer"], torch.float32, dropout=0.3)
    with sg.Step(model, cross_entropy, plan=plan_with(**levers(5, *taken))) as step:
        step.backward(batch)
        verdict = sg.verify_step(step, batch)
        assert verdict.same, verdict
        # The step goes on as before.
        step.backward(batch)


def test_planted_graphs_that_keep_the_key_of_the_first_step_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = on_device(MODELS["mlp"], torch.float64, dropout=0.3)
    eager = made_by(model, batch, levers(5))
    right = chunk_graphs.CapturedPass.begin

    def begin(self: Any, work: Any) -> None:
        key = None if self._key is None or not self._graphs else self._key.clone()
        right(self, work)
        if key is not None:
            self._key.copy_(key)

    monkeypatch.setattr(chunk_graphs.CapturedPass, "begin", begin)
    replayed = made_by(model, batch, levers(5, "graphs"))
    assert_bitwise(replayed[0][1], eager[0][1])
    with pytest.raises(AssertionError):
        assert_bitwise(replayed[1][1], eager[1][1])


class Scheduled(nn.Module):
    """A model and a loss that read plain numbers, tensors and switches that a training loop changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(6, 8), nn.Dropout(0.0), nn.Linear(8, 3)
        self.slope, self.shifts = 0.5, [torch.zeros(3, device="cuda", dtype=torch.float64)]
        self.weight = torch.ones(3, device="cuda", dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(F.leaky_relu(self.first(x), self.slope))) + self.shifts[0]


def change_slope(model: Any) -> None:
    model.slope = 0.1


def change_weight(model: Any) -> None:
    model.weight = torch.tensor([1.0, 5.0, 0.5], device="cuda", dtype=torch.float64)


def change_held_tensor_in_place(model: Any) -> None:
    model.weight[1] = 7.0


def change_list(model: Any) -> None:
    model.shifts[0] = torch.full((3,), 2.0, device="cuda", dtype=torch.float64)


def change_parameter_memory(model: Any) -> None:
    model.last.weight.data = model.last.weight.data * 2


def change_parameter_in_place(model: Any) -> None:
    with torch.no_grad():
        model.last.weight.mul_(2)


def add_a_hook(model: Any) -> None:
    model.last.register_forward_hook(lambda module, inputs, outputs: outputs * 3)


CHANGES = [
    change_slope, change_weight, change_held_tensor_in_place, change_list, change_parameter_memory,
    change_parameter_in_place,
]  # fmt: skip


def scheduled_steps(change: Callable[[Any], None], *names: str) -> list[Gradients]:
    torch.manual_seed(0)
    model = Scheduled().to("cuda", torch.float64)
    batch = on_device(MODELS["mlp"], torch.float64)[1]

    def loss(outputs: Tensor, rows: Any) -> Tensor:
        return F.cross_entropy(outputs, rows[1], weight=model.weight)

    found = []
    with sg.Step(model, loss, plan=plan_with(**levers(5, *names))) as step:
        for turn in range(3):
            if turn == 1:
                change(model)
            model.zero_grad()
            step.backward(batch)
            found.append(gradients(model))
    return found


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_a_training_loop_changes_between_steps_is_seen(change: Callable[[Any], None]) -> None:
    for mine, plain in zip(scheduled_steps(change, "graphs"), scheduled_steps(change)):
        assert_bitwise(mine, plain)


@pytest.mark.parametrize("change", [change_slope, change_weight, change_list, change_parameter_memory],
                         ids=lambda change: change.__name__)  # fmt: skip
def test_planted_graphs_that_look_at_nothing_are_caught(
    change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = scheduled_steps(change)
    monkeypatch.setattr(chunk_graphs.Constants, "hold", lambda self: True)
    blind = scheduled_steps(change, "graphs")
    assert_bitwise(blind[0], plain[0])
    with pytest.raises(AssertionError):
        assert_bitwise(blind[1], plain[1])


class Waiting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.layer(x)
        return outputs * (2.0 if outputs.abs().max().item() > 1e9 else 1.0)


def test_a_forward_that_waits_for_the_device_is_refused_with_its_line_and_nothing_is_left() -> None:
    model = Waiting().to("cuda", torch.float64)
    batch = on_device(MODELS["mlp"], torch.float64)[1]
    step = sg.Step(model, cross_entropy, plan=plan_with(**levers(5, "graphs")))
    with step, pytest.raises(CannotSplit, match=r"test_programs\.py:\d+"):
        step.backward(batch)
    assert all(p.grad is None for p in model.parameters())
    assert torch.cuda.get_sync_debug_mode() == 0


@pytest.mark.parametrize(("model", "found"), [
    (nn.Sequential(nn.Linear(6, 8), nn.utils.parametrizations.spectral_norm(nn.Linear(8, 3))), "changes state"),
    (nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), "parts of the model|rows|BatchNorm"),
], ids=["spectral norm", "batch norm"])  # fmt: skip
def test_what_a_replay_would_not_do_is_refused(model: nn.Module, found: str) -> None:
    batch = on_device(MODELS["mlp"], torch.float64)[1]
    step = sg.Step(model.to("cuda", torch.float64), cross_entropy, plan=plan_with(**levers(5, "graphs")))
    with step, pytest.raises(CannotSplit, match=found):
        step.backward(batch)


def test_graphs_give_back_their_memory_and_a_step_that_raises_keeps_none() -> None:
    model, batch = on_device(MODELS["cnn"], torch.float32)
    armed = [False]

    def loss(outputs: Tensor, rows: Any) -> Tensor:
        if armed[0]:
            raise ZeroDivisionError
        return cross_entropy(outputs, rows)

    # The stream that captures has workspaces of its own, once a process.
    made_by(model, batch, levers(5, "graphs"))
    model.zero_grad()
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with sg.Step(model, loss, plan=plan_with(**levers(5, "graphs"))) as step:
        step.backward(batch)
        model.zero_grad()
        armed[0] = True
        with pytest.raises(ZeroDivisionError):
            # Another size of chunk is captured, in which the user's code runs.
            step.backward(tuple(leaf[:11] for leaf in batch))
        assert all(p.grad is None for p in model.parameters())
        armed[0] = False
        step.backward(batch)
        model.zero_grad()
    gc.collect()
    torch.cuda.empty_cache()
    # What tests before this one left may go meanwhile.
    assert torch.cuda.memory_allocated() <= before


def test_a_scaled_loss_and_two_backwards_add_up_as_in_python() -> None:
    model, batch = on_device(MODELS["cnn"], torch.float32)
    found = []
    for names in ([], ["graphs"]):
        model.zero_grad()
        scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
        with sg.Step(model, cross_entropy, plan=plan_with(**levers(5, *names))) as step:
            step.backward(batch, scaler=scaler)
            step.backward(batch, scaler=scaler)
        found.append(gradients(model))
    assert_bitwise(found[1], found[0])


def kept_in_other_tensors(model: nn.Module) -> list[Tensor]:
    """What an earlier step's gradients are held by when the next one begins: ``.grad`` itself, then views of it."""
    held = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return held


def kept_as_views(model: nn.Module) -> list[Tensor]:
    return [gradient.view(-1) for gradient in kept_in_other_tensors(model)]


def zeroed_in_place(model: nn.Module) -> list[Tensor]:
    model.zero_grad(set_to_none=False)
    return []


def added_to(model: nn.Module) -> list[Tensor]:
    return []


BETWEEN = [kept_in_other_tensors, kept_as_views, zeroed_in_place, added_to]


def gradients_kept(between: Callable[[nn.Module], list[Tensor]], *names: str) -> tuple[list[Gradients], list[Tensor]]:
    model, batch = on_device(MODELS["cnn"], torch.float64, dropout=0.3)
    torch.manual_seed(3)
    found, held = [], list[Tensor]()
    with sg.Step(model, cross_entropy, plan=plan_with(**levers(5, *names))) as step:
        for _ in range(3):
            step.backward(batch)
            found.append({name: None if g is None else g.clone() for name, g in gradients(model).items()})
            held += between(model)
    return found, held


@pytest.mark.parametrize("between", BETWEEN, ids=lambda between: between.__name__)
def test_gradients_that_somebody_keeps_keep_their_numbers(between: Callable[[nn.Module], list[Tensor]]) -> None:
    found, held = gradients_kept(between, "graphs")
    plain, plain_held = gradients_kept(between)
    for mine, theirs in zip(found, plain):
        assert_bitwise(mine, theirs)
    for kept, other in zip(held, plain_held, strict=True):
        assert torch.equal(kept, other)


@pytest.mark.parametrize("between", [kept_as_views, added_to], ids=lambda between: between.__name__)
def test_planted_sums_that_are_never_taken_back_are_caught(
    between: Callable[[nn.Module], list[Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, plain_held = gradients_kept(between)
    monkeypatch.setattr(chunk_graphs.CapturedPass, "take_back", lambda self: True)
    found, held = gradients_kept(between, "graphs")
    with pytest.raises(AssertionError):
        for mine, theirs in zip(found, plain):
            assert_bitwise(mine, theirs)
        assert all(torch.equal(kept, other) for kept, other in zip(held, plain_held, strict=True))


def test_a_replayed_step_needs_no_second_set_of_gradients() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3000), nn.Linear(3000, 3000), nn.Linear(3000, 3)).to("cuda")
    batch = on_device(MODELS["mlp"], torch.float32)[1]
    parameter_bytes = sum(p.nbytes for p in model.parameters())
    with sg.Step(model, cross_entropy, plan=plan_with(**levers(5, "graphs"))) as step:
        for _ in range(2):
            step.backward(batch)
            assert all(p.grad is not None for p in model.parameters())
            model.zero_grad()
        standing = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step.backward(batch)
        assert torch.cuda.max_memory_allocated() - standing < parameter_bytes / 10


@pytest.mark.parametrize("names", [["compile"], ["compile", "graphs"]], ids=" ".join)
def test_a_compiled_step_in_chunks_holds_one_set_of_gradients(names: list[str]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3000), *[nn.Linear(3000, 3000) for _ in range(8)], nn.Linear(3000, 3)).to("cuda")
    batch = on_device(MODELS["mlp"], torch.float32)[1]
    parameter_bytes = sum(p.nbytes for p in model.parameters())
    before = torch.cuda.memory_allocated()
    with sg.Step(model, cross_entropy, plan=plan_with(**levers(5, *names))) as step:
        for _ in range(2):
            step.backward(batch)
            model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        step.backward(batch)
        # The sums, and one layer's gradient at a time.
        assert torch.cuda.max_memory_allocated() - before < 1.5 * parameter_bytes


def test_recomputed_blocks_are_captured_with_their_draws() -> None:
    model, batch = on_device(MODELS["cnn"], torch.float64, dropout=0.3)
    again = {"recompute": {"blocks": ["0", ["2", "3", "4"]]}}
    eager = made_by(model, batch, levers(5) | again)
    replayed = made_by(model, batch, levers(5, "graphs") | again)
    for (_, mine), (_, plain) in zip(replayed, eager):
        assert_bitwise(mine, plain)


def test_captured_chunks_are_handed_over_under_ddp() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("nccl", rank=0, world_size=1)
    try:
        model, batch = on_device(MODELS["mlp"], torch.float64, dropout=0.3)
        eager = made_by(model, batch, levers(5))
        replayed = made_by(DistributedDataParallel(model, device_ids=[0]), batch, levers(5, "graphs"))
        for (_, mine), (_, plain) in zip(replayed, eager):
            assert_bitwise({name.removeprefix("module."): g for name, g in mine.items()}, plain)
    finally:
        dist.destroy_process_group()
