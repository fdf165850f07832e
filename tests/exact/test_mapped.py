"""Models that couple rows, parts of them a few rows at a time: the plain step's gradients, loss, buffers and draws."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.exact import chunk_map, segments
from samegrad.exact.batchnorm import RunningMoments

from . import coupled_zoo as zoo
from .batchnorm_zoo import worst_share
from .coupled_zoo import CASES, D, Left, made, plain_and, step_of

HOWS: dict[str, dict[str, Any]] = {"8 at a time": {"rows": 8}, "ragged": {"rows": [1, 13, 15]}}
WITH_SEGMENTS = [name for name, case in CASES.items() if case.segments]


def named(name: str) -> dict[str, Any]:
    return {"rows": [2, 9, 18], "segments": CASES[name].segments}


def worst(ours: list[Left], plain: list[Left]) -> float:
    """The largest difference of any step as a share of what the contract allows; generators end alike."""
    largest = 0.0
    for mine, theirs in zip(ours, plain, strict=True):
        mine, theirs = dict(mine), dict(theirs)
        assert torch.equal(mine.pop("generator"), theirs.pop("generator"))
        largest = max(largest, worst_share(mine, theirs))
    return largest


def three_batches(dtype: torch.dtype = D) -> list[Any]:
    return [zoo.batch(seed=seed, dtype=dtype) for seed in range(3)]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", CASES)
def test_steps_in_a_row_are_the_plain_ones(name: str, how: str) -> None:
    plain, ours, step = plain_and(name, HOWS[how], three_batches())
    assert worst(ours, plain) <= 1
    assert all("forward" not in vars(part) for part in step.declared.network.modules())


@pytest.mark.parametrize("name", WITH_SEGMENTS)
def test_named_segments_are_the_plain_step_and_are_what_runs(name: str) -> None:
    plain, ours, step = plain_and(name, named(name), three_batches())
    assert worst(ours, plain) <= 1
    assert step.plan is not None and list(step.plan.levers["segments"]["paths"]) == list(CASES[name].segments or ())


@pytest.mark.parametrize("name", CASES)
def test_the_verifier_says_the_same(name: str) -> None:
    model, how = made(name), named(name) if CASES[name].segments else {"rows": 8}
    before = copy.deepcopy(model.state_dict())
    verdict = sg.verify_step(step_of(model, name, **how), zoo.batch())
    assert verdict.same, verdict
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_sizes_of_gradients_are_computed_only_for_a_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Tensor] = []
    right = chunk_map.Magnitudes.of

    def counted(self: chunk_map.Magnitudes, shared: Tensor, gradient: Tensor | None) -> Tensor | None:
        asked.append(shared)
        return right(self, shared, gradient)

    monkeypatch.setattr(chunk_map.Magnitudes, "of", counted)
    name = next(iter(CASES))
    with step_of(made(name), name, rows=8) as step:
        step.backward(zoo.batch())
        assert not asked
        assert sg.verify_step(step, zoo.batch()).same and asked


@contextlib.contextmanager
def last_chunk_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Gradients of parameters are those of the last chunk."""
    take = chunk_map._Joined.take

    def forgetful(self: Any, result: Tensor | None, start: int) -> None:
        if self._axis is None:
            self._whole = None
        take(self, result, start)

    with monkeypatch.context() as patch:
        patch.setattr(chunk_map._Joined, "take", forgetful)
        yield


