"""Steps whose plan recomputes blocks, through the front door: whole, in ragged chunks, inside segments."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.errors import CannotSplit
from samegrad.exact import step_draws
from samegrad.exact.randomness import keyed
from samegrad.measure.counting import ByteCounter
from samegrad.verify import tolerance

from ..crossed import crossed
from ..exact import recompute_zoo as zoo

Batch = tuple[Tensor, Tensor]
SIZES = [4, 5, 2]


def mean_loss(outputs: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


def coupled_loss(outputs: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(outputs, batch[1]) + outputs.std(0).sum()


LOSSES: dict[str, Callable[[Tensor, Batch], Tensor]] = {"one pass": mean_loss, "two passes": coupled_loss}


def batch_of(x: Tensor) -> Batch:
    return x, torch.arange(len(x)) % zoo.CLASSES


def plan(rows: int, **levers: dict[str, Any]) -> sg.Plan:
    exactness = sg.Exactness.SAME_BITS if list(levers) == ["recompute"] else sg.Exactness.SAME_SUM
    return sg.Plan(levers=levers, exactness=exactness, batch_rows=rows)


def left_by(model: nn.Module, batch: Batch, loss_fn: Any, **how: Any) -> dict[str, Tensor]:
    """Loss, gradients, buffers and the generator's state after one step from one seed on a copy of ``model``."""
    twin = copy.deepcopy(model)
    torch.manual_seed(5)
    with sg.Step(twin, loss_fn, forward=lambda m, b: m(b[0]), **how) as step:
        loss = step.backward(batch)
    found = {"loss": loss, "generator": torch.get_rng_state()}
    found |= {f"gradient of {n}": p.grad for n, p in twin.named_parameters() if p.grad is not None}
    assert all("forward" not in vars(part) for part in twin.modules())
    for name, part in twin.named_modules():
        values = {f"{name}.{key}": getattr(part, key) for key in zoo.ATTRIBUTES if hasattr(part, key)}
        found |= {key: torch.as_tensor(value) for key, value in values.items()}
    return found | {f"buffer {n}": b for n, b in twin.named_buffers()}


