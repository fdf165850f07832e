"""What is taken over rows without a gradient is seen in the code, also where every row that is tried is like the next.

The batches are made so that a comparison of values cannot see it: masks that are all true, weights and lengths that are
one number, but for rows of a later batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.exact import declared_loss, examine_loss
from samegrad.exact.backward_probe import BackwardProbe
from samegrad.exact.losses import Form
from samegrad.exact.state_probe import StateProbe

D = torch.float64
ROWS = 29
Loss = Callable[[Tensor, Any], Tensor]


def batch(seed: int = 0, *, alike: bool = True) -> dict[str, Tensor]:
    """alike: as a first batch may be; else a third of the mask is off, and weights and lengths differ."""
    generator = torch.Generator().manual_seed(seed)
    on = torch.ones(ROWS, dtype=torch.bool) if alike else torch.rand(ROWS, generator=generator) > 0.3
    y = torch.randint(0, 5, (ROWS,), generator=generator)
    return {
        "x": torch.randn(ROWS, 6, dtype=D, generator=generator),
        "t": torch.randn(ROWS, 5, dtype=D, generator=generator),
        "y": torch.where(on, y, -100),
        "on": on,
        "mask": on.to(D),
        "weight": torch.ones(ROWS, dtype=D) if alike else torch.rand(ROWS, dtype=D, generator=generator) + 0.5,
        "length": torch.full((ROWS,), 7) if alike else torch.randint(3, 9, (ROWS,), generator=generator),
    }


def squares(z: Tensor, b: Any) -> Tensor:
    return (z - b["t"]).square().mean(1)


def positive(b: Any) -> Tensor:
    return (b["t"] > 0).to(D)


def centred(z: Tensor, b: Any) -> Tensor:
    kept = b["on"]
    return F.binary_cross_entropy_with_logits(z, positive(b), weight=(kept / kept.to(D).mean())[:, None])


def through_a_view(z: Tensor, b: Any) -> Tensor:
    twice = torch.ones(2, dtype=D)
    twice[:1].copy_(b["weight"].max())
    return (squares(z, b) / twice[0]).mean()


def hooked(z: Tensor, b: Any) -> Tensor:
    z.register_hook(lambda g: g * (b["weight"] / b["weight"].max())[:, None])
    return squares(z, b).mean()


@torch.jit.script
def scripted(weight: Tensor) -> Tensor:
    return weight / weight.max()


# Losses whose graph is a mean over rows, and that are none.
HIDDEN: dict[str, Loss] = {
    "the largest weight": lambda z, b: (squares(z, b) * (b["weight"] / b["weight"].max())).mean(),
    "its reciprocal": lambda z, b: (squares(z, b) * (1 / b["weight"].max())).mean(),
    "read by Python": lambda z, b: squares(z, b).clamp(max=float(b["weight"].max()) * 9).mean(),
    "decided by Python": lambda z, b: squares(z, b).mean() if b["on"].all() else squares(z, b).sqrt().mean(),
    "the mean of a mask": lambda z, b: (squares(z, b) * b["mask"] / b["mask"].mean()).mean(),
    "of one kept in a name": lambda z, b: (squares(z, b) * b["on"] / b["on"].double().mean()).mean(),
    "inside weight=": centred,
    "the longest": lambda z, b: F.mse_loss(z / b["length"].max(), b["t"]),
    "written into a tensor": lambda z, b: (squares(z, b) * torch.zeros(1, dtype=D).add_(b["weight"].mean())).mean(),
    "rows counted by a tensor": lambda z, b: (
        squares(z, b) / torch.ones_like(b["mask"]).sum().clamp(max=29).sub(21).clamp(min=1)
    ).mean(),
    "shifted rows": lambda z, b: (squares(z, b) * b["weight"].roll(1)).mean(),
    "sorted rows": lambda z, b: (squares(z, b) * b["weight"].sort().values).mean(),
    "the largest so far": lambda z, b: (squares(z, b) * b["weight"].cummax(0).values).mean(),
    "sums that run": lambda z, b: (squares(z, b) * (1 + (b["weight"] - 1).cumsum(0))).mean(),
    "rows scaled together": lambda z, b: (squares(z, b) * F.normalize(b["weight"], p=float("inf"), dim=0)).mean(),
    "how often a length is there": lambda z, b: (
        squares(z, b) / (b["length"][:, None] == b["length"]).sum(1)
    ).mean(),
    "unique ones": lambda z, b: (squares(z, b) * b["length"].unique().numel()).mean(),
    "how many are on": lambda z, b: squares(z, b).mean() / b["on"].nonzero().shape[0],
    "filled with the largest": lambda z, b: (squares(z, b) / b["weight"].new_full((1,), b["weight"].max())).mean(),
    "written through a view": through_a_view,
    "in a hook": hooked,
    "in a script": lambda z, b: (squares(z, b) * scripted(b["weight"])).mean(),
    "mapped by torch": lambda z, b: (squares(z, b) * torch.vmap(lambda c: c / c.max())(b["weight"][None])[0]).mean(),
    "of outputs, detached": lambda z, b: (squares(z, b) / (1 + z.detach().argmax(1).max())).mean(),
}
# Such as look like it and are a mean over rows for every batch.
ALONE: dict[str, Loss] = {
    "a mask for each row": lambda z, b: (squares(z, b) * b["mask"]).mean(),
    "ones like it": lambda z, b: (squares(z, b) * torch.ones_like(b["mask"]) * b["mask"].new_ones(())).mean(),
    "its own length": lambda z, b: (squares(z, b) / b["length"]).mean(),
    "looked at and not used": lambda z, b: (b["mask"].mean(), squares(z, b).mean())[1],
    "positions of a row": lambda z, b: (squares(z, b) * torch.arange(1, 6, dtype=D)[b["y"].clamp(min=0)]).mean(),
    "read when all is done": lambda z, b: (squares(z, b).mean(), b["weight"].max().item())[0],
    "sorted in a row": lambda z, b: (squares(z, b) * b["t"].sort(1).values.cumsum(1)[:, 2].square()).mean(),
    "the largest of a row": lambda z, b: (squares(z, b) * b["t"].max(1).values).mean(),
}


class Net(nn.Module):
    """A network whose ``use(hidden, batch)`` is its own code between two layers."""

    def __init__(self, use: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.last, self.use = nn.Linear(6, 16, dtype=D), nn.Linear(16, 5, dtype=D), use

    def forward(self, b: Any) -> Tensor:
        return self.last(self.use(self.first(b["x"]).tanh(), b))


class ByLongest(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, length: Tensor) -> Tensor:
        ctx.save_for_backward(length)
        return h.clone()

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        (length,) = ctx.saved_tensors
        return cotangent / length.max(), None


USES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "the mean of a mask": lambda h, b: h * (b["on"].to(D) / b["on"].to(D).mean())[:, None],
    "the longest": lambda h, b: h / b["length"].max(),
    "in place": lambda h, b: h * b["on"].to(D).div_(b["on"].to(D).mean())[:, None],
    "rows counted by a tensor": lambda h, b: h * torch.ones_like(b["on"]).sum().clamp(min=16),
    "read by Python": lambda h, b: h / float(b["length"].max()),
    "decided by Python": lambda h, b: h if b["on"].all() else 2 * h,
    "a column for all": lambda h, b: h[:, : b["length"].max()].mean(1, keepdim=True).expand(-1, 16),
    "a backward of its own": lambda h, b: ByLongest.apply(h, b["length"]),
    "through where": lambda h, b: torch.where(b["on"].all(), h, 2 * h),
}
def by_class(h: Tensor, b: Any) -> Tensor:
    """Rows are sent to what their length says, as to experts, and come back to their places."""
    out = torch.zeros_like(h)
    for number in range(9):
        (at,) = torch.where(b["length"] == number)
        out = out.index_add(0, at, h[at] * (1 + number))
    return out


ROW_BY_ROW: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "a mask": lambda h, b: h * b["on"][:, None],
    "a table": lambda h, b: h + torch.linspace(0, 1, 9, dtype=D)[b["length"]][:, None],
    "as many as the longest": lambda h, b: h * (torch.arange(16) < b["length"][:, None]),
    "up to the longest": lambda h, b: h * (torch.arange(b["length"].max().clamp(min=16)) < b["length"][:, None]),
    "a mask where it is needed": lambda h, b: h if b["on"].all() else h * torch.ones_like(b["on"])[:, None],
    "as a class has rows": by_class,
    "rows that are taken": lambda h, b: h[b["length"].argsort()][b["length"].argsort().argsort()],
}



def forward(model: nn.Module, b: Any) -> Tensor:
    return model(b)


def stepped(step: sg.Step, b: Any) -> list[Tensor]:
    step.backward(b)
    return [p.grad.clone() for p in step.declared.network.parameters() if p.grad is not None]


def gradients(model: nn.Module, loss: Loss, b: Any) -> list[Tensor]:
    loss(model(b), b).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def assert_right_on_both(make: Callable[[], nn.Module], loss: Loss, **how: Any) -> sg.Step:
    """One step object on a batch of rows that are alike and on one of rows that are not; returns it."""
    model = make()
    step = sg.Step(model, loss, forward=forward, rows=8, **how)
    for alike in (True, False):
        rows = batch(int(alike), alike=alike)
        model.zero_grad()
        ours, theirs = stepped(step, rows), gradients(make(), loss, rows)
        for mine, plainly in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, plainly, rtol=1e-12, atol=1e-14)
    return step


def examination(step: sg.Step) -> Any:
    rows = batch()
    return step.split_for(rows, step.declared.layout(rows)).examination


@pytest.mark.parametrize("name", HIDDEN)
def test_a_loss_that_takes_something_over_rows_takes_two_passes(name: str) -> None:
    step = assert_right_on_both(lambda: Net(lambda h, b: h), HIDDEN[name])
    assert examination(step).form is Form.COUPLED
    if name in ("in a script", "mapped by torch"):
        assert "cannot be followed" in examination(step).reason
    elif "parts differ" not in examination(step).reason:
        # Of some values tell as well.
        assert "test_across_rows.py" in examination(step).reason


@pytest.mark.parametrize("name", ALONE)
def test_a_loss_that_looks_like_it_keeps_its_one_pass(name: str) -> None:
    step = assert_right_on_both(lambda: Net(lambda h, b: h), ALONE[name])
    assert examination(step).form is Form.ROW_MEAN


@pytest.mark.parametrize("name", ["the largest weight", "inside weight=", "the longest"])
def test_without_following_its_code_the_step_would_be_wrong(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine_loss, "taken_over_rows", lambda *_: None)
    with pytest.raises(AssertionError, match="not close"):
        assert_right_on_both(lambda: Net(lambda h, b: h), HIDDEN[name])


@pytest.mark.parametrize("name", USES)
def test_a_model_that_takes_something_over_rows_is_named_with_its_line(name: str) -> None:
    def loss(z: Tensor, b: Any) -> Tensor:
        return squares(z, b).mean()

    step = assert_right_on_both(lambda: Net(USES[name]), loss)
    told = step.explain()
    assert "takes over rows" in told
    if name != "a backward of its own":
        assert "the model (Net) uses in" in told and "test_across_rows.py" in told


@pytest.mark.parametrize("name", ROW_BY_ROW)
def test_a_model_that_only_looks_like_it_is_split(name: str) -> None:
    def loss(z: Tensor, b: Any) -> Tensor:
        return squares(z, b).mean()

    step = assert_right_on_both(lambda: Net(ROW_BY_ROW[name]), loss)
    assert examination(step).passes == 1


def test_without_following_the_model_the_step_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BackwardProbe, "_check_across", lambda self: None)
    with pytest.raises(AssertionError, match="not close"):
        assert_right_on_both(lambda: Net(USES["the longest"]), lambda z, b: squares(z, b).mean())


def masked(z: Tensor, b: Any) -> Tensor:
    return (squares(z, b) * b["mask"]).sum() / b["mask"].sum()


FALSE: dict[str, tuple[Loss, Any]] = {
    "a masked mean, mean": (masked, "mean"),
    "a masked mean, rows": (masked, lambda b: len(b["x"])),
    "the largest weight, mean": (HIDDEN["the largest weight"], "mean"),
    "the largest of some": (
        lambda z, b: F.mse_loss(z, b["t"]) + (z.square().sum(1) * (b["weight"] > 1)).max(), "mean"
    ),
}  # fmt: skip
TRUE: dict[str, tuple[Loss, Any]] = {
    "a masked mean": (masked, lambda b: b["mask"].sum()),
    "what is not zero in a mask": (masked, lambda b: (b["mask"] > 0).sum()),
    "targets that count": (lambda z, b: F.cross_entropy(z, b["y"]), lambda b: (b["y"] != -100).sum()),
    "a mean of targets": (lambda z, b: F.cross_entropy(z, b["y"]), "mean"),
}


@pytest.mark.parametrize("name", FALSE)
def test_a_declaration_that_only_these_rows_bear_out_is_refused(name: str) -> None:
    loss, normalise = FALSE[name]
    step = sg.Step(Net(lambda h, b: h), loss, forward=forward, rows=8, normalise=normalise)
    with pytest.raises(sg.FalseNormalise, match="remove normalise="):
        step.backward(batch())
    assert all(p.grad is None for p in step.declared.network.parameters())


@pytest.mark.parametrize("name", TRUE)
def test_a_declaration_that_every_batch_bears_out_is_kept(name: str) -> None:
    loss, normalise = TRUE[name]
    step = assert_right_on_both(lambda: Net(lambda h, b: h), loss, normalise=normalise)
    assert examination(step).passes == 1


def test_without_other_rows_a_false_declaration_would_be_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(declared_loss, "taken_over_rows", lambda *_, **__: None)
    with pytest.raises(AssertionError, match="not close"):
        assert_right_on_both(lambda: Net(lambda h, b: h), masked, normalise="mean")


def smoothed(z: Tensor, b: Any) -> Tensor:
    return F.cross_entropy(z, b["y"], label_smoothing=0.1)


def test_targets_that_are_left_out_later_are_looked_at_when_they_come() -> None:
    model = Net(lambda h, b: h)
    step = sg.Step(model, smoothed, forward=forward, rows=8, normalise="mean")
    step.backward(batch())
    model.zero_grad()
    with pytest.raises(sg.FalseNormalise, match="8 rows"):
        step.backward(batch(1, alike=False))
    assert all(p.grad is None for p in model.parameters())
    # And the count that is right is right for both.
    assert_right_on_both(lambda: Net(lambda h, b: h), smoothed, normalise=lambda b: (b["y"] != -100).sum())


def test_targets_that_no_chosen_row_has_are_looked_at_all_the_same() -> None:
    rows = batch()
    # Rows between those that are tried.
    rows["y"][[4, 5, 28]] = -100
    with pytest.raises(sg.FalseNormalise):
        sg.Step(Net(lambda h, b: h), smoothed, forward=forward, rows=8, normalise="mean").backward(rows)


class Centre(nn.Module):
    """Keeps a moving average over the rows that count."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(6, 5, dtype=D)
        self.register_buffer("centre", torch.ones(5, dtype=D))

    def forward(self, b: Any) -> Tensor:
        z = self.layer(b["x"])
        out = z * (1 + self.centre / 10)
        with torch.no_grad():
            on = b["on"].to(D)
            self.centre.mul_(0.9).add_((z * on[:, None]).sum(0) / on.sum(), alpha=0.1)
        return out


