"""``Step`` on one GPU: host batches, autocast, loss scaling, caps, and a recipe from end to end."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.recipes._recipe import run_epochs
from samegrad.recipes.autoencoder.options import AutoencoderOptions
from samegrad.recipes.autoencoder.recipe import build

pytestmark = pytest.mark.gpu

ROWS = 509
Batch = tuple[Tensor, Tensor]


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 10)).cuda()


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, 64, generator=generator), torch.randint(0, 10, (ROWS,), generator=generator)


def contrastive(outputs: Tensor, batch: Batch) -> Tensor:
    z = F.normalize(outputs.float(), dim=1)
    return F.cross_entropy(z @ z.T * 3, torch.arange(len(z), device=z.device)) + F.cross_entropy(outputs, batch[1])


LOSSES: dict[str, Callable[[Tensor, Batch], Tensor]] = {
    "one pass": lambda outputs, batch: F.cross_entropy(outputs, batch[1]),
    "two passes": contrastive,
}


def plain_gradients(model: nn.Module, loss_fn: Callable[[Tensor, Batch], Tensor], batch: Batch) -> list[Tensor]:
    twin = copy.deepcopy(model).double()
    x, y = batch[0].cuda().double(), batch[1].cuda()
    loss_fn(twin(x), (x, y)).backward()
    return [p.grad for p in twin.parameters() if p.grad is not None]


def distance(gradients: list[Tensor], reference: list[Tensor]) -> float:
    difference = torch.cat([(g.double() - r).flatten() for g, r in zip(gradients, reference)])
    return float(difference.norm() / torch.cat([r.flatten() for r in reference]).norm())


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("place", ["host", "pinned", "device"])
def test_a_batch_from_anywhere_gives_the_plain_gradient(name: str, place: str) -> None:
    model, batch = make_model(), make_batch()
    where = {
        "host": batch,
        "pinned": tuple(leaf.pin_memory() for leaf in batch),
        "device": tuple(leaf.cuda() for leaf in batch),
    }[place]
    with sg.Step(model, LOSSES[name], rows=97) as step:
        step.backward(where)
        mine = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        assert distance(mine, plain_gradients(model, LOSSES[name], batch)) < 1e-5
        assert sg.verify_step(step, where).same


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_around_the_call_is_the_plain_step_under_autocast(name: str) -> None:
    model, batch = make_model(), make_batch()
    on_device = tuple(leaf.cuda() for leaf in batch)
    twin = copy.deepcopy(model)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = LOSSES[name](twin(on_device[0]), on_device)
    loss.backward()
    reference = plain_gradients(model, LOSSES[name], batch)
    plain = distance([p.grad for p in twin.parameters() if p.grad is not None], reference)
    with sg.Step(model, LOSSES[name], rows=97) as step, torch.autocast("cuda", dtype=torch.bfloat16):
        step.backward(batch)
        mine = distance([p.grad for p in model.parameters() if p.grad is not None], reference)
        assert mine <= 2 * plain + 1e-6
        assert sg.verify_step(step, batch).same


def test_a_scaler_scales_the_loss_only() -> None:
    model, batch = make_model(), make_batch()
    reference = plain_gradients(model, LOSSES["one pass"], batch)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    with sg.Step(model, LOSSES["one pass"], rows=97) as step:
        loss = step.backward(batch, scaler=scaler)
    x, y = batch[0].cuda(), batch[1].cuda()
    torch.testing.assert_close(loss, LOSSES["one pass"](model(x), (x, y)).detach(), rtol=1e-5, atol=0)
    assert distance([p.grad / 1024 for p in model.parameters() if p.grad is not None], reference) < 1e-5


@pytest.mark.parametrize("name", LOSSES)
def test_a_cap_is_enforced_kept_and_lifted(name: str) -> None:
    torch.cuda.empty_cache()
    base = torch.cuda.memory_reserved()
    generator = torch.Generator().manual_seed(1)
    batch = torch.randn(200_000, 64, generator=generator), torch.randint(0, 10, (200_000,), generator=generator)
    model = make_model()
    optimizer = torch.optim.Adam(model.parameters())
    loss_fn = LOSSES["one pass"] if name == "one pass" else lambda o, b: F.cross_entropy(o, b[1]).sqrt()
    budget_bytes = base + 256 * 2**20
    with sg.Step(model, loss_fn, budget=budget_bytes, optimizer=optimizer, enforce=True) as step:
        results = list(sg.train(step, [batch] * 3))
        assert step.plan is not None
        assert "split_rows" in step.plan.levers
        assert max(result.peak_reserved_bytes or 0 for result in results) <= budget_bytes
        assert results[-1].loss < results[0].loss
    assert torch.cuda.get_per_process_memory_fraction() == 1.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_autoencoder_trains_on_the_device(dtype: str, tmp_path: Path) -> None:
    options = AutoencoderOptions(
        num_epochs=4, patch_rows=4000, latent_dim=8, hidden=128, learning_rate=2e-4, device="cuda", dtype=dtype,
        budget="400MiB", empty_cache="validation",
    )  # fmt: skip
    program = build(options)
    with program.step:
        results = list(run_epochs(program))
        assert len(results) == 4
        assert all(result.steps[0].peak_reserved_bytes for result in results)
        metrics = program.evaluate()
        assert metrics["test_mse"] < 1.1 * metrics["pca_test_mse"]
        files = program.write(tmp_path)
    assert {file.suffix for file in files} == {".safetensors", ".pt", ".png"}
