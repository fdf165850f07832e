"""The loop: one optimizer step a batch, stopped before a bad one, and the best weights kept."""

from __future__ import annotations

import gc
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.exact.out_of_memory import OutOfMemory
from samegrad.execute.one_step import gradient_norm
from samegrad.measure.counting import sample_bytes
from samegrad.records import timed

from ..contract.plain import assert_close, cross_entropy, labelled, mlp, same

BATCHES = [labelled(n) for n in (29, 20, 11)]


def stepped(rows: int | None = 4, optimizer: Any = torch.optim.Adam, **given: Any) -> sg.Step:
    model = mlp()
    return sg.Step(model, cross_entropy, rows=rows, optimizer=optimizer(model.parameters(), lr=0.05), **given)


def test_training_ends_with_the_weights_of_the_plain_loop() -> None:
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    losses, norms = [], []
    for batch in BATCHES:
        loss = cross_entropy(model(batch[0]), batch)
        loss.backward()
        losses.append(loss.item())
        norms.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters()])))
        optimizer.step()
        optimizer.zero_grad()
    step = stepped()
    results = list(sg.train(step, BATCHES))
    assert [r.loss for r in results] == pytest.approx(losses, rel=1e-12)
    assert [r.grad_norm for r in results] == pytest.approx(norms, rel=1e-12)
    assert_close(dict(step.declared.model.named_parameters()), dict(model.named_parameters()))


def test_a_step_is_yielded_after_it_with_gradients_cleared_and_its_index() -> None:
    step = stepped()
    parameters = list(step.declared.model.parameters())
    before = [p.detach().clone() for p in parameters]
    for count, result in enumerate(sg.train(step, BATCHES, first_index=5)):
        assert result.index == 5 + count and result.batch_rows == len(BATCHES[count][0])
        assert all(p.grad is None for p in parameters)
        assert not any(torch.equal(a, b) for a, b in zip(before, parameters))
        before = [p.detach().clone() for p in parameters]
        assert result.seconds > 0 and result.peak_allocated_bytes is None


def test_a_run_counts_some_steps_and_says_which() -> None:
    """Counting takes the host's time; what counts every step leaves none to be timed."""
    sampled, whole = (list(sg.train(step, BATCHES * 20, counter=counter_of(step)))
                      for counter_of in (sample_bytes, sg.count_bytes) for step in [stepped()])  # fmt: skip
    assert timed(whole) == [] and all(result.counted for result in whole)
    counted = [result.index for result in sampled if result.counted]
    assert counted[:3] == [0, 2, 4] and len(counted) < len(sampled) / 2 and max(counted) > len(sampled) - 17
    for one, other in zip(sampled, whole):
        assert one.peak_allocated_bytes == (other.peak_allocated_bytes if one.counted else None)
    assert timed(sampled) == [result.seconds for result in sampled if result.index not in counted]


