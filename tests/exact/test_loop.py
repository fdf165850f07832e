"""Sharded parameters (fully_shard) on gloo ranks: unequal rows, unequal chunk counts, the plain step's gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import samegrad as sg
from samegrad import trees
from samegrad.exact.loop import equal_count
from samegrad.exact.split import SplitStep
from samegrad.verify import tolerance

from ..contract.plain import Tally
from . import zoo
from .processes import here, on_ranks

Rows = dict[str, Tensor]


class Net(nn.Module):
    """Layers that do not divide by the ranks, and a parameter that the outermost module holds itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = zoo.mlp()
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, zoo.CLASSES, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * self.scale


def sharded(net: nn.Module, **options: Any) -> nn.Module:
    net.to(here())
    for part in net.modules():
        if isinstance(part, nn.Linear):
            fully_shard(part, **options)
    fully_shard(net, **options)
    return net


def rows_of(batch: Rows, rank: int, counts: Sequence[int]) -> Rows:
    start = sum(counts[:rank])
    return {key: value[start : start + counts[rank]] for key, value in batch.items()}


def valid(batch: Rows) -> Tensor:
    return (batch["y_ignored"] != -100).sum()


# rows on each rank, rows at a time on each rank
CUTS: dict[str, tuple[list[int], list[int]]] = {
    "5 chunks and 3": ([18, 11], [4, 4]),
    "6 chunks and 2 rows": ([27, 2], [5, 5]),
    "one rank whole": ([19, 10], [7, 64]),
    "equal": ([15, 14], [5, 5]),
}
# loss, what is declared, passes
STEPS: dict[str, tuple[str, Any, int]] = {
    "mean": ("mse", None, 1),
    "sum": ("mse sum", None, 1),
    "weighted": ("weighted rows", "mean", 1),
    "count declared": ("ignored targets", valid, 1),
    "count": ("ignored targets", None, 2),
    "contrastive": ("info nce", None, 2),
}


def step_for(model: nn.Module, name: str, rows: int) -> sg.Step:
    loss, normalise, _ = STEPS[name]
    return sg.Step(model, zoo.LOSSES[loss][0], rows=rows, forward=zoo.forward, normalise=normalise)


