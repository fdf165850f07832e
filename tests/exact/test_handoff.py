"""Totals handed over once: hooks, existing gradients, memory, and DistributedDataParallel's reducer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from samegrad.exact.handoff import hand_over, hooks_silenced

from . import zoo
from .processes import on_two_ranks


def test_hooks_fire_once_on_the_total() -> None:
    model, rows = zoo.mlp(), zoo.batch()
    loss_fn = zoo.LOSSES["mse"][0]
    _, reference = zoo.plain_gradients(model, loss_fn, rows)
    fired: list[Tensor] = []
    weight = next(model.parameters())
    # A clamp is exact on the total only; on chunks it would clamp other numbers.
    weight.register_hook(lambda g: g.clamp(-1e-3, 1e-3))
    weight.register_post_accumulate_grad_hook(lambda p: fired.append(p.grad.clone()))
    split, layout = zoo.split_step(model, loss_fn, rows)
    split.backward(rows, layout, [8, 8, 8, 5])
    assert len(fired) == 1
    torch.testing.assert_close(fired[0], reference[0].clamp(-1e-3, 1e-3), rtol=1e-12, atol=1e-17)


def test_what_stands_in_grad_is_added_to_and_none_is_kept() -> None:
    model, rows = zoo.mlp(), zoo.batch()
    unused = nn.Linear(2, 2, dtype=torch.float64)
    model.register_module("unused", unused)
    loss_fn = zoo.LOSSES["rmse"][0]

    def forward(module: Any, batch: dict[str, Tensor]) -> Tensor:
        return module[2](module[1](module[0](batch["x"])))

    _, reference = zoo.plain_gradients(model, loss_fn, rows, forward=forward)
    split, layout = zoo.split_step(model, loss_fn, rows, forward=forward)
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    split.backward(rows, layout, [8, 8, 8, 5])
    torch.testing.assert_close(first.grad, reference[0] + 1, rtol=1e-13, atol=1e-15)
    assert unused.weight.grad is None
    assert unused.bias.grad is None


def test_totals_are_taken_over_and_not_copied() -> None:
    model = zoo.mlp()
    parameters = list(model.parameters())
    totals: list[Tensor | None] = [torch.ones_like(p) for p in parameters]
    places = [t.data_ptr() for t in totals if t is not None]
    hand_over(model, parameters, totals)
    assert totals == []
    assert [p.grad.data_ptr() for p in parameters if p.grad is not None] == places


def test_silenced_hooks_come_back_after_an_exception() -> None:
    leaf = torch.ones(2, requires_grad=True)
    fired: list[int] = []
    leaf.register_hook(lambda _: fired.append(1))
    with pytest.raises(ZeroDivisionError), hooks_silenced([leaf]):
        torch.autograd.grad(leaf.sum(), leaf)
        raise ZeroDivisionError
    assert fired == []
    torch.autograd.grad(leaf.sum(), leaf)
    assert fired == [1]


def _loss(z: Tensor, b: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(z, b["y_ignored"])


def _rank(rank: int) -> dict[str, Any]:
    """One of two gloo ranks: plain DDP and a split step on the same rows, collectives counted."""
    rows = {k: (v[:17] if rank == 0 else v[17:]) for k, v in zoo.batch().items()}
    found: dict[str, Any] = {}
    for unused in (False, True):
        plain, ours = (_wrapped(unused) for _ in range(2))
        counts = [_counted(plain), _counted(ours)]
        for _ in range(2):
            _loss(zoo.forward(plain, rows), rows).backward()
            # Ranks run 3 and 4 chunks: the reducer must not care.
            split, layout = zoo.split_step(ours, _loss, rows)
            sizes = [8, 8, 1] if rank == 0 else [3, 3, 3, 3]
            split.backward(rows, layout, sizes)
        pairs = list(zip(plain.parameters(), ours.parameters()))
        found[f"same pattern, unused={unused}"] = all((a.grad is None) == (b.grad is None) for a, b in pairs)
        found[f"error, unused={unused}"] = max(
            ((a.grad - b.grad).abs().max() / a.grad.abs().max()).item() for a, b in pairs if a.grad is not None
        )
        found[f"collectives, unused={unused}"] = (counts[0][0], counts[1][0])
        first = next(ours.parameters()).grad
        assert first is not None
        everyone = [torch.empty_like(first) for _ in range(2)]
        dist.all_gather(everyone, first)
        found[f"ranks equal, unused={unused}"] = torch.equal(*everyone)
    with ours.no_sync():
        split, layout = zoo.split_step(ours, _loss, rows)
        before = counts[1][0]
        split.backward(rows, layout, sizes)
        found["collectives under no_sync"] = counts[1][0] - before
    return found


class _WithUnused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = zoo.mlp(), nn.Linear(2, 2, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x)


def _wrapped(unused: bool) -> DistributedDataParallel:
    if unused:
        return DistributedDataParallel(_WithUnused(), find_unused_parameters=True)
    return DistributedDataParallel(zoo.mlp())


def _counted(model: DistributedDataParallel) -> list[int]:
    count = [0]

    # DDP compares annotations with types, and here they are text: leave them out.
    def hook(state, bucket):  # type: ignore[no-untyped-def]
        count[0] += 1
        work = dist.all_reduce(bucket.buffer().div_(2), async_op=True)
        assert work is not None
        return work.get_future().then(lambda f: f.value()[0])

    model.register_comm_hook(None, hook)
    return count


def test_two_ranks_reduce_once_a_step_and_end_with_plain_ddp_gradients() -> None:
    found = on_two_ranks(_rank)
    for unused in (False, True):
        assert found[f"same pattern, unused={unused}"]
        assert found[f"error, unused={unused}"] < 1e-13
        plain, ours = found[f"collectives, unused={unused}"]
        assert plain == ours > 0
        assert found[f"ranks equal, unused={unused}"]
    assert found["collectives under no_sync"] == 0