def centres(model: nn.Module) -> Tensor:
    return model.get_buffer("centre").clone()


def state_after(make: Callable[[], nn.Module], loss: Loss) -> tuple[list[Tensor], list[Tensor]]:
    ours, theirs, model, twin = [], [], make(), make()
    step = sg.Step(model, loss, forward=forward, rows=8)
    for alike in (True, False):
        rows = batch(int(alike), alike=alike)
        step.backward(rows)
        loss(twin(rows), rows).backward()
        ours.append(centres(model))
        theirs.append(centres(twin))
    return ours, theirs


def test_state_of_rows_that_count_is_no_mean_over_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(z: Tensor, b: Any) -> Tensor:
        return squares(z, b).mean()

    for mine, plainly in zip(*state_after(Centre, loss)):
        torch.testing.assert_close(mine, plainly, rtol=1e-12, atol=1e-14)
    monkeypatch.setattr(StateProbe, "check", lambda *_: None)
    monkeypatch.setattr(BackwardProbe, "_check_across", lambda self: None)
    ours, theirs = state_after(Centre, loss)
    assert not torch.allclose(ours[1], theirs[1], rtol=1e-4)


def test_following_takes_no_forward_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for check in (BackwardProbe._check_across, lambda self: None):
        seen: list[int] = []
        monkeypatch.setattr(BackwardProbe, "_check_across", check)

        def counted(model: nn.Module, b: Any, seen: list[int] = seen) -> Tensor:
            seen.append(len(b["x"]))
            return model(b)

        sg.Step(Net(lambda h, b: h), lambda z, b: squares(z, b).mean(), forward=counted, rows=8).backward(batch())
        counts.append(seen)
    assert counts[0] == counts[1]


