"""Chunks that meet at each BatchNorm: any Python code, threads that always end, refusals by name."""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import samegrad as sg
from samegrad.errors import Untraceable
from samegrad.exact import joined_graphs
from samegrad.exact.lockstep import lockstep
from samegrad.exact.rendezvous import rendezvous
from samegrad.exact.virtual_ranks import Question, Result, VirtualRank

from .batchnorm_zoo import D, coupled_loss, left_by, made, worst_share


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


class Wild(nn.Module):
    """Python that looks at values: as many refinements as the rows ask for, lists, shortcuts over several layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm1d(6) for _ in range(4))
        self.head = nn.Linear(6, 5)
        self.trouble: str | None = None

    def forward(self, x: Tensor) -> Tensor:
        kept, h = [x], x
        for index, (layer, norm) in enumerate(zip(self.layers, self.norms)):
            if float(h.detach().abs().sum()) < 0:
                raise AssertionError
            if self.trouble == "raises" and index == 2 and len(x) == 4:
                raise ZeroDivisionError("planted")
            if self.trouble == "differs" and index == 2 and len(x) == 4:
                continue
            if self.trouble == "fewer" and index == 3 and len(x) == 4:
                break
            h = F.silu(norm(layer(h)) + kept[index // 2])
            kept.append(h)
        return self.head(h + kept[1])


def wild(trouble: str | None = None) -> Wild:
    torch.manual_seed(0)
    network = Wild().to(D)
    network.trouble = trouble
    return network


def test_python_code_that_cannot_be_recorded() -> None:
    network, x = wild(), made("mlp")[1]
    with pytest.raises(Untraceable), lockstep(network, sizes=[9, 10, 4]):
        network(x)
    for sizes in ([9, 10, 4], [1, 21, 1]):
        ours = left_by(network, x, coupled_loss, lambda twin, sizes=sizes: rendezvous(twin, sizes=sizes))
        assert worst_share(ours, left_by(network, x, coupled_loss)) <= 1


@pytest.mark.parametrize("part", [0, 1])
def test_a_planted_missing_gradient_of_the_statistics_is_caught(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = wild(), made("mlp")[1]
    plain = left_by(network, x, coupled_loss)

    def planted(both: list[Tensor], group: Any) -> list[Tensor]:
        return [torch.zeros_like(g) if i == part else g for i, g in enumerate(both)]

    monkeypatch.setattr(joined_graphs.batchnorm, "summed_over_ranks", planted)
    ours = left_by(network, x, coupled_loss, lambda twin: rendezvous(twin, sizes=[9, 10, 4]))
    assert worst_share(ours, plain) > 100


class _Doubled(torch.autograd.Function):
    """Zeros come where nothing arrives: a gradient by it is zero and not None once backward comes by."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return 2 * cotangent


class Auxiliary(nn.Module):
    """A second head with a BatchNorm of its own, whose output a loss may leave out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, 7), nn.BatchNorm1d(7), nn.ReLU())
        self.second = nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(4), nn.Linear(4, 5))
        self.head = nn.Sequential(nn.Linear(7, 6), nn.BatchNorm1d(6), nn.Linear(6, 5))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.stem(x)
        second = self.second[1:](_Doubled.apply(self.second[0](hidden)))
        return self.head(hidden), second


AUXILIARY_LOSSES = {
    "first": lambda outputs: coupled_loss(outputs[0]),
    "second": lambda outputs: coupled_loss(outputs[1]),
    "both": lambda outputs: coupled_loss(outputs[0]) + coupled_loss(outputs[1]),
}


@pytest.mark.parametrize("loss", AUXILIARY_LOSSES)
def test_a_head_that_the_loss_leaves_out_has_no_gradients(loss: str) -> None:
    torch.manual_seed(0)
    network, x, loss_fn = Auxiliary().to(D), made("mlp")[1], AUXILIARY_LOSSES[loss]
    ours = left_by(network, x, loss_fn, lambda twin: rendezvous(twin, sizes=[9, 10, 4]))
    assert worst_share(ours, left_by(network, x, loss_fn)) <= 1


def test_a_planted_backward_through_a_head_that_was_left_out_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    # Some rank for every layer: then all nodes of statistics are on one chain, and backward comes by all of them.
    monkeypatch.setattr(joined_graphs.batchnorm, "group_of", lambda layer: layer)
    monkeypatch.setattr(joined_graphs.batchnorm, "summed_over_ranks", lambda both, group: both)
    monkeypatch.setattr(joined_graphs.batchnorm, "gathered", lambda moments, group: moments)
    with pytest.raises(AssertionError, match="second"):
        test_a_head_that_the_loss_leaves_out_has_no_gradients("first")


@pytest.mark.parametrize(
    ("trouble", "kind", "found"),
    [
        ("raises", ZeroDivisionError, "planted"),
        ("differs", sg.CannotSplit, r"chunk 0 comes to norms\.2 where chunk 2 comes to norms\.3"),
        ("fewer", sg.CannotSplit, r"chunk 0 comes to norms\.3 where chunk 2 is done"),
    ],
)
def test_trouble_in_one_chunk_ends_all_and_changes_nothing(trouble: str, kind: type[Exception], found: str) -> None:
    network, x = wild(trouble), made("mlp")[1]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(kind, match=found), rendezvous(network, sizes=[9, 10, 4]):
        network(x)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all("forward" not in vars(part) for part in network.modules())
    assert all(isinstance(p, nn.Parameter) for p in network.parameters())


def test_a_model_that_checkpoints_is_refused_in_backward_without_a_deadlock() -> None:
    class Checkpointed(Wild):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(super().forward, x, use_reentrant=False)

    torch.manual_seed(0)
    network, x = Checkpointed().to(D), made("mlp")[1]
    with rendezvous(network, sizes=[9, 10, 4]):
        loss = network(x).sum()
        with pytest.raises(sg.CannotSplit, match=r"norms\.0 is called outside"):
            loss.backward()
    assert all(p.grad is None for p in network.parameters())


def test_backward_twice_and_weights_changed_before_it_are_errors() -> None:
    network, x = wild(), made("mlp")[1]
    with rendezvous(network, sizes=[9, 10, 4]):
        loss = network(x).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
        loss = network(x).sum()
    with torch.no_grad():
        network.head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_virtual_rank_asks_answers_and_ends_however_its_work_behaves() -> None:
    variable = contextvars.ContextVar("variable", default=0)
    variable.set(5)

    def work(rank: VirtualRank) -> int:
        total = variable.get()
        while (answer := rank.ask(total)) is not None:
            total += answer
        return total

    rank = VirtualRank(work)
    assert rank.advance() == Question(5)
    assert rank.advance(2) == Question(7)
    assert rank.advance(None) == Result(7)
    rank.close()

    def stubborn(rank: VirtualRank) -> str:
        for _ in range(3):
            # What a model's code may do.
            with contextlib.suppress(BaseException):
                rank.ask("again")
        return "done"

    for advances in range(4):
        rank = VirtualRank(stubborn)
        for _ in range(advances):
            rank.advance()
        rank.close()
