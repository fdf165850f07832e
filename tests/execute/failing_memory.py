"""Memory that runs out where a test says, steps of several kinds to run out in, and all that a step leaves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import samegrad as sg
from samegrad.execute.kept_plans import Kept
from samegrad.measure.counting import ByteCounter
from samegrad.records import Budget, Counting, Exactness, Footprint, Origin, Plan
from samegrad.trees import extents_of

D = torch.float64
ROWS = 7
Levers = dict[str, dict[str, Any]]
Batch = tuple[Tensor, Tensor]


class FailsAt(TorchDispatchMode):
    """Raises ``error`` in place of operation number ``at`` (from 0), once; counts all of them."""

    def __init__(self, at: int | None, error: BaseException | None = None) -> None:
        super().__init__()
        self.at, self.count, self.failed_in = at, 0, ""
        self._error = torch.OutOfMemoryError("planted") if error is None else error

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        number, self.count = self.count, self.count + 1
        if number == self.at:
            self.failed_in = str(func)
            raise self._error
        return func(*args, **(kwargs or {}))


class Limited(TorchDispatchMode):
    """An allocator of ``limit_bytes``: raises when an operation leaves more than that alive."""

    def __init__(self, counter: ByteCounter, limit_bytes: int) -> None:
        super().__init__()
        self._counter, self._limit_bytes, self.failures = counter, limit_bytes, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        # The counter, which is entered first, sees the operation when it is done.
        if self._counter.live_bytes > self._limit_bytes:
            del made
            self.failures += 1
            raise torch.OutOfMemoryError(f"planted: more than {self._limit_bytes} bytes")
        return made


class Centred(nn.Module):
    """An encoder that treats rows alone, and a head on rows whose mean is taken off."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.3), nn.Tanh())
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.encoder(x)
        return self.head(hidden - hidden.mean(0))


class Moving(nn.Module):
    """A layer with state that the engine reduces: a count of calls and a moving mean of its rows."""

    calls: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("mean", torch.zeros(6, dtype=D))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return x


def dropping(*between: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), *between, nn.Dropout(0.3), nn.Tanh(), nn.Linear(6, 3))