# Functions of items or rows, on which the first is larger than all others, or a mask is true everywhere.
MIXING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sums that run": lambda x, on: x.cumsum(0),
    "the first row": lambda x, on: x - x[:1],
    "the largest": lambda x, on: x / x.abs().max(),
    "the largest, detached": lambda x, on: x - x.detach().max(0).values,
    "places": lambda x, on: x * torch.arange(1, len(x) + 1, dtype=D)[:, None],
    "the row before": lambda x, on: torch.cat([x[:1], x[1:] - x[:-1]]),
    "a mask's mean": lambda x, on: x * (on / on.to(D).mean())[:, None],
    "backward only": lambda x, on: x.sin() + (x.mean(0) - x.mean(0).detach()),
    "how many there are": lambda x, on: x * (2.0 if len(x) > 9 else 1.0),
    "and what they are then": lambda x, on: x - (x.mean() if len(x) > 9 else 0.0),
}


def items() -> tuple[Tensor, Tensor]:
    x = torch.randn(21, 3, dtype=D, generator=torch.Generator().manual_seed(2))
    x[:3] = x[:3].abs() + 5
    return x.requires_grad_(), torch.ones(21, dtype=torch.bool)


@pytest.mark.parametrize("reduce", ["cat", "sum", "logsumexp"])
@pytest.mark.parametrize("name", MIXING)
def test_over_refuses_what_mixes_items(name: str, reduce: Any) -> None:
    mixing = MIXING[name]
    for _ in range(2):
        with pytest.raises(sg.CannotSplit):
            sg.over(lambda each, _: mixing(*each), items(), reduce=reduce, rows=4)


