"""The loss of a head in chunks against the same loss in plain PyTorch: float64, ragged chunks, every reduction."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samegrad.errors import UsageError
from samegrad.exact import chunked_head, logit_rows
from samegrad.exact.chunk_map import Autocast
from samegrad.exact.chunked_head import ChunkedLikelihood, HeadLoss
from samegrad.exact.deferred_logits import DeferredLogits, deferred_head
from samegrad.exact.pending_logits import Uses
from samegrad.verify import tolerance

from . import head_zoo as zoo
from .head_zoo import CLASSES, LOSSES, D, LogitLoss, Words, words

Gradients = Sequence[Tensor | None]
POSITIONS = zoo.ROWS * zoo.LENGTH


@pytest.fixture(autouse=True, params=["cpu", "cuda"])
def as_on(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU; and as on CUDA: zeros behind the vocabulary, and gradients written over logits."""
    if request.param == "cuda":
        monkeypatch.setitem(logit_rows._CLASSES_OF_A_TILE, "cpu", 64)
        monkeypatch.setattr(chunked_head, "_SWEPT_ON", {"cpu"})
        # The kernel computes in float32; what it stands for is tried in float64.
        monkeypatch.setattr(chunked_head, "_SWEPT_DTYPES", (*chunked_head._SWEPT_DTYPES, D))


def test_zeros_behind_the_vocabulary_fill_it_to_a_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    head = nn.Linear(8, CLASSES)
    rows = logit_rows.LogitRows(head.weight, head.bias, Autocast.now(["cpu"]))
    for tile, padded in ((1, CLASSES), (64, 64), (CLASSES, CLASSES)):
        monkeypatch.setitem(logit_rows._CLASSES_OF_A_TILE, "cpu", tile)
        leaves = rows.as_leaves()
        assert leaves.weight.shape == (padded, 8) and leaves.of(torch.ones(3, 8)).shape == (3, CLASSES)
        assert not leaves.weight[CLASSES:].any()


def plain(model: nn.Module, loss: LogitLoss, batch: zoo.Batch) -> tuple[Tensor, Gradients]:
    found = loss(model(batch[0]), batch[1])
    return found.detach(), torch.autograd.grad(found, trained(model), allow_unused=True)


def chunked(model: Any, loss: LogitLoss, batch: zoo.Batch, rows: int, scale: float = 1.0) -> tuple[Tensor, Gradients]:
    uses = Uses("head")
    with deferred_head(model.head, rows=rows, uses=uses):
        logits = model(batch[0])
    assert isinstance(logits, DeferredLogits)
    found = loss(logits, batch[1])
    assert uses.losses and not uses.met
    return found.detach(), torch.autograd.grad(found * scale, trained(model), allow_unused=True)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def assert_same(ours: Gradients, theirs: Gradients, kind: torch.dtype = D, rounded: torch.dtype | None = None) -> None:
    """``rounded``: a narrower dtype that the loss itself casts to."""
    for mine, expected in zip(ours, theirs, strict=True):
        assert (mine is None) == (expected is None)
        if mine is not None and expected is not None:
            assert mine.dtype is expected.dtype
            scale = tolerance.entry_scale(float(expected.abs().max()), 1e-3)
            assert float((mine - expected).abs().max()) <= tolerance.entry_allowed(rounded or kind) * scale


@pytest.mark.parametrize("rows", [1, 5, 16, POSITIONS, 1000])
@pytest.mark.parametrize("name", LOSSES)
def test_loss_and_gradients_are_the_plain_ones(name: str, rows: int) -> None:
    model, batch = Words(bias=True).to(D), words()
    loss, gradients = plain(model, LOSSES[name], batch)
    ours, mine = chunked(model, LOSSES[name], batch, rows)
    casts = torch.float32 if name == "transformers" else D
    assert ours.dtype is loss.dtype
    assert float((ours - loss).abs()) <= tolerance.loss_allowed(casts) * float(loss.abs())
    assert_same(mine, gradients, rounded=casts)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_tied_weight_gets_both_gradients(tied: bool, bias: bool) -> None:
    model, batch = Words(tied=tied, bias=bias).to(D), words()
    assert_same(chunked(model, zoo.flat, batch, 7)[1], plain(model, zoo.flat, batch)[1])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("frozen", ["head", "body", "bias"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(frozen: str, reduction: str) -> None:
    model, batch = Words(tied=False, bias=True).to(D), words()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not ((name == "head.bias") if frozen == "bias" else
                                      name.startswith("head") == (frozen == "head")))  # fmt: skip
    loss = lambda z, y: F.cross_entropy(z.mT, y, reduction=reduction).sum() / 7
    assert_same(chunked(model, loss, batch, 7)[1], plain(model, loss, batch)[1])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [True, False])
