"""A trace counts what the real step takes, to the byte on the CPU, where both can be had. It changes nothing."""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from samegrad.declared import DeclaredStep, declare
from samegrad.errors import CannotTrace
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.examine import examine
from samegrad.exact.mapped import MappedStep
from samegrad.exact.split import SplitStep, sliced_chunks
from samegrad.exact.step_draws import StepDraws
from samegrad.execute.apply import applied, chunked_step
from samegrad.execute.ways import find_ways
from samegrad.levers.exact_batchnorm import ExactBatchNorm
from samegrad.measure import trace_reading
from samegrad.measure.recorder import Recorder
from samegrad.measure.trace import LossScale, Run, in_chunks, plainly, trace_step
from samegrad.records import Category, Exactness, Phase, Plan

from .traced import Pictures, Words, counted_peaks, cross_entropy, pictures, words

ROWS, SIZES = 13, (4, 4, 5)
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer | None]] = {
    "no optimizer": lambda parameters: None,
    "SGD": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters),
    "AdamW foreach": lambda parameters: torch.optim.AdamW(parameters, foreach=True),
}
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Any]]] = {
    "BatchNorm and dropout": (Pictures, pictures),
    "BatchNorm that only reads": (lambda: Pictures().eval(), pictures),
    "tied weights": (Words, words),
    "tied weights and dropout": (lambda: Words(0.2), words),
    "bfloat16": (lambda: Words().bfloat16(), words),
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def spread(outputs: Tensor, batch: Any) -> Tensor:
    """Couples all rows: two passes."""
    return outputs.std(0).sum() + cross_entropy(outputs, batch)


def ignoring(outputs: Tensor, batch: Any) -> Tensor:
    """Divided by a count that is known when all chunks have run."""
    return nn.functional.cross_entropy(outputs.flatten(0, -2), batch[1].flatten(), ignore_index=7)


def declared_on(
    model: nn.Module, loss_fn: Any = cross_entropy, optimizer: str = "AdamW", **options: Any
) -> DeclaredStep:
    return declare(model, loss_fn, optimizer=OPTIMIZERS[optimizer](model.parameters()), **options)


def split(declared: DeclaredStep, batch: Any, kept: int = 0) -> SplitStep:
    aliases = ParameterAliases({"": declared.network})
    return SplitStep(declared, aliases, examine(declared, aliases, batch, declared.layout(batch)), kept=kept)


def traced_peaks(declared: DeclaredStep, batch: Any, run: Run, device: str = "cpu") -> list[int]:
    trace = trace_step(declared, batch, device=device, run=run)
    return [trace_reading.peak_bytes(trace, step=step) for step in (0, 1)]


# Against the byte counter on the real step.


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", MODELS)
def test_the_plain_step_to_the_byte(name: str, optimizer: str) -> None:
    model, batch_of = MODELS[name]
    declared, batch = declared_on(model(), optimizer=optimizer), batch_of(ROWS)
    # Traced first: then the real first step is the one that makes the optimizer's state.
    assert traced_peaks(declared, batch, plainly()) == counted_peaks(declared, batch, plainly())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", [name for name in MODELS if name != "BatchNorm and dropout"])
def test_one_pass_in_chunks_to_the_byte(name: str, optimizer: str) -> None:
    model, batch_of = MODELS[name]
    declared, batch = declared_on(model(), optimizer=optimizer), batch_of(ROWS)
    step = split(declared, batch)
    assert step.examination.passes == 1
    traced = traced_peaks(declared, batch, in_chunks(step, SIZES))
    assert traced == counted_peaks(declared, batch, in_chunks(step, SIZES))


@pytest.mark.parametrize("kept", [0, 2])
def test_two_passes_to_the_byte(kept: int) -> None:
    declared, batch = declared_on(Words(0.2), spread), words(ROWS)
    step = split(declared, batch, kept)
    assert step.examination.passes == 2
    traced = traced_peaks(declared, batch, in_chunks(step, SIZES))
    assert traced == counted_peaks(declared, batch, in_chunks(step, SIZES))


@pytest.mark.parametrize(
    "options", [{"loss_fn": ignoring}, {"normalise": lambda batch: torch.ones_like(batch[1]).sum()}], ids=str
)
def test_counts_that_cannot_be_read_do_not_stop_a_trace(options: dict[str, Any]) -> None:
    declared, batch = declared_on(Words(), **options), words(ROWS)
    step = split(declared, batch)
    traced = traced_peaks(declared, batch, in_chunks(step, SIZES))
    assert traced == counted_peaks(declared, batch, in_chunks(step, SIZES))


def blocks() -> nn.Module:
    """Three blocks with a BatchNorm and a dropout."""
    parts = [nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.1)) for _ in "abc"]
    return nn.Sequential(nn.Sequential(*parts), nn.Flatten(), nn.Linear(243, 5))


