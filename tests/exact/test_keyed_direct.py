"""Draws called by themselves and as torch's operations: the same bits, and whoever looks on sees the operation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from samegrad.exact import keyed_direct, randomness
from samegrad.exact.randomness import LeadingRows, keyed

from .test_randomness import DRAWS, ROWS, rows_of_batch, tensors

KEY = torch.tensor(2**61 + 977)
# Axes before the rows, rows, and entries of each.
LAYOUTS = [(1, 1, 1), (1, 5, 7), (1, 64, 256), (3, 29, 5)]


def where(before: int, rows: int, inner: int, call: int = 4) -> keyed_direct.Where:
    return KEY, torch.arange(rows) * 2**33, 3, call, before, inner


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dropout_and_its_derivatives_are_the_operations(layout: tuple[int, int, int], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x, cotangent, second = (torch.randn(layout, generator=generator).to(dtype).requires_grad_() for _ in range(3))

    def run(dropout: Callable[..., tuple[Tensor, Tensor]], call: int = 4) -> list[Tensor]:
        dropped, keep = dropout(x, where(*layout, call), 0.3)
        (first,) = torch.autograd.grad(dropped, x, cotangent, create_graph=True)
        return [dropped, keep, first, *torch.autograd.grad(first, cotangent, second)]

    direct = run(keyed_direct.dropout)
    operation = run(lambda x, where, drop: torch.ops.samegrad.keyed_dropout(x, *where, drop))
    assert type(direct[0].grad_fn).__name__ == "_DropoutBackward"
    for mine, theirs in zip(direct, operation, strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)
    with torch.no_grad():
        assert torch.equal(keyed_direct.dropout(x, where(*layout), 0.3)[0], direct[0])
    # The twin with the fault: another call.
    if x.numel() > 1:
        assert not any(torch.equal(a, b) for a, b in zip(direct, run(keyed_direct.dropout, call=5)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_words_masks_and_numbers_are_the_operations(layout: tuple[int, int, int]) -> None:
    asked: list[tuple[str, tuple[Any, ...]]] = [
        ("words", (2,)),
        ("keep", (0.3,)),
        *(("numbers", ("normal", 1.0, 0.0, dtype)) for dtype in (torch.float64, torch.float32, torch.bfloat16)),
        ("numbers", ("exponential", 2.0, 1.0, torch.float32)),
    ]
    for name, rest in asked:
        here = where(*layout)
        direct = keyed_direct.operation(name, here[1])
        operation = getattr(torch.ops.samegrad, f"keyed_{name}")
        assert direct is not operation
        mine, theirs = direct(*here, *rest), operation(*here, *rest)
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape == layout
        assert torch.equal(mine, theirs)


class Seen(TorchDispatchMode):
    """The names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@contextmanager
def drawing(rows: int) -> Iterator[None]:
    with keyed(KEY, torch.arange(rows), sites=LeadingRows()):
        yield


def test_a_dispatch_mode_and_fake_tensors_see_the_operation() -> None:
    x = torch.randn(6, 5)
    with drawing(6):
        plain = F.dropout(x, 0.4), torch.randn(6, 3)
    with Seen() as seen, drawing(6):
        watched = F.dropout(x, 0.4), torch.randn(6, 3)
    assert {"samegrad.keyed_dropout.default", "samegrad.keyed_numbers.default"} <= set(seen.names)
    for mine, theirs in zip(watched, plain):
        assert torch.equal(mine, theirs)
    with FakeTensorMode() as fake:
        imagined, ids, key = (fake.from_tensor(part) for part in (x, torch.arange(6), KEY))
        with keyed(key, ids, sites=LeadingRows()):
            outputs = F.dropout(imagined, 0.4)
    assert outputs.shape == x.shape
    assert type(outputs) is type(imagined)


@pytest.mark.parametrize("before_autograd", [False, True])
def test_a_recorded_graph_holds_the_operation_and_draws_anew(before_autograd: bool) -> None:
    x, ids = torch.randn(6, 5), torch.arange(6)

    def chunk(key: Tensor) -> Tensor:
        with keyed(key, ids, sites=LeadingRows()):
            return F.dropout(x, 0.4) + torch.randn_like(x)

    graph = make_fx(chunk, pre_dispatch=before_autograd)(KEY)
    for key in (KEY, KEY + 1):
        assert torch.equal(graph(key), chunk(key))


def test_transforms_go_through_a_draw() -> None:
    x, tangent = torch.randn(2, 6, 5, dtype=torch.float64)

    def loss(values: Tensor) -> Tensor:
        with drawing(6):
            return F.dropout(values, 0.4).pow(2).sum()

    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    assert 0 < int((gradient == 0).sum()) < 30
    torch.testing.assert_close(torch.func.grad(loss)(x), gradient, rtol=1e-14, atol=0)
    along = (gradient * tangent).sum()
    torch.testing.assert_close(torch.func.jvp(loss, (x,), (tangent,))[1], along, rtol=1e-13, atol=0)
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(loss(forward_ad.make_dual(x, tangent)))
    assert dual.tangent is not None
    torch.testing.assert_close(dual.tangent, along, rtol=1e-13, atol=0)


def test_functions_written_in_python_are_looked_into_where_they_may_draw() -> None:
    looked_into = {func.__name__ for func in randomness._TWINS}
    assert {"gumbel_softmax", "multi_head_attention_forward", "fractional_max_pool2d", "dropout1d"} <= looked_into
    assert not {"relu", "layer_norm", "softmax", "cross_entropy", "max_pool2d", "batch_norm"} & looked_into
    x = rows_of_batch()[:, 0]

    def noisy_distance(a: Tensor, b: Tensor) -> Tensor:
        return (F.dropout(a, 0.5) - b).abs().sum(-1)

    def loss(ids: Tensor) -> Tensor:
        with keyed(KEY, ids, sites=LeadingRows()) as draws:
            part = x[ids]
            losses = F.triplet_margin_with_distance_loss(
                part, part * 2, -part, distance_function=noisy_distance, reduction="none"
            )
        assert draws.calls == 2
        return losses

    whole = loss(torch.arange(ROWS))
    assert torch.equal(torch.cat([loss(ids) for ids in torch.arange(ROWS).split([8, 8, 13])]), whole)


# fractional_max_pool: torch's compiler does not follow the function that chooses between its two forms.
COMPILED = sorted(set(DRAWS) - {"fractional_max_pool"})


def test_compiled_draws_are_the_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    x, ids = rows_of_batch(), torch.arange(ROWS)

    def compiled(names: list[str]) -> tuple[list[Tensor], list[Tensor]]:
        def draw(key: Tensor, ids: Tensor, x: Tensor) -> list[Tensor]:
            with keyed(key, ids, sites=LeadingRows()):
                return [part for name in names for part in tensors(DRAWS[name](x))]

        torch._dynamo.reset()
        with torch.random.fork_rng():
            return torch.compile(draw, backend="eager", fullgraph=True)(KEY, ids, x), draw(KEY, ids, x)

    try:
        mine, eager = compiled(COMPILED)
        assert all(torch.equal(a, b) for a, b in zip(mine, eager, strict=True))
        # The twin with the fault: a compiler whose list lacks them.
        listed = torch._dynamo.variables.torch.get_overridable_functions() - set(randomness._KEYED)
        monkeypatch.setattr(torch._dynamo.variables.torch, "get_overridable_functions", lambda: Unchanged(listed))
        mine, eager = compiled(["randn_like"])
        assert not torch.equal(mine[0], eager[0])
    finally:
        torch._dynamo.reset()


class Unchanged(set[Any]):
    def update(self, *_: Any) -> None:
        return
