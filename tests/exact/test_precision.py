"""Narrow dtypes: autocast, loss scaling and narrow parameters in chunks, against the same in plain PyTorch."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.exact import aliases, first_pass
from samegrad.verify import tolerance

Batch = tuple[Tensor, Tensor]
Patch = pytest.MonkeyPatch
N = 61


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 5))


def make_batch(rows: int = N) -> Batch:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, 16, generator=generator), torch.randint(0, 5, (rows,), generator=generator)


def cross_entropy(outputs: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


def contrastive(outputs: Tensor, batch: Batch) -> Tensor:
    z = F.normalize(outputs.float(), dim=1)
    return F.cross_entropy(z @ z.T * 3, torch.arange(len(z))) + F.cross_entropy(outputs, batch[1])


LOSSES = {"one pass": cross_entropy, "two passes": contrastive}
Loss = Callable[[Tensor, Batch], Tensor]


def taken(model: nn.Module) -> list[Tensor]:
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(found) == len(list(model.parameters()))
    return [g.detach().clone() for g in found]


def in_float64(model: nn.Module, loss_fn: Loss, batch: Batch) -> list[Tensor]:
    """The oracle: the plain step in float64 from the same weights."""
    twin = copy.deepcopy(model).double()
    wide = batch[0].double(), batch[1]
    loss_fn(twin(wide[0]), wide).backward()
    return taken(twin)


def distance(found: list[Tensor], oracle: list[Tensor]) -> float:
    difference = torch.cat([(a.double() - b).flatten() for a, b in zip(found, oracle)])
    return float(difference.norm() / torch.cat([b.flatten() for b in oracle]).norm())


def no_further(ours: list[Tensor], plain: list[Tensor], oracle: list[Tensor]) -> bool:
    """The contract's third tier, and that there is something to be seen: plain itself is not float64."""
    theirs = distance(plain, oracle)
    assert theirs > 1e-5
    return distance(ours, oracle) <= tolerance.NOISE_RATIO * theirs + tolerance.norm_allowed(torch.float32)


# Autocast