def reference(name: str, counts: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """The mean over ranks of each rank's plain gradient, computed here, and the mean of Σ_k |g_k|."""
    loss_fn = zoo.LOSSES[STEPS[name][0]][0]
    gradients, sizes = [], []
    for rank in range(len(counts)):
        rows = rows_of(zoo.batch(), rank, counts)
        gradients.append(zoo.plain_gradients(Net(), loss_fn, rows)[1])
        split, layout = zoo.split_step(Net(), loss_fn, rows)
        sizes.append(split.totals(rows, layout, [1] * layout.rows).magnitudes)
    return ([torch.stack(g).mean(0) for g in zip(*gradients)], [torch.stack(s).mean(0) for s in zip(*sizes)])  # type: ignore[arg-type]


def error(model: nn.Module, reference: tuple[list[Tensor], list[Tensor]]) -> float:
    """Largest entry difference of the gradients over the contract's allowance."""
    worst = 0.0
    largest = max(size.max().item() for size in reference[1])
    for parameter, plain, size in zip(model.parameters(), *reference):
        assert parameter.grad is not None
        ours = parameter.grad.full_tensor().cpu()  # type: ignore[attr-defined]
        allowed = tolerance.entry_allowed(plain.dtype) * tolerance.entry_scale(size.max().item(), largest)
        worst = max(worst, (ours - plain).abs().max().item() / allowed)
    return worst


def compared(name: str, cut: str, rank: int) -> dict[str, Any]:
    """One step of ours, one of plain fully_shard and the reference, from the same weights."""
    counts, at_a_time = CUTS[cut]
    counts = [*counts, *counts][: dist.get_world_size()] if dist.get_world_size() > 2 else counts
    rows = rows_of(zoo.batch(), rank, counts) if len(counts) == 2 else rows_of(_doubled(), rank, counts)
    ours, plain = sharded(Net()), sharded(Net())
    step = step_for(ours, name, at_a_time[rank % 2])
    loss = step.backward(rows)
    rows = trees.move(rows, here())
    theirs = zoo.LOSSES[STEPS[name][0]][0](zoo.forward(plain, rows), rows)
    theirs.backward()
    expected = reference(name, counts) if len(counts) == 2 else _from(plain, name)
    found = {
        "error": error(ours, expected),
        "plain's error": error(plain, expected),
        "loss": abs((loss - theirs.detach()).item()) / max(abs(theirs.item()), 1),
        "passes": step.split_for(rows, step.declared.layout(rows)).examination.passes,
    }
    for model in (ours, plain):
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    pairs = zip(ours.parameters(), plain.parameters())
    found["parameters"] = max((a - b).full_tensor().abs().max().item() for a, b in pairs)  # type: ignore[attr-defined]
    return found


def _doubled() -> Rows:
    return {key: torch.cat([value, value.flip(0)]) for key, value in zoo.batch().items()}


def _from(plain: nn.Module, name: str) -> tuple[list[Tensor], list[Tensor]]:
    full = [p.grad.full_tensor().cpu() for p in plain.parameters()]  # type: ignore[union-attr]
    return full, [g.abs().max() * torch.ones_like(g) * 8 for g in full]


def planted(rank: int) -> float:
    """Shares forgotten: every chunk counts as much as any other."""
    counts, at_a_time = CUTS["5 chunks and 3"]
    rows, right = rows_of(zoo.batch(), rank, counts), SplitStep._shares
    model = sharded(Net())
    SplitStep._shares = lambda self, batch, layout, sizes: [1 / len(sizes)] * len(sizes)  # type: ignore[method-assign]
    try:
        step_for(model, "mean", at_a_time[rank]).backward(rows)
    finally:
        SplitStep._shares = right  # type: ignore[method-assign]
    return error(model, reference("mean", counts))


def raised(run: Callable[[], Any]) -> str:
    try:
        run()
    except (sg.SamegradError, ZeroDivisionError) as found:
        return f"{type(found).__name__}: {found}"
    return "nothing was raised"


def in_bfloat16(rank: int, kind: str) -> dict[str, Any]:
    """Distances to float64, of ours and of plain fully_shard, in the parameters' own or in the compute dtype."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    dtype, options = (torch.bfloat16, {}) if kind == "parameters" else (torch.float32, {"mp_policy": policy})
    counts, at_a_time = CUTS["5 chunks and 3"]
    rows = {k: v.to(dtype) if v.is_floating_point() else v for k, v in zoo.batch().items()}
    mine = trees.move(rows_of(rows, rank, counts), here())
    ours, plain = (sharded(Net().to(dtype), **options) for _ in range(2))
    step = sg.Step(ours, in_float, rows=at_a_time[rank], forward=zoo.forward)
    step.backward(mine)
    in_float(zoo.forward(plain, mine), mine).backward()
    oracle, sizes = zip(*[in_float64(rows, dtype, r, counts) for r in range(len(counts))])
    exact = [torch.stack(g).mean(0) for g in zip(*oracle)]
    scale = torch.cat([torch.stack(s).mean(0).flatten() for s in zip(*sizes)]).norm()
    distances = []
    for model in (ours, plain):
        pairs = zip(model.parameters(), exact)
        parts = [(p.grad.full_tensor().cpu().double() - g).flatten() for p, g in pairs]  # type: ignore[union-attr]
        distances.append(float(torch.cat(parts).norm() / scale))
    passes = step.split_for(mine, step.declared.layout(mine)).examination.passes
    return {"ours": distances[0], "plain": distances[1], "passes": passes}


def in_float(z: Tensor, b: Rows) -> Tensor:
    kind = torch.promote_types(z.dtype, torch.float32)
    return F.mse_loss(z.to(kind), b["t"].to(kind))


def in_float64(rows: Rows, dtype: torch.dtype, rank: int, counts: Sequence[int]) -> tuple[list[Any], list[Any]]:
    """The gradient and Σ_k |g_k| of a rank's rows, from the same cast weights and rows."""
    wide = {k: v.double() if v.is_floating_point() else v for k, v in rows_of(rows, rank, counts).items()}
    network = Net().to(dtype).double()
    split, layout = zoo.split_step(network, in_float, wide)
    totals = split.totals(wide, layout, [1] * layout.rows)
    return totals.totals, totals.magnitudes or []


def transaction(rank: int) -> dict[str, Any]:
    """A loss that fails in its third chunk leaves gradients as they were, and the next step is right."""
    counts, at_a_time = CUTS["5 chunks and 3"]
    rows = rows_of(zoo.batch(), rank, counts)
    model = sharded(Net())
    tally = Tally()

    def loss_fn(z: Tensor, b: Rows) -> Tensor:
        tally.seen.append(1)
        if len(tally.seen) == limit:
            raise ZeroDivisionError
        return zoo.LOSSES["mse"][0](z, b)

    limit = -1
    step = sg.Step(model, loss_fn, rows=at_a_time[rank], forward=zoo.forward)
    step.backward(rows)
    before = [p.grad for p in model.parameters()]
    values = [g.full_tensor().clone() for g in before]  # type: ignore[union-attr]
    limit = len(tally.seen) + 3
    failed = raised(lambda: step.backward(rows))
    after = [p.grad for p in model.parameters()]
    same = all(a is b for a, b in zip(before, after))
    same = same and all(torch.equal(v, g.full_tensor()) for v, g in zip(values, after))  # type: ignore[union-attr]
    step.backward(rows)
    doubled = [p.grad.full_tensor() / 2 for p in model.parameters()]  # type: ignore[union-attr]
    again = max((v - d).abs().max().item() for v, d in zip(values, doubled))
    return {"failed": failed, "same": same, "again": again}


def refusals(rank: int) -> dict[str, str]:
    rows = rows_of(zoo.batch(), rank, CUTS["equal"][0])
    found = {}

    def tried(name: str, model: nn.Module, batch: Rows = rows, loss: Any = zoo.LOSSES["mse"][0], **step: Any) -> None:
        given = {"rows": 5, "forward": zoo.forward, **step}
        found[name] = raised(lambda: sg.Step(model, loss, **given).backward(batch))

    narrow = sharded(Net(), mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.bfloat16))
    tried("narrow reduction", narrow)
    hooked = sharded(Net())
    hooked.layers[0].weight.register_post_accumulate_grad_hook(lambda p: None)  # type: ignore[index, union-attr]
    tried("hook", hooked)
    unsynced = sharded(Net())
    unsynced.set_requires_gradient_sync(False)  # type: ignore[operator]
    tried("no sync", unsynced)
    model = sharded(Net())
    tried("loss", model, loss=lambda z, b: (z * model.scale).pow(2).mean())
    tried("loss after a collective", model, loss=lambda z, b: (counted(z) * model.scale).pow(2).mean())
    tried("budget", model, rows=None, budget="1GiB")
    empty = {key: value[:0] for key, value in rows.items()}
    tried("one rank's batch", model, batch=rows if rank == 0 else empty)
    ignored = {**rows, "y_ignored": torch.full_like(rows["y_ignored"], -100)}
    cross_entropy = zoo.LOSSES["ignored targets"][0]
    tried("no targets", model, batch=rows if rank == 0 else ignored, loss=cross_entropy, normalise=valid)
    tried("draws", sharded(nn.Sequential(zoo.mlp(), nn.Dropout())), forward=lambda m, b: m(b["x"]))
    tried("collective", sharded(Meeting()))
    found["verify"] = raised(lambda: sg.verify_step(sg.Step(model, cross_entropy, rows=5, forward=zoo.forward), rows))
    found["rowwise"] = raised(lambda: sg.rowwise(model, rows=5)(rows["x"]))
    step = sg.Step(model, zoo.LOSSES["mse"][0], rows=5, forward=zoo.forward)
    step.backward(rows)
    found["after all of them"] = "right" if error(model, reference("mean", CUTS["equal"][0])) <= 1 else "wrong"
    return found


