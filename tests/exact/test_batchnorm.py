"""BatchNorm a few rows at a time: gradients, running statistics and counters are those of the plain step, float64."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.errors import Untraceable
from samegrad.exact import batchnorm, tracings
from samegrad.exact.batchnorm import RunningMoments, has_batchnorm
from samegrad.exact.lockstep import lockstep
from samegrad.exact.rendezvous import rendezvous
from samegrad.exact.stage_tracing import trace_stages
from samegrad.exact.tracings import Tracings
from samegrad.measure.counting import ByteCounter

from . import batchnorm_zoo as zoo
from .batchnorm_zoo import D, coupled_loss, left_by, made, row_loss, worst_share

SIZES = [[9, 10, 4], [1, 21, 1]]
SCHEMES: dict[str, Callable[[nn.Module, list[int]], Any]] = {
    "lockstep": lambda network, sizes: lockstep(network, sizes=sizes),
    "every second cut": lambda network, sizes: lockstep(network, sizes=sizes, keep_every=2),
    "only the input": lambda network, sizes: lockstep(network, sizes=sizes, keep_every=99),
    "three together": lambda network, sizes: lockstep(network, sizes=sizes, together=3),
    "all together": lambda network, sizes: lockstep(network, sizes=sizes, together=99),
    "rendezvous": lambda network, sizes: rendezvous(network, sizes=sizes),
}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", zoo.NETWORKS)
def test_a_step_in_chunks_leaves_what_the_plain_step_leaves(name: str, scheme: str, sizes: list[int]) -> None:
    network, x = made(name)
    within = lambda twin: SCHEMES[scheme](twin, sizes)
    for loss_fn in (row_loss, coupled_loss):
        if name == "many views" and scheme == "rendezvous":
            # It cannot know that no row enters one of the outputs.
            with pytest.raises(sg.CannotSplit, match="not one entry a row"):
                left_by(network, x, loss_fn, within)
            continue
        assert worst_share(left_by(network, x, loss_fn, within), left_by(network, x, loss_fn)) <= 1


def _chunk_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = batchnorm.normalised

    def planted(layer: Any, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        own = torch.var_mean(x, batchnorm.channel_axes(x), correction=0)
        return plain(layer, x, own[1] + 0 * mean, own[0] + 0 * variance)

    monkeypatch.setattr(batchnorm, "normalised", planted)


def _commit_every_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = batchnorm.commit
    monkeypatch.setattr(batchnorm, "commit", lambda layer, statistics: [plain(layer, statistics) for _ in range(3)])


def _no_variance_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batchnorm, "summed_over_ranks", lambda both, group: [both[0], torch.zeros_like(both[1])])


def _no_mean_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batchnorm, "summed_over_ranks", lambda both, group: [torch.zeros_like(both[0]), both[1]])


def _biased_running_variance(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = batchnorm.commit
    monkeypatch.setattr(
        batchnorm, "commit", lambda layer, s: plain(layer, batchnorm.Statistics(s.mean, s.variance, 10**12))
    )


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    "plant",
    [_chunk_statistics, _commit_every_chunk, _no_variance_gradient, _no_mean_gradient, _biased_running_variance],
)
def test_planted_faults_are_caught(
    scheme: str, plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    network, x = made("residual" if scheme == "lockstep" else "mlp")
    plain = left_by(network, x, row_loss)
    plant(monkeypatch)
    assert worst_share(left_by(network, x, row_loss, lambda twin: SCHEMES[scheme](twin, [9, 10, 4])), plain) > 100


def test_one_chunk_is_the_plain_call_bit_for_bit() -> None:
    network, x = made("residual")
    plain = left_by(network, x, row_loss)
    for scheme in SCHEMES.values():
        ours = left_by(network, x, row_loss, lambda twin, scheme=scheme: scheme(twin, [zoo.ROWS]))
        assert all(torch.equal(ours[key], plain[key]) for key in plain)


def test_moments_are_merged_without_cancellation() -> None:
    """Far from zero E[x²] − E[x]² has no digit left; the merge keeps them, whatever the chunks are."""
    x = torch.randn(23, 2, 3, dtype=D, generator=torch.Generator().manual_seed(0)) + 1e8
    moments = RunningMoments()
    for chunk in x.split([1, 21, 1]):
        moments.add(chunk)
    found = moments.statistics(nn.BatchNorm1d(2))
    torch.testing.assert_close(found.variance, x.sub(1e8).var((0, 2), correction=0), rtol=1e-7, atol=0)
    naive = x.square().mean((0, 2)) - x.mean((0, 2)).square()
    assert (naive - found.variance).abs().max() > 0.5


@pytest.mark.parametrize("scheme", SCHEMES)
def test_hooks_fire_once_and_what_stands_in_grad_is_added_to(scheme: str) -> None:
    network, x = made("mlp")
    plain = left_by(network, x, row_loss)
    weight, fired = network.get_parameter("layers.0.weight"), list[str]()
    weight.register_hook(lambda g: fired.append("tensor") or g)
    weight.register_post_accumulate_grad_hook(lambda _: fired.append("accumulated"))
    weight.grad = torch.ones_like(weight)
    with SCHEMES[scheme](network, [9, 10, 4]):
        row_loss(network(x)).backward()
    assert fired == ["tensor", "accumulated"]
    torch.testing.assert_close(weight.grad, plain["gradient of layers.0.weight"] + 1, rtol=1e-12, atol=1e-13)


def test_derivatives_of_derivatives() -> None:
    """A gradient penalty through two BatchNorm layers: second derivatives of the statistics as well."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)
    ).to(D)
    x = made("mlp")[1]

    def step(twin: nn.Module) -> list[Tensor]:
        rows = x.clone().requires_grad_()
        z = twin(rows)
        (g,) = torch.autograd.grad(z.pow(2).sum() + z.std(0).sum(), rows, create_graph=True)
        ((g.norm(dim=1) - 1).pow(2).mean() + z.mean().pow(2)).backward()
        assert rows.grad is not None
        return [rows.grad, *(p.grad for p in twin.parameters() if p.grad is not None)]

    ours, plain = copy.deepcopy(network), copy.deepcopy(network)
    with lockstep(ours, sizes=[9, 10, 4]):
        found = step(ours)
    reference = step(plain)
    largest = max(float(g.abs().max()) for g in reference)
    assert len(found) == len(reference)
    assert all((a - b).abs().max() <= 1e-12 * largest for a, b in zip(found, reference))
    for within in (lockstep(ours, sizes=[9, 10, 4], keep_every=2), rendezvous(ours, sizes=[9, 10, 4])):
        with within, pytest.raises((sg.CannotSplit, RuntimeError), match=r"keep_every=1|once_differentiable"):
            step(ours)