@torch.no_grad()
def test_over_is_looked_at_without_gradients_too() -> None:
    layer, x = nn.Linear(3, 2, dtype=D), items()[0]
    torch.testing.assert_close(sg.over(lambda each, net: net(each), x, shared=layer, rows=4), layer(x))
    with pytest.raises(sg.CannotSplit, match=r"in backward only|takes over items"):
        sg.over(lambda each, _: MIXING["backward only"](each, each), x, rows=4)


def test_over_looks_at_another_function_behind_the_same_code() -> None:
    def through(function: Callable[[Tensor], Tensor]) -> Tensor:
        return sg.over(lambda each, _: function(each), items()[0], rows=4)

    through(lambda x: x.sin())
    with pytest.raises(sg.CannotSplit):
        through(lambda x: x.sin() * (2.0 if len(x) > 9 else 1.0))


@pytest.mark.parametrize("name", MIXING)
def test_rowwise_refuses_what_mixes_rows(name: str) -> None:
    with pytest.raises(sg.CannotSplit):
        sg.rowwise(MIXING[name], rows=4)(*items())


@pytest.mark.parametrize("name", [name for name in MIXING if name not in ("places", "the row before", "backward only")])
def test_groups_that_see_others_are_refused(name: str) -> None:
    with pytest.raises(sg.CannotSplit):
        sg.rowwise(MIXING[name], rows=6, groups=[3] * 7)(*items())