@contextlib.contextmanager
def unbiased_variance(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rows are normalised with the variance that belongs into the running statistics."""
    statistics = RunningMoments.statistics

    def unbiased(self: Any, layer: Any) -> Any:
        found = statistics(self, layer)
        return dataclasses.replace(found, variance=found.variance * found.count / (found.count - 1))

    with monkeypatch.context() as patch:
        patch.setattr(RunningMoments, "statistics", unbiased)
        yield


@contextlib.contextmanager
def draws_of_the_first_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each chunk draws what the first rows draw."""
    in_chunks = segments.RowCall.in_chunks

    def counted_anew(self: Any, batch: Any, layout: Any, sizes: Any, ids: Tensor | None = None) -> Any:
        ids = None if ids is None else torch.cat([torch.arange(size) for size in sizes])
        return in_chunks(self, batch, layout, sizes, ids)

    with monkeypatch.context() as patch:
        patch.setattr(segments.RowCall, "in_chunks", counted_anew)
        yield


Planted = Callable[[pytest.MonkeyPatch], contextlib.AbstractContextManager[None]]
PLANTED: dict[str, tuple[str, Planted]] = {
    "last chunk only": ("its own loss", last_chunk_only),
    "unbiased variance": ("mlp with batchnorm", unbiased_variance),
    "draws of the first rows": ("codebook", draws_of_the_first_rows),
}


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_refused_when_tried_and_caught_when_not(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, planted = PLANTED[fault]
    step = step_of(made(name), name, rows=8)
    # Examined while all is well.
    step.backward(zoo.batch())
    assert step.plan is not None
    with planted(monkeypatch), contextlib.suppress(sg.CannotSplit):
        other = step_of(made(name), name, rows=8)
        other.backward(zoo.batch())
        # What is left is not what was spoilt: single layers between the BatchNorms.
        assert other.plan is not None and other.plan.levers.keys() != step.plan.levers.keys()
    with planted(monkeypatch):
        assert not sg.verify_step(step, zoo.batch()).same
    assert sg.verify_step(step, zoo.batch()).same


@pytest.mark.parametrize("name", CASES)
def test_hooks_fire_once_on_the_total_and_gradients_add_up(name: str) -> None:
    model = made(name)
    fired: dict[str, list[Tensor]] = {n: [] for n, _ in model.named_parameters()}
    for n, p in model.named_parameters():
        if p.requires_grad:
            p.register_hook(fired[n].append)
    step = step_of(model, name, rows=8)
    torch.manual_seed(3)
    step.backward(zoo.batch())
    once = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert {n: len(grads) for n, grads in fired.items()} == {n: int(n in once) for n in fired}
    assert all(torch.equal(fired[n][0], grad) for n, grad in once.items())
    model.load_state_dict(made(name).state_dict())
    torch.manual_seed(3)
    step.backward(zoo.batch())
    for n, p in model.named_parameters():
        assert (p.grad is None) == (n not in once)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, 2 * once[n], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["codebook", "mlp with batchnorm", "its own loss"])
def test_a_scaler_scales_the_gradients_and_not_the_loss(name: str) -> None:
    found = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**10)):
        model = made(name)
        torch.manual_seed(3)
        loss = step_of(model, name, rows=8).backward(zoo.batch(), scaler=scaler)
        found.append([loss, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert torch.equal(found[0][0], found[1][0])
    for plain, scaled in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(scaled, plain * 2**10, rtol=1e-12, atol=1e-12)


def test_an_infinite_scale_skips_the_step_as_the_plain_one_does() -> None:
    model, rows = made("mlp with batchnorm", torch.float32), zoo.batch(dtype=torch.float32)
    optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=3e38)
    before = copy.deepcopy(list(model.parameters()))
    loss_fn = lambda o, b: 100 * F.cross_entropy(o, b["y"])
    sg.Step(model, loss_fn, forward=lambda m, b: m(b["x"]), rows=8).backward(rows, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters())) and scaler.get_scale() < 3e38


@pytest.mark.parametrize("name", ["codebook", "convolutions with batchnorm and dropout", "rows attend to rows"])
def test_under_autocast_the_step_is_no_further_from_the_plain_one_than_bfloat16(name: str) -> None:
    found = []
    for how in ({"rows": 10**6}, {"rows": 8}):
        model = made(name, torch.float32)
        step, rows = step_of(model, name, **how), zoo.batch(dtype=torch.float32)
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            step.backward(rows)
            verdict = sg.verify_step(step, rows)
        assert verdict.same, verdict
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert all(grad.dtype == torch.float32 for grad in found[-1].values())
    largest = max(float(grad.abs().max()) for grad in found[0].values())
    for n, grad in found[0].items():
        assert float((found[1][n] - grad).abs().max()) <= 0.05 * largest, n