def cross_entropy(outputs: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


def coupled(outputs: Tensor, batch: Batch) -> Tensor:
    return outputs.std(0).sum() + cross_entropy(outputs, batch)


@dataclasses.dataclass(frozen=True)
class Kind:
    """A step, the plan that runs out of memory, and the one below it. ``scaled``: with a GradScaler."""

    name: str
    model: Callable[[], nn.Module]
    left: Levers
    taken: Levers
    loss: Callable[[Any, Any], Tensor] = cross_entropy
    segments: tuple[str, ...] | None = None
    scaled: bool = False

    def make(self) -> nn.Module:
        torch.manual_seed(3)
        return self.model().to(D)

    def step(self, model: nn.Module, **options: Any) -> sg.Step:
        return sg.Step(model, self.loss, segments=self.segments, **options)

    def scaler(self) -> Any:
        return torch.amp.GradScaler("cpu", init_scale=64.0) if self.scaled else None


def split(rows: int) -> Levers:
    return {"split_rows": {"rows": rows}}


def _segments(rows: int) -> Levers:
    return {"segments": {"rows": rows, "paths": {"encoder": 1}}}


def _head(rows: int) -> Levers:
    return {"chunk_loss": {"head": "3", "rows": rows}}


KINDS = {
    kind.name: kind
    for kind in (
        Kind("whole", dropping, {}, split(3)),
        Kind("whole, BatchNorm", lambda: dropping(nn.BatchNorm1d(6)), {}, {"exact_batchnorm": {"rows": 3}}),
        Kind("single pass", dropping, split(4), split(2)),
        Kind("single pass, state, scaler", lambda: dropping(Moving()), split(4), split(2), scaled=True),
        Kind("two passes", dropping, split(4), split(2), loss=coupled),
        Kind(
            "two passes, kept graphs", dropping, {"split_rows": {"rows": 3, "kept_chunks": 2}}, split(2), loss=coupled
        ),
        Kind(
            "exact_batchnorm", lambda: dropping(nn.BatchNorm1d(6)), {"exact_batchnorm": {"rows": 4}},
            {"exact_batchnorm": {"rows": 2}}, scaled=True,
        ),
        Kind("segments", Centred, _segments(4), _segments(2), segments=("encoder",)),
        Kind("recompute", dropping, {"recompute": {"blocks": ["0"]}}, {"recompute": {"blocks": ["0", "2"]}}),
        Kind("chunk_loss", dropping, _head(5), _head(3)),
        Kind("host_rows", dropping, {"host_rows": {}, **split(4)}, {"host_rows": {}, **split(3)}, scaled=True),
    )
}  # fmt: skip


def batch_of(rows: int = ROWS, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, generator=generator, dtype=D), torch.randint(0, 3, (rows,), generator=generator)


@dataclasses.dataclass(frozen=True)
class Left:
    """All that a step leaves: loss, gradients, buffers, the generator."""

    loss: Tensor
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]
    generator: Tensor

    @classmethod
    def by(cls, model: nn.Module, loss: Tensor) -> Left:
        gradients = {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        return cls(loss, gradients, buffers, torch.get_rng_state())

    def differing(self, other: Left) -> list[str]:
        """What is not the same bit for bit."""
        pairs = [("loss", self.loss, other.loss), ("generator", self.generator, other.generator)]
        pairs += [(f"gradient of {name}", mine, other.gradients[name]) for name, mine in self.gradients.items()]
        pairs += [(name, mine, other.buffers[name]) for name, mine in self.buffers.items()]
        return [
            name for name, a, b in pairs
            if (a is None) != (b is None) or (a is not None and b is not None and not torch.equal(a, b))
        ]  # fmt: skip


def plan(levers: Levers, needed_bytes: int = 1000, rows: int = ROWS) -> Plan:
    budget = Budget(total_bytes=10**6, device="cpu", counting=Counting.TENSOR_BYTES, source="budget=1000000")
    return Plan(
        levers=levers, exactness=Exactness.SAME_SUM, batch_rows=rows, budget=budget, predicted_peak_bytes=needed_bytes
    )


class Rerun:
    """One step of a kind, run again and again from the same state under the plan that is to fail first."""

    def __init__(self, kind: Kind, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
        self.kind, self.batch = kind, self.rows()
        self.model = kind.make()
        self.step = kind.step(self.wrapped(self.model), budget=10**6, **options)
        self.smaller = [plan(kind.taken, 800)]
        monkeypatch.setattr("samegrad.step.smaller_plans", lambda footprint, plan, allow: iter(self.smaller))
        self._state = {name: value.clone() for name, value in self.model.state_dict().items()}
        torch.manual_seed(11)
        self._generator = torch.get_rng_state()
        declared = self.step.declared
        self._key = declared.layout(self.batch).signature(self.batch), declared.mode()
        extents = extents_of(self.batch, declared.layout(self.batch))
        self._plan = Kept(plan(kind.left), _footprint(), extents)
        self.run(None)
        self.expected, self.unmoved = self.by_itself(kind.taken), self.by_itself(kind.left)

    def rows(self) -> Batch:
        return batch_of()

    def wrapped(self, model: nn.Module) -> nn.Module:
        return model

    def reset(self) -> None:
        self.model.load_state_dict(self._state)
        self.model.zero_grad()
        torch.set_rng_state(self._generator)
        self.step._plans.keep(self._key, self._plan)

    def run(self, at: int | None, error: BaseException | None = None) -> tuple[Left, FailsAt]:
        """What the step leaves when operation ``at`` runs out of memory."""
        self.reset()
        with FailsAt(at, error) as failing:
            loss = self.step.backward(self.batch, scaler=self.kind.scaler())
        return Left.by(self.model, loss), failing

    def by_itself(self, levers: Levers) -> Left:
        """What a step leaves that had this plan from the start, in a Step and a model of its own."""
        model = self.kind.make()
        with self.kind.step(self.wrapped(model), plan=plan(levers)) as step:
            torch.set_rng_state(self._generator)
            return Left.by(model, step.backward(self.batch, scaler=self.kind.scaler()))

    def places(self, stride: int) -> Iterator[int]:
        """Operations of the step under the plan that fails, every ``stride``-th, and the last."""
        count = self.run(None)[1].count
        yield from range(0, count - 1, stride)
        yield count - 1


def _footprint() -> Footprint:
    return Footprint(
        device="cpu", counting=Counting.TENSOR_BYTES, origin=Origin.PREDICTED, basis="none", rows=ROWS,
        batch_rows=ROWS, peak_allocated_bytes=1000,
    )  # fmt: skip