def test_what_a_group_sees_of_itself_is_its_own() -> None:
    def centred(x: Tensor, on: Tensor) -> Tensor:
        each = x.view(-1, 3, 3) * on.view(-1, 3, 1)
        return (each - each.mean(1, keepdim=True)).cumsum(1).view(-1, 3)

    x, on = items()
    torch.testing.assert_close(sg.rowwise(centred, rows=6, groups=[3] * 7)(x, on), centred(x, on), rtol=0, atol=0)


def test_a_recurrent_layer_may_be_shared_with_all_items() -> None:
    torch.manual_seed(0)
    layer, x = nn.GRU(3, 2, batch_first=True).to(D), torch.randn(13, 4, 3, dtype=D, requires_grad=True)

    def run(each: Tensor, shared: nn.Module) -> Tensor:
        return shared(each)[0]

    layer.zero_grad()
    run(x, layer).square().sum().backward()
    plainly = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    layer.zero_grad()
    sg.over(run, x, shared=layer, rows=4).square().sum().backward()
    ours = [p.grad for p in layer.parameters()]
    torch.testing.assert_close(ours, plainly, rtol=1e-12, atol=1e-14)


def test_scattered_modules_are_refused_inside_a_function_of_rows_too() -> None:
    inside = nn.Sequential(nn.DataParallel(nn.Linear(3, 2, dtype=D)))
    x = items()[0]
    with pytest.raises(sg.CannotSplit, match=r"0\.0 is an nn\.DataParallel|0 is an nn\.DataParallel"):
        sg.rowwise(inside, rows=4)(x)
    with pytest.raises(sg.CannotSplit, match=r"0 is an nn\.DataParallel"):
        sg.over(lambda each, shared: shared(each), x, shared=inside, rows=4)