class Fails(nn.Module):
    """Counts, and raises at its call number ``at``."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.calls, self.armed = at, 0, False

    def forward(self, x: Tensor) -> Tensor:
        self.calls += self.armed
        if self.armed and self.calls == self.at:
            raise ZeroDivisionError
        return x


# The second chunk's forward, and its second run in backward: of 4 chunks.
@pytest.mark.parametrize("at", [2, 6])
def test_an_exception_in_the_middle_leaves_everything_as_it_was(at: int) -> None:
    model = made("codebook")
    fails = Fails(at)
    model.decoder.insert(1, fails)
    step = step_of(model, "codebook", rows=8)
    step.backward(zoo.batch())
    state = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    generator = torch.get_rng_state()
    fails.armed = True
    with pytest.raises(ZeroDivisionError):
        step.backward(zoo.batch(seed=1))
    fails.armed, fails.calls = False, 0
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, model.parameters()) if p.grad is not None)
    assert torch.equal(generator, torch.get_rng_state())
    assert all("forward" not in vars(part) for part in model.modules())
    step.backward(zoo.batch(seed=1))


def test_a_loss_that_raises_leaves_everything_as_it_was() -> None:
    model, broken = made("convolutions with batchnorm and dropout"), []

    def loss_fn(outputs: Tensor, batch: Any) -> Tensor:
        if broken:
            raise ZeroDivisionError
        return F.cross_entropy(outputs, batch["y"])

    step = sg.Step(model, loss_fn, forward=lambda model, batch: model(batch["image"]), rows=8)
    step.backward(zoo.batch())
    state, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    broken.append(True)
    with pytest.raises(ZeroDivisionError):
        step.backward(zoo.batch())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())


class Counting(nn.Module):
    """Remembers the rows of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        return x


def counted(part: nn.Module) -> list[int]:
    """The rows that each later call of the Sequential ``part`` sees."""
    seen: list[int] = []
    assert isinstance(part, nn.Sequential)
    part[0].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return seen


def test_a_part_that_is_called_first_on_shared_rows_is_a_segment_of_the_batchs() -> None:
    model = made("prototypes")
    step = step_of(model, "prototypes", rows=10, segments=["encoder"])
    step.backward(zoo.batch())
    seen = counted(model.encoder)
    step.backward(zoo.batch())
    assert seen == [12, 10, 10, 9, 10, 10, 9]


class Views(nn.Module):
    """Three views of each row, one after the other, through one encoder; their mean is compared with all rows'."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = zoo.encoder(drop=0.3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(torch.stack([x, 2 * x, x.sin()], 1).reshape(3 * len(x), -1))
        z = z.reshape(len(x), 3, -1).mean(1)
        return z @ z.T


def test_a_segment_of_several_entries_a_row_keeps_them_together_and_draws_for_each() -> None:
    torch.manual_seed(1)
    model, rows = Views().to(D), zoo.batch()["x"]
    twin = copy.deepcopy(model)
    loss_fn = lambda o, b: (o * 0.3).logsumexp(1).mean() - o.diagonal().mean()
    plain, step = sg.Step(model, loss_fn, rows=10**6), sg.Step(twin, loss_fn, rows=[4, 25])
    left = [zoo.left_by(m, s.backward, [rows, rows]) for m, s in ((model, plain), (twin, step))]
    assert worst(left[1], left[0]) <= 1
    assert step.plan is not None and step.plan.levers["segments"]["paths"] == {"encoder": 3}
    seen = counted(twin.encoder)
    step.backward(rows)
    assert seen == [12, 75, 12, 75]


@pytest.mark.parametrize(
    ("name", "parts", "found"),
    [
        ("codebook", ["codebook"], "codebook"),
        ("experts with room", ["experts.0"], "not called on rows"),
        ("mlp with batchnorm", ["layers"], "normalises with the statistics"),
        ("self-similarity", ["nothing"], "no submodule 'nothing'"),
        ("its own loss", ["encoder.1"], "no parameters"),
    ],
)
def test_parts_that_are_no_segments_are_refused_by_name_and_the_model_is_left_alone(
    name: str, parts: list[str], found: str
) -> None:
    model = made(name)
    state, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    with pytest.raises(sg.SamegradError, match=found):
        step_of(model, name, rows=8, segments=parts).backward(zoo.batch())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())
    assert all(p.grad is None and "forward" not in vars(p) for p in model.parameters())