@pytest.mark.parametrize("scheme", ["lockstep", "every second cut", "rendezvous"])
def test_autocast_has_the_dtypes_and_the_noise_of_the_plain_step(scheme: str) -> None:
    network, x = made("residual")
    network, x = network.float(), x.float()

    def step(within: Callable[[nn.Module], Any]) -> zoo.Left:
        twin = copy.deepcopy(network)
        with within(twin):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                z = twin(x)
            F.cross_entropy(z.float(), torch.arange(len(z)) % 5).backward()
        gradients = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
        return {"z": z.detach()} | gradients | dict(twin.named_buffers())

    ours, plain = step(lambda twin: SCHEMES[scheme](twin, [9, 10, 4])), step(lambda _: contextlib.nullcontext())
    assert ours["z"].dtype is torch.bfloat16
    for key in plain:
        assert ours[key].dtype is plain[key].dtype
        assert (ours[key] - plain[key]).double().norm() <= 0.06 * plain[key].double().norm() + 1e-6, key


def test_narrow_models_keep_wide_statistics() -> None:
    network, x = made("mlp")
    network, x = network.bfloat16(), x.bfloat16()
    plain = left_by(network, x, lambda z: row_loss(z.float()))
    for scheme in SCHEMES.values():
        ours = left_by(
            network, x, lambda z: row_loss(z.float()), lambda twin, scheme=scheme: scheme(twin, [9, 10, 4])
        )
        assert all(ours[k].dtype is plain[k].dtype for k in plain)
        assert all((ours[k].double() - plain[k]).norm() <= 0.1 * plain[k].double().norm() + 1e-2 for k in plain)


def test_evaluation_without_gradients_and_layers_in_eval_mode() -> None:
    network, x = made("residual")
    reference = copy.deepcopy(network)
    for scheme in SCHEMES.values():
        twin = copy.deepcopy(network)
        with torch.no_grad(), scheme(twin, [9, 10, 4]):
            z = twin(x)
        assert not z.requires_grad
        torch.testing.assert_close(z, copy.deepcopy(reference)(x).detach(), rtol=1e-12, atol=1e-13)
        assert int(twin.bn1.num_batches_tracked) == 1
    assert len(has_batchnorm(network)) == 6
    assert has_batchnorm(network.eval()) == []
    assert trace_stages(network, (x,), {}, rows=len(x)).layer_names() == []


