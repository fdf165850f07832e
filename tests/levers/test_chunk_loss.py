"""``chunk_loss`` through ``Step``: the plain step's gradients whole and split, verified, planned, refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import samegrad as sg
from samegrad.errors import BadInput, CannotSplit, UsageError
from samegrad.exact.chunked_head import ChunkedLikelihood, HeadLoss, losses_of_chunk
from samegrad.levers.chunk_loss import ChunkLoss
from samegrad.measure.rungs import OptimizerTurn, measure_rung
from samegrad.records import Exactness, HeadLaws, Phase, Plan, Same

from ..contract.plain import assert_close, left_alone, plain_step
from ..exact import head_zoo as zoo
from ..exact.head_zoo import LOSSES, ROWS, D, Words, of_batch, words
from ..exact.processes import on_two_ranks
from ..plan.test_choose import MIB, footprint, law

BATCH = words()


def plan(rows: int = 7, *, split: int | None = None, **others: dict[str, Any]) -> Plan:
    levers: dict[str, dict[str, Any]] = {"chunk_loss": {"head": "head", "rows": rows}, **others}
    if split is not None:
        levers["split_rows"] = {"rows": split}
    return Plan(levers=levers, exactness=Exactness.SAME_SUM, batch_rows=ROWS)


def stepped(model: nn.Module, loss: Any, batch: Any = BATCH, **options: Any) -> tuple[Tensor, dict[str, Tensor | None]]:
    step = sg.Step(model, loss, **options)
    found = step.backward(batch)
    return found, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("split", [None, 1, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_the_plain_ones_whole_and_split(name: str, split: int | None) -> None:
    model, loss = Words(bias=True).to(D), of_batch(LOSSES[name])
    if split is not None and two_passes(name):
        with pytest.raises(CannotSplit, match=r"(?s)chunk_loss in a step that takes two passes.*logits of all rows"):
            stepped(model, loss, plan=plan(split=split))
        assert all(p.grad is None for p in model.parameters())
        return
    expected, gradients = plain_step(model, loss, BATCH)
    ours, mine = stepped(model, loss, plan=plan(split=split))
    assert float(ours) == pytest.approx(float(expected), rel=1e-6 if name == "transformers" else 1e-14)
    if name == "transformers":
        # It casts to float32 itself.
        mine, gradients = ({n: None if g is None else g.float() for n, g in side.items()} for side in (mine, gradients))
    assert_close(mine, gradients)


def two_passes(name: str) -> bool:
    step = sg.Step(Words(bias=True).to(D), of_batch(LOSSES[name]), rows=2)
    return step.split_for(BATCH, step.declared.layout(BATCH)).examination.passes == 2


def test_losses_of_both_kinds_were_tried() -> None:
    kinds = {two_passes(name) for name in LOSSES}
    assert kinds == {True, False} and not two_passes("flat") and two_passes("none, weighted rows")


def test_naming_the_head_with_pinned_rows_takes_the_lever() -> None:
    model, loss = Words().to(D), of_batch(zoo.flat)
    expected = plain_step(model, loss, BATCH)[1]
    for rows, levers in ((ROWS, {"chunk_loss"}), (2, {"chunk_loss", "split_rows", "host_rows"})):
        model.zero_grad()
        step = sg.Step(model, loss, rows=rows, head="head")
        step.backward(BATCH)
        assert step.plan is not None and step.plan.levers.keys() == levers
        assert step.plan.exactness is Exactness.SAME_SUM and "chunk_loss" in step.explain()
        assert_close({n: p.grad for n, p in model.named_parameters()}, expected)
    with pytest.raises(UsageError, match="SAME_BITS at most"):
        sg.Step(model, loss, rows=ROWS, head="head", allow=Exactness.SAME_BITS).backward(BATCH)


@pytest.mark.parametrize("split", [None, 2])
def test_dropout_before_the_head_draws_as_in_every_plan(split: int | None) -> None:
    found = []
    for options in ({"rows": ROWS}, {"plan": plan(split=split)}):
        model = Words(dropout=0.4).to(D)
        torch.manual_seed(5)
        found.append(stepped(model, of_batch(zoo.next_token), **options))
    assert float(found[0][0]) == pytest.approx(float(found[1][0]), rel=1e-14)
    assert_close(found[1][1], found[0][1])


def test_gradients_add_to_what_is_there_and_hooks_fire_once() -> None:
    model, loss = Words().to(D), of_batch(zoo.flat)
    expected = plain_step(model, loss, BATCH)[1]
    fired: list[Tensor] = []
    model.head.weight.register_hook(fired.append)
    step = sg.Step(model, loss, plan=plan())
    step.backward(BATCH), step.backward(BATCH)
    assert len(fired) == 2
    assert_close({n: p.grad / 2 for n, p in model.named_parameters() if p.grad is not None}, expected)


@pytest.mark.parametrize("scale", [1024.0, 2.0**15])
@pytest.mark.parametrize("split", [None, 2])
def test_a_scaler_scales_the_gradients_and_not_the_loss(split: int | None, scale: float) -> None:
    model, loss = Words().to(D), of_batch(zoo.flat)
    expected, gradients = plain_step(model, loss, BATCH)
    found = sg.Step(model, loss, plan=plan(split=split)).backward(
        BATCH, scaler=torch.amp.GradScaler("cpu", init_scale=scale)
    )
    assert float(found) == pytest.approx(float(expected), rel=1e-14)
    assert_close({n: p.grad / scale for n, p in model.named_parameters() if p.grad is not None}, gradients)


def test_float16_gradients_do_not_vanish_under_a_mean_over_many_positions() -> None:
    """Formed for cotangent 1 and not for 1 / positions, which float16 does not hold beside a small probability."""
    batch = words(900)
    exact = plain_step(Words().half().to(D), of_batch(zoo.flat), batch)[1]["embed.weight"]
    model, scaler = Words().half(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    chunks = Plan(levers={"chunk_loss": {"head": "head", "rows": 512}}, exactness=Exactness.SAME_SUM, batch_rows=900)
    sg.Step(model, of_batch(zoo.flat), plan=chunks).backward(batch, scaler=scaler)
    grad = model.embed.weight.grad
    assert grad is not None and exact is not None
    assert float((grad.to(D) / 1024 - exact).norm() / exact.norm()) < 4 * torch.finfo(torch.float16).eps


# Verified


@pytest.mark.parametrize("split", [None, 2])
@pytest.mark.parametrize("dtype", [D, torch.float32, torch.bfloat16], ids=str)
def test_the_verdict_is_same(dtype: torch.dtype, split: int | None) -> None:
    model = Words(dropout=0.2).to(dtype)
    step = sg.Step(model, of_batch(zoo.next_token), plan=plan(split=split))
    with left_alone(model):
        verdict = sg.verify_step(step, BATCH)
    assert verdict.answer is Same.SAME and 1 in verdict.tiers


@pytest.mark.parametrize("split", [None, 2])
def test_the_verdict_is_same_under_autocast(split: int | None) -> None:
    model = Words()
    step = sg.Step(model, of_batch(zoo.next_token), plan=plan(split=split))
    with torch.autocast("cpu", torch.bfloat16):
        step.backward(BATCH)
        verdict = sg.verify_step(step, BATCH)
    assert verdict.answer is Same.SAME


def test_the_verdict_is_same_where_gradients_are_what_is_left_of_terms_that_cancel() -> None:
    """A step that runs whole has no chunks of rows whose sizes would say so; they are asked for all the same."""
    model = Words().to(D)
    step = sg.Step(model, of_batch(zoo.flat), plan=plan())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        step.backward(BATCH)
        optimizer.step()
        optimizer.zero_grad()
    assert sg.verify_step(step, BATCH).answer is Same.SAME


def half_a_percent_less(patch: pytest.MonkeyPatch) -> None:
    backward = ChunkedLikelihood.backward
    patch.setattr(ChunkedLikelihood, "backward", staticmethod(lambda ctx, cotangent: backward(ctx, cotangent * 0.995)))


def ignored_targets_counted(patch: pytest.MonkeyPatch) -> None:
    count = lambda self, targets: (torch.tensor(float(targets.numel())).double(), torch.tensor(targets.numel()))
    patch.setattr(HeadLoss, "divisor", count)


def one_position_left_out(patch: pytest.MonkeyPatch) -> None:
    def without_the_last(loss: HeadLoss, logits: Any, hidden: Tensor, targets: Tensor) -> Tensor:
        kept = torch.ones(len(targets), dtype=hidden.dtype)
        kept[-1] = 0
        return losses_of_chunk(loss, logits, hidden, targets) * kept

    made = HeadLoss.__init__
    patch.setattr(
        HeadLoss, "__init__", lambda self, *args, **kwargs: made(self, *args, **kwargs | {"of_chunk": without_the_last})
    )


@pytest.mark.parametrize(
    "fault", [half_a_percent_less, ignored_targets_counted, one_position_left_out], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("dtype", [D, torch.float32, torch.bfloat16], ids=str)
def test_a_planted_fault_is_found_and_the_lever_named(
    fault: Callable[[pytest.MonkeyPatch], None], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = sg.Step(Words().to(dtype), of_batch(zoo.flat), plan=plan())
    step.prepare(BATCH)
    fault(monkeypatch)
    verdict = sg.verify_step(step, BATCH)
    assert verdict.answer is Same.DIFFERS and "chunk_loss" in verdict.fault


# Refused


def test_a_loss_that_takes_the_logits_otherwise_is_refused_with_the_place() -> None:
    model = Words().to(D)
    loss = lambda z, b: zoo.flat(z, b[1]) + z.logsumexp(-1).pow(2).mean()
    with pytest.raises(CannotSplit, match="head: its logits meet logsumexp"):
        stepped(model, loss, plan=plan())
    assert all(p.grad is None for p in model.parameters())


def test_a_head_that_a_part_in_chunks_contains_is_refused() -> None:
    model = nn.Sequential(Words()).to(D)
    levers = {"segments": {"rows": 2, "paths": {"0": 1}}, "chunk_loss": {"head": "0.head", "rows": 7}}
    step = sg.Step(model, of_batch(zoo.flat), plan=Plan(levers=levers, exactness=Exactness.SAME_SUM, batch_rows=ROWS))
    with pytest.raises(CannotSplit, match=r"(?s)head in chunks.*inside a part of the model that runs in chunks itself"):
        step.backward(BATCH)
    assert all(p.grad is None for p in model.parameters())


PARTS = {"recompute": {"blocks": ["body"]}, "segments": {"rows": 2, "paths": {"body": 1}}}


@pytest.mark.parametrize("other", PARTS)
def test_parts_before_the_head_may_run_in_chunks_or_again(other: str) -> None:
    model, loss = Words().to(D), of_batch(zoo.flat)
    expected = plain_step(model, loss, BATCH)[1]
    assert_close(stepped(model, loss, plan=plan(**{other: PARTS[other]}))[1], expected)


def test_what_changes_after_the_trial_gets_the_plain_numbers_and_a_warning() -> None:
    model, extra = Words().to(D), [0.0]
    loss = lambda z, b: zoo.flat(z, b[1]) + (extra[0] * z.exp().mean() if extra[0] else 0.0)
    step = sg.Step(model, loss, plan=plan())
    step.backward(BATCH)
    model.zero_grad()
    extra[0] = 1.0
    with pytest.warns(UserWarning, match="exp needs the whole logits of head"):
        step.backward(BATCH)
    assert_close({n: p.grad for n, p in model.named_parameters()}, plain_step(model, loss, BATCH)[1])


@pytest.mark.parametrize("rows", [0, -1, 2.5, True, None], ids=str)
def test_knobs_that_are_no_rows_are_refused(rows: Any) -> None:
    with pytest.raises(BadInput, match="chunk_loss"):
        ChunkLoss("head", rows)


def test_everything_is_put_back_when_the_loss_raises() -> None:
    model, fails = Words().to(D), [False]

    def loss(logits: Tensor, batch: zoo.Batch) -> Tensor:
        if fails[0]:
            raise ZeroDivisionError
        return zoo.flat(logits, batch[1])

    step = sg.Step(model, loss, plan=plan())
    step.backward(BATCH)
    fails[0] = True
    with left_alone(model), pytest.raises(ZeroDivisionError):
        step.backward(BATCH)
    assert "forward" not in vars(model.head)


# Planned


class Large(nn.Module):
    """A head whose logits are most of what the step holds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.body, self.head = nn.Embedding(2001, 16), nn.Linear(16, 16), nn.Linear(16, 2001)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.embed(tokens))))