def test_a_list_with_an_entry_for_each_row_is_refused_by_its_name() -> None:
    def chosen(model: nn.Module, b: Any) -> Tensor:
        return torch.stack([row * (1 + number) for row, number in zip(model(b[0]), b[1])])

    def loss(outputs: Tensor, b: Any) -> Tensor:
        return outputs.square().mean()

    x = torch.randn(ROWS, 6, dtype=D)
    for task in ([0] * ROWS, list(range(ROWS))):
        with pytest.raises(sg.CannotSplit, match=rf"batch\[1\] has {ROWS} entries that are no tensors"):
            sg.Step(nn.Linear(6, 5, dtype=D), loss, forward=chosen, rows=8).backward((x, task))
    # Names that all rows share are another number of them, or are said to be shared.
    model = nn.Linear(6, 5, dtype=D)
    sg.Step(model, loss, forward=lambda m, b: m(b[0]), rows=8).backward((x, ["a", "b"]))
    sg.Step(model, loss, forward=lambda m, b: m(b[0]), rows=8, batch_axes=(0, None)).backward((x, ["a"] * ROWS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_weights_are_looked_at_in_full(dtype: torch.dtype) -> None:
    def loss(z: Tensor, b: Any) -> Tensor:
        weight = b["weight"].to(dtype)
        return (squares(z, b) * (weight.softmax(0) * ROWS)).mean()

    assert examination(assert_right_on_both(lambda: Net(lambda h, b: h), loss)).form is Form.COUPLED


@pytest.mark.parametrize("name", ["the largest", "a mask's mean", "the largest, detached", "and what they are then"])
def test_groups_of_several_lengths_that_see_others_are_refused(name: str) -> None:
    with pytest.raises(sg.CannotSplit):
        sg.rowwise(MIXING[name], rows=6, groups=[2, 3, 1, 6, 4, 5])(*items())


def test_groups_of_several_lengths_are_not_told_apart_by_their_longest() -> None:
    def by_longest(x: Tensor, length: Tensor) -> Tensor:
        return x / length.max()

    x, lengths = items()[0], torch.full((21,), 7)
    with pytest.raises(sg.CannotSplit, match="depends on the groups that run with it"):
        sg.rowwise(by_longest, rows=6, groups=[2, 3, 1, 6, 4, 5])(x, lengths)


def test_a_rule_of_state_that_other_masks_break_is_refused_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BackwardProbe, "_check_across", lambda self: None)
    step = sg.Step(Centre(), lambda z, b: squares(z, b).mean(), forward=forward, rows=8)
    step.backward(batch())
    assert "centre" in step.explain() and "not split through the whole model" in step.explain()