@pytest.mark.parametrize("number", [0, 1], ids=["recomputed", "lockstep"])
def test_parts_of_the_model_in_chunks_to_the_byte(number: int) -> None:
    declared, batch = declared_on(blocks()), pictures(ROWS)
    aliases = ParameterAliases({"": declared.network})
    ways = find_ways(declared, aliases, batch, declared.layout(batch))

    def run() -> Run:
        return in_chunks(MappedStep(declared, aliases, ways.mapped_examination(), ways.mapped[number].scheme()), SIZES)

    assert traced_peaks(declared, batch, run()) == counted_peaks(declared, batch, run())
    assert traced_peaks(declared, batch, run(), device="cuda")


def test_the_plain_step_under_keyed_draws_to_the_byte() -> None:
    declared, batch = declared_on(Words(0.2)), words(ROWS)
    sites = split(declared, batch).examination.sites
    assert sites is not None
    traced = traced_peaks(declared, batch, plainly(StepDraws(sites)))
    assert traced == counted_peaks(declared, batch, plainly(StepDraws(sites)))


def test_state_and_gradients_that_exist_are_there_from_the_start() -> None:
    declared, batch = declared_on(Words()), words(ROWS)
    counted_peaks(declared, batch, plainly())
    plainly()(declared, batch)
    trace = trace_step(declared, batch, device="cpu")
    before = {event.category for event in trace.events if event.operation == -1}
    assert {Category.OPTIMIZER_STATE, Category.GRADIENTS} <= before
    traced = [trace_reading.peak_bytes(trace, step=step) for step in (0, 1)]
    assert traced == counted_peaks(declared, batch, plainly())


def test_a_plan_in_force_is_followed_as_it_runs() -> None:
    declared, batch = declared_on(Words(0.2)), words(ROWS)
    ways = find_ways(declared, ParameterAliases({"": declared.network}), batch, declared.layout(batch))
    plan = Plan(levers={"split_rows": {"rows": 4}}, exactness=Exactness.SAME_SUM, batch_rows=ROWS)

    def run(declared: DeclaredStep, batch: Any) -> object:
        with applied(plan, declared, ROWS) as execution:
            assert execution.sizes is not None
            aliases = ParameterAliases({"": declared.network})
            step = chunked_step(execution, aliases, ways, sliced_chunks)
            return step.backward(batch, declared.layout(batch), execution.sizes)

    assert traced_peaks(declared, batch, run) == counted_peaks(declared, batch, run)
    assert ParameterAliases({"": declared.network}).parameters == list(declared.network.parameters())


@pytest.mark.parametrize("chunked", [False, True])
def test_a_loss_scale_is_followed_without_the_users_scaler(chunked: bool) -> None:
    declared, batch = declared_on(Words()), words(ROWS)
    step = split(declared, batch)
    run = in_chunks(step, SIZES, LossScale()) if chunked else plainly(scaler=LossScale())
    names = [operation.name for operation in trace_step(declared, batch, run=run).operations]
    without = trace_step(declared, batch, run=in_chunks(step, SIZES) if chunked else plainly()).operations
    assert names.count("aten.mul.Tensor") == sum(o.name == "aten.mul.Tensor" for o in without) + 2 * (2 - chunked)


def test_a_planted_leak_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    declared, batch = declared_on(Words()), words(ROWS)
    kept: list[Any] = []
    note = Recorder._note

    def keeping(self: Recorder, func: Any, *rest: Any) -> None:
        kept.append(rest[-1])
        note(self, func, *rest)

    monkeypatch.setattr(Recorder, "_note", keeping)
    assert traced_peaks(declared, batch, plainly()) != counted_peaks(declared, batch, plainly())


