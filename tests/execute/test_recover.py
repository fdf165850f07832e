"""Running out of memory at every operation of a step: undone, and the smaller plan runs the same batch."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.exact import handoff, passes, whole
from samegrad.exact.out_of_memory import OutOfMemory
from samegrad.exact.undisturbed import Before, Generators
from samegrad.execute import recover
from samegrad.measure.counting import ByteCounter
from samegrad.records import Category, Exactness, StepResult

from .failing_memory import KINDS, D, FailsAt, Kind, Left, Limited, Rerun, batch_of, cross_entropy, dropping, plan
from .failing_memory import split as by_rows

# Of the operations of a step, in the fast suite.
STRIDE = 17
COMPARES = ("aten.equal.default", "aten.detach.default")


@pytest.fixture(autouse=True)
def quick_collections() -> Iterator[None]:
    """Every recovery collects garbage; what stands before a test need not be looked through each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def wrong_places(rerun: Rerun, stride: int, last: int = 0) -> tuple[list[tuple[int, str, list[str]]], int]:
    """Operations whose failing leaves anything else than the smaller plan leaves by itself; and how many failed.

    ``last``: of those places the last ones alone; 0 is all.
    """
    wrong, count = [], 0
    for at in [*rerun.places(stride)][-last:]:
        left, failing = rerun.run(at)
        assert failing.failed_in, at
        # Where memory was short only for a comparison that can be done without, the plan stays.
        reached = rerun.expected if rerun.step.recoveries else rerun.unmoved
        assert rerun.step.recoveries or failing.failed_in in COMPARES, (at, failing.failed_in)
        if different := left.differing(reached):
            wrong.append((at, failing.failed_in, different))
        count += 1
    return wrong, count


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_is_what_the_smaller_plan_leaves(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, count = wrong_places(Rerun(KINDS[kind], monkeypatch), STRIDE)
    assert not wrong and count > 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_at_every_operation(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong, count = wrong_places(Rerun(KINDS[kind], monkeypatch), 1)
    assert not wrong and count > 30


@contextlib.contextmanager
def _nothing_undone(*_: Any) -> Iterator[None]:
    yield


def forget_the_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Generators, "restored_on_failure", _nothing_undone)


def leave_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the whole step finds is added to ``.grad`` while backward runs, and there is nobody who looks."""

    @contextlib.contextmanager
    def in_place(leaves: Any) -> Iterator[list[Tensor | None]]:
        found: list[Tensor | None] = []
        yield found
        found += [leaf.grad for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None

    monkeypatch.setattr(whole, "gradients_apart", in_place)
    monkeypatch.setattr(recover, "_gradient_marks", lambda parameters: [])


def take_another_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = sg.Step._run

    def run(self: sg.Step, execution: Any, kind: Any, batch: Any, *rest: Any) -> Tensor:
        return plain(self, execution, kind, batch_of(seed=2) if self.recoveries else batch, *rest)

    monkeypatch.setattr(sg.Step, "_run", run)


def commit_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """State that was written stays written when the hand-over fails."""
    monkeypatch.setattr("samegrad.exact.state.StateTransaction._take_back", lambda self, before: None)


def keep_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the forward of a mapped or whole step wrote stays."""
    monkeypatch.setattr(Before, "restored_on_failure", _nothing_undone)
    monkeypatch.setattr(whole, "undone_on_failure", _nothing_undone)


PLANTED: list[tuple[str, Callable[[pytest.MonkeyPatch], None], str]] = [
    ("single pass", forget_the_generator, "generator"),
    ("whole", forget_the_generator, "generator"),
    ("whole", leave_gradients, "gradient of 3.bias"),
    ("single pass", take_another_batch, "loss"),
    ("single pass, state, scaler", commit_twice, "1.calls"),
    ("exact_batchnorm", keep_buffers, "1.running_mean"),
    ("whole, BatchNorm", keep_buffers, "1.num_batches_tracked"),
]


@pytest.mark.parametrize(("kind", "fault", "shows"), PLANTED)
def test_a_recovery_that_leaves_something_is_caught(
    kind: str, fault: Callable[[pytest.MonkeyPatch], None], shows: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rerun = Rerun(KINDS[kind], monkeypatch)
    fault(monkeypatch)
    # The hand-over is short; what it leaves shows only where it fails.
    wrong, _ = wrong_places(rerun, 1, last=15) if fault is commit_twice else wrong_places(rerun, 7)
    assert any(shows in different for _, _, different in wrong)


def test_what_happened_is_told_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    rerun = Rerun(KINDS["single pass"], monkeypatch)
    caplog.clear()
    rerun.run(40)
    [recovery] = rerun.step.recoveries
    assert recovery.left == by_rows(4) and recovery.taken == by_rows(2)
    assert (recovery.left_predicted_bytes, recovery.taken_predicted_bytes) == (1000, 800)
    assert recovery.place.startswith(("forward", "loss", "backward")) and recovery.found == "OutOfMemoryError: planted"
    assert recovery.seconds > 0 and recovery.rank is None
    [line] = [record.getMessage() for record in caplog.records]
    assert "split_rows 4 rows" in line and "split_rows 2 rows" in line and recovery.place in line
    # The smaller plan stays, and nothing is said of a step that ran.
    rerun.step.backward(rerun.batch)
    assert rerun.step.recoveries == () and len(caplog.records) == 1
    assert rerun.step.plan is not None and rerun.step.plan.levers == by_rows(2)
    result = StepResult(index=0, loss=1.0, seconds=1.0, batch_rows=7, recoveries=(recovery,))
    assert StepResult.from_json(result.to_json()) == result


def test_the_place_names_the_module_and_the_users_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails(nn.Module):
        asked = False

        def forward(self, x: Tensor) -> Tensor:
            if Fails.asked:
                Fails.asked = False
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
            return x

    model = nn.Sequential(nn.Linear(4, 6), nn.Sequential(nn.Tanh(), Fails()), nn.Linear(6, 3)).to(D)
    monkeypatch.setattr("samegrad.step.smaller_plans", lambda *_: iter([plan(by_rows(2))]))
    step = sg.Step(model, cross_entropy, budget=10**6)
    step.backward(batch_of())
    Fails.asked = True
    step.backward(batch_of())
    [recovery] = step.recoveries
    assert recovery.place.startswith("forward of 1.1 (test_recover.py:")
    assert recovery.found == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"


@pytest.mark.parametrize("kind", ["whole", "single pass", "two passes", "exact_batchnorm"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("theirs"), RuntimeError("CUDA out of memory")])
def test_what_is_no_lack_of_memory_goes_on_and_leaves_nothing(
    kind: str, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    rerun = Rerun(KINDS[kind], monkeypatch)
    rerun.reset()
    before = Left.by(rerun.model, torch.zeros(()))
    for at in rerun.places(41):
        rerun.reset()
        with pytest.raises(type(error)) as raised, FailsAt(at, error):
            rerun.step.backward(rerun.batch, scaler=rerun.kind.scaler())
        assert raised.value is error and not rerun.step.recoveries
        assert not Left.by(rerun.model, torch.zeros(())).differing(before), at


@pytest.mark.parametrize("pin", ["rows", "plan", "whole"])
def test_a_pin_is_not_left(pin: str) -> None:
    torch.manual_seed(0)
    model = dropping().to(D)
    pins: dict[str, Any] = {"rows": {"rows": 3}, "plan": {"plan": plan(by_rows(3))}, "whole": {"rows": 7}}
    step = sg.Step(model, cross_entropy, **pins[pin])
    step.backward(batch_of())
    model.zero_grad()
    generator = torch.get_rng_state()
    with pytest.raises(OutOfMemory, match="is a pin") as raised, FailsAt(30):
        step.backward(batch_of())
    assert isinstance(raised.value, (torch.OutOfMemoryError, sg.SamegradError)) and raised.value.exit_code == 5
    assert "budget=" in raised.value.do and "planted" in raised.value.found
    assert raised.value.__context__ is None and raised.value.__cause__ is None
    assert all(p.grad is None for p in model.parameters()) and torch.equal(torch.get_rng_state(), generator)


def test_attempts_end_and_say_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    rerun = Rerun(KINDS["single pass"], monkeypatch)
    rerun.reset()
    before = Left.by(rerun.model, torch.zeros(()))
    counter = ByteCounter(torch.device("cpu"))
    for smaller, tried in ((3, 4), (30, recover.MOST_ATTEMPTS)):
        rerun.smaller = [plan(by_rows(2), 900 - n) for n in range(smaller)]
        rerun.reset()
        with pytest.raises(OutOfMemory) as raised, counter, Limited(counter, 10) as limited:
            rerun.step.backward(rerun.batch)
        assert limited.failures == raised.value.found.count("predicted") == tried
        assert raised.value.asked == "step.backward(batch) within 977 KiB (budget=1000000)"
        assert len(rerun.step.recoveries) == tried - 1
        assert not Left.by(rerun.model, torch.zeros(())).differing(before)


@pytest.mark.parametrize("kind", ["whole", "single pass", "two passes", "segments"])
def test_the_failed_attempt_is_dead_before_the_next_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rerun = Rerun(KINDS[kind], monkeypatch)
    alive: list[weakref.ref[Tensor]] = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, out: alive.append(weakref.ref(out)))
    seen: list[bool] = []
    released = recover.counters.release_cached

    def released_when_dead(device: torch.device) -> int:
        seen.append(all(reference() is None for reference in alive))
        return released(device)

    monkeypatch.setattr(recover.counters, "release_cached", released_when_dead)
    kept: list[BaseException] = []

    class Held(FailsAt):
        """Somebody keeps the exception: a logger, a debugger."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            try:
                return super().__torch_dispatch__(func, types, args, kwargs)
            except torch.OutOfMemoryError as error:
                kept.append(error)
                raise

    try:
        for at in rerun.places(11):
            rerun.reset()
            alive.clear()
            with Held(at):
                rerun.step.backward(rerun.batch)
    finally:
        hook.remove()
    assert len(seen) > 3 and all(seen) and kept


def test_an_error_that_was_being_handled_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    rerun = Rerun(KINDS["single pass"], monkeypatch)
    try:
        raise KeyError("theirs")
    except KeyError as theirs:
        rerun.run(30)
        assert theirs.__traceback__ is not None
    assert len(rerun.step.recoveries) == 1


@pytest.mark.parametrize("kind", ["whole", "single pass"])
def test_gradients_that_stand_are_added_to_once(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the hand-over an attempt is undone; where it had begun to add there is no other one, and it says so."""
    rerun = Rerun(KINDS[kind], monkeypatch)
    standing = {name: torch.full_like(p, 0.25) for name, p in rerun.model.named_parameters()}
    expected, ended = rerun.expected, 0
    for at in rerun.places(11):
        rerun.reset()
        for name, parameter in rerun.model.named_parameters():
            parameter.grad = standing[name].clone()
        try:
            with FailsAt(at):
                rerun.step.backward(rerun.batch, scaler=rerun.kind.scaler())
        except OutOfMemory as error:
            assert "handed over" in error.found and "zero the gradients" in error.do
            ended += 1
            continue
        if not rerun.step.recoveries:
            continue
        for name, parameter in rerun.model.named_parameters():
            assert torch.equal(parameter.grad, standing[name] + expected.gradients[name]), (at, name)
    assert ended <= len(standing)


def test_hooks_see_the_gradient_of_the_attempt_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    rerun = Rerun(KINDS["whole"], monkeypatch)
    seen: list[str] = []
    rerun.model[0].weight.register_hook(lambda gradient: seen.append("hook"))
    rerun.model[0].weight.register_post_accumulate_grad_hook(lambda parameter: seen.append("post"))
    expected, places = rerun.expected, [*rerun.places(7)]
    handed_over = 0
    for at in places:
        seen.clear()
        try:
            left, _ = rerun.run(at)
        except OutOfMemory as error:
            assert "handed over" in error.found
            handed_over += 1
            continue
        assert seen == ["hook", "post"] and not left.differing(expected), at
    assert handed_over < len(places) / 2


def test_a_batch_that_was_written_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Writes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2) @ torch.ones(4, 4, dtype=D)

    rerun = Rerun(Kind("writes", lambda: nn.Sequential(Writes(), nn.Linear(4, 3)), {}, {}), monkeypatch)
    count = rerun.run(None)[1].count
    with pytest.raises(OutOfMemory, match="had written into the batch"), FailsAt(count - 5):
        rerun.step.backward(rerun.batch)


def test_a_limit_of_bytes_is_met_by_a_smaller_plan_of_the_ladder(caplog: pytest.LogCaptureFixture) -> None:
    """A budget that was believed and did not hold: planned by the laws, run under less, within it in the end."""

    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.3), nn.Tanh(), nn.Linear(64, 3)).to(D)

    model, batch = made(), batch_of(64)
    with sg.Step(model, cross_entropy, budget="1MiB") as step:
        left = step.prepare(batch)
        torch.manual_seed(5)
        counter = ByteCounter(torch.device("cpu"), gradients_of=[model])
        counter.claim(model.parameters(), Category.PARAMETERS)
        limit = int(0.6 * (left.predicted_peak_bytes or 0))
        with counter, Limited(counter, limit):
            loss = step.backward(batch)
        mine = Left.by(model, loss)
        assert step.recoveries and counter.peak_bytes <= limit * 1.2
        taken = step.plan
    assert taken is not None and (taken.predicted_peak_bytes or 0) < (left.predicted_peak_bytes or 0)
    assert taken.levers == step.recoveries[-1].taken and taken.budget == left.budget
    fresh = made()
    with sg.Step(fresh, cross_entropy, plan=taken) as pinned:
        torch.manual_seed(5)
        assert not Left.by(fresh, pinned.backward(batch)).differing(mine)


