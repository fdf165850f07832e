"""What users of other tools complain about most, as far as it applies to models with independent rows."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.measure.counting import ByteCounter
from samegrad.records import Category

from .plain import assert_close, cross_entropy, fingerprint, gradients, labelled, mlp, plain_step, same

D = torch.float64


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(13, 8, dtype=D)
        self.head = nn.Linear(8, 13, dtype=D)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids).cumsum(1).tanh())


def token_batch(lengths: list[int]) -> tuple[Tensor, Tensor]:
    width = max(lengths)
    ids = torch.randint(0, 13, (len(lengths), width), generator=torch.Generator().manual_seed(2))
    valid = torch.arange(width) < torch.tensor(lengths)[:, None]
    return ids, ids.roll(-1, 1).masked_fill(~valid, -100)


def token_loss(logits: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten())


UNEVEN, WITH_NONE = [64, 60, 8, 4, 50, 3, 40, 2], [64, 60, 0, 0, 50, 3, 40, 2]


@pytest.mark.parametrize("lengths", [UNEVEN, WITH_NONE], ids=["uneven", "one without any"])
def test_micro_batches_with_unequal_tokens_are_not_averaged_as_if_equal(lengths: list[int]) -> None:
    batch, model = token_batch(lengths), Tokens()
    loss, expected = plain_step(model, token_loss, batch)
    ours = sg.Step(model, token_loss, rows=2).backward(batch)
    assert torch.allclose(ours, loss, rtol=1e-14)
    assert_close(gradients(model), expected)


@pytest.mark.parametrize("count", [9, 10, 11])
def test_the_last_accumulated_step_is_the_mean_over_exactly_its_samples(count: int) -> None:
    # Loader batches joined in fours, as accumulation does; the last group is short.
    loader = [labelled(8) if i < count - 1 else labelled(5) for i in range(count)]
    groups = [loader[i : i + 4] for i in range(0, count, 4)]
    joined = tuple(torch.cat(leaves) for leaves in zip(*groups[-1]))
    model = mlp()
    _, expected = plain_step(model, cross_entropy, joined)
    sg.Step(model, cross_entropy, rows=[len(x) for x, _ in groups[-1]]).backward(joined)
    assert_close(gradients(model), expected)


def test_a_tighter_budget_changes_neither_the_number_of_steps_nor_what_each_is_taken_over() -> None:
    batches = [labelled(400), labelled(400), labelled(130)]
    footprint = sg.measure_step(sg.Step(mlp(), cross_entropy), batches[0])
    low, high = (footprint.predicted_peak_bytes(rows=n) for n in (1, 400))
    runs = []
    for budget in ("1GiB", low + (high - low) // 3):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        step = sg.Step(model, cross_entropy, budget=budget, optimizer=optimizer)
        seen = []
        for result in sg.train(step, batches):
            seen.append((result.batch_rows, scheduler.get_last_lr()[0]))
            scheduler.step()
        runs.append((seen, dict(model.named_parameters())))
    assert runs[0][0] == runs[1][0]
    assert_close(runs[1][1], runs[0][1])


def test_planning_leaves_no_trace_also_when_it_fails() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Dropout(0.3), nn.Linear(9, 3)).to(D)
    optimizer = torch.optim.Adam(model.parameters())
    batch = labelled(40)
    cross_entropy(model(batch[0]), batch).backward()
    optimizer.step()
    before = fingerprint(model, optimizer=optimizer), [part.training for part in model.modules()]
    with pytest.raises(sg.SamegradError):
        sg.Step(model, cross_entropy, budget=5000, optimizer=optimizer).backward(batch)
    sg.measure_step(sg.Step(model, cross_entropy, optimizer=optimizer), batch)
    after = fingerprint(model, optimizer=optimizer), [part.training for part in model.modules()]
    assert same(before[0], after[0]) and before[1] == after[1]


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("coupled", [False, True], ids=["one pass", "two passes"])
def test_a_failed_step_keeps_nothing_alive(where: str, coupled: bool) -> None:
    failing: list[bool] = [False]
    alive: list[weakref.ref[Tensor]] = []

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            if failing[0] and where == "backward":
                raise torch.OutOfMemoryError("planted")
            return gradient

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            hidden = Fails.apply(self.inner[0](x))
            alive.append(weakref.ref(hidden))
            if failing[0] and where == "forward" and len(alive) > 3:
                raise torch.OutOfMemoryError("planted")
            return self.inner[1:](hidden)

    def loss_fn(outputs: Tensor, batch: Any) -> Tensor:
        return cross_entropy(outputs, batch) + (outputs.std(0).sum() if coupled else 0)

    model, batch = Model(), labelled(29)
    step = sg.Step(model, loss_fn, rows=4)
    step.backward(batch)
    model.zero_grad()
    counter = ByteCounter(torch.device("cpu"))
    counter.claim(model.parameters(), Category.PARAMETERS)
    level = counter.live_bytes
    for _ in range(5):
        alive.clear()
        failing[0] = True
        with counter:
            try:
                step.backward(batch)
            except torch.OutOfMemoryError:
                failed = True
            else:
                failed = False
        assert failed and all(p.grad is None for p in model.parameters())
        gc.collect()
        assert alive and all(reference() is None for reference in alive)
        assert counter.live_bytes == level
    failing[0] = False
    _, expected = plain_step(mlp(), loss_fn, batch)
    step.backward(batch)
    assert_close({k.removeprefix("inner."): v for k, v in gradients(model).items()}, expected)


def test_frozen_weights_under_trained_adapters_leave_no_gradient_out() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(13, 8, dtype=D).requires_grad_(False)
            self.body = nn.Linear(8, 8, dtype=D).requires_grad_(False)
            self.down, self.up = nn.Linear(8, 2, dtype=D), nn.Linear(2, 8, dtype=D)

        def forward(self, ids: Tensor) -> Tensor:
            h = self.embed(ids).mean(1)
            return self.body(h) + self.up(self.down(h))

    batch = token_batch([9, 8, 7, 9, 9, 2, 3])[0], torch.arange(7) % 8
    for loss_fn in (cross_entropy, lambda z, b: cross_entropy(z, b) + z.std(0).sum()):
        model = Adapted()
        _, expected = plain_step(model, loss_fn, batch)
        sg.Step(model, loss_fn, rows=3).backward(batch)
        assert_close(gradients(model), expected)
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_one_clipping_sees_the_sum_and_not_the_parts() -> None:
    batch, model, twin = labelled(29), mlp(), mlp()
    (100 * cross_entropy(twin(batch[0]), batch)).backward()
    plain_norm = nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    sg.Step(model, lambda z, b: 100 * cross_entropy(z, b), rows=4).backward(batch)
    our_norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    assert torch.allclose(our_norm, plain_norm, rtol=1e-13)
    assert_close(gradients(model), gradients(twin))


def test_the_longest_batch_comes_last_and_was_prepared_for() -> None:
    ragged = [token_batch([n] * 24) for n in (8, 8, 64)]
    worst = ragged[-1]
    footprint = sg.measure_step(sg.Step(Tokens(), token_loss), worst)
    low, high = (footprint.predicted_peak_bytes(rows=n) for n in (1, 24))
    total = low + (high - low) // 3
    model = Tokens()
    step = sg.Step(model, token_loss, budget=total, optimizer=torch.optim.SGD(model.parameters(), 0.1))
    step.prepare(worst)
    results = list(sg.train(step, ragged, counter=sg.count_bytes(step)))
    assert all(r.peak_allocated_bytes is not None and r.peak_allocated_bytes <= total for r in results)
    assert [r.batch_rows for r in results] == [24, 24, 24]


def test_the_predicted_and_the_measured_peak_are_both_there() -> None:
    batch = labelled(200)
    model = mlp()
    step = sg.Step(model, cross_entropy, budget="1GiB", optimizer=torch.optim.SGD(model.parameters(), 0.1))
    plan = step.prepare(batch)
    [result] = sg.train(step, [batch], counter=sg.count_bytes(step))
    assert plan.predicted_peak_bytes is not None and result.peak_allocated_bytes is not None
    assert "Predicted peak" in step.explain()