# What a trace says of a step.


def test_what_is_written_down_of_each_operation() -> None:
    model, rows = nn.Sequential(nn.Linear(6, 10), nn.Tanh()), 7
    declared = declare(model, lambda outputs, batch: outputs.square().sum(), optimizer=None)
    trace = trace_step(declared, torch.zeros(rows, 6), device="cpu")
    first = [operation for operation in trace.operations if operation.step == 0]
    product = next(operation for operation in first if operation.name == "aten.addmm.default")
    assert (product.module, product.phase, product.kernels, product.dtype) == ("0", Phase.FORWARD, 1, "float32")
    assert product.flops == 2 * rows * 6 * 10
    assert product.moved_bytes == 4 * (rows * 6 + 6 * 10 + 10 + rows * 10)
    backward = [operation for operation in first if operation.phase is Phase.BACKWARD]
    by_name = {operation.name: operation.module for operation in backward}
    assert by_name["aten.tanh_backward.default"] == "1" and by_name["aten.mm.default"] == "0"
    assert all(operation.kernels == 0 for operation in first if operation.name == "aten.t.default")
    assert trace.batch_rows == rows and trace.sizes == (rows,) and trace.device == "cpu"


def test_what_lives_at_the_peak_adds_up() -> None:
    trace = trace_step(declared_on(Pictures()), pictures(ROWS), device="cpu")
    peak = trace_reading.find_peak(trace)
    living = trace_reading.live_at(trace, peak)
    assert sum(storage.size_bytes for storage in living) == peak.live_bytes == sum(peak.by_category.values())
    assert living == sorted(living, key=lambda storage: -storage.size_bytes)
    assert max(trace_reading.peak_by_phase(trace).values()) == peak.live_bytes
    course = trace_reading.timeline(trace)
    assert max(sum(point.live_bytes.values()) for point in course) == peak.live_bytes
    assert {"stem", "norm", "head"} <= trace_reading.by_module_at(trace, peak).keys()
    rounded = trace_reading.find_peak(trace, round_to=trace_reading.CUDA_BLOCK_BYTES)
    assert rounded.live_bytes % 512 == 0 and 0 <= rounded.live_bytes - peak.live_bytes < 512 * len(living)


def test_models_on_no_device_and_on_the_cpu_are_followed_alike() -> None:
    here = trace_step(declared_on(Words()), words(ROWS))
    with torch.device("meta"):
        nowhere = declared_on(Words())
    there = trace_step(nowhere, words(ROWS, "meta"))
    resident = {e.storage for e in there.events if e.category is Category.INPUTS and e.operation == -1}
    assert resident and not any(e.category is Category.INPUTS and e.operation == -1 for e in here.events)
    # A batch on the host arrives in the step; from then on both hold the same.
    assert trace_reading.peak_bytes(here) == trace_reading.peak_bytes(there)


def test_chunks_from_the_host_arrive_in_two_places() -> None:
    declared, batch = declared_on(Words()), words(ROWS)
    trace = trace_step(declared, batch, run=in_chunks(split(declared, batch), SIZES), sizes=SIZES)
    inputs = [event.change_bytes for event in trace.events if event.category is Category.INPUTS]
    tokens = max(SIZES) * 11 * 8
    assert inputs == [tokens] * 4, "two leaves in two places, kept between steps"
    assert trace.sizes == SIZES


class Mapped:
    """Rows on a disk that must not be read."""

    def __init__(self, rows: int) -> None:
        self.shape, self.dtype = (rows, 11), torch.int64

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        raise AssertionError("a trace has read")


def test_rows_on_disk_are_not_read() -> None:
    declared = declared_on(Words())
    step, batch = split(declared, words(ROWS)), (Mapped(ROWS), Mapped(ROWS))
    for run in (plainly(), in_chunks(step, SIZES)):
        for device in ("cpu", "cuda"):
            assert trace_step(declared, batch, run=run, device=device).operations


# What cannot be followed.


