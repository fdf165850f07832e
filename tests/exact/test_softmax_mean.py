"""``over(..., reduce="softmax_mean")``: log-sum-exp and softmax-weighted means against plain PyTorch, in float64."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.exact.softmax_mean import Streamed
from samegrad.verify import tolerance

from .test_over import net, points
from .test_rowwise import assert_same

D = torch.float64
ITEMS, SAMPLES, WIDTH = 50, 11, 6


def kernels(centers: Tensor, shared: Any) -> tuple[Tensor, dict[str, Any]]:
    """A Gaussian at each center with a diagonal precision: log-density (centers, 11), its gradient and Laplacian."""
    x, network = shared
    width = F.softplus(network(centers)) + 0.1
    away = (x[None] - centers[:, None]) * width[:, None] ** 2
    scores = width.log().sum(1)[:, None] - 0.5 * ((x[None] - centers[:, None]) * width[:, None]).pow(2).sum(-1)
    return scores, {"gradient": -away, "rest": [away.pow(2).sum(-1) - width.pow(2).sum(1)[:, None]]}


def plain(fn: Callable[[Any, Any], Any], items: Any, shared: Any) -> tuple[Tensor, Any]:
    scores, values = fn(items, shared)
    shares = scores.softmax(0)
    mean = lambda v: (shares.reshape(*shares.shape, *(1 for _ in range(v.dim() - shares.dim()))) * v).sum(0)
    return scores.logsumexp(0), torch.utils._pytree.tree_map(mean, values)


def streamed(rows: int) -> Callable[..., tuple[Tensor, Any]]:
    return lambda fn, items, shared: sg.over(fn, items, shared=shared, reduce="softmax_mean", rows=rows)


USES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "all": lambda lse, m: lse.pow(2).mean() + (m["gradient"].pow(2).sum(1) * m["rest"][0]).mean(),
    "log-sum-exp alone": lambda lse, m: lse.pow(2).mean(),
    "one mean": lambda lse, m: m["gradient"].pow(3).mean(),
    "a constant cotangent": lambda lse, m: m["rest"][0].sum(),
}


def gradients(reduced: Callable[..., tuple[Tensor, Any]], use: Callable[[Tensor, Any], Tensor]) -> list[Tensor]:
    network, centers, x = net(), points(ITEMS, 1), points(SAMPLES, 2)
    loss = use(*reduced(kernels, centers, (x, network)))
    loss.backward()
    return [loss.detach(), *(p.grad for p in (*network.parameters(), centers, x) if p.grad is not None)]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("rows", [1, 7, 16, ITEMS])
def test_values_and_gradients_are_the_plain_ones(use: str, rows: int) -> None:
    assert_same(gradients(streamed(rows), USES[use]), gradients(plain, USES[use]))


def test_softmax_restricted_to_a_chunk_would_be_seen() -> None:
    def restricted(fn: Any, centers: Tensor, shared: Any) -> tuple[Tensor, Any]:
        parts = [plain(fn, part, shared) for part in centers.split(10)]
        means = {"gradient": torch.stack([m["gradient"] for _, m in parts]).mean(0)}
        means["rest"] = [torch.stack([m["rest"][0] for _, m in parts]).mean(0)]
        return torch.stack([lse for lse, _ in parts]).logsumexp(0), means

    with pytest.raises(AssertionError):
        assert_same(gradients(restricted, USES["all"]), gradients(plain, USES["all"]))


def test_sums_that_are_not_rescaled_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Streamed, "raised", lambda self, maximum: Streamed(maximum, self.total, self.weighted))
    with pytest.raises(AssertionError):
        assert_same(gradients(streamed(7), USES["all"]), gradients(plain, USES["all"]))


def test_every_item_runs_once_forward_and_once_backward() -> None:
    seen: list[int] = []

    def counted(items: Tensor, shared: Any) -> Any:
        if type(items) is Tensor:
            # Followed without data, it is called for all of them.
            seen.append(len(items))
        return kernels(items, shared)

    lse, _ = streamed(7)(counted, points(ITEMS, 1), (points(SAMPLES, 2), net()))
    # Three items twice, and the first and the last of them alone, are looked at first.
    assert sum(seen) == ITEMS + 8
    lse.sum().backward()
    assert sum(seen) == 2 * ITEMS + 8
    assert max(seen) == 7


def test_minus_infinity_and_huge_scores_give_no_nan() -> None:
    inf = torch.inf
    columns = [[-inf, 3.0, -inf, 1.0], [-inf] * 4, [1e300, -1e300, 1e300, 0.0], [-1e4, -2e4, -inf, -1e4], [0.0] * 4]
    scores = torch.tensor(columns, dtype=D).T.contiguous().requires_grad_()
    values = torch.randn(4, 5, 3, dtype=D, generator=torch.Generator().manual_seed(0)).requires_grad_()
    # The all -inf column is no number in plain PyTorch, and 1e300 + log 2 is 1e300, whose exponentials then sum to 2.
    kept, ordinary = torch.tensor([0, 2, 3, 4]), torch.tensor([0, 3, 4])

    def gradients(lse: Tensor, means: Tensor) -> list[Tensor]:
        loss = lse[ordinary].sum() + means[kept].pow(2).sum()
        return [g[:, kept] for g in torch.autograd.grad(loss, (scores, values), retain_graph=True)]

    reference = plain(lambda i, _: i, (scores, values), None)
    for rows in (1, 2, 3, 4):
        lse, means = sg.over(lambda i, _: i, (scores, values), reduce="softmax_mean", rows=rows)
        assert lse[1] == -inf and not means[1].any()
        torch.testing.assert_close(lse, reference[0], rtol=1e-15, atol=0)
        torch.testing.assert_close(means[kept], reference[1][kept], rtol=1e-14, atol=1e-15)
        for mine, theirs in zip(gradients(lse, means), gradients(*reference)):
            torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-14)
        (whole,) = torch.autograd.grad(lse.sum() + means.sum(), scores, retain_graph=True)
        assert not whole[:, 1].any()
        (shares,) = torch.autograd.grad(lse.sum(), scores)
        torch.testing.assert_close(shares.sum(0)[kept], torch.ones(4, dtype=D), rtol=1e-15, atol=0)


def test_states_merge_in_any_order() -> None:
    generator = torch.Generator().manual_seed(4)
    scores = 40 * torch.randn(24, 5, dtype=D, generator=generator)
    scores[torch.rand(24, 5, generator=generator) < 0.5] = -torch.inf
    scores[:, 0] = -torch.inf
    values = torch.randn(24, 5, 2, dtype=D, generator=generator)
    parts = [Streamed.of(s, [v]) for s, v in zip(scores.split(5), values.split(5))]
    whole = Streamed.of(scores, [values])
    for seed in range(4):
        random.Random(seed).shuffle(parts)
        state = parts[0]
        for part in parts[1:]:
            state = part.merged(state)
        torch.testing.assert_close(state.log_sum_exp(), whole.log_sum_exp(), rtol=1e-14, atol=0)
        torch.testing.assert_close(state.means()[0], whole.means()[0], rtol=1e-13, atol=1e-15)


def test_a_second_derivative_is_refused_and_a_first_one_is_not() -> None:
    network, centers, x = net(), points(ITEMS, 1), points(SAMPLES, 2)
    lse, _ = streamed(7)(kernels, centers, (x, network))
    (first,) = torch.autograd.grad(lse.sum(), x, create_graph=True)
    (reference,) = torch.autograd.grad(plain(kernels, centers, (x, network))[0].sum(), x)
    torch.testing.assert_close(first, reference, rtol=1e-12, atol=1e-14)
    with pytest.raises(sg.UsageError, match=r'reduce="logsumexp".*reduce="sum"'):
        first.pow(2).sum().backward()
    assert x.grad is None


def test_what_the_refusal_advises_has_the_second_derivative() -> None:
    def composed(centers: Tensor, x: Tensor, network: nn.Module) -> Tensor:
        lse = sg.over(lambda c, s: kernels(c, s)[0], centers, shared=(x, network), reduce="logsumexp", rows=7)

        def weighted(items: Tensor, shared: Any) -> Tensor:
            scores, values = kernels(items, shared[:2])
            return (scores - shared[2]).exp()[..., None] * values["gradient"]

        return sg.over(weighted, centers, shared=(x, network, lse), reduce="sum", rows=7)

    def second(mean: Callable[[Tensor, Tensor, nn.Module], Tensor]) -> list[Tensor]:
        network, centers, x = net(), points(ITEMS, 1), points(SAMPLES, 2)
        (first,) = torch.autograd.grad(mean(centers, x, network).pow(2).sum(), x, create_graph=True)
        first.pow(2).sum().backward()
        return [p.grad for p in (*network.parameters(), centers, x) if p.grad is not None]

    assert_same(second(composed), second(lambda c, x, n: plain(kernels, c, (x, n))[1]["gradient"]))


class Precisions(nn.Module):
    """A center (d,) to a lower triangular factor of its precision (d, d) with a positive diagonal, and a weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, 16), nn.SiLU(), nn.Linear(16, width * width + 1))
        self.width = width

    def forward(self, centers: Tensor) -> tuple[Tensor, Tensor]:
        out = self.inner(centers)
        square = out[:, :-1].reshape(-1, self.width, self.width)
        diagonal = F.softplus(square.diagonal(dim1=1, dim2=2)) + 0.3
        return 0.5 * square.tril(-1) + torch.diag_embed(diagonal), out[:, -1]