def under_autocast(loss_fn: Loss, rows: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of the split step, of the plain one, and of float64; both of the first under bfloat16 autocast."""
    model, batch = make_model(), make_batch()
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_fn(twin(batch[0]), batch)
    loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        sg.Step(model, loss_fn, rows=rows).backward(batch)
    return taken(model), taken(twin), in_float64(model, loss_fn, batch)


@pytest.mark.parametrize("rows", [1, 7, 30])
@pytest.mark.parametrize("name", LOSSES)
def test_under_bfloat16_autocast_chunks_are_no_further_from_float64_than_plain_is(name: str, rows: int) -> None:
    assert no_further(*under_autocast(LOSSES[name], rows))


def test_two_percent_would_not_pass_as_rounding() -> None:
    ours, plain, oracle = under_autocast(cross_entropy, 7)
    assert not no_further([g * 1.02 for g in ours], plain, oracle)


@contextlib.contextmanager
def cached(device_type: str) -> Iterator[None]:
    yield


def loses_gradients_to_the_cache() -> bool:
    """Whether this torch keeps weights cast without a graph for a later forward with one (pytorch#112583)."""
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            layer(x)
        outputs = layer(x)
    outputs.float().sum().backward()
    return layer.weight.grad is None


class Watching(nn.Module):
    """Notes of each forward whether casts of weights are cached, and whether there is a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model()
        self.__dict__["seen"] = set()

    def forward(self, x: Tensor) -> Tensor:
        self.__dict__["seen"].add((torch.is_grad_enabled(), torch.is_autocast_cache_enabled()))
        return self.inner(x)


def test_weights_are_never_cached_without_a_graph_inside_the_users_autocast_block(monkeypatch: Patch) -> None:
    def seen() -> set[tuple[bool, bool]]:
        model = Watching()
        step = sg.Step(model, contrastive, rows=7)
        with torch.autocast("cpu", torch.bfloat16):
            step.backward(make_batch())
            model.__dict__["seen"].clear()
            step.backward(make_batch())
        taken(model)
        return set(model.__dict__["seen"])

    assert seen() == {(False, False), (True, True)}
    monkeypatch.setattr(first_pass, "_autocast_uncached", cached)
    if loses_gradients_to_the_cache():
        with pytest.raises(AssertionError):
            seen()
    else:
        assert (False, True) in seen()


@pytest.mark.parametrize("name", LOSSES)
def test_steps_that_follow_in_one_autocast_block_see_the_new_weights(name: str) -> None:
    def trained(backward: Callable[[nn.Module], object], model: nn.Module) -> list[Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), 0.5)
        for _ in range(3):
            backward(model)
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() - q.detach() for p, q in zip(model.parameters(), make_model().parameters())]

    def plainly(model: nn.Module) -> None:
        # A block for each step, as plain PyTorch needs it.
        with torch.autocast("cpu", torch.bfloat16):
            loss = LOSSES[name](model(make_batch()[0]), make_batch())
        loss.backward()

    plain = trained(plainly, make_model())
    model = make_model()
    step = sg.Step(model, LOSSES[name], rows=7)
    with torch.autocast("cpu", torch.bfloat16):
        ours = trained(lambda _: step.backward(make_batch()), model)
    assert distance(ours, plain) <= 0.02


@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
def test_rows_that_run_again_in_backward_do_so_under_the_autocast_of_the_call(inside: bool) -> None:
    model, batch = make_model(), make_batch()
    dtypes: list[torch.dtype] = []
    model[0].register_forward_hook(lambda _, __, output: dtypes.append(output.dtype))
    mapped = sg.rowwise(model, rows=7)
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive(mapped(batch[0]), batch)
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    assert set(dtypes) == {torch.bfloat16}
    twin = make_model()
    with torch.autocast("cpu", torch.bfloat16):
        plain = contrastive(twin(batch[0]), batch)
    plain.backward()
    assert no_further(taken(model), taken(twin), in_float64(twin, contrastive, batch))


# Loss scaling: scale, unscale, clip, step and update once a step, as in the plain loop


class Scaled:
    """The plain recipe of a scaled step, and the same with ``step.backward``; ``rows`` None is plain PyTorch."""

    def __init__(self, loss_fn: Loss, rows: int | None, autocast: torch.dtype | None = None) -> None:
        self.model, self.loss_fn, self.autocast = make_model(), loss_fn, autocast
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.3, momentum=0.9)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        self.step = None if rows is None else sg.Step(self.model, loss_fn, rows=rows)
        self.norms: list[float] = []

    def backward(self, batch: Batch) -> Tensor:
        with torch.autocast("cpu", self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            if self.step is not None:
                return self.step.backward(batch, scaler=self.scaler)
            loss = self.loss_fn(self.model(batch[0]), batch)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def run(self, batch: Batch, clip: float = 0.05) -> Tensor:
        loss = self.backward(batch)
        self.scaler.unscale_(self.optimizer)
        self.norms.append(float(nn.utils.clip_grad_norm_(self.model.parameters(), clip)))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return loss

    @property
    def moved(self) -> list[Tensor]:
        """How far each parameter is from where it began."""
        return [p.detach() - q.detach() for p, q in zip(self.model.parameters(), make_model().parameters())]


def close(a: Any, b: Any, dtype: torch.dtype) -> bool:
    allowed = tolerance.entry_allowed(dtype)
    # Weights below 1 move by what float32 can hold of it.
    least = torch.finfo(torch.float32).eps
    return all(float((x - y).abs().max()) <= allowed * float(y.abs().max()) + least for x, y in zip(a, b))


@pytest.mark.parametrize("autocast", [None, torch.float16], ids=["float32", "float16 autocast"])
@pytest.mark.parametrize("name", LOSSES)
def test_a_scaled_step_is_the_plain_recipe(name: str, autocast: torch.dtype | None) -> None:
    ours, plain = Scaled(LOSSES[name], 16, autocast), Scaled(LOSSES[name], None, autocast)
    for _ in range(3):
        losses = [float(side.run(make_batch())) for side in (ours, plain)]
        assert losses[0] == pytest.approx(losses[1], rel=tolerance.loss_allowed(autocast or torch.float32))
    dtype = autocast or torch.float32
    assert ours.scaler.get_scale() == plain.scaler.get_scale() == 1024.0
    assert close([torch.tensor(ours.norms)], [torch.tensor(plain.norms)], dtype)
    assert close(ours.moved, plain.moved, dtype)


def test_clipping_every_chunk_would_be_seen() -> None:
    plain, clipped = Scaled(cross_entropy, None), Scaled(cross_entropy, None)
    plain.run(make_batch())
    x, y = make_batch()
    for start in range(0, N, 16):
        part = x[start : start + 16], y[start : start + 16]
        loss = cross_entropy(clipped.model(part[0]), part) * (len(part[0]) / N)
        clipped.scaler.scale(loss).backward()
        nn.utils.clip_grad_norm_(clipped.model.parameters(), 0.05 * 1024)
    clipped.scaler.unscale_(clipped.optimizer)
    nn.utils.clip_grad_norm_(clipped.model.parameters(), 0.05)
    clipped.scaler.step(clipped.optimizer)
    assert not close(clipped.moved, plain.moved, torch.float16)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("how", ["infinite row", "float16 overflow"])
def test_one_bad_chunk_of_four_skips_one_step_and_halves_the_scale_once(name: str, how: str) -> None:
    autocast = torch.float16 if how == "float16 overflow" else None
    ours, plain = Scaled(LOSSES[name], 16, autocast), Scaled(LOSSES[name], None, autocast)
    x, y = make_batch()
    # In the second of four chunks; finite in float32, where autocast does not make it float16.
    x[20] = 1e5 if autocast else torch.inf
    for side in (ours, plain):
        side.backward((x, y))
    finite = [[bool(g.isfinite().all()) for g in taken(side.model)] for side in (ours, plain)]
    assert finite[0] == finite[1] and not all(finite[0])
    for side in (ours, plain):
        side.optimizer.zero_grad()
        side.run((x, y))
    assert not any(bool(change.any()) for change in ours.moved)
    assert ours.scaler.get_scale() == plain.scaler.get_scale() == 512.0
    for side in (ours, plain):
        side.run(make_batch())
    assert ours.scaler.get_scale() == plain.scaler.get_scale() == 512.0
    assert close(ours.moved, plain.moved, autocast or torch.float32)
    assert all(bool(change.any()) for change in ours.moved)


# What each row's output is given as its gradient


def row_mean(outputs: Tensor, batch: Batch) -> Tensor:
    return (outputs - F.one_hot(batch[1], 5).to(outputs.dtype)).square().mean()


def row_sum(outputs: Tensor, batch: Batch) -> Tensor:
    return (outputs - F.one_hot(batch[1], 5).to(outputs.dtype)).square().sum()


def cotangents(loss_fn: Loss, dtype: torch.dtype, rows: Any, batch: Batch) -> Tensor:
    """The gradient with respect to the outputs of each row, in the rows' order; ``rows`` None is plain PyTorch."""
    model = make_model().to(dtype)
    found: list[Tensor] = []

    def note(_: nn.Module, __: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda g: found.append(g.clone()))

    typed = batch[0].to(dtype), batch[1]
    if rows is None:
        model.register_forward_hook(note)
        loss_fn(model(typed[0]), typed).backward()
    else:
        step = sg.Step(model, loss_fn, rows=rows)
        step.sizes_for(typed)
        step.split_for(typed, step.declared.layout(typed))
        model.register_forward_hook(note)
        step.backward(typed)
    return torch.cat(found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("loss_fn", [row_mean, row_sum, cross_entropy, contrastive])
@pytest.mark.parametrize("rows", [16, [32, 16, 16], [8, 32, 24]], ids=str)
def test_cotangents_of_rows_are_those_of_the_unsplit_loss_bit_for_bit(
    rows: Any, loss_fn: Loss, dtype: torch.dtype
) -> None:
    batch = make_batch(64)
    ours, plain = cotangents(loss_fn, dtype, rows, batch), cotangents(loss_fn, dtype, None, batch)
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("loss_fn", [row_mean, row_sum, cross_entropy, contrastive])
def test_where_rows_are_no_power_of_two_all_cotangents_share_one_factor(loss_fn: Loss, dtype: torch.dtype) -> None:
    # 1 / 61 is rounded in a narrow dtype and 1 / 64 is not: the rest is made up for on the wide sums. No row comes
    # nearer to overflow or to nothing than by a factor of the square root of two.
    ours, plain = (cotangents(loss_fn, dtype, rows, make_batch(61)).double() for rows in ([30, 8, 23], None))
    seen = plain.abs() > 64 * torch.finfo(dtype).tiny
    factors = (ours / plain)[seen]
    assert float(factors.min()) >= 2**-0.5 and float(factors.max()) <= 2**0.5
    assert float(factors.max() / factors.min()) <= 1 + 8 * tolerance.unit_roundoff(dtype)


# Many chunks of narrow parameters


def many_chunks(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    model, batch = make_model().to(dtype), make_batch(256)
    typed = batch[0].to(dtype), batch[1]
    twin = copy.deepcopy(model)
    cross_entropy(twin(typed[0]), typed).backward()
    sg.Step(model, cross_entropy, rows=1).backward(typed)
    return taken(model), taken(twin), in_float64(model, cross_entropy, typed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_of_256_chunks_of_one_row_do_not_stop_growing(dtype: torch.dtype, monkeypatch: Patch) -> None:
    assert no_further(*many_chunks(dtype))
    if dtype is torch.bfloat16:
        # Summed in their own dtype they would: the twin that must be caught.
        monkeypatch.setattr(aliases, "NARROW", ())
        assert not no_further(*many_chunks(dtype))