class Reads(nn.Module):
    """``reads`` is called with the output of a part named ``inner.1``."""

    def __init__(self, reads: Callable[[Tensor], Tensor]) -> None:
        super().__init__()

        class Part(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return reads(x)

        self.inner = nn.Sequential(nn.Linear(6, 3), Part())

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.inner(x)
        return made


NEEDS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "item": (lambda x: x * x.detach().mean().item(), "_local_scalar_dense"),
    "branch": (lambda x: x if x.sum() > 0 else -x, "_local_scalar_dense"),
    "mask": (lambda x: x[x[:, 0] > 0], "aten.index"),
    "numpy": (lambda x: x * float(x.detach().numpy()[0, 0]), "numpy"),
    "raises": (lambda x: x.view(-1, 5, 5, 5), "view"),
}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", NEEDS)
def test_what_needs_values_is_named_with_its_place(name: str, device: str) -> None:
    reads, word = NEEDS[name]
    declared = declare(Reads(reads), lambda outputs, batch: outputs.sum())
    with pytest.raises(CannotTrace) as caught:
        trace_step(declared, torch.ones(4, 6), device=device)
    assert word in caught.value.found and "inner.1 (test_trace.py:" in caught.value.found


def test_chunks_in_threads_are_refused() -> None:
    declared, batch = declared_on(blocks()), pictures(ROWS)
    aliases = ParameterAliases({"": declared.network})
    ways = find_ways(declared, aliases, batch, declared.layout(batch))
    step = MappedStep(declared, aliases, ways.mapped_examination(), ExactBatchNorm(1, "rendezvous").scheme())
    with pytest.raises(CannotTrace, match="threads"):
        trace_step(declared, batch, run=in_chunks(step, SIZES))


def test_hooks_that_could_step_inside_backward_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    model[0].weight.register_post_accumulate_grad_hook(lambda parameter: None)
    with pytest.raises(CannotTrace, match=r"0\.weight"):
        trace_step(declare(model, lambda outputs, batch: outputs.sum()), torch.ones(4, 6))


def test_an_optimizer_that_reads_values_leaves_a_note() -> None:
    model = Words()
    declared = declare(model, cross_entropy, optimizer=torch.optim.Adafactor(model.parameters()))
    trace = trace_step(declared, words(ROWS))
    assert "Adafactor" in trace.notes["optimizer"]
    assert any(event.category is Category.OPTIMIZER_STATE for event in trace.events)


def test_another_device_is_refused() -> None:
    with pytest.raises(CannotTrace, match="mps"):
        trace_step(declared_on(Words()), words(ROWS), device="mps")


class Clamped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent * (ctx.saved_tensors[0] > 0)


def test_functions_and_hooks_of_the_users_run() -> None:
    declared = declared_on(Reads(Clamped.apply), lambda outputs, batch: outputs.sum())
    declared.network.inner[0].weight.register_hook(lambda gradient: gradient * torch.ones(50, 1, 1).mean(0))
    declared.network.inner.register_forward_hook(lambda module, given, made: made.repeat(1, 40))
    batch = torch.ones(ROWS, 6)
    assert traced_peaks(declared, batch, plainly()) == counted_peaks(declared, batch, plainly())


# Nothing of the user's changes.


