"""Keyed draws on CUDA: the CPU's bits, new ones at each replay of a graph, and the same compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samegrad.exact import keyed_direct, philox
from samegrad.exact.randomness import DrawSites, LeadingRows, StepKey, keyed, learn_sites, recording
from tests.exact.test_randomness import DRAWS, ROWS, rows_of_batch, tensors

pytestmark = pytest.mark.gpu

# What these make of their input before or after the draw is not whole numbers and IEEE's own operations only.
NOT_BIT_FOR_BIT = {
    "bernoulli", "bernoulli_ tensor", "multinomial", "multinomial again", "gumbel_softmax", "attention",
    "fractional_max_pool",
}  # fmt: skip
KEYS = [0, -3, 2**62 + 977]


@pytest.mark.parametrize("name", sorted(set(DRAWS) - NOT_BIT_FOR_BIT))
def test_the_bits_are_those_of_the_cpu(name: str) -> None:
    x, results = rows_of_batch(), []
    for device in ("cpu", "cuda"):
        key, ids = torch.tensor(91, device=device), torch.arange(ROWS, device=device) + 2**33
        with torch.device(device), keyed(key, ids, sites=LeadingRows(), stream=2):
            results.append(tensors(DRAWS[name](x.to(device))))
    for on_cpu, on_cuda in zip(*results):
        assert on_cuda.is_cuda
        assert torch.equal(on_cpu, on_cuda.cpu())


LAYOUTS = [(1, 1, 1), (1, 5, 7), (1, 300, 12), (3, 29, 5), (7, 6, 64), (1, 2, 9001)]


@pytest.mark.parametrize("before, rows, inner", LAYOUTS)
@pytest.mark.parametrize("key", KEYS)
def test_kernels_follow_the_specification(key: int, before: int, rows: int, inner: int) -> None:
    ids = torch.randperm(rows) + 2**34 * torch.arange(rows)
    ids[0] = philox.WHOLE_BATCH
    elements = before * inner
    on_device = torch.tensor(key, device="cuda"), ids.cuda()

    def laid_out(words: Any) -> Tensor:
        return torch.from_numpy(words).view(rows, before, inner).transpose(0, 1).contiguous()

    words = torch.ops.samegrad.keyed_words(*on_device, 3, 17, before, inner, 2)
    expected = philox.keyed_words(key, ids.numpy(), 3, 17, 2, elements).astype(np.int64)
    assert torch.equal(words.cpu(), laid_out(expected))
    for drop in (0.1, 0.5, 0.9):
        keep = laid_out(philox.keyed_keep(key, ids.numpy(), 3, 17, elements, philox.keep_threshold(drop)))
        assert torch.equal(torch.ops.samegrad.keyed_keep(*on_device, 3, 17, before, inner, drop).cpu(), keep)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            x = torch.randn(before, rows, inner, dtype=dtype, device="cuda", requires_grad=True)
            kept, mask = torch.ops.samegrad.keyed_dropout(x, *on_device, 3, 17, before, inner, drop)
            assert torch.equal(mask.cpu(), keep)
            plain = torch.ops.aten.native_dropout_backward(x.detach(), mask, 1 / (1 - drop))
            torch.testing.assert_close(kept.detach(), plain, rtol=torch.finfo(dtype).eps, atol=0)
            (gradient,) = torch.autograd.grad(kept, x, torch.ones_like(x))
            assert torch.equal(gradient != 0, mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("before, rows, inner", [*LAYOUTS, (1, 64, 16_000)])
def test_normal_numbers_are_the_cpus_bit_for_bit(before: int, rows: int, inner: int, dtype: torch.dtype) -> None:
    key, ids = torch.tensor(KEYS[2]), torch.arange(rows) * 2**33
    for scale, shift in ((1.0, 0.0), (3.0, -0.3)):
        options = (3, 17, before, inner, "normal", scale, shift, dtype)
        on_cpu = torch.ops.samegrad.keyed_numbers(key, ids, *options)
        on_cuda = torch.ops.samegrad.keyed_numbers(key.cuda(), ids.cuda(), *options).cpu()
        assert on_cuda.dtype == dtype
        assert torch.equal(on_cuda.view(torch.uint8), on_cpu.view(torch.uint8))


def test_a_kernel_that_contracts_products_and_sums_shows() -> None:
    from samegrad.exact import normal_triton, philox_triton

    key, ids = torch.tensor(KEYS[2], device="cuda"), torch.arange(64, device="cuda")
    right = normal_triton.keyed_normal(key, ids, 3, 17, 1, 16_000, torch.float64)
    wrong = torch.empty_like(right)
    philox_triton.launch(
        normal_triton._normal_kernel, (wrong,), key, ids, (256 * 3, 17), (1, 16_000), (), enable_fp_fusion=True
    )
    torch.testing.assert_close(wrong, right, rtol=1e-12, atol=1e-12)
    assert not torch.equal(wrong, right)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dropout_by_itself_is_the_operation(dtype: torch.dtype) -> None:
    x, cotangent, second = (torch.randn(5, 7, 33, device="cuda").to(dtype).requires_grad_() for _ in range(3))
    where = torch.tensor(7, device="cuda"), torch.arange(7, device="cuda"), 3, 17, 5, 33
    results = []
    for dropped, keep in (
        keyed_direct.dropout(x, where, 0.3),
        torch.ops.samegrad.keyed_dropout(x, *where, 0.3),
    ):
        (first,) = torch.autograd.grad(dropped, x, cotangent, create_graph=True)
        results.append((dropped, keep, first, *torch.autograd.grad(first, cotangent, second)))
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("order", ["channels last", "every other"])
def test_strides_do_not_matter(order: str) -> None:
    dense = torch.randn(6, 8, 4, 4, device="cuda")
    strided = {
        "channels last": dense.to(memory_format=torch.channels_last),
        "every other": dense.repeat_interleave(2, -1)[..., ::2],
    }[order]
    results = []
    for x in (dense, strided):
        with keyed(torch.tensor(5, device="cuda"), torch.arange(6, device="cuda"), sites=LeadingRows()):
            results.append(F.dropout(x, 0.4))
    assert torch.equal(results[0], results[1])
    if order == "channels last":
        assert results[1].is_contiguous(memory_format=torch.channels_last)


def noisy_model() -> nn.Module:
    torch.manual_seed(0)
    parts = [nn.Linear(16, 32), nn.Dropout(0.3), nn.GELU(), nn.Linear(32, 32), nn.Dropout(0.5), nn.Linear(32, 4)]
    return nn.Sequential(*parts).cuda()


def noisy(model: nn.Module, x: Tensor) -> Tensor:
    outputs: Tensor = model(x + 0.1 * torch.randn_like(x))
    return outputs


def sites_of(model: nn.Module) -> DrawSites:
    seen = []
    for rows in (8, 5):
        x = torch.randn(rows, 16, device="cuda")
        with recording() as recorder, torch.no_grad():
            noisy(model, x)
        seen.append(recorder)
    return learn_sites(seen[0], seen[1])


def test_each_replay_of_a_graph_draws_for_its_key_and_rows() -> None:
    model = noisy_model()
    sites = sites_of(model)
    key, ids = torch.tensor(1, device="cuda"), torch.arange(64, device="cuda")
    x = torch.randn(64, 16, device="cuda")
    parameters = list(model.parameters())

    def chunk() -> list[Tensor]:
        with keyed(key, ids, sites=sites):
            outputs = noisy(model, x)
        return [outputs.detach(), *torch.autograd.grad(outputs.pow(2).sum(), parameters)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            chunk()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = chunk()
    seen = []
    for number, start in ((1, 0), (2, 0), (2, 64), (1, 0)):
        key.fill_(number)
        ids.copy_(torch.arange(start, start + 64))
        graph.replay()
        for mine, eager in zip(captured, chunk()):
            torch.testing.assert_close(mine, eager, rtol=1e-5, atol=1e-5)
        seen.append(captured[0].clone())
    assert torch.equal(seen[0], seen[3])
    assert not torch.allclose(seen[0], seen[1])
    assert not torch.allclose(seen[1], seen[2])


def test_a_compiled_chunk_is_the_eager_one() -> None:
    model = noisy_model()
    sites = sites_of(model)

    def chunk(key: Tensor, ids: Tensor, x: Tensor) -> Tensor:
        with keyed(key, ids, sites=sites):
            return noisy(model, x)

    torch._dynamo.reset()
    try:
        compiled = torch.compile(chunk, fullgraph=True)
        key, ids, x = torch.tensor(1, device="cuda"), torch.arange(64, device="cuda"), torch.randn(64, 16).cuda()
        seen = []
        for number in (1, 2, 1):
            key.fill_(number)
            mine, eager = compiled(key, ids, x), chunk(key, ids, x)
            torch.testing.assert_close(mine, eager, rtol=1e-4, atol=1e-4)
            seen.append(mine.detach().clone())
        assert torch.equal(seen[0], seen[2])
        assert not torch.allclose(seen[0], seen[1])
    finally:
        torch._dynamo.reset()


def test_the_device_generator_stands_still() -> None:
    before = torch.cuda.get_rng_state()
    key = StepKey()
    with keyed(key, torch.arange(8, device="cuda"), sites=LeadingRows()):
        F.dropout(torch.randn(8, 3, device="cuda"), 0.5)
    assert key.taken
    assert torch.equal(torch.cuda.get_rng_state(), before)


@pytest.mark.parametrize("batch_first", [True, False])
def test_an_encoder_layer_in_chunks_is_the_whole_one(batch_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first, dtype=torch.float64, device="cuda")
    axis = 0 if batch_first else 1
    x = torch.randn(ROWS, 5, 16, dtype=torch.float64, device="cuda").transpose(0, axis)
    seen = []
    for rows in (8, 5):
        with recording() as recorder, torch.no_grad():
            layer(x.narrow(axis, 0, rows))
        seen.append(recorder)
    sites, key = learn_sites(seen[0], seen[1]), StepKey()
    everyone = torch.arange(ROWS, device="cuda")
    with keyed(key, everyone, sites=sites.for_all_rows()):
        whole = layer(x)
    parts = []
    for ids in everyone.split([1, 27, 1]):
        with keyed(key, ids, sites=sites):
            parts.append(layer(x.index_select(axis, ids)))
    torch.testing.assert_close(torch.cat(parts, axis), whole, rtol=1e-11, atol=1e-11)