def next_of_many(logits: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(logits[:, :-1].reshape(-1, 2001), batch[:, 1:].reshape(-1))


TOKENS = torch.randint(0, 2001, (24, 41), generator=torch.Generator().manual_seed(0))


def test_a_budget_between_takes_the_lever_and_holds() -> None:
    model = Large()
    expected = plain_step(model, next_of_many, TOKENS, forward=lambda m, b: m(b))[1]
    step = sg.Step(model, next_of_many, budget="12MiB")
    step.backward(TOKENS)
    assert step.plan is not None and step.footprint is not None and step.plan.levers.keys() == {"chunk_loss"}
    assert step.footprint.head == HeadLaws.from_json(step.footprint.head.to_json())
    assert "the loss of head" in step.explain() and "chunk_loss: taken: saves" in step.explain()
    assert_close({n: p.grad for n, p in model.named_parameters()}, expected)
    assert sg.verify_step(step, TOKENS).same


def test_a_budget_that_holds_the_plain_step_leaves_it_plain() -> None:
    step = sg.Step(Large(), next_of_many, budget="1GiB")
    step.backward(TOKENS)
    assert step.plan is not None and step.plan.levers == {}


@pytest.mark.parametrize("rows", [64, 100, 256, 480])
def test_the_predicted_peak_is_the_counted_one(rows: int) -> None:
    model = Large()
    step = sg.Step(model, next_of_many, plan=Plan(
        levers={"chunk_loss": {"head": "head", "rows": rows}}, exactness=Exactness.SAME_SUM, batch_rows=len(TOKENS)
    ))  # fmt: skip
    predicted = ChunkLoss("head", rows).predict(sg.measure_step(step, TOKENS)).peak_allocated_bytes
    layout = step.declared.layout(TOKENS)
    step.prepare(TOKENS)
    rung = measure_rung(step.split_for(TOKENS, layout), TOKENS, layout, [len(TOKENS)], turn=OptimizerTurn())
    assert rung is not None
    # The last chunk may be shorter, which the probes' are not.
    assert -0.001 <= predicted / rung.peak_bytes - 1 <= 0.02


def test_candidates_halve_fit_and_need_a_head() -> None:
    head = HeadLaws(
        path="head", classes=9, positions_per_row=10.0, laws=(law(Phase.LOSS, 20 * MIB, MIB / 100, MIB / 50),)
    )  # fmt: skip
    step = footprint(refusals={}, head=head)
    found = list(ChunkLoss.candidates(step, 60 * MIB))
    assert [c.rows for c in found] == [1024, 512, 256, 128, 64]
    assert all(c.predict(step).peak_allocated_bytes <= 60 * MIB for c in found)
    assert list(ChunkLoss.candidates(footprint(refusals={}), 60 * MIB)) == []
    assert ChunkLoss("head", 64).predict(footprint(refusals={})) == footprint(refusals={})


# Ranks


def _on_a_rank(rank: int) -> dict[str, Any]:
    batch = tuple(part[rank * 3 : rank * 3 + 3] for part in BATCH)
    errors = {}
    for name, options in {"whole": {}, "split": {"split": 2}}.items():
        model = DistributedDataParallel(Words(tied=True).to(D))
        halves = [tuple(part[r * 3 : r * 3 + 3] for part in BATCH) for r in range(2)]
        expected = [plain_step(copy.deepcopy(model.module), of_batch(zoo.flat), half)[1] for half in halves]
        sg.Step(model, of_batch(zoo.flat), plan=plan(**options)).backward(batch)
        errors[name] = max(
            float((p.grad - (expected[0][n] + expected[1][n]) / 2).abs().max())
            for n, p in model.module.named_parameters()
        )
    return errors


def test_ranks_under_ddp_get_the_mean_of_their_gradients() -> None:
    assert all(error < 1e-15 for error in on_two_ranks(_on_a_rank).values())