def quadratic(centers: Tensor, shared: Any) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Scores s_j = a_j + log det T_j - |T_j' (x - c_j)|^2 / 2, and (g_j, q_j) = (grad s_j, |g_j|^2 - |T_j|^2)."""
    x, precisions = shared
    factor, weight = precisions(centers)
    inner = torch.einsum("jki,jbk->jbi", factor, x[None] - centers[:, None])
    gradient = -torch.einsum("jki,jbi->jbk", factor, inner)
    scores = (weight + factor.diagonal(dim1=1, dim2=2).log().sum(1))[:, None] - 0.5 * inner.pow(2).sum(-1)
    return scores, (gradient, gradient.pow(2).sum(-1) - factor.pow(2).sum((1, 2))[:, None])


def by_double_backward(centers: Tensor, x: Tensor, precisions: nn.Module) -> Tensor:
    """E[tr Hessian log p + |grad log p|^2 / 2] by derivatives with respect to x."""
    density = quadratic(centers, (x, precisions))[0].logsumexp(0)
    (score,) = torch.autograd.grad(density.sum(), x, create_graph=True)
    trace = sum(torch.autograd.grad(score[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(x.shape[1]))
    return (trace + 0.5 * score.pow(2).sum(1)).mean()


@pytest.mark.parametrize("rows", [1, 16, 41])
def test_implicit_score_matching_in_closed_form_is_the_double_backward(rows: int) -> None:
    def run(loss_of: Callable[[Tensor, Tensor, nn.Module], Tensor]) -> list[Tensor]:
        torch.manual_seed(1)
        precisions = Precisions(4).to(D)
        centers, x = torch.randn(41, 4, dtype=D).requires_grad_(), torch.randn(9, 4, dtype=D).requires_grad_()
        loss = loss_of(centers, x, precisions)
        found = torch.autograd.grad(loss, [*precisions.parameters(), centers])
        return [loss.detach(), *found]

    def closed(centers: Tensor, x: Tensor, precisions: nn.Module) -> Tensor:
        _, (score, rest) = streamed(rows)(quadratic, centers, (x, precisions))
        return (rest - 0.5 * score.pow(2).sum(1)).mean()

    assert_same(run(closed), run(by_double_backward))
    with pytest.raises(AssertionError):
        assert_same(run(lambda *a: closed(*a) + 1e-9), run(by_double_backward))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_terms_are_summed_in_float32(dtype: torch.dtype) -> None:
    """In bfloat16 a sum of equal terms stops at 256; here 4096 are added one chunk at a time."""
    scores = torch.zeros(4096, 3, dtype=dtype).requires_grad_()
    values = torch.rand(4096, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    lse, mean = sg.over(lambda i, _: i, (scores, values), reduce="softmax_mean", rows=8)
    assert lse.dtype is mean.dtype is dtype
    unit = tolerance.unit_roundoff(dtype)
    reference = values.double().mean(0)
    assert (lse.double() - scores.double().logsumexp(0)).abs().max() <= 2 * unit * lse.double().abs().max()
    assert (mean.double() - reference).abs().max() <= 2 * unit
    (2.0**12 * mean.float()).sum().backward()
    assert scores.grad is not None and scores.grad.dtype is dtype
    assert (scores.grad.double() - (values.double() - reference)).abs().max() <= 4 * unit


def test_float32_over_many_chunks_is_as_good_as_one_sum() -> None:
    scores = 6 * torch.randn(20_000, 8, generator=torch.Generator().manual_seed(1))
    lse, mean = sg.over(lambda i, _: (i, i), scores, reduce="softmax_mean", rows=100)
    wide = scores.double()
    assert (lse - wide.logsumexp(0)).abs().max() <= 2 * tolerance.unit_roundoff(torch.float32) * lse.abs().max()
    assert (mean - (wide.softmax(0) * wide).sum(0)).abs().max() <= 64 * 2**-24 * mean.abs().max()


def test_autocast_at_the_call_is_entered_again_in_backward() -> None:
    network, centers, x = net().float(), points(ITEMS, 1).detach().float(), points(SAMPLES, 2).detach().float()
    seen: list[torch.dtype] = []
    in_backward: list[bool] = []

    def watched(items: Tensor, shared: Any) -> Any:
        seen.append(shared[1](items).dtype)
        scores, values = kernels(items, shared)
        if scores.requires_grad:
            scores.register_hook(lambda _: in_backward.append(torch.is_autocast_enabled("cpu")))
        return scores, values

    def run(reduced: Callable[..., tuple[Tensor, Any]]) -> list[Tensor]:
        network.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = USES["all"](*reduced(watched, centers, (x, network)))
        loss.backward()
        return [p.grad.clone() for p in network.parameters() if p.grad is not None]

    ours = run(streamed(7))
    assert set(seen) == {torch.bfloat16}
    # In the one that is looked at first, and in every chunk.
    assert in_backward == [False] * 9
    for mine, reference in zip(ours, run(plain)):
        assert mine.dtype is torch.float32
        assert (mine - reference).norm() <= 0.05 * reference.norm()


def test_what_changed_before_backward_is_an_error() -> None:
    network, centers, x = nn.Sequential(net(), nn.Dropout(0.5)).eval(), points(ITEMS, 1), points(SAMPLES, 2)
    lse, _ = streamed(7)(kernels, centers, (x, network))
    network.train()
    with pytest.raises(sg.GradientsDiffer, match="switched between training and eval"):
        lse.sum().backward()
    network.eval()
    with torch.no_grad():
        centers.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        lse.sum().backward()
    assert all(p.grad is None for p in (*network.parameters(), centers, x))


def test_items_of_whole_numbers_unused_inputs_and_no_values() -> None:
    table, unused = points(ITEMS, 1), points(3, 2)
    order = torch.randperm(ITEMS, generator=torch.Generator().manual_seed(0))

    def looked_up(items: Tensor, shared: Any) -> Any:
        return shared[0][items], ()

    lse, means = sg.over(looked_up, order, shared=(table, unused), reduce="softmax_mean", rows=7)
    assert means == ()
    lse.sum().backward()
    assert table.grad is not None and unused.grad is None
    torch.testing.assert_close(table.grad, table.detach().softmax(0), rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda i, _: i, "returned a Tensor"),
        (lambda i, _: (i, i, i), "returned a tuple"),
        (lambda i, _: (i, {"far": i[:, :2]}), "values\\['far'\\] is \\(7, 2\\), scores are \\(7, 6\\)"),
        (lambda i, _: (i, i > 0), "torch.bool, which has no mean"),
    ],
)
def test_other_results_are_refused(function: Any, named: str) -> None:
    with pytest.raises(sg.UsageError, match=named):
        sg.over(function, points(ITEMS, 1), reduce="softmax_mean", rows=7)


@pytest.mark.parametrize(
    ("function", "named"),
    [
        (lambda i, _: (i, i - i.mean(0)), "changes when another item"),
        (lambda i, _: (i, i + torch.randn_like(i)), "draws random numbers"),
    ],
)
def test_what_is_no_function_of_items_is_refused(function: Any, named: str) -> None:
    with pytest.raises(sg.CannotSplit, match=named):
        sg.over(function, points(ITEMS, 1), reduce="softmax_mean", rows=7)
