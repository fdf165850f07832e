"""Recomputed blocks on one GPU: bits in every precision and layout, draws in autograd's own thread, and real bytes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import samegrad as sg
from samegrad.exact.recomputed import Blocks, recomputed_blocks

from ..contract.test_recompute import LOSSES, SIZES, batch_of, coupled_loss, left_by, plan, same_bits
from ..exact import recompute_zoo as zoo
from ..exact import test_regions as regions

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = before


def made(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.Tensor]:
    model, x = zoo.made(name)
    model, x = model.to("cuda", dtype), x.to("cuda", dtype)
    if x.dim() == 4:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    return model, x


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", zoo.ON_ANY_DEVICE)
def test_torchs_own_draws_are_replayed_and_bits_are_the_plain_ones(name: str, dtype: torch.dtype) -> None:
    model, x = made(name, dtype)
    plain = regions.left_by(model, x)
    for blocks in zoo.MODELS[name][2:]:
        assert regions.same(regions.left_by(model, x, regions.recomputing(blocks)), plain)


def plain_or_skip(model: nn.Module, x: Any, narrow: torch.dtype | None) -> Any:
    """What the plain step leaves; some layers have no backward of torch's under autocast on CUDA."""
    try:
        return left_by(model, batch_of(x), coupled_loss, rows=len(x))
    except RuntimeError as error:
        if narrow is None or "expected input and grad types to match" not in str(error):
            raise
        return pytest.skip(f"the plain step fails in torch {torch.__version__}: {error}")


@pytest.mark.parametrize("narrow", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", zoo.ON_ANY_DEVICE)
def test_the_whole_step_is_the_plain_one_bit_for_bit(name: str, narrow: torch.dtype | None) -> None:
    model, x = made(name)
    with nullcontext() if narrow is None else torch.autocast("cuda", dtype=narrow):
        plain = plain_or_skip(model, x, narrow)
        for blocks in zoo.MODELS[name][2:]:
            whole = plan(len(x), recompute={"blocks": blocks})
            assert same_bits(left_by(model, batch_of(x), coupled_loss, plan=whole), plain)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("narrow", [None, torch.bfloat16])
@pytest.mark.parametrize("name", [name for name in zoo.BY_ROWS if name in zoo.ON_ANY_DEVICE])
def test_ragged_chunks_give_the_split_steps_bits(name: str, narrow: torch.dtype | None, loss: str) -> None:
    model, x = made(name)
    split = {"rows": SIZES, "kept_chunks": 1}
    with nullcontext() if narrow is None else torch.autocast("cuda", dtype=narrow):
        plain_or_skip(model, x, narrow)
    with nullcontext() if narrow is None else torch.autocast("cuda", dtype=narrow):
        alone = left_by(model, batch_of(x), LOSSES[loss], plan=plan(len(x), split_rows=split))
        for blocks in zoo.MODELS[name][2:]:
            both = plan(len(x), split_rows=split, recompute={"blocks": blocks})
            assert same_bits(left_by(model, batch_of(x), LOSSES[loss], plan=both), alone)


def kept_bytes(model: nn.Module, x: torch.Tensor, blocks: Blocks) -> int:
    """What the allocator holds between forward and backward beyond what it held before."""
    with recomputed_blocks(model, blocks) if blocks else nullcontext():
        model(x).sum().backward()
        model.zero_grad()
        before = torch.cuda.memory_allocated()
        outputs = model(x)
        kept = torch.cuda.memory_allocated() - before
        outputs.sum().backward()
    return kept


def test_nothing_is_kept_beyond_what_enters_the_blocks() -> None:
    model, x = regions.Deep().cuda(), torch.randn(4096, 16, device="cuda")
    for blocks, handed in (([str(i) for i in range(6)], 5), ([["0", "1", "2"], ["3", "4", "5"]], 1)):
        assert kept_bytes(model, x, blocks) <= x.nbytes * (handed + 1) + 8 * 512
    assert kept_bytes(model, x, []) > 30 * x.nbytes


def test_the_draws_of_a_large_batch_and_the_peak_of_both_levers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(zoo.Block(64, 0.1) for _ in range(8)), nn.Flatten(), nn.Linear(64 * 32, zoo.CLASSES)).cuda()
    x = torch.randn(256, 32, 64)
    blocks = [[str(i), str(i + 1)] for i in range(0, 8, 2)]
    found: dict[str, tuple[dict[str, Any], int]] = {}
    for name, levers in {
        "plain": {},
        "recompute": {"recompute": {"blocks": blocks}},
        "split": {"split_rows": {"rows": 64}},
        "both": {"split_rows": {"rows": 64}, "recompute": {"blocks": blocks}},
    }.items():
        how: dict[str, Any] = {"plan": plan(256, **levers)} if levers else {"rows": 256}
        step = sg.Step(copy.deepcopy(model), coupled_loss, forward=lambda m, b: m(b[0]), **how)
        torch.manual_seed(5)
        step.backward(batch_of(x))
        gradients = {n: p.grad.clone() for n, p in step.declared.network.named_parameters() if p.grad is not None}
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step.backward(batch_of(x))
        found[name] = gradients, torch.cuda.max_memory_allocated() - before
        step.close()
    for ours, theirs in (("recompute", "plain"), ("both", "split")):
        assert same_bits(found[ours][0], found[theirs][0])
        assert found[ours][1] < 0.7 * found[theirs][1]
