"""A head's loss in chunks on one GPU: bfloat16 and float16 autocast, memory of a chunk, no waiting for the device."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.exact.cross_entropy_ops import cross_entropy_over
from samegrad.exact.deferred_logits import deferred_head
from samegrad.exact.pending_logits import Uses
from samegrad.records import Exactness, Plan
from samegrad.verify import tolerance

pytestmark = pytest.mark.gpu

CLASSES, WIDTH, LENGTH, ROWS, POSITIONS = 20011, 256, 128, 24, 512


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body = nn.Embedding(CLASSES, WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.body(self.embed(tokens))))


def batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, CLASSES, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0)).cuda()
    targets = tokens.roll(-1, 1)
    targets[:, -1] = -100
    return tokens, targets


def loss_fn(logits: Tensor, rows: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(logits.view(-1, CLASSES), rows[1].view(-1))


def chunked(**others: Any) -> Plan:
    levers = {"chunk_loss": {"head": "head", "rows": POSITIONS}, **others}
    return Plan(levers=levers, exactness=Exactness.SAME_SUM, batch_rows=ROWS)


def gradient(model: nn.Module, scale: float = 1.0) -> Tensor:
    return torch.cat([p.grad.double().flatten() / scale for p in model.parameters() if p.grad is not None])


def stepped(plan: Plan | None, dtype: torch.dtype, scale: float) -> Tensor:
    model = Words().cuda()
    scaler = torch.amp.GradScaler("cuda", init_scale=scale)
    step = sg.Step(model, loss_fn, rows=ROWS) if plan is None else sg.Step(model, loss_fn, plan=plan)
    with torch.autocast("cuda", dtype):
        step.backward(batch(), scaler=scaler)
    return gradient(model, scale)


def oracle() -> Tensor:
    model = Words().cuda().double()
    loss_fn(model(batch()[0]), batch()).backward()
    return gradient(model)


@pytest.mark.parametrize("split", [{}, {"split_rows": {"rows": 8}}], ids=["whole", "split"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_as_near_to_float64_as_plain_ones(dtype: torch.dtype, split: dict[str, Any]) -> None:
    exact = oracle()
    distance = (stepped(None, dtype, 2.0**14) - exact).norm()
    found = (stepped(chunked(**split), dtype, 2.0**14) - exact).norm()
    assert found <= tolerance.NOISE_RATIO * distance + tolerance.norm_allowed(torch.float32) * exact.norm()


PROGRAMS = pytest.mark.parametrize(
    "programs", [{"compile": {}}, {"graphs": {}}, {"compile": {}, "graphs": {}}], ids=" ".join
)


@PROGRAMS
@pytest.mark.parametrize("split", [{}, {"split_rows": {"rows": 8}}], ids=["whole", "split"])
def test_compiled_and_captured_they_are_too(programs: dict[str, Any], split: dict[str, Any]) -> None:
    exact = oracle()
    distance = (stepped(None, torch.bfloat16, 1.0) - exact).norm()
    found = (stepped(chunked(**split, **programs), torch.bfloat16, 1.0) - exact).norm()
    assert found <= tolerance.NOISE_RATIO * distance + tolerance.norm_allowed(torch.float32) * exact.norm()


@pytest.mark.parametrize("programs", [{}, {"compile": {}}], ids=["python", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_verdict_is_same(dtype: torch.dtype, programs: dict[str, Any]) -> None:
    step = sg.Step(Words().cuda().to(dtype), loss_fn, plan=chunked(**programs))
    assert sg.verify_step(step, batch(), rows=8).same


def peak(plan: Plan | None) -> int:
    """Bytes that a step takes beside what stands before it."""
    model = Words().cuda()
    rows = batch()
    step = sg.Step(model, loss_fn, rows=ROWS) if plan is None else sg.Step(model, loss_fn, plan=plan)
    with step, torch.autocast("cuda", torch.bfloat16):
        # Examined first, on rows of its own.
        step.backward(rows)
        model.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step.backward(rows)
    return torch.cuda.max_memory_allocated() - before


def test_the_peak_is_that_of_a_chunk() -> None:
    logits_bytes = ROWS * LENGTH * CLASSES * torch.float32.itemsize
    assert peak(None) - peak(chunked()) >= logits_bytes


def test_the_peak_of_a_compiled_step_is_too() -> None:
    whole = Plan(levers={"compile": {}}, exactness=Exactness.SAME_SUM, batch_rows=ROWS)
    logits_bytes = ROWS * LENGTH * CLASSES * torch.bfloat16.itemsize
    assert peak(whole) - peak(chunked(compile={})) >= logits_bytes / 2


def test_the_loss_does_not_wait_for_the_device() -> None:
    model, rows = Words().cuda(), batch()

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            with deferred_head(model.head, rows=POSITIONS, uses=Uses("head")):
                logits = model(rows[0])
            loss = loss_fn(logits, rows)
        loss.backward()

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def rows_of_scores(kind: torch.dtype, padded: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (positions, padded), targets and cotangents, with what is not finite and what is not counted."""
    generator = torch.Generator("cuda").manual_seed(0)
    scores = (torch.randn(64, padded, generator=generator, device="cuda") * 5).to(kind)
    scores[1, 5:900] = float("-inf")
    scores[2, :CLASSES] = float("-inf")
    scores[3, 7] = float("nan")
    scores[4, 7] = float("inf")
    scores[5] *= 1000
    targets = torch.randint(0, CLASSES, (64,), generator=generator, device="cuda")
    targets[6:9] = -100
    return scores, targets, torch.randn(64, generator=generator, device="cuda")