def test_a_batch_without_a_target_has_the_plain_loss_and_no_gradient(weighted: bool, smoothing: float) -> None:
    model, (tokens, targets) = Words().to(D), words()
    batch = tokens, torch.full_like(targets, -100)

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        weight = zoo.class_weights(logits) if weighted else None
        return F.cross_entropy(logits.mT, labels, weight=weight, label_smoothing=smoothing)

    found, gradients = plain(model, loss, batch)
    ours, mine = chunked(model, loss, batch, 7)
    assert bool(found.isnan()) and bool(ours.isnan())
    assert all(float(g.abs().max()) == 0 for g in (*gradients, *mine) if g is not None)


@pytest.mark.parametrize("scale", [3.0, 2.0**16, 1e-9])
def test_the_incoming_scale_multiplies_the_gradients(scale: float) -> None:
    model, batch = Words().to(D), words()
    wanted = [None if g is None else g * scale for g in plain(model, zoo.flat, batch)[1]]
    for mine, expected in zip(chunked(model, zoo.flat, batch, 7, scale)[1], wanted):
        assert mine is not None and expected is not None
        assert float((mine - expected).abs().max()) <= tolerance.entry_allowed(D) * float(expected.abs().max())


# Precision


@pytest.mark.parametrize("name", ["flat", "weights and smoothing", "none, masked mean", "likelihood"])
def test_autocast_computes_in_the_dtypes_of_the_plain_step(name: str) -> None:
    """Both in bfloat16 and next to float64: the chunked gradients are no further from it than the plain ones."""
    model, batch = Words(bias=True), words()
    exact = plain(Words(bias=True).to(D), LOSSES[name], batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = LOSSES[name](model(batch[0]), batch[1])
        uses = Uses("head")
        with deferred_head(model.head, rows=7, uses=uses):
            ours = LOSSES[name](model(batch[0]), batch[1])
    assert ours.dtype is found.dtype
    theirs, mine = (torch.autograd.grad(loss, trained(model)) for loss in (found, ours))
    for plainly, chunks, oracle in zip(theirs, mine, exact[1], strict=True):
        assert oracle is not None and chunks.dtype is plainly.dtype is torch.float32
        distance = (plainly - oracle).norm()
        allowed = tolerance.NOISE_RATIO * distance + tolerance.norm_allowed(torch.float32) * oracle.norm()
        assert (chunks - oracle).norm() <= allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["flat", "weights", "none, masked mean"])
def test_narrow_parameters_are_summed_wide(name: str, dtype: torch.dtype) -> None:
    batch = words(40)
    exact = plain(Words().to(dtype).to(D), LOSSES[name], batch)[1]
    model = Words().to(dtype)
    theirs, mine = plain(model, LOSSES[name], batch)[1], chunked(model, LOSSES[name], batch, 3)[1]
    for plainly, chunks, oracle in zip(theirs, mine, exact, strict=True):
        assert plainly is not None and chunks is not None and oracle is not None and chunks.dtype is dtype
        # float16 loses small entries under no loss scale, on either side.
        lost = tolerance.subnormal_loss(dtype, 120) * oracle.numel() ** 0.5
        allowed = tolerance.NOISE_RATIO * (plainly - oracle).norm() + tolerance.unit_roundoff(dtype) * oracle.norm()
        assert (chunks - oracle).norm() <= allowed + lost