def counted(z: Tensor) -> Tensor:
    rows = torch.tensor(float(len(z)), dtype=z.dtype)
    dist.all_reduce(rows)
    return z / rows


class TwoHeads(nn.Module):
    """A second output that the loss leaves alone: its head has no gradient, in chunks of zero weight neither."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.other = zoo.mlp(), nn.Linear(zoo.CLASSES, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        z = self.body(x)
        return {"other": self.other(z), "z": z}


def two_heads(rank: int, name: str) -> dict[str, Any]:
    counts, at_a_time = CUTS["6 chunks and 2 rows"]
    model, plain = sharded(TwoHeads()), sharded(TwoHeads())
    loss_fn = zoo.LOSSES[name][0]
    rows = rows_of(zoo.batch(), rank, counts)
    step = sg.Step(model, lambda o, b: loss_fn(o["z"], b), rows=at_a_time[rank], forward=zoo.forward)
    step.backward(rows)
    loss_fn(zoo.forward(plain, rows)["z"], rows).backward()
    pairs = [(a.grad, b.grad) for a, b in zip(model.parameters(), plain.parameters())]
    return {
        "pattern": [a is None for a, _ in pairs] == [b is None for _, b in pairs],
        "error": max((a - b).full_tensor().abs().max().item() for a, b in pairs if a is not None),  # type: ignore[operator, union-attr]
    }


class Meeting(nn.Module):
    """Takes the mean of its rows over all ranks, as a synchronised statistic would."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = zoo.mlp()

    def forward(self, x: Tensor) -> Tensor:
        shift = x.detach().mean(0)
        dist.all_reduce(shift)
        return self.inner(x - shift)


def _rank(rank: int) -> dict[str, Any]:
    found: dict[str, Any] = {f"{name}, {cut}": compared(name, cut, rank) for name in STEPS for cut in CUTS}
    found["two heads"] = {name: two_heads(rank, name) for name in ("mse", "info nce")}
    found["bfloat16"] = {kind: in_bfloat16(rank, kind) for kind in ("parameters", "compute")}
    return {**found, "planted": planted(rank), "transaction": transaction(rank), "refusals": refusals(rank)}