@pytest.mark.parametrize(
    ("levers", "share"),
    [({}, 0.6), ({"autocast": {"dtype": "bfloat16", "full_precision": []}}, 0.35)],
    ids=["as it is", "autocast"],
)
def test_a_plan_with_its_footprint_is_left_for_a_smaller_one_in_its_precision(
    levers: dict[str, Any], share: float
) -> None:
    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 64), nn.Dropout(0.3), nn.Tanh(), nn.Linear(64, 3))

    model, batch, allow = made(), (batch_of(64)[0].float(), batch_of(64)[1]), Exactness.ROUNDED
    settled, footprint = sg.settle_plan(sg.Step(model, cross_entropy), batch, budget="1MiB")
    given = dataclasses.replace(settled, levers=settled.levers | levers, exactness=allow)
    step = sg.Step(model, cross_entropy, plan=given, footprint=footprint, allow=allow)
    counter = ByteCounter(torch.device("cpu"), gradients_of=[model])
    counter.claim(model.parameters(), Category.PARAMETERS)
    torch.manual_seed(5)
    limit = int(share * (settled.predicted_peak_bytes or 0))
    with counter, Limited(counter, limit) as limited:
        loss = step.backward(batch)
    mine, taken = Left.by(model, loss), step.plan
    assert step.recoveries and limited.failures == len(step.recoveries) and taken is not None
    assert "split_rows" in taken.levers and all(taken.levers[name] == knobs for name, knobs in levers.items())
    assert taken.exactness is (allow if levers else Exactness.SAME_SUM) and taken.signature == given.signature
    # It stays in force, and is what a step that had it from the start would have done.
    step.backward(batch)
    assert step.plan == taken and not step.recoveries
    fresh = made()
    with sg.Step(fresh, cross_entropy, plan=taken, allow=allow) as pinned:
        torch.manual_seed(5)
        assert not Left.by(fresh, pinned.backward(batch)).differing(mine)