def same_bits(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> bool:
    assert ours.keys() == plain.keys()
    return all(torch.equal(ours[key], value) for key, value in plain.items())


def worst(ours: dict[str, Tensor], plain: dict[str, Tensor]) -> float:
    """The largest difference as a share of what float64 rounding allows: at most 1 means the same step."""
    assert ours.keys() == plain.keys()
    gradients = [value for key, value in plain.items() if key.startswith("gradient")]
    largest = max(float(value.abs().max()) for value in gradients)
    shares = []
    for key, value in plain.items():
        # For what rows give before they cancel; processors round the products of an LSTM in orders of their own.
        scale = 16 * tolerance.entry_scale(float(value.double().abs().max()), largest)
        apart = float((ours[key].double() - value.double()).abs().max())
        shares.append(apart / (tolerance.entry_allowed(torch.float64) * scale))
    return max(shares)


@pytest.mark.parametrize("form", [2, 3], ids=["one by one", "in runs"])
@pytest.mark.parametrize("name", zoo.MODELS)
def test_recomputation_on_the_whole_batch_is_the_plain_step_bit_for_bit(name: str, form: int) -> None:
    model, x = zoo.made(name)
    blocks: Any = zoo.MODELS[name][form]
    ours = left_by(model, batch_of(x), coupled_loss, plan=plan(len(x), recompute={"blocks": blocks}))
    assert same_bits(ours, left_by(model, batch_of(x), coupled_loss, rows=len(x)))


@pytest.mark.parametrize(("name", "kept_chunks", "loss"), crossed(zoo.BY_ROWS, (0, 2), LOSSES, every=3))
def test_recomputation_in_ragged_chunks_gives_the_split_steps_bits(name: str, kept_chunks: int, loss: str) -> None:
    model, x = zoo.made(name)
    split = {"rows": SIZES, "kept_chunks": kept_chunks}
    alone = left_by(model, batch_of(x), LOSSES[loss], plan=plan(len(x), split_rows=split))
    for blocks in zoo.MODELS[name][2:]:
        both = plan(len(x), split_rows=split, recompute={"blocks": blocks})
        ours = left_by(model, batch_of(x), LOSSES[loss], plan=sg.Plan.from_json(both.to_json()))
        assert same_bits(ours, alone)
    assert worst(alone, left_by(model, batch_of(x), LOSSES[loss], rows=len(x))) <= 1


@pytest.mark.parametrize("name", ["gpt", "lstm", "mixer"])
def test_recomputation_in_chunks_is_plain_pytorch_where_nothing_is_drawn(name: str) -> None:
    model, x = zoo.made(name)
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
    batch, twin = batch_of(x), copy.deepcopy(model)
    loss = coupled_loss(twin(x), batch)
    loss.backward()
    plain = {f"gradient of {n}": p.grad for n, p in twin.named_parameters() if p.grad is not None}
    levers = {"split_rows": {"rows": 4}, "recompute": {"blocks": zoo.MODELS[name][3]}}
    ours = left_by(model, batch, coupled_loss, plan=plan(len(x), **levers))
    assert worst({key: ours[key] for key in plain} | {"loss": ours["loss"]}, plain | {"loss": loss.detach()}) <= 1


class Halves(nn.Module):
    """Rows meet between two row-wise halves; the first holds a dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(zoo.Block(6, 0.3), zoo.Block(6, 0.3))
        self.head = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, zoo.CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        z = self.encoder(x[:, None] * torch.linspace(0.5, 1, 3, dtype=x.dtype)[:, None]).mean(1)
        return self.head(z - z.mean(0))


@pytest.mark.parametrize("blocks", [["encoder.0", "encoder.1"], [["encoder.0", "encoder.1"], "head"]], ids=str)
def test_recomputation_inside_segments_gives_the_segments_bits(blocks: Any) -> None:
    torch.manual_seed(0)
    model, x = Halves().to(zoo.D), zoo.made("gpt")[1]
    segments = {"rows": 4, "paths": {"encoder": 1, "head": 1}}
    alone = left_by(model, batch_of(x), coupled_loss, plan=plan(len(x), segments=segments))
    both = plan(len(x), segments=segments, recompute={"blocks": blocks})
    assert same_bits(left_by(model, batch_of(x), coupled_loss, plan=both), alone)
    assert worst(alone, left_by(model, batch_of(x), coupled_loss, rows=len(x))) <= 1


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_chunks_inside_the_users_autocast_block(narrow: torch.dtype) -> None:
    model, x = zoo.made("gpt")
    model, x = model.float(), x.float()
    split = {"rows": SIZES}
    with torch.autocast("cpu", dtype=narrow):
        alone = left_by(model, batch_of(x), coupled_loss, plan=plan(len(x), split_rows=split))
        both = plan(len(x), split_rows=split, recompute={"blocks": zoo.MODELS["gpt"][3]})
        assert same_bits(left_by(model, batch_of(x), coupled_loss, plan=both), alone)


class Deep(nn.Sequential):
    def __init__(self) -> None:
        make = lambda: nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 16), nn.Tanh())
        super().__init__(*(make() for _ in range(6)))


def peak_bytes(levers: dict[str, dict[str, Any]]) -> int:
    """What a step needs at its peak beyond the weights and their gradients."""
    torch.manual_seed(0)
    model, x = Deep(), torch.randn(600, 16)
    batch = (x, torch.arange(600) % 16)
    how: dict[str, Any] = {"plan": plan(600, **levers)} if levers else {"rows": 600}
    step = sg.Step(model, mean_loss, forward=lambda m, b: m(b[0]), **how)
    step.backward(batch)
    with ByteCounter(x.device) as counter:
        counter.reset_peaks()
        before = counter.live_bytes
        step.backward(batch)
    return counter.peak_bytes - before


def test_both_levers_need_less_than_either() -> None:
    each: dict[str, Any] = {"blocks": [str(i) for i in range(6)]}
    split = {"rows": 150}
    plain, recomputed, chunks = peak_bytes({}), peak_bytes({"recompute": each}), peak_bytes({"split_rows": split})
    both = peak_bytes({"split_rows": split, "recompute": each})
    assert recomputed < 0.5 * plain and chunks < 0.5 * plain
    assert both < 0.7 * min(recomputed, chunks)


def test_a_verified_plan_of_both_levers() -> None:
    model, x = zoo.made("gpt")
    levers = {"split_rows": {"rows": 4}, "recompute": {"blocks": [["h.0", "h.1"], "h.2"]}}
    step = sg.Step(model, coupled_loss, forward=lambda m, b: m(b[0]), plan=plan(len(x), **levers))
    verdict = sg.verify_step(step, batch_of(x))
    assert verdict.same
    assert "recompute: 2 forwards a row" in step.explain()


def from_the_first(self: step_draws.StepDraws) -> Any:
    """Planted: what runs again makes the first draws of the model, not its own."""
    running = getattr(self._here, "running", None) or self._running
    return lambda: keyed(self._key, running.ids, sites=running.sites, first_call=0)


def test_planted_draws_of_another_place_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = zoo.made("gpt")
    split = {"rows": SIZES}
    alone = left_by(model, batch_of(x), mean_loss, plan=plan(len(x), split_rows=split))
    both = plan(len(x), split_rows=split, recompute={"blocks": ["h.0", "h.1"]})
    monkeypatch.setattr(step_draws.StepDraws, "again", from_the_first)
    with pytest.raises(CannotSplit, match=r"the gradient of .* changes"):
        left_by(model, batch_of(x), mean_loss, plan=both)
    # Past the trial on a few rows it would be another step, which the comparison shows.
    monkeypatch.setattr("samegrad.execute.examined.check_levers", lambda *_: None)
    assert not same_bits(left_by(model, batch_of(x), mean_loss, plan=both), alone)
    # Draws of torch's own are no keyed ones: they leave other tensors to be saved.
    monkeypatch.setattr(step_draws.StepDraws, "again", lambda self: nullcontext)
    with pytest.raises(CannotSplit, match="as it ran in forward"):
        left_by(model, batch_of(x), mean_loss, plan=both)


@pytest.mark.parametrize("outer", ["split_rows", "segments", ""])
def test_verification_names_recompute_where_it_is_at_fault(outer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model, x = Halves().to(zoo.D) if outer == "segments" else zoo.GPT().to(zoo.D), zoo.made("gpt")[1]
    blocks = ["encoder.1"] if outer == "segments" else ["h.0", "h.1"]
    knobs: dict[str, Any] = {"rows": 4} | ({"paths": {"encoder": 1, "head": 1}} if outer == "segments" else {})
    levers = ({outer: knobs} if outer else {}) | {"recompute": {"blocks": blocks}}
    step = sg.Step(model, coupled_loss, forward=lambda m, b: m(b[0]), plan=plan(len(x), **levers))
    assert sg.verify_step(step, batch_of(x)).same
    monkeypatch.setattr(step_draws.StepDraws, "again", from_the_first)
    verdict = sg.verify_step(step, batch_of(x))
    assert not verdict.same and verdict.fault.startswith("lever recompute: without it the step passes")


def test_a_planted_second_update_of_state_is_caught_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from samegrad.exact import part_state

    model, x = zoo.made("spectral norm")
    split = {"rows": SIZES}
    both = plan(len(x), split_rows=split, recompute={"blocks": ["blocks.0", "blocks.1"]})
    monkeypatch.setattr(part_state.PartState, "standing", lambda self: nullcontext())
    monkeypatch.setattr("samegrad.execute.examined.check_levers", lambda *_: None)
    with pytest.raises(CannotSplit, match="buffers changed"):
        left_by(model, batch_of(x), mean_loss, plan=both)


class Keys:
    """A cache of what was handed to blocks so far."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []


class Caching(zoo.TupleBlock):
    """A block that writes into what it is handed, as transformers' blocks do where ``use_cache`` is set."""

    def forward(self, hidden: Tensor, attention_mask: Tensor | None = None, cache: Any = None) -> tuple[Any, ...]:
        cache.kept.append(hidden)
        return super().forward(hidden + torch.cat(cache.kept, 1).mean(1, keepdim=True), attention_mask)


class Cached(zoo.GPT):
    def __init__(self) -> None:
        super().__init__(block=Caching)

    def forward(self, x: Tensor) -> Tensor:
        self.keys = Keys()
        return super().forward(x)

    def called(self, block: nn.Module, z: Tensor, mask: Tensor) -> Tensor:
        return block(z, mask, self.keys)[0]


def test_a_block_that_writes_into_a_cache_is_refused_by_its_name() -> None:
    torch.manual_seed(0)
    model, x = Cached().to(zoo.D), zoo.made("gpt")[1]
    for levers in ({}, {"split_rows": {"rows": SIZES}}):
        recompute = {"blocks": [["wte", "drop"], "h.2"]}
        with pytest.raises(CannotSplit, match=r"(?s)run h\.2 again.*the gradient of .* changes.*such as a cache"):
            left_by(model, batch_of(x), mean_loss, plan=plan(len(x), **levers, recompute=recompute))


def test_what_excludes_recomputation_is_refused_in_words() -> None:
    model, x = zoo.made("resnet")
    blocks = {"blocks": ["layer1.0"]}
    both = plan(len(x), exact_batchnorm={"rows": 4}, recompute=blocks)
    with pytest.raises(CannotSplit, match=r"(?s)beside exact_batchnorm.*take one of the two"):
        left_by(model, batch_of(x), mean_loss, plan=both)
    with pytest.raises(CannotSplit, match="normalises with the statistics of all rows"):
        left_by(model, batch_of(x), mean_loss, plan=plan(len(x), split_rows={"rows": 4}, recompute=blocks))
    for wrong, found in (({"blocks": ["layer9"]}, "no part 'layer9'"), ({"blocks": ["fc", "fc"]}, "fc is named twice")):
        with pytest.raises(sg.UsageError, match=found):
            left_by(model, batch_of(x), mean_loss, plan=plan(len(x), recompute=wrong))


def test_an_exception_on_the_way_leaves_the_model_and_its_gradients_alone() -> None:
    model, x = zoo.made("spectral norm")
    before = copy.deepcopy(model.state_dict())
    levers = {"split_rows": {"rows": SIZES}, "recompute": {"blocks": [["blocks.0", "blocks.1"]]}}
    step = sg.Step(model, mean_loss, forward=lambda m, b: m(b[0]), plan=plan(len(x), **levers))
    step.backward(batch_of(x))
    model.load_state_dict(before)
    model.zero_grad()
    counted: list[int] = []

    def failing(*_: Any) -> None:
        # In the second chunk's backward.
        counted.append(len(counted))
        if len(counted) == 4:
            raise ZeroDivisionError

    model.blocks[0][2].register_forward_hook(failing)
    with pytest.raises(ZeroDivisionError):
        step.backward(batch_of(x))
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all("forward" not in vars(part) for part in model.modules())


def test_coupled_models_without_batchnorm_may_recompute_their_blocks() -> None:
    torch.manual_seed(0)
    model, x = Halves().to(zoo.D), zoo.made("gpt")[1]
    footprint = sg.measure_step(sg.Step(model, coupled_loss, forward=lambda m, b: m(b[0])), batch_of(x))
    knobs = {variant.lever: variant.knobs for variant in footprint.variants}
    assert knobs["recompute"] == {"blocks": [["encoder.0"], ["encoder.1"], ["head"]]}


class Twice(nn.Module):
    """One block, called twice, and rows that meet."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        z = self.block(self.block(x))
        return (z - z.mean(0))[:, : zoo.CLASSES]


def test_a_model_without_units_is_refused_by_module() -> None:
    model, x = Twice().to(zoo.D), zoo.made("gpt")[1]
    footprint = sg.measure_step(sg.Step(model, coupled_loss, forward=lambda m, b: m(b[0])), batch_of(x))
    assert "block is called 2 times in a forward" in footprint.refusals["recompute"]
