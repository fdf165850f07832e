"""DistributedDataParallel on gloo ranks: one reduction a step, whatever rows and chunks each rank has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather
from torch.nn.parallel import DistributedDataParallel

import samegrad as sg
from samegrad import trees
from samegrad.exact import handoff
from samegrad.exact import passes as engine
from samegrad.verify import tolerance

from . import zoo
from .processes import here, on_ranks

Rows = dict[str, Tensor]
D = torch.float64


def rows_of(rank: int, counts: Sequence[int]) -> Rows:
    start = sum(counts[:rank])
    return {key: value[start : start + counts[rank]] for key, value in zoo.batch().items()}


def wrapped(network: nn.Module, **options: Any) -> tuple[DistributedDataParallel, list[int]]:
    """``network`` under DDP, and a count of the reductions of its gradients."""
    model, count = DistributedDataParallel(network.to(here()), **options), [0]

    # DDP compares annotations with types, and here they are text: leave them out.
    def hook(state, bucket):  # type: ignore[no-untyped-def]
        count[0] += 1
        work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    model.register_comm_hook(None, hook)
    return model, count


def local_gradients(network: nn.Module, loss_fn: zoo.Loss, rows: Rows) -> tuple[list[Tensor], list[Tensor]]:
    """The plain gradients of these rows and Σ_k |g_k| of single rows, on copies."""
    gradients = zoo.plain_gradients(network, loss_fn, rows)[1]
    alone, layout = zoo.split_step(network, loss_fn, rows)
    return gradients, alone.totals(rows, layout, [1] * layout.rows).magnitudes or []  # type: ignore[return-value]


def error(model: nn.Module, reference: Sequence[Tensor], sizes: Sequence[Tensor]) -> float:
    """Largest entry difference of the gradients over the contract's allowance."""
    worst, largest = 0.0, max(size.max().item() for size in sizes)
    for parameter, plain, size in zip(model.parameters(), reference, sizes):
        assert parameter.grad is not None
        allowed = tolerance.entry_allowed(plain.dtype) * tolerance.entry_scale(size.max().item(), largest)
        worst = max(worst, (parameter.grad.cpu() - plain).abs().max().item() / allowed)
    return worst


def mean_over_ranks(name: str, counts: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """The mean of the ranks' plain gradients, every rank's computed here."""
    ranks = [local_gradients(zoo.mlp(), zoo.LOSSES[name][0], rows_of(r, counts)) for r in range(len(counts))]
    return tuple([torch.stack(parts).mean(0) for parts in zip(*which)] for which in zip(*ranks))  # type: ignore[return-value]


def equal_on_ranks(model: nn.Module) -> bool:
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    everyone = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, flat)
    return all(torch.equal(flat, other) for other in everyone)


class PartlyUsed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.used, self.unused = nn.Linear(6, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.used(x)
        return outputs


def static_graph(rank: int, how: dict[str, Any]) -> float:
    """Four steps of a graph that DDP takes for static, a part of it unused, against plain ones: the largest error."""
    generator = torch.Generator().manual_seed(rank)
    batch = torch.randn(11, 6, dtype=D, generator=generator), torch.randint(0, 3, (11,), generator=generator)

    def loss_fn(outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])

    models = [DistributedDataParallel(PartlyUsed().to(D), static_graph=True) for _ in range(2)]
    step, worst = sg.Step(models[0], loss_fn, **how), 0.0
    for _ in range(4):
        for model in models:
            model.zero_grad()
        step.backward(batch)
        loss_fn(models[1](batch[0]), batch).backward()
        mine, plain = (model.module.used.weight.grad for model in models)
        assert mine is not None and plain is not None
        worst = max(worst, float((mine - plain).abs().max()))
    return worst


def stepped(name: str, counts: Sequence[int], at_a_time: Sequence[int], rank: int) -> dict[str, Any]:
    """Three steps; the first one's gradient against the reference."""
    model, count = wrapped(zoo.mlp())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = sg.Step(model, zoo.LOSSES[name][0], rows=at_a_time[rank], forward=zoo.forward)
    step.backward(rows_of(rank, counts))
    found: dict[str, Any] = {"error": error(model, *mean_over_ranks(name, counts)), "reductions": [count[0]]}
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad()
        step.backward(rows_of(rank, counts))
        found["reductions"].append(count[0])
    return {**found, "equal": equal_on_ranks(model)}


