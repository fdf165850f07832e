"""``rowwise``: values and derivatives of every order are those of the function it wraps, in float64."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import samegrad as sg
from samegrad.verify import tolerance

from . import zoo
from .processes import on_two_ranks

D = torch.float64
N = 23


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 16), nn.SiLU(), nn.Linear(16, 3)
    ).to(D)


def rows(seed: int = 1, width: int = 5, count: int = N) -> Tensor:
    return torch.randn(count, width, dtype=D, generator=torch.Generator().manual_seed(seed))


def loss_of(function: Callable[[Tensor], Tensor], x: Tensor, order: int) -> Tensor:
    """A loss that couples rows and holds derivatives of ``function`` up to ``order`` - 1."""
    y = function(x)
    loss = y.pow(2).mean() + (y.std(0) - 1).pow(2).sum()
    if order >= 2:
        (g,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        loss = loss + (g.norm(dim=1) - 1).pow(2).mean()
    if order >= 3:
        (h,) = torch.autograd.grad(g.pow(2).sum(), x, create_graph=True)
        loss = loss + h.pow(2).mean()
    return loss


def everything(model: nn.Module, function: Callable[[Tensor], Tensor], order: int) -> list[Tensor]:
    model.zero_grad()
    x = rows().requires_grad_()
    loss = loss_of(function, x, order)
    loss.backward()
    assert x.grad is not None
    return [loss.detach(), x.grad, *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(ours: list[Tensor], plain: list[Tensor]) -> None:
    assert len(ours) == len(plain)
    sizes = [reference.abs().max().item() for reference in plain]
    for mine, reference, size in zip(ours, plain, sizes):
        # The contract's scale is the sum of the chunks' absolute gradients, several times the gradient itself.
        allowed = 8 * tolerance.entry_allowed(D) * tolerance.entry_scale(size, max(sizes))
        assert (mine - reference).abs().max().item() <= allowed


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 5, 8, N])
def test_derivatives_of_every_order_are_the_plain_ones(order: int, size: int) -> None:
    model = net()
    assert_same(everything(model, sg.rowwise(model, rows=size), order), everything(model, model, order))


def test_a_planted_weight_error_would_be_seen() -> None:
    model = net()
    wrapped = sg.rowwise(model, rows=5)
    with pytest.raises(AssertionError):
        assert_same(everything(model, lambda x: 1.0001 * wrapped(x), 1), everything(model, model, 1))


def test_hooks_fire_once_and_grad_is_added_to() -> None:
    model = net()
    fired: list[int] = []
    weight = next(model.parameters())
    weight.register_hook(lambda _: fired.append(1))
    plain = copy.deepcopy(model)
    plain(rows()).pow(2).sum().backward()
    weight.grad = torch.ones_like(weight)
    sg.rowwise(model, rows=4)(rows()).pow(2).sum().backward()
    assert fired == [1]
    reference = next(plain.parameters()).grad
    assert reference is not None
    torch.testing.assert_close(weight.grad, reference + 1, rtol=1e-13, atol=1e-14)


def test_several_encoders_tied_weights_and_unused_parameters() -> None:
    first, second = net(), net()
    second[0].weight = first[0].weight
    first.register_module("unused", nn.Linear(2, 2))
    function = lambda module, x: module[4](module[3](module[2](module[1](module[0](x)))))

    def contrastive(a: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(F.normalize(a, dim=1) @ F.normalize(b, dim=1).T, torch.arange(len(a)) % len(b))

    def gradients(a: Tensor, b: Tensor) -> list[Tensor | None]:
        for p in (*first.parameters(), *second.parameters()):
            p.grad = None
        contrastive(a, b).backward()
        return [None if p.grad is None else p.grad.clone() for p in (*first.parameters(), *second.parameters())]

    wrapped = [
        sg.rowwise(lambda x, m=m: function(m, x), rows=size, shared=[m]) for m, size in ((first, 4), (second, 7))
    ]
    ours = gradients(wrapped[0](rows(1)), wrapped[1](rows(2, count=31)))
    plain = gradients(function(first, rows(1)), function(second, rows(2, count=31)))
    assert [g is None for g in ours] == [g is None for g in plain]
    assert_same([g for g in ours if g is not None], [g for g in plain if g is not None])


def test_nested_arguments_and_outputs_keep_their_shape() -> None:
    @dataclasses.dataclass
    class Seen:
        calls: int = 0

    model, seen = net(), Seen()

    def function(batch: dict[str, Tensor], scale: Tensor) -> dict[str, Any]:
        seen.calls += 1
        z = model(batch["x"])
        return {"rows": (z * scale, batch["y"]), "name": "encoded"}

    scale = torch.tensor(2.0, dtype=D, requires_grad=True)
    batch = {"x": rows(), "y": torch.arange(N)}
    ours = sg.rowwise(function, rows=6, shared=[model])(batch, scale)
    assert ours["name"] == "encoded"
    assert torch.equal(ours["rows"][1], batch["y"])
    ours["rows"][0].pow(2).sum().backward()
    mine, scale.grad = scale.grad, None
    function(batch, scale)["rows"][0].pow(2).sum().backward()
    torch.testing.assert_close(mine, scale.grad, rtol=1e-13, atol=0)


def test_time_major_rows() -> None:
    model = nn.LSTM(5, 7).to(D)
    x = rows(count=4 * N).reshape(4, N, 5)
    wrapped = sg.rowwise(lambda x: model(x)[0], rows=6, axes=1, shared=[model])
    wrapped(x).pow(2).mean().backward()
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(x)[0].pow(2).mean().backward()
    assert_same(ours, [p.grad for p in model.parameters() if p.grad is not None])


def test_groups_stay_together_and_their_rows_may_see_each_other() -> None:
    model = net()

    def centred(x: Tensor) -> Tensor:
        z = model(x).reshape(-1, 3, 3)
        return (z - z.mean(1, keepdim=True)).reshape(-1, 3)

    x = rows(count=21)
    wrapped = sg.rowwise(centred, rows=7, groups=[3] * 7, shared=[model])
    wrapped(x).pow(2).sum().backward()
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    centred(x).pow(2).sum().backward()
    assert_same(ours, [p.grad for p in model.parameters() if p.grad is not None])
    with pytest.raises(sg.CannotSplit, match="groups that run with it"):
        sg.rowwise(lambda x: model(x) - model(x).mean(0), rows=6, groups=[3] * 7, shared=[model])(x)
    with pytest.raises(sg.UsageError, match="a group has 3 rows"):
        sg.rowwise(centred, rows=2, groups=[3] * 7, shared=[model])(x)


def test_autocast_at_the_call_is_entered_again_in_backward() -> None:
    model = net().float()
    x = rows().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sg.rowwise(model, rows=8)(x)
    assert y.dtype is torch.bfloat16
    y.float().pow(2).sum().backward()
    ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
    y.float().pow(2).sum().backward()
    for mine, plain in zip(ours, [p.grad for p in model.parameters() if p.grad is not None]):
        assert mine.dtype is plain.dtype is torch.float32
        assert (mine - plain).norm() <= 0.02 * plain.norm()


def test_weights_changed_before_backward_are_an_error() -> None:
    model = net()
    y = sg.rowwise(model, rows=5)(rows())
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).to(D), "BatchNorm1d"),
        (lambda: nn.Sequential(nn.Linear(5, 4), nn.Softmax(dim=0)).to(D), "mixes rows"),
    ],
)
def test_what_is_no_function_of_rows_is_refused_by_name(make: Callable[[], nn.Module], named: str) -> None:
    model = make()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(sg.CannotSplit, match=named):
        sg.rowwise(model, rows=5)(rows())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def test_a_module_in_a_closure_is_refused_until_it_is_named() -> None:
    model = net()
    with pytest.raises(sg.CannotSplit, match="requires grad"):
        sg.rowwise(lambda x: model(x), rows=5)(rows())
    sg.rowwise(lambda x: model(x), rows=5, shared=[model])(rows())


def _rank(rank: int) -> dict[str, Any]:
    model = zoo.mlp()
    wrapped = DistributedDataParallel(sg.rowwise(model, rows=5))
    count = [0]

    def hook(state, bucket):  # type: ignore[no-untyped-def]
        count[0] += 1
        work = dist.all_reduce(bucket.buffer().div_(2), async_op=True)
        return work.get_future().then(lambda f: f.value()[0])

    wrapped.register_comm_hook(None, hook)
    plain = DistributedDataParallel(zoo.mlp())
    x = zoo.batch()["x"]
    mine = x[:17] if rank == 0 else x[17:]
    wrapped(mine).pow(2).mean().backward()
    plain(mine).pow(2).mean().backward()
    pairs = list(zip(wrapped.parameters(), plain.parameters()))
    error = max(((a.grad - b.grad).abs().max() / b.grad.abs().max()).item() for a, b in pairs)
    return {"collectives": count[0], "error": error, "pid": os.getpid()}


def test_under_ddp_one_reduction_a_step() -> None:
    found = on_two_ranks(_rank)
    assert found["collectives"] == 1
    assert found["error"] < 1e-13


def _switched(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), layer, nn.Linear(4, 3)).to(D).eval()


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Identity()])
@pytest.mark.parametrize("way", ["rowwise", "over"])
def test_a_mode_switched_before_backward_is_an_error_and_changes_nothing(layer: nn.Module, way: str) -> None:
    """What runs again in backward would be another function, and would draw or update statistics besides."""
    model = _switched(copy.deepcopy(layer))
    x = rows()
    y = sg.rowwise(model, rows=5)(x) if way == "rowwise" else sg.over(lambda i, s: s(i), x, shared=model, rows=5)
    model.train()
    before, drawn = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    with pytest.raises(sg.GradientsDiffer, match="switched between training and eval"):
        y.sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(p.grad is None for p in model.parameters())
    model.eval()
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_buffers_changed_before_backward_are_an_error() -> None:
    model = _switched(nn.BatchNorm1d(4))
    y = sg.rowwise(model, rows=5)(rows())
    model[1].running_mean.add_(1)
    with pytest.raises(sg.GradientsDiffer, match=r"1\.running_mean"):
        y.sum().backward()


def test_state_and_draws_that_begin_after_the_first_call_are_refused() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 3, dtype=D)
            self.register_buffer("calls", torch.zeros(()))
            self.armed = ["nothing"]

        def forward(self, x: Tensor) -> Tensor:
            if self.armed[0] == "counts":
                self.calls.add_(1)
            z = self.inner(x)
            return z + torch.randn_like(z) if self.armed[0] == "draws" else z

    for armed, named in (("counts", "calls"), ("draws", "draws random numbers")):
        model = Late()
        wrapped = sg.rowwise(model, rows=5)
        wrapped(rows())
        model.armed[0] = armed
        before = torch.get_rng_state()
        with pytest.raises(sg.CannotSplit, match=named):
            wrapped(rows())
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("groups", [None, [3] * 7])
def test_the_length_of_a_chunk_never_passes_for_the_batchs(groups: list[int] | None) -> None:
    model = net()
    wrapped = sg.rowwise(lambda x: (model(x), len(x)), rows=6, groups=groups, shared=[model])
    with pytest.raises(sg.CannotSplit, match=r"outputs\[1\]"):
        wrapped(rows(count=21))
