"""Narrow formats on one GPU: float16 with a scaler, bfloat16 and TF32 in chunks, against the same in plain PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.verify import tolerance

pytestmark = pytest.mark.gpu

N = 509
Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Batch], Tensor]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 10)]
    return nn.Sequential(*layers).cuda()


def make_batch(rows: int = N) -> Batch:
    generator = torch.Generator().manual_seed(rows)
    return (
        torch.randn(rows, 64, generator=generator).cuda(),
        torch.randint(0, 10, (rows,), generator=generator).cuda(),
    )


def cross_entropy(outputs: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


def contrastive(outputs: Tensor, batch: Batch) -> Tensor:
    z = F.normalize(outputs.float(), dim=1)
    return F.cross_entropy(z @ z.T * 3, torch.arange(len(z), device=z.device)) + F.cross_entropy(outputs, batch[1])


LOSSES: dict[str, Loss] = {"one pass": cross_entropy, "two passes": contrastive}


def taken(model: nn.Module) -> list[Tensor]:
    return [p.grad.detach().clone() for p in model.parameters() if p.grad is not None]


def distance(found: list[Tensor], reference: list[Tensor]) -> float:
    difference = torch.cat([(a.double() - b.double()).flatten() for a, b in zip(found, reference)])
    return float(difference.norm() / torch.cat([b.double().flatten() for b in reference]).norm())


def in_float64(model: nn.Module, loss_fn: Loss, batch: Batch) -> list[Tensor]:
    twin = copy.deepcopy(model).double()
    wide = batch[0].double(), batch[1]
    loss_fn(twin(wide[0]), wide).backward()
    return taken(twin)


def no_further(ours: list[Tensor], plain: list[Tensor], oracle: list[Tensor]) -> bool:
    allowed = tolerance.NOISE_RATIO * distance(plain, oracle) + tolerance.norm_allowed(torch.float32)
    return distance(ours, oracle) <= allowed


@pytest.fixture(params=["ieee", "tf32"])
def products(request: pytest.FixtureRequest) -> Iterator[str]:
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = request.param
    yield request.param
    matmul.fp32_precision = before


@pytest.mark.parametrize("rows", [1, 97, 256])
@pytest.mark.parametrize("name", LOSSES)
def test_tf32_products_in_chunks_are_no_further_from_float64_than_plain(name: str, rows: int, products: str) -> None:
    model, twin, batch = make_model(), make_model(), make_batch()
    LOSSES[name](twin(batch[0]), batch).backward()
    with sg.Step(model, LOSSES[name], rows=rows) as step:
        step.backward(batch)
    oracle = in_float64(twin, LOSSES[name], batch)
    assert no_further(taken(model), taken(twin), oracle)
    # That the setting is in force, or the test shows nothing.
    assert (distance(taken(twin), oracle) > 1e-5) == (products == "tf32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 97])
@pytest.mark.parametrize("name", LOSSES)
def test_autocast_in_chunks_is_no_further_from_float64_than_plain(name: str, rows: int, dtype: torch.dtype) -> None:
    model, twin, batch = make_model(), make_model(), make_batch()
    # Without a scale float16 loses small gradients on both sides; a power of two shifts them and rounds nothing.
    scale = 2.0**10 if dtype is torch.float16 else 1.0
    scaler = torch.amp.GradScaler("cuda", init_scale=scale, enabled=dtype is torch.float16)
    with torch.autocast("cuda", dtype):
        loss = LOSSES[name](twin(batch[0]), batch)
    (loss * scale).backward()
    with sg.Step(model, LOSSES[name], rows=rows) as step, torch.autocast("cuda", dtype):
        step.backward(batch, scaler=scaler)
    ours, plain = ([g / scale for g in taken(side)] for side in (model, twin))
    assert no_further(ours, plain, in_float64(twin, LOSSES[name], batch))


@pytest.mark.parametrize("name", LOSSES)
def test_narrow_parameters_in_many_chunks_keep_growing_sums(name: str) -> None:
    model, batch = make_model().bfloat16(), make_batch()
    typed = batch[0].bfloat16(), batch[1]
    twin = copy.deepcopy(model)
    LOSSES[name](twin(typed[0]), typed).backward()
    with sg.Step(model, LOSSES[name], rows=1) as step:
        step.backward(typed)
    assert no_further(taken(model), taken(twin), in_float64(twin, LOSSES[name], typed))


class Scaled:
    """The plain recipe of a float16 step, and the same with ``step.backward``; ``rows`` None is plain PyTorch."""

    def __init__(self, loss_fn: Loss, rows: int | None) -> None:
        self.model, self.loss_fn = make_model(), loss_fn
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.3, momentum=0.9)
        self.scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
        self.step = None if rows is None else sg.Step(self.model, loss_fn, rows=rows)
        self.norms: list[float] = []

    def run(self, batch: Batch) -> None:
        with torch.autocast("cuda", torch.float16):
            if self.step is not None:
                self.step.backward(batch, scaler=self.scaler)
            else:
                loss = self.loss_fn(self.model(batch[0]), batch)
        if self.step is None:
            self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        self.norms.append(float(nn.utils.clip_grad_norm_(self.model.parameters(), 0.05)))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    @property
    def moved(self) -> list[Tensor]:
        return [p.detach() - q.detach() for p, q in zip(self.model.parameters(), make_model().parameters())]


@pytest.mark.parametrize("name", LOSSES)
def test_a_scaled_float16_step_is_the_plain_recipe_also_when_a_chunk_overflows(name: str) -> None:
    ours, plain = Scaled(LOSSES[name], 128), Scaled(LOSSES[name], None)
    bad = make_batch()
    # In the second of four chunks; autocast makes it infinite.
    bad[0][200] = 1e5
    for side in (ours, plain):
        side.run(bad)
        assert not any(bool(change.any()) for change in side.moved)
        assert side.scaler.get_scale() == 512.0
    for side in (ours, plain):
        for _ in range(3):
            side.run(make_batch())
    assert ours.scaler.get_scale() == plain.scaler.get_scale() == 512.0
    assert ours.norms[1:] == pytest.approx(plain.norms[1:], rel=tolerance.entry_allowed(torch.float16))
    assert distance(ours.moved, plain.moved) <= tolerance.norm_allowed(torch.float16)