def test_only_values_that_later_stages_need_cross_a_cut() -> None:
    """No result of a BatchNorm does, and a shortcut does once."""
    network, x = made("residual")
    stages = trace_stages(network, (x,), {}, rows=len(x)).stages
    assert [str(s.barrier.target) for s in stages if s.barrier is not None] == [
        "bn1", "stages.0.0.bn1", "stages.0.0.bn2", "stages.1.0.bn1", "stages.1.0.bn2", "stages.1.0.downsample.1",
    ]  # fmt: skip
    layers = has_batchnorm(network)
    crossing = [node for stage in stages[:-1] for node in stage.outputs]
    assert not any(str(node.target) in layers for node in crossing)
    assert len(set(crossing)) == len(crossing)
    assert [len(stage.inputs) for stage in stages] == [1, 1, 1, 2, 1, 1, 2]


def _deep(stages: int) -> nn.Module:
    torch.manual_seed(0)
    layers = [
        [nn.BatchNorm1d(32), nn.GELU(), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)] for _ in range(stages)
    ]
    return nn.Sequential(*(layer for stage in layers for layer in stage)).to(D)


def test_bytes_are_those_of_the_cuts_and_one_chunk() -> None:
    network, x = _deep(16), torch.randn(512, 32, dtype=D)
    schemes = [
        contextlib.nullcontext(), lockstep(network, sizes=[32] * 16), lockstep(network, sizes=[32] * 16, keep_every=4),
        lockstep(network, sizes=[8] * 64, together=4), lockstep(network, sizes=[16] * 32, together=99),
    ]  # fmt: skip
    peaks = []
    for within in schemes:
        with ByteCounter(torch.device("cpu")) as counter, within:
            row_loss(network(x)).backward()
        peaks.append(counter.peak_bytes)
    plain, every, every_fourth, four_together, all_together = (peak / x.nbytes for peak in peaks)
    # Plain keeps eleven times the cut's width a stage: two normalised, and three times the four times wider one.
    assert plain > 16 * 9
    # One width a cut, and four in flight: what is pulled back, what it becomes, the output and its gradient.
    assert every < 16 + 5
    # Every fourth, those of one group again, and the same four.
    assert every_fourth < 4 + 4 + 5
    # None of one group, and little for a 64th of the rows; in flight as above, and the results of all rows.
    assert four_together < 4 + 6
    # No cut at all: what comes in and goes out, their gradients, a 32nd of the plain step; and, of all weights, the
    # gradients of one stage beside the sums of those before and the first chunk's.
    weights = sum(p.nbytes for p in network.parameters()) / x.nbytes
    assert all_together < 4 + 16 * 11 / 32 + 3 * weights


ROW_NUMBERS: ContextVar[Tensor | None] = ContextVar("ROW_NUMBERS", default=None)


class Keyed(nn.Module):
    """Drops entries by a hash of the row's number; ``ROW_NUMBERS`` says which rows run."""

    def forward(self, x: Tensor) -> Tensor:
        rows = ROW_NUMBERS.get()
        place = torch.arange(x.shape[1]) + 31 * (torch.arange(len(x)) if rows is None else rows)[:, None]
        return x * ((place * 7919 + 13) % 5 > 1)


@pytest.mark.parametrize("scheme", ["lockstep", "every second cut", "rendezvous"])
def test_draws_can_be_keyed_by_row(scheme: str) -> None:
    network = nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), Keyed(), nn.Linear(8, 8), nn.BatchNorm1d(8), Keyed(), nn.Linear(8, 5)
    ).to(D)
    x, seen = made("mlp")[1], set[int]()

    @contextlib.contextmanager
    def context(row_numbers: Tensor, stage: int) -> Iterator[None]:
        before = ROW_NUMBERS.set(row_numbers)
        seen.add(stage)
        try:
            yield
        finally:
            ROW_NUMBERS.reset(before)

    keep = 2 if scheme == "every second cut" else 1

    def within(twin: nn.Module) -> Any:
        if scheme == "rendezvous":
            return rendezvous(twin, sizes=[9, 10, 4], chunk_context=context)
        return lockstep(twin, sizes=[9, 10, 4], keep_every=keep, chunk_context=context)

    assert worst_share(left_by(network, x, row_loss, within), left_by(network, x, row_loss)) <= 1
    assert seen == ({0} if scheme == "rendezvous" else {0, 1, 2})