@pytest.mark.parametrize("padded", [CLASSES, CLASSES + 21], ids=["as it is", "padded"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_computes_torchs_own_cross_entropy(kind: torch.dtype, smoothing: float, padded: int) -> None:
    scores, targets, cotangents = rows_of_scores(kind, padded)
    # In float64: torch's own gradient of smoothed labels is a sum of as many terms as there are classes.
    leaf = scores[:, :CLASSES].double().requires_grad_()
    expected = F.cross_entropy(leaf, targets, reduction="none", label_smoothing=smoothing)
    expected.backward(cotangents.double())
    # A column of a table, say: neighbours are not neighbours in memory.
    column = torch.stack([targets, targets.flip(0)], 1)[:, 0]
    losses = cross_entropy_over(scores, CLASSES, column, cotangents, -100, smoothing)
    assert torch.equal(losses.isfinite(), expected.isfinite())
    torch.testing.assert_close(losses, expected.detach().float(), rtol=2e-6, atol=2e-6, equal_nan=True)
    assert leaf.grad is not None and not scores[:, CLASSES:].any()
    # Probabilities of nearly nothing are told by the difference, whose rounding an exponential multiplies.
    nothing, allowed = 4 * torch.finfo(torch.float32).eps, 4 * torch.finfo(kind).eps
    gradient = leaf.grad.to(kind)
    torch.testing.assert_close(scores[:, :CLASSES], gradient, rtol=allowed, atol=nothing, equal_nan=True)


NO_CLASS = """
import torch
from samegrad.exact.cross_entropy_ops import cross_entropy_over
scores = torch.zeros(2, 10, device="cuda")
targets = torch.tensor([1, {target}], device="cuda")
cross_entropy_over(scores, 10, targets, torch.ones(2, device="cuda"), -100, 0.0)
torch.cuda.synchronize()
"""


@pytest.mark.parametrize(("target", "fails"), [(9, False), (-100, False), (10, True), (-1, True)])
def test_a_target_that_is_no_class_fails(target: int, fails: bool) -> None:
    ended = subprocess.run([sys.executable, "-c", NO_CLASS.format(target=target)], capture_output=True, text=True)
    assert (ended.returncode != 0) is fails and ("assert" in ended.stderr) is fails, ended.stderr[-500:]