def test_a_factor_that_is_no_power_of_two_is_not_rounded_to_a_narrow_dtype() -> None:
    """0.3 is off by a thousandth in bfloat16: every row would carry that."""
    factor, ones = torch.tensor(0.3, dtype=D), torch.ones(1000, 4, dtype=torch.bfloat16)
    rows = torch.linspace(1, 2, 1000).view(-1, 1).expand(1000, 4).to(torch.bfloat16)
    multiplied = rows.clone()
    chunked_head.multiply(multiplied, factor)
    assert abs(float((multiplied.double() / (rows.double() * 0.3)).mean()) - 1) < 2e-4
    assert abs(float((ones * factor.bfloat16()).double().mean()) / 0.3 - 1) > 5e-4


SWEPT = {
    "flat": True,
    "transformers": True,
    "smoothing": True,
    "none, masked mean": True,
    "weights": False,
    "likelihood": False,
    "capped": False,
}


@pytest.mark.parametrize("name", SWEPT)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_only_a_cross_entropy_of_scores_that_were_widened_is_swept(
    name: str, kind: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunked_head, "_SWEPT_ON", {"cpu"})
    calls: list[Tensor] = []
    sweep = chunked_head.cross_entropy_over
    monkeypatch.setattr(chunked_head, "cross_entropy_over", lambda *args: calls.append(args[0]) or sweep(*args))
    model, batch = Words().to(kind), words()
    chunked(model, LOSSES[name], batch, 7)
    # A likelihood that is narrow itself is called as it is.
    assert bool(calls) == (SWEPT[name] and (kind is torch.float32 or name == "transformers"))
    assert all(scores.dtype is kind for scores in calls)


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_sweep_is_torchs_own_likelihood(kind: torch.dtype, smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(9, 50, generator=generator) * 4).to(kind)
    targets = torch.randint(0, CLASSES, (9,), generator=generator)
    targets[3] = -7
    cotangents = torch.randn(9, generator=generator)
    leaf = scores[:, :CLASSES].clone().requires_grad_()
    expected = F.cross_entropy(leaf.float(), targets, ignore_index=-7, reduction="none", label_smoothing=smoothing)
    expected.backward(cotangents)
    losses = chunked_head.cross_entropy_over(scores, CLASSES, targets, cotangents, -7, smoothing)
    assert torch.equal(losses, expected.detach()) and not scores[:, CLASSES:].any()
    assert leaf.grad is not None
    assert_same([scores[:, :CLASSES]], [leaf.grad], kind)