def test_draws_that_are_not_keyed_are_refused() -> None:
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 5)).to(D)
    before = copy.deepcopy(network.state_dict())
    for scheme in SCHEMES.values():
        with scheme(network, [9, 10, 4]), pytest.raises(sg.CannotSplit, match="draws random numbers"):
            network(made("mlp")[1])
        assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_a_network_is_recorded_anew_only_when_it_looks_different(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = made("mlp")
    made_so_far, known = list[int](), Tracings()
    monkeypatch.setattr(
        tracings, "trace_stages", lambda *a, **k: made_so_far.append(1) or trace_stages(*a, **k)
    )
    for expected, change in [
        (1, lambda: None),
        (1, lambda: None),
        (2, lambda: network.layers[1].eval()),
        (2, lambda: None),
        (3, lambda: setattr(network, "branch", True)),
        (4, lambda: network.layers.__setitem__(5, nn.SiLU())),
    ]:
        change()
        with lockstep(network, sizes=[9, 10, 4], tracings=known):
            network(x)
        assert len(made_so_far) == expected


class Odd(nn.Module):
    """Networks whose code does what cannot be recorded or cut: ``way`` says which."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.calls = way, 0
        self.first, self.norm, self.second = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 5)
        self.after = nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Any:
        h = self.first(x)
        if self.way == "branch" and float(h.sum()) > 1e9:
            return h
        if self.way == "draw":
            h = h + torch.randn(6, dtype=h.dtype)
        if self.way == "draw at once":
            h = h + torch.randn(6)
        if self.way == "count":
            self.calls += 1
        if self.way == "kind" and isinstance(h, Tensor):
            h = 2 * h
        if self.way == "functional":
            h = F.batch_norm(h, None, None, training=True)
        mean = h.mean() if self.way == "mean" else None
        y = self.norm(h)
        if self.way == "input in place":
            h.mul_(2)
        if self.way == "result in place":
            torch.relu_(y)
        if self.way == "mean":
            y = y * mean
        z = self.after(self.second(y))
        if self.way == "length":
            return z, len(x) if isinstance(x, Tensor) else x.shape[0]
        return z + y[:, :5]


@pytest.mark.parametrize(
    ("way", "kind", "found"),
    [
        ("branch", Untraceable, "control flow|float"),
        ("draw", sg.CannotSplit, "draws random numbers"),
        ("draw at once", Untraceable, "outside of leaf modules draws"),
        ("count", Untraceable, "changes calls"),
        ("kind", Untraceable, "takes another way"),
        ("functional", Untraceable, "functional.batch_norm"),
        ("input in place", sg.CannotSplit, "in place"),
        ("result in place", sg.CannotSplit, "in place"),
        ("mean", sg.CannotSplit, r"shape \(\)"),
        ("length", sg.CannotSplit, "how many rows"),
    ],
)
def test_what_cannot_be_cut_is_refused_by_name_and_nothing_changes(way: str, kind: type[Exception], found: str) -> None:
    network, x = Odd(way).to(D), made("mlp")[1]
    state, attributes = copy.deepcopy(network.state_dict()), set(vars(network))
    drawn = torch.get_rng_state()
    with pytest.raises(kind, match=found), lockstep(network, sizes=[9, 10, 4]):
        network(x)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert set(vars(network)) == attributes
    assert torch.equal(torch.get_rng_state(), drawn)


def test_hooks_inside_and_forwards_of_ones_own_are_refused() -> None:
    network, x = made("residual")
    handle = network.stages[0].register_forward_hook(lambda *_: None)
    with pytest.raises(Untraceable, match=r"stages\.0 has hooks"), lockstep(network, sizes=[9, 10, 4]):
        network(x)
    handle.remove()

    class Noted(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    network.bn1 = Noted(4).to(D)
    for scheme in SCHEMES.values():
        with pytest.raises(sg.CannotSplit, match=r"bn1 \(Noted\)"), scheme(network, [9, 10, 4]):
            network(x)


def test_sizes_that_are_not_the_batchs_are_refused() -> None:
    network, x = made("mlp")
    for scheme in SCHEMES.values():
        with pytest.raises(sg.UsageError, match="has 22 rows"), scheme(network, [9, 9, 4]):
            network(x)
        with pytest.raises(sg.UsageError, match="not positive"), scheme(network, [23, 0]):
            network(x)