def test_a_footprint_of_another_mode_never_splits_what_couples_rows() -> None:
    """In eval mode BatchNorm treats rows alone and smaller plans split them; in training mode none of them may run."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Linear(64, 3)).to(D).eval()
    batch = batch_of(64)
    settled, footprint = sg.settle_plan(sg.Step(model, cross_entropy), batch, budget="1MiB")
    model.train()
    step = sg.Step(model, cross_entropy, plan=settled, footprint=footprint)
    with pytest.raises(sg.CannotSplit, match="statistics of all rows"), FailsAt(60):
        step.backward(batch)
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(model[1].running_mean, torch.zeros(64, dtype=D)) and int(model[1].num_batches_tracked) == 0


def test_a_footprint_is_of_a_plan() -> None:
    model, batch = dropping().to(D), batch_of()
    settled, footprint = sg.settle_plan(sg.Step(model, cross_entropy), batch, budget="1MiB")
    for given, found in (({"footprint": footprint}, "no plan="), ({"plan": settled, "footprint": settled}, "a Plan")):
        with pytest.raises(sg.UsageError, match=found):
            sg.Step(model, cross_entropy, **given)


def test_train_tells_what_happened_in_the_step_it_happened(monkeypatch: pytest.MonkeyPatch) -> None:
    rerun = Rerun(KINDS["single pass"], monkeypatch)
    optimizer = torch.optim.SGD(rerun.model.parameters(), lr=0.1)
    object.__setattr__(rerun.step.declared, "optimizer", optimizer)
    rerun.reset()
    with FailsAt(40):
        results = list(sg.train(rerun.step, [rerun.batch, rerun.batch]))
    assert [len(result.recoveries) for result in results] == [1, 0]


def test_the_engine_undoes_a_failing_hand_over_only_where_it_can() -> None:
    one, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    model = nn.ParameterList([one, other])
    assert handoff.can_be_taken_back(model, [one, other])
    one.grad = torch.ones(2)
    assert not handoff.can_be_taken_back(model, [one, other])
    one.grad = None
    other.register_hook(lambda gradient: None)
    assert not handoff.can_be_taken_back(model, [one, other])
    assert passes.hand_over is handoff.hand_over