def plain_weights_of(groups: Any, loss: Any = cross_entropy) -> dict[str, Tensor]:
    """After one step on each of ``groups``, batches laid together."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for group in groups:
        whole = tuple(torch.cat(leaves) for leaves in zip(*group))
        loss(model(whole[0]), whole).backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


@pytest.mark.parametrize("per_step", [2, 3])
def test_several_batches_a_step_are_one_large_batch_whatever_their_sizes(per_step: int) -> None:
    step = stepped(optimizer=torch.optim.SGD)
    results = list(sg.train(step, BATCHES, batches_per_step=per_step))
    groups = [BATCHES[:per_step], BATCHES[per_step:]] if per_step < 3 else [BATCHES]
    assert [r.batch_rows for r in results] == [sum(len(batch[0]) for batch in group) for group in groups]
    first = tuple(torch.cat(leaves) for leaves in zip(*groups[0]))
    with torch.no_grad():
        assert results[0].loss == pytest.approx(float(cross_entropy(mlp()(first[0]), first)), rel=1e-12)
    trained = dict(step.declared.model.named_parameters())
    assert_close(trained, plain_weights_of(groups))
    # What a mean of the batches' means would have given.
    model = mlp()
    for batch in groups[0]:
        (cross_entropy(model(batch[0]), batch) / len(groups[0])).backward()
    torch.optim.SGD(model.parameters(), lr=0.05).step()
    means = dict(model.named_parameters())
    assert max(float((means[name] - trained[name]).abs().max()) for name in means) > 1e-6


def ignoring(outputs: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(outputs, batch[1], ignore_index=0)


def summed(outputs: Tensor, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(outputs, batch[1], reduction="sum")


@pytest.mark.parametrize(
    ("loss", "normalise"), [(ignoring, lambda batch: (batch[1] != 0).sum()), (summed, "sum")], ids=["counted", "sum"]
)
def test_several_batches_a_step_count_what_the_loss_is_divided_by(loss: Any, normalise: Any) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    step = sg.Step(model, loss, rows=4, optimizer=optimizer, normalise=normalise)
    results = list(sg.train(step, BATCHES, batches_per_step=3))
    assert_close(dict(model.named_parameters()), plain_weights_of([BATCHES], loss))
    whole = tuple(torch.cat(leaves) for leaves in zip(*BATCHES))
    with torch.no_grad():
        assert results[0].loss == pytest.approx(float(loss(mlp()(whole[0]), whole)), rel=1e-12)


def test_batches_whose_targets_are_left_out_ask_what_they_count() -> None:
    batches = [(x, y.clone()) for x, y in BATCHES]
    batches[1][1][3] = -100
    step = stepped()
    wanted = r"(?s)batch\[1\] holds -100.*normalise=lambda batch: \(batch\[1\] != -100\)"
    with pytest.raises(sg.UsageError, match=wanted):
        next(sg.train(step, batches, batches_per_step=2))
    # One batch a step counts for itself.
    assert len(list(sg.train(stepped(), batches))) == 3


def stepping_in_backward(model: nn.Module) -> None:
    inside = {p: torch.optim.SGD([p], 0.1) for p in model.parameters()}
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: inside[p].step())


@pytest.mark.parametrize(
    "how", [{"batches_per_step": 2}, {"scaler": torch.amp.GradScaler("cpu")}], ids=["several batches", "scaler"]
)
def test_hooks_that_step_in_backward_are_refused_where_the_gradient_is_not_whole(how: dict[str, Any]) -> None:
    step = stepped()
    before = {k: v.clone() for k, v in step.declared.model.state_dict().items()}
    stepping_in_backward(step.declared.model)
    with pytest.raises(sg.UsageError, match="steps an optimizer inside backward"):
        next(sg.train(step, BATCHES, **how))
    assert same(before, step.declared.model.state_dict())


def test_a_step_that_scales_its_loss_refuses_them_too() -> None:
    step = stepped()
    stepping_in_backward(step.declared.model)
    with pytest.raises(sg.UsageError, match="steps an optimizer inside backward"):
        step.backward(BATCHES[0], scaler=torch.amp.GradScaler("cpu"))


def test_hooks_that_only_look_are_no_reason_to_refuse() -> None:
    step, seen = stepped(), []
    for parameter in step.declared.model.parameters():
        parameter.register_post_accumulate_grad_hook(seen.append)
    list(sg.train(step, BATCHES, batches_per_step=2))
    assert seen


def test_several_batches_a_step_are_unscaled_before_they_are_averaged() -> None:
    scaled, plainly = (stepped(optimizer=torch.optim.SGD) for _ in range(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    found = list(sg.train(scaled, BATCHES, batches_per_step=2, scaler=scaler))
    expected = list(sg.train(plainly, BATCHES, batches_per_step=2))
    assert [r.grad_norm for r in found] == pytest.approx([r.grad_norm for r in expected], rel=1e-12)
    assert_close(*(dict(step.declared.model.named_parameters()) for step in (scaled, plainly)))


def test_nothing_runs_before_it_is_asked_for() -> None:
    step = stepped()
    asked: list[int] = []

    def batches() -> Any:
        for index, batch in enumerate(BATCHES):
            asked.append(index)
            yield batch

    loop = sg.train(step, batches())
    assert asked == []
    next(loop)
    assert asked == [0]


@pytest.mark.parametrize("place", ["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_before_the_optimizer(place: str) -> None:
    def loss_fn(outputs: Tensor, batch: Any) -> Tensor:
        if place == "loss":
            return cross_entropy(outputs, batch) * batch[2].mean()
        # Finite itself, with a gradient that is not.
        return (outputs * batch[2][:, None]).sum(1).abs().sqrt().mean()

    model = mlp()
    optimizer = torch.optim.Adam(model.parameters())
    step = sg.Step(model, loss_fn, rows=4, optimizer=optimizer)
    good = (*labelled(29), torch.ones(29, dtype=torch.float64))
    bad = (*labelled(29), torch.ones(29, dtype=torch.float64))
    bad[2][17] = math.nan if place == "loss" else 0.0
    loop = sg.train(step, [good, bad, good])
    next(loop)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    state = [v["exp_avg"].clone() for v in optimizer.state.values()]
    with pytest.raises(sg.NonFinite, match="step 1"):
        next(loop)
    assert same(weights, model.state_dict())
    assert same(state, [v["exp_avg"] for v in optimizer.state.values()])
    assert all(p.grad is None for p in model.parameters())


def test_what_of_a_batch_is_not_finite_is_named() -> None:
    x, y = BATCHES[0][0].clone(), BATCHES[0][1]
    x[5, 2], x[9, 0] = math.nan, math.inf
    with pytest.raises(sg.NonFinite, match=r"row 5 and 1 more of batch\[0\] is not finite"):
        next(sg.train(stepped(rows=None, budget="1GiB"), [(x, y)]))


def test_a_scaler_is_used_as_the_plain_recipe_uses_it() -> None:
    def run(train: Any) -> Any:
        model = mlp(torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        train(model, optimizer, scaler)
        return model.state_dict(), scaler.get_scale()

    batches = [(x.float(), y) for x, y in BATCHES]

    def plainly(model: nn.Module, optimizer: Any, scaler: Any) -> None:
        for batch in batches:
            scaler.scale(cross_entropy(model(batch[0]), batch)).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

    def ours(model: nn.Module, optimizer: Any, scaler: Any) -> None:
        step = sg.Step(model, cross_entropy, rows=4, optimizer=optimizer)
        norms = [r.grad_norm for r in sg.train(step, batches, scaler=scaler)]
        assert all(norm is not None and norm < 10 for norm in norms)

    (plain_weights, plain_scale), (our_weights, our_scale) = run(plainly), run(ours)
    assert plain_scale == our_scale == 16.0
    assert_close(our_weights, plain_weights)


def test_an_optimizer_that_runs_out_of_memory_is_said_to_have_moved_some_weights() -> None:
    class Greedy(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemory, match=r"(?s)optimizer\.step\(\).*some weights may have moved"):
        next(sg.train(stepped(optimizer=Greedy), BATCHES))


def test_with_a_scaler_a_loss_that_is_not_finite_skips_its_step_and_ten_in_a_row_are_an_error() -> None:
    model = mlp(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    step = sg.Step(model, lambda z, b: cross_entropy(z, b) * b[2].mean(), rows=4, optimizer=optimizer)
    good = (BATCHES[0][0].float(), BATCHES[0][1], torch.ones(29))
    bad = (*good[:2], torch.full((29,), math.inf))
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    loop = sg.train(step, [bad, good, *[bad] * 11], scaler=scaler)
    assert next(loop).loss == math.inf and same(weights, model.state_dict()) and scaler.get_scale() == 512.0
    assert math.isfinite(next(loop).loss) and not same(weights, model.state_dict())
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(sg.NonFinite, match="10 steps in a row"):
        list(loop)
    assert same(weights, model.state_dict())


def test_with_a_scaler_a_gradient_that_overflows_skips_its_step_and_the_loop_goes_on() -> None:
    model = mlp(torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    step = sg.Step(model, lambda z, b: 100 * cross_entropy(z, b), rows=4, optimizer=optimizer)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    results = list(sg.train(step, [(BATCHES[0][0].float(), BATCHES[0][1])], scaler=scaler))
    assert len(results) == 1 and same(weights, model.state_dict()) and scaler.get_scale() == 2.0**125


def test_a_step_without_an_optimizer_cannot_be_trained() -> None:
    with pytest.raises(sg.UsageError, match="optimizer=optimizer"):
        next(sg.train(sg.Step(mlp(), cross_entropy, rows=4), BATCHES))


def test_the_gradient_norm_is_over_what_the_optimizer_uses() -> None:
    model = mlp()
    cross_entropy(model(BATCHES[0][0]), BATCHES[0]).backward()
    optimizer = torch.optim.SGD(model[2].parameters(), 0.1)
    assert gradient_norm(optimizer) == float(nn.utils.get_total_norm([p.grad for p in model[2].parameters()]))
    optimizer.zero_grad()
    assert gradient_norm(optimizer) == 0.0


# The best weights


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))
        self.register_buffer("seen", torch.zeros(()))

    def become(self, value: float) -> None:
        with torch.no_grad():
            self.weight.fill_(value)
            self.seen.fill_(value)


def followed(values: list[float], patience: int | None) -> tuple[Counter, sg.BestWeights, list[bool]]:
    model = Counter()
    best = sg.BestWeights(model, patience=patience)
    stops = []
    for index, value in enumerate(values):
        model.become(index)
        stops.append(best.update(value))
    return model, best, stops


def test_the_best_weights_and_buffers_come_back() -> None:
    model, best, _ = followed([3.0, 1.0, 2.0, 1.0], None)
    best.restore()
    assert best.best_value == 1.0 and best.best_index == 1
    assert model.weight.tolist() == [1, 1] and model.seen == 1


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_patience_counts_values_in_a_row_that_fail_to_improve(patience: int) -> None:
    _, _, stops = followed([5.0, 4.0, 4.0, 3.0, *[3.5] * 5], patience)
    waiting = [False, False, patience == 1, False]
    assert stops == waiting + [waited >= patience for waited in range(1, 6)]


def test_without_patience_it_never_stops() -> None:
    assert not any(followed([1.0] * 50, None)[2])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_never_best_and_counts_as_waiting(bad: float) -> None:
    model, best, stops = followed([bad, 2.0, bad, bad], 2)
    assert best.best_value == 2.0 and stops == [False, False, False, True]
    best.restore()
    assert model.weight.tolist() == [1, 1]


def test_without_a_finite_value_the_model_stays_as_it_is() -> None:
    model, best, _ = followed([math.nan, math.nan], None)
    best.restore()
    assert model.weight.tolist() == [1, 1] and best.best_index is None


def test_the_kept_weights_are_copies() -> None:
    model, best, _ = followed([1.0], None)
    model.become(9)
    assert best.weights()["weight"].tolist() == [0, 0]
    best.weights().clear()
    best.restore()
    assert model.weight.tolist() == [0, 0]


@pytest.mark.parametrize("values", [[3.0, 1.0, 2.0], [math.nan, math.nan], []], ids=str)
def test_resumed_it_stops_and_restores_as_if_it_had_never_stopped(values: list[float]) -> None:
    rest = [1.5, 0.9, 2.0, 2.0, 2.0]
    model, best, _ = followed(values, 3)
    again_model = Counter()
    again = sg.BestWeights(again_model, patience=3)
    again.load_state(json.loads(json.dumps(best.state())), best.weights())
    for index, value in enumerate(rest):
        for which in (model, again_model):
            which.become(100 + index)
        assert best.update(value) == again.update(value)
    assert best.state() == again.state()
    best.restore()
    again.restore()
    assert same(model.state_dict(), again_model.state_dict())


def test_an_optimizer_that_needs_a_closure_is_refused_before_a_step() -> None:
    model = mlp()
    step = sg.Step(model, cross_entropy, optimizer=torch.optim.LBFGS(model.parameters()), rows=7)
    with pytest.raises(sg.UsageError, match=r"LBFGS\.step needs a closure"):
        next(sg.train(step, [BATCHES[0]]))


@pytest.mark.parametrize("count", [0, 1.5, "2"])
def test_a_number_of_batches_that_is_none_is_refused(count: Any) -> None:
    with pytest.raises(sg.UsageError, match="not a positive whole number"):
        next(sg.train(stepped(rows=7), [BATCHES[0]], batches_per_step=count))


def test_gradients_from_before_are_told_and_kept(caplog: pytest.LogCaptureFixture) -> None:
    step = stepped(rows=7)
    next(sg.train(step, [BATCHES[0]]))
    assert "stand from before" not in caplog.text
    for parameter in step.declared.network.parameters():
        parameter.grad = torch.ones_like(parameter)
    next(sg.train(step, [BATCHES[0]]))
    assert "stand from before training, and the first step adds to them" in caplog.text


NOT_A_STEP: dict[str, Callable[[Any], Any]] = {
    "train": lambda model: sg.train(model, []),
    "verify_step": lambda model: sg.verify_step(model, torch.ones(4, 3)),
    "measure_step": lambda model: sg.measure_step(model, torch.ones(4, 3)),
    "settle_plan": lambda model: sg.settle_plan(model, torch.ones(4, 3), budget="1GiB"),
}


@pytest.mark.parametrize("function", NOT_A_STEP)
def test_a_model_where_a_step_is_needed_is_told_what_to_write(function: str) -> None:
    with pytest.raises(sg.UsageError, match=rf"{function}\(.*\n.*step is a Linear, not a samegrad.Step"):
        NOT_A_STEP[function](nn.Linear(3, 2))


@pytest.mark.parametrize("batches", [3, "train.csv", None, lambda: iter([])])
def test_what_holds_no_batches_is_refused_at_the_call(batches: Any) -> None:
    model = nn.Linear(3, 2)
    step = sg.Step(model, lambda out, batch: out.square().mean(), rows=2, optimizer=torch.optim.SGD(model.parameters()))
    with pytest.raises(sg.UsageError, match="holds no batches"):
        sg.train(step, batches)


@pytest.mark.parametrize("batch", [(torch.ones(4, 3), torch.ones(4)), {"x": torch.ones(4, 3)}, (torch.ones(4, 3),)])
def test_one_batch_in_the_place_of_batches_is_told(batch: Any) -> None:
    """Iterated over, (x, y) would be a batch x and a batch y."""
    model = nn.Linear(3, 2)
    step = sg.Step(model, lambda out, batch: out.square().mean(), rows=2, optimizer=torch.optim.SGD(model.parameters()))
    with pytest.raises(sg.UsageError, match=r"looks like one batch(.|\n)*train\(step, \[batch\]\)"):
        sg.train(step, batch)


def test_a_training_that_nobody_iterates_over_says_so(recwarn: pytest.WarningsRecorder) -> None:
    model = nn.Linear(3, 2)
    step = sg.Step(model, lambda out, batch: out.square().mean(), rows=2, optimizer=torch.optim.SGD(model.parameters()))
    weight = model.weight.detach().clone()
    assert len(list(sg.train(step, [torch.ones(4, 3)]))) == 1 and not torch.equal(model.weight, weight)
    gc.collect()
    assert not recwarn.list
    sg.train(step, [torch.ones(4, 3)])
    gc.collect()
    [told] = recwarn.list
    assert "nothing was trained" in str(told.message)
