"""Batch leaves that all rows share and that require grad: prototypes of a support set, F + B, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import samegrad as sg
from samegrad.exact import shared_leaves

from . import zoo
from .test_handoff import on_two_ranks
from .test_rowwise import assert_same

D = torch.float64
WAYS, SHOTS, QUERIES = 4, 5, 29


def episode(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Support (20, 6) in class order, queries (29, 6) and their classes (29,)."""
    generator = torch.Generator().manual_seed(seed)
    support = torch.randn(WAYS * SHOTS, 6, dtype=D, generator=generator)
    queries = torch.randn(QUERIES, 6, dtype=D, generator=generator)
    return support, queries, torch.randint(0, WAYS, (QUERIES,), generator=generator)


def prototypes(encoder: Callable[[Tensor], Tensor], support: Tensor) -> Tensor:
    return encoder(support).reshape(WAYS, SHOTS, -1).mean(1)


def nearest(z: Tensor, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Cross entropy of cosine similarities between rows and prototypes."""
    return F.cross_entropy(5 * F.normalize(z, dim=1) @ F.normalize(batch[2], dim=1).T, batch[1])


def gradients(run: Callable[[nn.Module, tuple[Tensor, Tensor, Tensor]], Tensor]) -> list[Tensor]:
    encoder = zoo.mlp()
    support, queries, classes = episode()
    loss = run(encoder, (queries, classes, prototypes(encoder, support)))
    return [loss.detach(), *(p.grad for p in encoder.parameters() if p.grad is not None)]


def plainly(encoder: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    loss = nearest(encoder(batch[0]), batch)
    loss.backward()
    return loss


@pytest.mark.parametrize("normalise", [None, "mean"])
@pytest.mark.parametrize("rows", [1, 8, [1, 27, 1]])
def test_prototypes_have_the_plain_gradient(normalise: Any, rows: Any) -> None:
    def ours(encoder: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return sg.Step(encoder, nearest, rows=rows, normalise=normalise).backward(batch)

    assert_same(gradients(ours), gradients(plainly))


@pytest.mark.parametrize("fault", ["lost", "counted once a chunk"])
def test_a_gradient_lost_or_counted_too_often_would_be_seen(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    factor = {"lost": 0.0, "counted once a chunk": 4.0}[fault]
    right = shared_leaves.stood_in

    def wrong(batch: Any, layout: Any, aliases: Any) -> Any:
        standing, both = right(batch, layout, aliases)
        for leaf in both._beside:
            leaf.register_hook(lambda g: g * factor)
        return standing, both

    monkeypatch.setattr("samegrad.exact.split.stood_in", wrong)
    with pytest.raises(AssertionError):
        assert_same(
            gradients(lambda encoder, batch: sg.Step(encoder, nearest, rows=8, normalise="mean").backward(batch)),
            gradients(plainly),
        )


def test_every_row_runs_once_and_hooks_fire_once_on_the_total() -> None:
    """F + B: the support set once, every query once, no second forward of either."""
    encoder = zoo.mlp()
    support, queries, classes = episode()
    step = sg.Step(encoder, nearest, rows=8, normalise="mean")
    step.backward((queries, classes, prototypes(encoder, support)))
    encoder.zero_grad()
    seen: list[tuple[int, bool]] = []
    encoder.register_forward_pre_hook(lambda _, inputs: seen.append((len(inputs[0]), torch.is_grad_enabled())))
    fired: list[Tensor] = []
    weight = next(encoder.parameters())
    weight.register_hook(fired.append)
    step.backward((queries, classes, prototypes(encoder, support)))
    assert seen == [(WAYS * SHOTS, True), (8, True), (8, True), (8, True), (5, True)]
    [total] = fired
    assert weight.grad is not None and torch.equal(total, weight.grad)


def test_a_shared_leaf_gets_its_total_in_grad_in_one_pass_and_in_two() -> None:
    _, queries, classes = episode()
    encoder = zoo.mlp()
    leaf = torch.randn(WAYS, zoo.CLASSES, dtype=D, generator=torch.Generator().manual_seed(5)).requires_grad_()
    nearest(encoder(queries), (queries, classes, leaf)).backward()
    assert leaf.grad is not None
    reference, leaf.grad = leaf.grad, None
    for normalise in ("mean", None):
        sg.Step(encoder, nearest, rows=8, normalise=normalise).backward((queries, classes, leaf))
        assert_same([leaf.grad], [reference])
        leaf.grad = None


def test_a_shared_leaf_that_the_model_reads_needs_no_declaration() -> None:
    class Conditioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = zoo.mlp()

        def forward(self, x: Tensor, style: Tensor) -> Tensor:
            return self.inner(x) * style

    model, rows = Conditioned(), zoo.batch()
    table = torch.randn(zoo.CLASSES, dtype=D, generator=torch.Generator().manual_seed(5)).requires_grad_()

    def run(backward: Callable[[dict[str, Tensor]], object]) -> list[Tensor]:
        model.zero_grad()
        table.grad = None
        # One tensor in two places gets one total.
        style = table.exp()
        backward({"x": rows["x"], "style": style, "t": rows["t"], "again": style})
        return [p.grad.clone() for p in (*model.parameters(), table) if p.grad is not None]

    def forward(module: nn.Module, b: dict[str, Tensor]) -> Tensor:
        return module(b["x"], b["style"])

    def loss_fn(z: Tensor, b: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(z, b["t"]) + 0 * b["again"].sum()

    def plain_loss(z: Tensor, b: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(z, b["t"])

    step = sg.Step(model, plain_loss, forward=forward, rows=8)
    assert_same(run(step.backward), run(lambda b: plain_loss(forward(model, b), b).backward()))
    assert "one pass" in step.explain()
    twice = sg.Step(model, loss_fn, forward=forward, rows=8)
    assert_same(run(twice.backward), run(lambda b: loss_fn(forward(model, b), b).backward()))


def test_planning_and_verification_leave_the_graph_behind_a_leaf_unspent() -> None:
    encoder = zoo.mlp()
    support, queries, classes = episode()
    batch = (queries, classes, prototypes(encoder, support))
    step = sg.Step(encoder, nearest, rows=8, normalise="mean")
    assert sg.verify_step(step, batch).same
    planned = sg.Step(encoder, nearest, budget="1GiB", normalise="mean")
    planned.prepare(batch)
    assert all(p.grad is None for p in encoder.parameters())
    step.backward(batch)
    ours = [p.grad.clone() for p in encoder.parameters() if p.grad is not None]
    assert_same(ours, gradients(plainly)[1:])


def test_a_failure_leaves_the_graph_and_the_gradients_as_they_were() -> None:
    encoder = zoo.mlp()
    support, queries, classes = episode()
    batch = (queries, classes, prototypes(encoder, support))
    armed = [False]

    def loss_fn(z: Tensor, b: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        if armed[0] and len(z) == 5:
            raise KeyError("the last chunk")
        return nearest(z, b)

    step = sg.Step(encoder, loss_fn, rows=8, normalise="mean")
    step.split_for(batch, step.declared.layout(batch))
    armed[0] = True
    with pytest.raises(KeyError):
        step.backward(batch)
    assert all(p.grad is None for p in encoder.parameters())
    armed[0] = False
    step.backward(batch)
    assert_same([p.grad for p in encoder.parameters() if p.grad is not None], gradients(plainly)[1:])


def test_a_leaf_that_begins_to_require_grad_is_examined_as_such() -> None:
    """As a constant the leaf leaves the loss a mean over rows; with a gradient of its own it needs two passes."""
    model, rows = zoo.mlp(), zoo.batch()
    leaf = torch.full((zoo.CLASSES,), 0.3, dtype=D)

    def loss_fn(z: Tensor, b: dict[str, Tensor]) -> Tensor:
        return (z * b["scale"] - b["t"]).pow(2).sum() + (b["scale"] - b["scale"].detach()).sum()

    step = sg.Step(model, loss_fn, forward=zoo.forward, rows=8)
    step.backward({**rows, "scale": leaf})
    leaf.requires_grad_()
    step.backward({**rows, "scale": leaf})
    ours, leaf.grad = leaf.grad, None
    loss_fn(model(rows["x"]), {**rows, "scale": leaf}).backward()
    assert_same([ours], [leaf.grad])


@pytest.mark.parametrize("owner", ["leaf", "loss"])
def test_a_term_without_a_value_that_chunks_would_count_again_is_refused(owner: str) -> None:
    """Its gradient would come once a chunk, and the value of the loss does not show it."""

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(0.5, dtype=D))

        def forward(self, z: Tensor, b: dict[str, Tensor]) -> Tensor:
            term = b["scale"].sum() if owner == "leaf" else self.scale
            return (z * self.scale - b["t"] * b["scale"]).pow(2).sum() + term - term.detach()

    rows = {**zoo.batch(), "scale": torch.full((zoo.CLASSES,), 0.3, dtype=D).requires_grad_()}
    with pytest.raises(sg.FalseNormalise, match="its gradient differs by"):
        sg.Step(zoo.mlp(), Loss(), forward=zoo.forward, rows=8, normalise="sum").backward(rows)


def test_a_parameter_of_the_loss_whose_gradient_is_zero_by_structure_is_no_reason_to_refuse() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shift, self.scale = (nn.Parameter(torch.tensor(v, dtype=D)) for v in (0.5, 1.5))

        def forward(self, z: Tensor, b: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(z * self.scale + self.shift, b["y"])

    model, rows, loss_fn = zoo.mlp(), zoo.batch(), Shifted()
    sg.Step(model, loss_fn, forward=zoo.forward, rows=8, normalise="mean").backward(rows)
    everything = [*model.parameters(), *loss_fn.parameters()]
    plain = torch.autograd.grad(loss_fn(model(rows["x"]), rows), everything)
    assert_same([p.grad for p in everything if p.grad is not None], list(plain))


def test_the_graph_behind_a_leaf_runs_outside_autocast() -> None:
    encoder, seen = zoo.mlp(torch.float32), []
    support, queries, classes = (t.float() if t.is_floating_point() else t for t in episode())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        means = prototypes(encoder, support)
        means.register_hook(lambda _: seen.append(torch.is_autocast_enabled("cpu")))
        sg.Step(encoder, nearest, rows=8, normalise="mean").backward((queries, classes, means))
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False]


def test_a_leaf_that_carries_rows_is_still_refused_and_can_be_marked_as_shared() -> None:
    encoder = zoo.mlp()
    generator = torch.Generator().manual_seed(0)
    queries, centers = torch.randn(9, 6, dtype=D, generator=generator), torch.randn(9, 7, dtype=D, generator=generator)
    batch = (queries, torch.arange(9), centers.requires_grad_())
    with pytest.raises(sg.CannotSplit, match=r"batch\[2\] carries rows and requires grad"):
        sg.Step(encoder, nearest, rows=4, normalise="mean").backward(batch)
    step = sg.Step(encoder, nearest, rows=4, normalise="mean", batch_axes=(0, 0, None))
    step.backward(batch)
    ours, centers.grad = centers.grad, None
    nearest(encoder(queries), batch).backward()
    assert_same([ours], [centers.grad])


def _rank(rank: int) -> dict[str, float]:
    errors = []
    support, queries, classes = episode(rank)
    wrapped, plain = DistributedDataParallel(zoo.mlp()), DistributedDataParallel(zoo.mlp())
    step = sg.Step(wrapped, nearest, rows=8, normalise="mean")
    step.backward((queries, classes, prototypes(wrapped, support)))
    nearest(plain(queries), (queries, classes, prototypes(plain, support))).backward()
    for a, b in zip(wrapped.parameters(), plain.parameters()):
        errors.append(((a.grad - b.grad).abs().max() / b.grad.abs().max()).item())
    return {"error": max(errors)}


def test_under_ddp_support_and_queries_are_reduced_together() -> None:
    assert on_two_ranks(_rank)["error"] < 1e-12