class Contrastive(nn.Module):
    """Every rank's rows against all ranks' rows, with a temperature that the loss owns."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.0, dtype=D))

    def forward(self, z: Tensor, _: Any) -> Tensor:
        everyone = torch.cat(all_gather(z))
        return _info_nce(everyone, self.temperature)


def _info_nce(z: Tensor, temperature: Tensor) -> Tensor:
    z = F.normalize(z, dim=1)
    return F.cross_entropy(z @ z.T * temperature.exp(), torch.arange(len(z), device=z.device))


def gathered(rank: int) -> dict[str, Any]:
    """A loss over all ranks' rows: one process with all rows is the reference, temperature included."""
    counts = [14, 14]
    rows = {key: value[:28] for key, value in zoo.batch().items()}
    alone = Contrastive()
    plain = zoo.plain_gradients(zoo.mlp(), lambda z, _: _info_nce(z, alone.temperature), rows)[1]
    (model, count), loss_fn = wrapped(zoo.mlp()), Contrastive().to(here())
    step = sg.Step(model, loss_fn, rows=(3, 5)[rank], forward=zoo.forward)
    mine = rows_of(rank, counts)
    step.backward(mine)
    sizes = [g.abs().max() * 8 for g in plain]
    found = {"error": error(model, plain, sizes), "reductions": count[0], "why": step.explain()}
    temperature = loss_fn.temperature.grad
    assert temperature is not None
    assert alone.temperature.grad is not None
    found["temperature"] = ((temperature.cpu() - alone.temperature.grad) / alone.temperature.grad).abs().item()
    if rank == 1:
        # Examined again on this rank only: nobody waits.
        mine = {**mine, "more": torch.zeros(14)}
    step.backward(mine)
    return found


def counted_over_ranks(rank: int) -> dict[str, Any]:
    """Cross entropy over the valid targets of all ranks, in three ways to write it."""
    counts = [18, 11]
    rows = rows_of(rank, counts)
    plain, sizes = local_gradients(zoo.mlp(), zoo.LOSSES["ignored targets"][0], zoo.batch())

    def total(z: Tensor, b: Rows) -> Tensor:
        return 2 * F.cross_entropy(z, b["y_ignored"], reduction="sum")

    def inside(z: Tensor, b: Rows) -> Tensor:
        count = (b["y_ignored"] != -100).sum()
        dist.all_reduce(count)
        return total(z, b) / count

    found: dict[str, Any] = {}
    for name, loss_fn, normalise in (
        ("inside", inside, None),
        ("inside, declared", inside, "sum"),
        ("in the batch", lambda z, b: total(z, b) / b["count"], "sum"),
    ):
        count = (rows["y_ignored"] != -100).sum()
        dist.all_reduce(count)
        model, reductions = wrapped(zoo.mlp())
        step = sg.Step(model, loss_fn, rows=4, forward=zoo.forward, normalise=normalise)
        given = {**rows, "count": count}
        try:
            step.backward(given)
        except sg.FalseNormalise as refusal:
            found[name] = str(refusal)
            continue
        passes = step.split_for(given, step.declared.layout(given)).examination.passes
        found[name] = (error(model, plain, sizes), reductions[0], passes)
    return found


class WithBuffer(nn.Module):
    def __init__(self, shift: float) -> None:
        super().__init__()
        self.inner = zoo.mlp()
        self.shift: Tensor
        self.register_buffer("shift", torch.full((6,), shift, dtype=D))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.shift)


def buffers(rank: int, split_ranks: tuple[int, ...]) -> dict[str, Any]:
    """Buffers that ranks changed on their own are the first rank's in the next step; some ranks may run whole."""
    loss_fn = zoo.LOSSES["mse"][0]
    rows = trees.move(rows_of(rank, [15, 14]), here())
    plain, ours = wrapped(WithBuffer(0.5))[0], wrapped(WithBuffer(0.5))[0]
    step = sg.Step(ours, loss_fn, rows=4 if rank in split_ranks else 64, forward=zoo.forward)
    worst = 0.0
    same = True
    for number in range(3):
        for model in (plain, ours):
            model.zero_grad()
            model.module.shift.fill_(number + rank)
        loss_fn(zoo.forward(plain, rows), rows).backward()
        step.backward(rows)
        pairs = zip(plain.parameters(), ours.parameters())
        worst = max(worst, *((a.grad - b.grad).abs().max().item() for a, b in pairs))  # type: ignore[operator]
        same = same and torch.equal(plain.module.shift, ours.module.shift)
    return {"error": worst, "same": same}


