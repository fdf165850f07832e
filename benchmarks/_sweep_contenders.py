"""Who runs the steps of the sweep: plain loops, what people do to fit a card, libraries that do it, and samegrad.

Each is a context that gives the backward of a whole batch; it may run steps to find how, and raises an out-of-memory
error where it finds nothing. Composer's ``auto`` is there as its method only: its wheel wants a torch below 2.7.1.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import _steps
import torch
from _sweep_training import Training, loss_of
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import samegrad as sg
from samegrad.exact.out_of_memory import is_out_of_memory

# A training run of some hours; compiling must pay for itself within it.
EXPECTED_STEPS = 100_000

Backward = Callable[[], None]
Contender = Callable[[Training, "int | None"], contextlib.AbstractContextManager[Backward]]


@contextlib.contextmanager
def plain(training: Training, budget: int | None) -> Iterator[Backward]:
    yield lambda: training.loss(training.batch).backward()


@contextlib.contextmanager
def plain_compiled(training: Training, budget: int | None) -> Iterator[Backward]:
    compiled = torch.compile(training.loss, dynamic=False)
    yield lambda: compiled(training.batch).backward()


@contextlib.contextmanager
def checkpointed(training: Training, budget: int | None) -> Iterator[Backward]:
    with _recomputing(training.model), plain(training, budget) as backward:
        yield backward


@contextlib.contextmanager
def checkpointed_compiled(training: Training, budget: int | None) -> Iterator[Backward]:
    with _recomputing(training.model), plain_compiled(training, budget) as backward:
        yield backward


@contextlib.contextmanager
def save_on_cpu(training: Training, budget: int | None) -> Iterator[Backward]:
    def backward() -> None:
        with torch.autograd.graph.save_on_cpu(pin_memory=True):
            loss = training.loss(training.batch)
        loss.backward()

    yield backward


@contextlib.contextmanager
def compile_budget(training: Training, budget: int | None) -> Iterator[Backward]:
    """torch's own budget of what a compiled step keeps: of its tenths the largest that fits."""

    def compiled_to(tenths: int) -> Backward:
        torch._dynamo.reset()
        compiled = torch.compile(training.loss, dynamic=False)

        def backward() -> None:
            # Read when the step is compiled, at its first call.
            with torch._functorch.config.patch(activation_memory_budget=tenths / 10):
                compiled(training.batch).backward()

        return backward

    fits, too_much = 0, 10
    while too_much - fits > 1:
        tenths = (fits + too_much) // 2
        fits, too_much = (tenths, too_much) if _fits(training, compiled_to(tenths)) else (fits, tenths)
    yield compiled_to(fits)


@contextlib.contextmanager
def halved(training: Training, budget: int | None, *, compiled: bool = False) -> Iterator[Backward]:
    """Rows halved until a step fits, the loss weighted by rows: what Composer's ``auto`` does."""
    loss = torch.compile(training.loss, dynamic=False) if compiled else training.loss
    rows = training.rows
    while rows > 1 and not _fits(training, in_parts(training, rows, loss)):
        rows //= 2
    yield in_parts(training, rows, loss)


@contextlib.contextmanager
def accelerate(training: Training, budget: int | None) -> Iterator[Backward]:
    """The rows that Accelerate finds, a tenth less after each failure, and accumulation weighted by rows."""
    from accelerate.utils import find_executable_batch_size

    @find_executable_batch_size(starting_batch_size=training.rows)
    def find(rows: int) -> int:
        training.optimizer.zero_grad(set_to_none=True)
        _try(training, in_parts(training, rows, training.loss))
        return rows

    yield in_parts(training, find(), training.loss)


@contextlib.contextmanager
def lightning(training: Training, budget: int | None) -> Iterator[Backward]:
    """The rows that Lightning's finder ends at, doubled until a step fails, and accumulation weighted by rows."""
    import pytorch_lightning

    class Fitted(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.batch_size = training.model, 2

        def training_step(self, rows: list[Tensor], _: int) -> Tensor:
            return training.loss((rows[0], rows[1]))

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(TensorDataset(*training.batch), batch_size=self.batch_size)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return training.optimizer

    with tempfile.TemporaryDirectory() as folder:
        trainer = pytorch_lightning.Trainer(
            devices=1, max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        finder = pytorch_lightning.tuner.Tuner(trainer)
        rows = finder.scale_batch_size(Fitted(), mode="power", steps_per_trial=2, init_val=2)
    training.model.to(training.batch[0].device)
    training.optimizer.zero_grad(set_to_none=True)
    emptied()
    yield in_parts(training, min(rows or 1, training.rows), training.loss)


@contextlib.contextmanager
def samegrad(training: Training, budget: int | None) -> Iterator[Backward]:
    with sg.Step(
        training.model, loss_of, forward=training.forward, optimizer=training.optimizer, budget=budget, enforce=True,
        expected_steps=EXPECTED_STEPS,
    ) as step:  # fmt: skip
        step.prepare(training.batch)
        backward: Any = functools.partial(step.backward, training.batch)
        backward.plan = step.plan
        yield backward


CONTENDERS: dict[str, Contender] = {
    "plain": plain,
    "plain compiled": plain_compiled,
    "checkpointing": checkpointed,
    "checkpointing compiled": checkpointed_compiled,
    "compile budget": compile_budget,
    "save_on_cpu": save_on_cpu,
    "halved batch": halved,
    "halved batch compiled": functools.partial(halved, compiled=True),
    "accelerate": accelerate,
    "lightning": lightning,
    "samegrad": samegrad,
}
# They run fewer rows at a time: with layers that couple rows that is another function.
IN_PARTS = frozenset(("halved batch", "halved batch compiled", "accelerate", "lightning"))


def in_parts(training: Training, rows: int, loss: Callable[[Any], Tensor]) -> Backward:
    """``rows`` at a time, each loss weighted by its rows."""

    def backward() -> None:
        for part in zip(*(leaf.split(rows) for leaf in training.batch)):
            (loss(part) * (len(part[0]) / training.rows)).backward()

    return backward


def _try(training: Training, backward: Backward) -> None:
    for _ in range(2):
        backward()
        training.optimizer.step()
        training.optimizer.zero_grad(set_to_none=True)


def _fits(training: Training, backward: Backward) -> bool:
    try:
        _try(training, backward)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    else:
        fits = True
    training.optimizer.zero_grad(set_to_none=True)
    emptied()
    return fits


def emptied() -> None:
    gc.collect()
    torch.cuda.empty_cache()


@contextlib.contextmanager
def _recomputing(model: nn.Module) -> Iterator[None]:
    blocks = list(_steps._blocks_of(model))
    for block in blocks:
        block.forward = _steps._recomputing(block.forward)  # type: ignore[method-assign]  # as users do it
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
