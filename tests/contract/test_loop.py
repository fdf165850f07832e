"""Clipping, schedulers, scalers and autocast stay the user's, and see what they would see of the plain step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import samegrad as sg
from samegrad.verify import tolerance

from .plain import (
    assert_close,
    cross_entropy,
    gradients,
    labelled,
    mlp,
    plain_step,
    spread,
)

N = 29
X, Y = labelled(N)
D = torch.float64


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def test_clipping_and_schedulers_stay_as_they_are_over_several_steps() -> None:
    models = mlp(), mlp()
    for model, rows in zip(models, (4, None)):
        optimizer = make_optimizer(model)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        step = sg.Step(model, cross_entropy, rows=rows, optimizer=optimizer) if rows else None
        for size in (N, 13, 7, 3):
            batch = (X[:size], Y[:size])
            if step is None:
                cross_entropy(model(batch[0]), batch).backward()
            else:
                step.backward(batch)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        assert scheduler.get_last_lr() == [0.125]
    weights = [dict(model.named_parameters()) for model in models]
    assert_close(*weights)


@pytest.mark.parametrize("samples", [9, 10, 11, 33])
def test_a_short_last_micro_batch_weighs_by_its_rows(samples: int) -> None:
    batch = labelled(samples)
    model = mlp()
    _, expected = plain_step(model, cross_entropy, batch)
    sg.Step(model, cross_entropy, rows=8 if samples == 33 else 4).backward(batch)
    assert_close(gradients(model), expected)


@pytest.mark.parametrize("loss_fn", [cross_entropy, spread], ids=["one pass", "two passes"])
def test_a_scaler_scales_the_gradients_and_not_the_returned_loss(loss_fn: Any) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    model = mlp()
    loss, expected = plain_step(model, loss_fn, (X, Y))
    ours = sg.Step(model, loss_fn, rows=4).backward((X, Y), scaler=scaler)
    assert torch.allclose(ours, loss, rtol=1e-14)
    assert_close(
        {k: None if g is None else g / 1024 for k, g in gradients(model).items()}, expected
    )  # fmt: skip


def test_a_chunk_that_overflows_skips_one_step_and_lowers_the_scale_once() -> None:
    model = mlp(torch.float32)
    optimizer = make_optimizer(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    step = sg.Step(model, lambda z, b: (z * b[1][:, None]).mean(), rows=4)
    weights = torch.ones(N)
    step.backward((X.float(), weights), scaler=scaler)
    optimizer.zero_grad()
    weights[6] = torch.inf
    before = [p.detach().clone() for p in model.parameters()]
    step.backward((X.float(), weights), scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 32.0
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


@pytest.mark.parametrize("loss_fn", [cross_entropy, spread], ids=["one pass", "two passes"])
@pytest.mark.parametrize("given", [{"rows": 4}, {"budget": "1GiB"}], ids=str)
def test_autocast_around_the_step_is_part_of_it(loss_fn: Any, given: Any) -> None:
    x, y = X.float(), Y
    model, twin, wide = mlp(torch.float32), mlp(torch.float32), mlp()
    with torch.autocast("cpu", torch.bfloat16):
        reference = loss_fn(twin(x), (x, y))
        assert twin(x).dtype is torch.bfloat16
    reference.backward()
    loss_fn(wide(x.double()), (x.double(), y)).backward()
    step = sg.Step(model, loss_fn, **given)
    with torch.autocast("cpu", torch.bfloat16):
        step.backward((x, y))
    # No further from float64 than the plain step under autocast is: a missing autocast would be nearer to 0.
    for mine, theirs, exact in zip(model.parameters(), twin.parameters(), wide.parameters()):
        own, plain_error = (mine.grad - exact.grad).norm(), (theirs.grad - exact.grad).norm()
        assert own <= tolerance.NOISE_RATIO * plain_error + 32 * 2**-8 * 2**-4 * exact.grad.norm()
        assert own >= 0.1 * plain_error


def test_the_second_forward_under_autocast_sees_the_weights() -> None:
    model, x = mlp(torch.float32), X.float()
    with torch.autocast("cpu", torch.bfloat16):
        step = sg.Step(model, spread, rows=4)
        step.backward((x, Y))
        step.backward((x, Y))
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_narrow_parameters_are_summed_wide() -> None:
    batch = labelled(512, torch.bfloat16)
    model, wide = mlp(torch.bfloat16), mlp(torch.bfloat16).double()
    cross_entropy(wide(batch[0].double()), batch).backward()
    whole = plain_step(model, cross_entropy, batch)[1]
    sg.Step(model, cross_entropy, rows=1).backward(batch)
    for (_, p), reference, exact in zip(model.named_parameters(), whole.values(), wide.parameters()):
        assert p.grad is not None and reference is not None and exact.grad is not None
        assert p.grad.dtype is torch.bfloat16
        own, theirs = (p.grad.double() - exact.grad).norm(), (reference.double() - exact.grad).norm()
        assert own <= 2 * theirs + 2**-8 * exact.grad.norm()
