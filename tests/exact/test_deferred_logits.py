"""Deferred logits look like logits; what needs the numbers gets all of them, and what would go wrong is refused."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samegrad.errors import CannotSplit
from samegrad.exact.deferred_logits import DeferredLogits, deferred_head
from samegrad.exact.pending_logits import Uses

D = torch.float64
CLASSES = 7
HIDDEN = torch.linspace(-1, 1, 60, dtype=D).view(3, 5, 4)
TARGETS = torch.arange(15).view(3, 5) % CLASSES


def head(bias: bool = True) -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(4, CLASSES, bias=bias, dtype=D)


def deferred(layer: nn.Linear, uses: Uses | None = None) -> tuple[DeferredLogits, Tensor]:
    """The logits of ``layer`` as they are deferred, and as they are."""
    hidden = HIDDEN.clone().requires_grad_()
    with deferred_head(layer, rows=4, uses=uses or Uses("head")):
        logits = layer(hidden)
    assert isinstance(logits, DeferredLogits)
    return logits, F.linear(hidden, layer.weight, layer.bias)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="samegrad: ")
        yield


LOOKS: list[Callable[[Tensor], Any]] = [
    lambda z: z.shape, lambda z: z.size(-1), lambda z: z.dim(), lambda z: z.ndim, lambda z: len(z), lambda z: z.numel(),
    lambda z: z.dtype, lambda z: z.device, lambda z: z.requires_grad, lambda z: z.is_leaf, lambda z: z.layout,
    lambda z: z.is_floating_point(), lambda z: z.is_contiguous(), lambda z: z.detach().requires_grad,
    lambda z: z.float().dtype, lambda z: z.to(torch.bfloat16).dtype, lambda z: z.type_as(HIDDEN.float()).dtype,
]  # fmt: skip


@pytest.mark.parametrize("look", LOOKS)
def test_questions_have_the_answers_of_the_logits(look: Callable[[Tensor], Any]) -> None:
    uses = Uses("head")
    ours, plain = deferred(head(), uses)
    assert look(ours) == look(plain)
    assert uses.met == []


MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "view": lambda z: z.view(-1, CLASSES),
    "view, named": lambda z: z.view(size=(15, CLASSES)),
    "view of the same": lambda z: z.view(3, -1, CLASSES),
    "flatten": lambda z: torch.flatten(z, 0, 1),
    "flatten after": lambda z: z.permute(2, 0, 1).flatten(1),
    "unflatten": lambda z: z.flatten(0, 1).unflatten(0, (5, 3)),
    "unsqueeze": lambda z: z.unsqueeze(0).unsqueeze(-1),
    "squeeze": lambda z: z[:1].squeeze(0),
    "transpose": lambda z: torch.transpose(z, 1, 2),
    "swapaxes": lambda z: z.swapaxes(0, 2),
    "T": lambda z: z[0].T,
    "mT": lambda z: z.mT,
    "t": lambda z: z[1].t(),
    "slice": lambda z: z[..., :-1, :],
    "step": lambda z: z[::2, 1:],
    "one row": lambda z: z[-1],
    "one position": lambda z: z[1, 2],
    "new axis": lambda z: z[:, None, 2:],
    "all classes by number": lambda z: z[:, 1:, :CLASSES],
    "mask": lambda z: z[TARGETS > 2],
    "mask of rows": lambda z: z[torch.tensor([True, False, True])],
    "index": lambda z: z[torch.tensor([2, 0, 2])],
    "pairs": lambda z: z[torch.tensor([2, 0]), torch.tensor([1, 4])],
    "index of positions": lambda z: z[:, torch.tensor([4, 1])],
    "apart": lambda z: z[torch.tensor([2, 0]), :, :],
    "select": lambda z: z.select(1, 3),
    "narrow": lambda z: torch.narrow(z, 1, 1, 3),
    "slice after transpose": lambda z: z.transpose(0, 2)[:, 1:, 0],
    "casts": lambda z: z.float().double().half().to(D),
    "numbers": lambda z: ((2 * z) / 3).tanh() * 0.5,
    "log_softmax": lambda z: z.mT.log_softmax(1),
    "contiguous": lambda z: z.contiguous().clone(),
}  # fmt: skip


@pytest.mark.parametrize("name", MOVES)
def test_what_moves_positions_stays_deferred_and_is_the_same(name: str) -> None:
    layer, uses = head(), Uses("head")
    ours, plain = deferred(layer, uses)
    moved, expected = MOVES[name](ours), MOVES[name](plain)
    assert isinstance(moved, DeferredLogits) and uses.met == []
    assert moved.shape == expected.shape and moved.dtype is expected.dtype
    whole = moved + 0
    assert uses.met == ["add"]
    assert torch.allclose(whole, expected, rtol=1e-14, atol=1e-15)
    [mine], [plainly] = (torch.autograd.grad(z.sum().sin(), [layer.weight]) for z in (whole, expected))
    assert torch.allclose(mine, plainly, rtol=1e-12)


WHOLE: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda z: z.softmax(-1),
    "add": lambda z: z + 1,
    "mul": lambda z: z * torch.ones(CLASSES, dtype=D),
    "__getitem__": lambda z: z[..., :3],
    "view": lambda z: z.view(3, -1),
    "logsumexp": lambda z: torch.logsumexp(z, -1),
    "gather": lambda z: z.gather(-1, TARGETS[..., None]),
    "cat": lambda z: torch.cat([z, z]),
    "log_softmax": lambda z: z.log_softmax(1),
    "cross_entropy": lambda z: F.cross_entropy(z.mT, z.detach().mT.softmax(1)),
    "div": lambda z: torch.div(z, 2, rounding_mode="floor"),
    "einsum": lambda z: torch.einsum("abc->ab", z),
    "unbind": lambda z: torch.stack(z.unbind(0)),
}


@pytest.mark.parametrize("name", WHOLE)
def test_anything_else_gets_the_whole_logits_and_is_named(name: str) -> None:
    layer, uses = head(), Uses("head")
    ours, plain = deferred(layer, uses)
    found, expected = WHOLE[name](ours), WHOLE[name](plain)
    assert name in uses.met
    assert torch.allclose(found, expected, rtol=1e-14)
    if expected.grad_fn is not None and name != "div":
        [mine], [plainly] = (torch.autograd.grad(z.sum().sin(), [layer.weight]) for z in (found, expected))
        assert torch.allclose(mine, plainly, rtol=1e-10, atol=1e-14)


def test_whole_logits_are_announced_and_made_once() -> None:
    uses = Uses("decoder.head")
    ours, _ = deferred(head(), uses)
    with pytest.warns(UserWarning, match=r"exp needs the whole logits of decoder\.head"):
        ours.exp()
    assert ours.exp().grad_fn is not None and len(uses._whole) == 1


@pytest.mark.parametrize("keepdim", [False, True])
def test_an_argmax_beside_the_loss_needs_no_logits(keepdim: bool) -> None:
    uses = Uses("head")
    ours, plain = deferred(head(), uses)
    for z, expected in ((ours, plain), (ours.mT, plain.mT), (ours.detach()[:, 1], plain[:, 1])):
        axis = 1 if z is not ours and z.dim() == 3 else -1
        assert torch.equal(z.argmax(axis, keepdim=keepdim), expected.argmax(axis, keepdim=keepdim))
    assert uses.met == []


def test_without_a_graph_there_is_none() -> None:
    layer = head()
    ours, _ = deferred(layer)
    with torch.no_grad():
        assert not ours[:, 1:].requires_grad and not F.cross_entropy(ours.mT, TARGETS).requires_grad
        assert type(layer(HIDDEN)) is Tensor
    assert not F.cross_entropy(ours.detach().mT, TARGETS).requires_grad
    loss = F.cross_entropy(ours.mT, TARGETS)
    assert loss.requires_grad


def test_a_hook_on_the_head_sees_logits_and_may_replace_them() -> None:
    layer = head()
    handle = layer.register_forward_hook(lambda module, inputs, output: output[:, 1:])
    ours, plain = deferred(layer)
    handle.remove()
    assert ours.shape == plain[:, 1:].shape


# What would be wrong


def test_logits_changed_in_place_are_refused_and_not_forgotten() -> None:
    ours, _ = deferred(head())
    shifted = ours[:, 1:]
    ours[..., 0] = -1e9
    for later in (lambda: F.cross_entropy(ours.mT, TARGETS), lambda: shifted.exp(), lambda: shifted[0]):
        with pytest.raises(CannotSplit, match="changed in place"):
            later()


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits * 2

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent * 2


class Exponential(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        return logits.exp()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent


def test_a_gradient_that_would_get_lost_is_refused() -> None:
    ours, _ = deferred(head())
    with pytest.raises(CannotSplit, match="an autograd function"):
        Exponential.apply(ours).sum().backward()
    doubled = Doubled.apply(ours)
    for later in (lambda: F.cross_entropy(doubled.mT, TARGETS), lambda: doubled.exp()):
        with pytest.raises(CannotSplit, match="DoubledBackward"):
            later()


def test_a_backward_hook_on_the_head_is_refused() -> None:
    layer = head()
    layer.register_full_backward_hook(lambda module, inputs, outputs: None)
    uses = Uses("head")
    with deferred_head(layer, rows=4, uses=uses):
        logits = layer(HIDDEN.clone().requires_grad_())
    # torch's own function stands between: seen in a trial, and refused in backward.
    assert uses.met
    with pytest.raises(CannotSplit, match="an autograd function"):
        F.cross_entropy(logits.mT, TARGETS).backward()


def test_what_does_not_ask_is_refused() -> None:
    ours, _ = deferred(head())
    with torch._C.DisableTorchFunctionSubclass(), pytest.raises(CannotSplit, match="aten"):
        ours + 1