@pytest.fixture(scope="module")
def found() -> list[dict[str, Any]]:
    return on_ranks(_rank, 2)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", STEPS)
def test_sharded_gradients_are_those_of_one_process_and_of_the_plain_step(
    found: list[dict[str, Any]], name: str, cut: str
) -> None:
    for rank in found:
        step = rank[f"{name}, {cut}"]
        assert step["error"] <= 1
        assert step["plain's error"] <= 1
        assert step["loss"] <= tolerance.loss_allowed(torch.float64)
        assert step["parameters"] < 1e-13
        assert step["passes"] == STEPS[name][2]


def test_forgotten_shares_are_outside_the_contract(found: list[dict[str, Any]]) -> None:
    assert all(rank["planted"] > 1e6 for rank in found)


@pytest.mark.parametrize("name", ["mse", "info nce"])
def test_a_head_without_gradient_has_none_in_chunks_of_zero_weight(found: list[dict[str, Any]], name: str) -> None:
    for rank in found:
        assert rank["two heads"][name]["pattern"]
        assert rank["two heads"][name]["error"] < 1e-14


@pytest.mark.parametrize("kind", ["parameters", "compute"])
def test_bfloat16_is_no_further_from_float64_than_the_plain_step(found: list[dict[str, Any]], kind: str) -> None:
    for rank in found:
        step = rank["bfloat16"][kind]
        assert step["passes"] == 1
        allowed = tolerance.NOISE_RATIO * step["plain"] + tolerance.norm_allowed(torch.float32)
        assert 0 < step["ours"] <= allowed


def test_a_failed_step_leaves_gradients_as_they_were(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["transaction"]["failed"].startswith("ZeroDivisionError")
        assert rank["transaction"]["same"]
        assert rank["transaction"]["again"] < 1e-15


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        ("narrow reduction", ["reduces gradients in bfloat16", "reduce_dtype=torch.float32"]),
        ("hook", ["layers.0.weight", "has a hook"]),
        ("no sync", ["switched off"]),
        ("loss", ["the loss uses scale, which is sharded"]),
        ("loss after a collective", ["the loss uses scale, which is sharded"]),
        ("budget", ["plan a step from a budget", "is sharded"]),
        ("draws", ["the forward draws random numbers"]),
        ("collective", ["Meeting) calls a collective (c10d::allreduce_)"]),
        ("verify", ["verify a step", "before fully_shard"]),
        ("rowwise", ["is sharded"]),
    ],
)
def test_what_cannot_be_split_is_refused_on_every_rank(
    found: list[dict[str, Any]], name: str, texts: list[str]
) -> None:
    for rank in found:
        assert rank["refusals"][name].startswith(("CannotSplit", "NotToBeTried"))
        assert all(text in rank["refusals"][name] for text in texts), rank["refusals"][name]
        assert rank["refusals"]["after all of them"] == "right"


@pytest.mark.parametrize("name", ["one rank's batch", "no targets"])
def test_what_one_rank_raises_all_raise(found: list[dict[str, Any]], name: str) -> None:
    assert "rank 1 raised an error" in found[0]["refusals"][name]
    assert found[1]["refusals"][name].startswith("BadInput")


def _four(rank: int) -> dict[str, Any]:
    replicas = sharded(Net(), mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "parts")))
    counts, at_a_time = [9, 8, 7, 5], [2, 3, 2, 64]
    step_for(replicas, "count declared", at_a_time[rank]).backward(rows_of(zoo.batch(), rank, counts))
    found = {"replicas": {"error": error(replicas, reference("count declared", counts)), "parameters": 0.0}}
    return found | {f"{name}, {cut}": compared(name, cut, rank) for name in ("mean", "contrastive") for cut in CUTS}


@pytest.mark.slow
def test_four_ranks() -> None:
    for rank in on_ranks(_four, 4):
        for step in rank.values():
            assert step["error"] <= 1
            assert step["parameters"] < 1e-13


@pytest.mark.parametrize(
    ("rows", "sizes", "count"), [(29, (8, 8, 8, 5), 4), (29, (8, 8, 8, 5), 6), (29, (29,), 5), (3, (2, 1), 5)]
)
def test_equal_counts_keep_every_row_once_and_no_chunk_grows(rows: int, sizes: tuple[int, ...], count: int) -> None:
    cut = equal_count(rows, sizes, count)
    assert len(cut) == count
    assert sum(cut) == rows
    assert max(cut) <= max(sizes)
    assert all(size for size in cut) or rows < count