def fingerprint(declared: DeclaredStep, extra: Any) -> str:
    """Of all that a step could change."""
    digest = hashlib.sha256()

    def add(*parts: Any) -> None:
        for part in parts:
            digest.update(part.detach().numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode())

    for module in declared.modules:
        for path, part in module.named_modules():
            add(path, part.training, sorted(part._forward_hooks), list(part._parameters), list(part._modules))
            add(*(f"{key} {id(value)}" for key, value in (*part._parameters.items(), *part._buffers.items())))
        for name, parameter in module.named_parameters():
            add(name, parameter, parameter.requires_grad, id(parameter.grad))
            add(*([] if parameter.grad is None else [parameter.grad]))
        for name, buffer in module.named_buffers():
            add(name, buffer, buffer._version)
    optimizer = declared.optimizer
    if optimizer is not None:
        add(len(optimizer.state), [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
        for state in optimizer.state.values():
            for key, value in state.items():
                add(key, value)
    add(torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=True), extra)
    return digest.hexdigest()


class Stateful(nn.Module):
    """Counts, draws in Python and numpy, switches modes and keeps what it saw."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.part, self.recurrent = Pictures(), nn.LSTM(5, 5, batch_first=True)
        self.calls, self.last, self.fails = 0, None, fails
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        made = self.part(x) * random.random() * np.random.rand()
        self.seen.append(made)
        self.last = made
        self.part.eval()
        for parameter in self.part.head.parameters():
            parameter.requires_grad_(False)
        if self.fails:
            raise ValueError("the user's own")
        return self.recurrent(made[:, None])[0][:, 0]


@contextmanager
def trained(fails: bool) -> Iterator[tuple[DeclaredStep, Any, dict[str, Any]]]:
    """A step with optimizer state and a gradient, whose loss keeps a moving centre, and what to look at besides."""
    model, held = Stateful(False), {"centre": torch.ones(5), "calls": []}

    def loss_fn(outputs: Tensor, batch: Any) -> Tensor:
        held["centre"].mul_(0.9).add_(outputs.detach().mean(0), alpha=0.1)
        held["calls"].append(outputs)
        return cross_entropy(outputs - held["centre"], batch)

    declared = declared_on(model, loss_fn)
    batch = pictures(6)
    plainly()(declared, batch)
    assert declared.optimizer is not None
    declared.optimizer.step()
    model.part.register_forward_hook(lambda module, given, made: held["calls"].append(made))
    model.fails = fails
    yield declared, batch, held


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("fails", [False, True], ids=["runs", "raises"])
def test_nothing_of_the_users_changes(fails: bool, device: str) -> None:
    with trained(fails) as (declared, batch, held):
        model = declared.network

        def now() -> str:
            mine = (held["centre"].tolist(), len(held["calls"]), model.calls, len(model.seen), id(model.last))
            return fingerprint(declared, (mine, [t.tolist() for t in batch]))

        before, dispatch = now(), dict(vars(torch._subclasses.FakeTensor))
        if fails:
            with pytest.raises(CannotTrace, match="the user's own") as caught:
                trace_step(declared, batch, device=device)
            assert isinstance(caught.value.__cause__, ValueError)
        else:
            trace_step(declared, batch, device=device)
        assert now() == before
        assert dict(vars(torch._subclasses.FakeTensor)) == dispatch
        assert nn.functional.dropout(torch.ones(3), 0.0).tolist() == [1, 1, 1]


def test_the_planted_change_is_seen() -> None:
    with trained(False) as (declared, _, _):
        before = fingerprint(declared, None)
        with torch.no_grad():
            declared.network.part.head.weight[0, 0] += 1
        assert fingerprint(declared, None) != before


def test_a_parameter_reached_past_its_slot_keeps_its_gradient() -> None:
    hidden = [nn.Parameter(torch.ones(5))]
    declared = declared_on(nn.Linear(6, 5), lambda outputs, batch: (outputs * hidden[0]).sum())
    trace_step(declared, torch.ones(4, 6), device="cpu")
    assert hidden[0].grad is None
    hidden[0].grad = given = torch.full((5,), 2.0)
    trace_step(declared, torch.ones(4, 6))
    assert hidden[0].grad is given and given.tolist() == [2.0] * 5


def test_the_next_real_step_is_the_one_it_would_have_been() -> None:
    model = Words(0.2)
    twin = copy.deepcopy(model)
    declared, batch = declared_on(model), words(ROWS)
    for device in ("cpu", "cuda"):
        trace_step(declared, batch, device=device)
    torch.manual_seed(5)
    cross_entropy(model(batch[0]), batch).backward()
    torch.manual_seed(5)
    cross_entropy(twin(batch[0]), batch).backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None and torch.equal(ours.grad, theirs.grad)


def test_a_tensor_that_the_step_makes_on_the_host_is_named_by_its_line() -> None:
    declared = declared_on(Words(), lambda outputs, _: cross_entropy(outputs, (0, torch.zeros(ROWS * 11).long())))
    with pytest.raises(CannotTrace, match=r"(?s)traced\.py:\d+\) takes a tensor of the host.*device=x\.device"):
        trace_step(declared, words(ROWS))
    trace_step(declared, words(ROWS), device="cpu")