def test_hidden_rows_get_the_bits_of_the_plain_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each position's term is what it is there, so that everything before the head gets what it gets there."""
    # With more classes, zeros or not, kernels add up in another order; and a sweep is another kernel.
    monkeypatch.setitem(logit_rows._CLASSES_OF_A_TILE, "cpu", 1)
    monkeypatch.setattr(chunked_head, "_SWEPT_ON", set())
    head, targets = nn.Linear(16, 300), torch.arange(96)
    hidden = torch.randn(96, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    [expected] = torch.autograd.grad(F.cross_entropy(head(hidden), targets), [hidden])
    with deferred_head(head, rows=32, uses=Uses("head")):
        [found] = torch.autograd.grad(F.cross_entropy(head(hidden), targets), [hidden])
    # All of them, but where a kernel adds up in another order for fewer rows.
    assert float((found == expected).double().mean()) > 0.9


def test_one_position_has_its_own_cotangent_in_narrow_dtypes() -> None:
    head, hidden = nn.Linear(4, 9).bfloat16(), torch.randn(1, 4, dtype=torch.bfloat16)
    loss = lambda: F.cross_entropy(head(hidden), torch.tensor([3]), reduction="none").sum() * 4
    [expected] = torch.autograd.grad(loss(), [head.bias])
    with deferred_head(head, rows=2, uses=Uses("head")):
        [found] = torch.autograd.grad(loss(), [head.bias])
    assert torch.equal(found, expected)


# What is refused


def test_derivatives_of_gradients_are_refused() -> None:
    model, batch = Words().to(D), words()
    for name in ("flat", "none, masked mean"):
        with deferred_head(model.head, rows=7, uses=Uses("head")):
            loss = LOSSES[name](model(batch[0]), batch[1])
        with pytest.raises(UsageError, match="create_graph"):
            torch.autograd.grad(loss, trained(model), create_graph=True)


def test_a_second_backward_is_refused_and_not_multiplied_twice() -> None:
    model, batch = Words().to(D), words()
    with deferred_head(model.head, rows=7, uses=Uses("head")):
        loss = zoo.flat(model(batch[0]), batch[1])
    torch.autograd.grad(loss, trained(model), retain_graph=True)
    with pytest.raises(UsageError, match="a second backward"):
        torch.autograd.grad(loss, trained(model))


def test_hidden_rows_changed_before_backward_are_an_error() -> None:
    head = nn.Linear(4, 9).to(D)
    hidden = torch.randn(5, 4, dtype=D, requires_grad=True) * 2
    with deferred_head(head, rows=2, uses=Uses("head")):
        loss = F.cross_entropy(head(hidden), torch.arange(5), reduction="none").sum()
    with torch.no_grad():
        hidden.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# Memory


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """The most rows that any tensor in memory with all classes had."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dim() and result.shape[-1] == CLASSES and not result.is_meta:
            self.rows = max(self.rows, result.numel() // CLASSES)
        return result


@pytest.mark.parametrize("name", [n for n in LOSSES if n != "two losses"])
def test_no_more_logits_exist_than_those_of_a_chunk(name: str) -> None:
    model, batch = Words(tied=False).to(D), words()
    with Largest() as seen:
        chunked(model, LOSSES[name], batch, 4)
    # The weight and its gradient are (classes, width).
    assert seen.rows <= max(4, zoo.WIDTH)
    with Largest() as seen:
        plain(model, LOSSES[name], batch)
    assert seen.rows >= 1


def test_hidden_rows_are_not_held_when_their_gradient_is() -> None:
    head = nn.Linear(4, 9)
    with deferred_head(head, rows=2, uses=Uses("head")):
        hidden = torch.randn(5, 4).requires_grad_().mul(2)
        loss = F.cross_entropy(head(hidden), torch.arange(5))
    gone = weakref.ref(hidden)
    del hidden
    assert gone() is None
    loss.backward()


# Planted faults: what tools have shipped, caught by the comparison above


@contextlib.contextmanager
def mean_of_chunk_means() -> Any:
    def of_chunk(loss: HeadLoss, logits: Any, hidden: Tensor, targets: Tensor) -> Tensor:
        losses = loss.likelihood(logits.of(hidden), targets)
        counted = (targets != loss.ignore_index).sum().clamp(min=1)
        return losses / counted * (targets != -1000).sum()

    made = HeadLoss.__init__
    with pytest.MonkeyPatch.context() as patch:
        wrong = {"of_chunk": of_chunk, "smoothing": None}
        patch.setattr(HeadLoss, "__init__", lambda self, **fields: made(self, **fields | wrong))
        yield


@contextlib.contextmanager
def forgotten_scale() -> Any:
    backward = ChunkedLikelihood.backward

    with pytest.MonkeyPatch.context() as patch:
        forgetful = staticmethod(lambda ctx, cotangent: backward(ctx, torch.ones_like(cotangent)))
        patch.setattr(ChunkedLikelihood, "backward", forgetful)
        yield


@contextlib.contextmanager
def ignored_targets_counted() -> Any:
    def divisor(self: HeadLoss, targets: Tensor) -> tuple[Tensor, Tensor]:
        count = torch.tensor(targets.numel())
        return count.double(), count

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeadLoss, "divisor", divisor)
        yield


@contextlib.contextmanager
def last_chunk_only() -> Any:
    def add(self: Any, part: slice, gradients: Sequence[Tensor | None]) -> None:
        if self._hidden is not None:
            self._hidden[part] = gradients[0]
        self._parameters = [g if g is None else g[:CLASSES] for g in gradients[1:]]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunked_head._Sums, "add", add)
        yield


@pytest.mark.parametrize(
    "fault", [mean_of_chunk_means, forgotten_scale, ignored_targets_counted, last_chunk_only], ids=lambda f: f.__name__
)
def test_a_planted_fault_is_caught(fault: Any) -> None:
    batch = words()
    loss = lambda z, y: 3 * zoo.flat(z, y)
    expected = plain(Words().to(D), loss, batch)[1]
    assert_same(chunked(Words().to(D), loss, batch, 7)[1], expected)
    with fault(), pytest.raises(AssertionError):
        assert_same(chunked(Words().to(D), loss, batch, 7)[1], expected)