def planted_buffers(rank: int) -> float:
    """Buffers left as each rank has them."""
    engine.begin_step = lambda _: None  # type: ignore[attr-defined]  # put back below
    try:
        return float(buffers(rank, (0, 1))["error"])
    finally:
        engine.begin_step = handoff.begin_step  # type: ignore[attr-defined]  # put back


class Meeting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = zoo.mlp(), Meets()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]


class Meets(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        mean = x.detach().mean(0)
        dist.all_reduce(mean)
        return x - mean


def refused(rank: int) -> dict[str, str]:
    """Refusals of one rank alone: no other one is asked, so nobody waits."""
    mse = zoo.LOSSES["mse"][0]
    tried: dict[str, tuple[nn.Module, Any, dict[str, Any]]] = {
        "collective": (DistributedDataParallel(Meeting()), mse, {"rows": 4}),
        "budget": (DistributedDataParallel(zoo.mlp()), Contrastive(), {"budget": "1GiB"}),
    }
    found = {}
    for name, (model, loss_fn, options) in tried.items() if rank == 0 else ():
        try:
            sg.Step(model, loss_fn, forward=zoo.forward, **options).backward(rows_of(rank, [15, 14]))
        except sg.CannotSplit as refusal:
            found[name] = str(refusal)
    return found


CUTS = {"5 chunks and 3": ([18, 11], [4, 4]), "one rank whole": ([19, 10], [7, 64]), "ragged": ([28, 1], [9, 9])}
LOSSES = ("mse", "ignored targets", "info nce", "mse sum")


def _rank(rank: int) -> dict[str, Any]:
    steps = {f"{name}, {cut}": stepped(name, *CUTS[cut], rank) for name in LOSSES for cut in CUTS}
    return {
        "steps": steps,
        "gathered": gathered(rank),
        "counted": counted_over_ranks(rank),
        "buffers": [buffers(rank, ranks) for ranks in ((0, 1), (0,), (1,))],
        "planted buffers": planted_buffers(rank),
        "static graph": [static_graph(rank, how) for how in ({"budget": "1GiB"}, {"rows": 5})],
        "refused": refused(rank),
    }


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return on_ranks(_rank, 2)


def test_gradients_are_the_mean_of_the_ranks_plain_gradients_after_one_reduction(found: list[dict[str, Any]]) -> None:
    for rank in found:
        for name, step in rank["steps"].items():
            assert step["error"] <= 1, name
            assert step["reductions"] == [1, 2, 3], name
            assert step["equal"], name


def test_a_loss_over_all_ranks_runs_once_a_step_and_its_own_parameters_are_not_multiplied(
    found: list[dict[str, Any]],
) -> None:
    for rank in found:
        assert rank["gathered"]["error"] <= 1
        assert rank["gathered"]["temperature"] < 1e-13
        assert rank["gathered"]["reductions"] == 1
        assert "the loss calls a collective (c10d::allgather_)" in rank["gathered"]["why"]


def test_a_count_over_ranks_inside_the_loss_or_in_the_batch(found: list[dict[str, Any]]) -> None:
    for rank in found:
        for name, passes in (("inside", 2), ("in the batch", 1)):
            assert rank["counted"][name][0] <= 1
            assert rank["counted"][name][1:] == (1, passes)
        assert "calls a collective (c10d::allreduce_)" in rank["counted"]["inside, declared"]
        assert "normalise='sum'" in rank["counted"]["inside, declared"]


def test_chunks_see_the_first_ranks_buffers(found: list[dict[str, Any]]) -> None:
    for rank in found:
        for mixture in rank["buffers"]:
            assert mixture["error"] < 1e-14
            assert mixture["same"]
    assert max(rank["planted buffers"] for rank in found) > 1e-3


def test_refusals_need_no_other_rank(found: list[dict[str, Any]]) -> None:
    refusals = found[0]["refused"]
    assert "second (Meets) calls a collective (c10d::allreduce_)" in refusals["collective"]
    assert "the loss calls collectives" in refusals["budget"]


def test_a_static_graph_with_an_unused_part_goes_on_step_after_step(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert max(rank["static graph"]) <= 1e-15


def _four(rank: int) -> dict[str, Any]:
    cut = ([11, 9, 7, 2], [2, 4, 64, 1])
    return {name: stepped(name, *cut, rank) for name in LOSSES}


@pytest.mark.slow
def test_four_ranks() -> None:
    for rank in on_ranks(_four, 4):
        for step in rank.values():
            assert step["error"] <= 1
            assert step["reductions"] == [1, 2, 3]
            assert step["equal"]
