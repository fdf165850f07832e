"""A step followed without being run: no data, no device, and yet every operation and every byte, twice.

    trace = trace_step(declared, batch)                                 the plain step, as CUDA would run it
    trace = trace_step(declared, batch, run=in_chunks(split, sizes))    the same in chunks

The user's own code runs, on twins without data (``shadows``), under CUDA's or the CPU's choice of kernels
(``cuda_dispatch``), and is written down (``recorder``). The second step has the optimizer's state. Nothing of the
user's changes. What needs values (``.item()``, shapes that depend on data) raises CannotTrace with its place.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from samegrad.declared import Around, DeclaredStep
from samegrad.errors import CannotTrace
from samegrad.exact.aliases import ParameterAliases
from samegrad.exact.one_chunk import ChunkedStep
from samegrad.exact.phases import listening
from samegrad.exact.split import SplitStep, plain_backward
from samegrad.exact.step_draws import StepDraws
from samegrad.exact.undisturbed import undisturbed
from samegrad.exact.whole import WholeStep
from samegrad.measure import census, cuda_trial, known_values
from samegrad.measure.arriving_rows import ArrivingRows
from samegrad.measure.cuda_dispatch import CpuDispatch, CudaDispatch
from samegrad.measure.events import MemoryEvent, Operation, Trace
from samegrad.measure.failures import explained, first_line
from samegrad.measure.recorder import Recorder
from samegrad.measure.replaced import generators_at_rest
from samegrad.measure.second_step import Again
from samegrad.measure.shadows import (
    NamedModules,
    Numbers,
    Twins,
    held_with_hooks,
    named_modules,
    read_numbers,
    refuse_hooks_in_backward,
    shadow_batch,
    shadow_optimizer,
    standing_in,
)
from samegrad.module_walk import is_compiled, parameters_of
from samegrad.records import Category, Phase

# run(declared, batch): forward, loss and backward, which leaves gradients in ``.grad``.
Run = Callable[[DeclaredStep, Any], object]
# stands(declared): a block in which stands what a plan needs between steps as well.
Stands = Callable[[DeclaredStep], contextlib.AbstractContextManager[Around]]

STEPS = 2
# Operations that keep memory of a size that only their libraries know.
_UNSURE = {
    "aten._cudnn_rnn.default": "what cuDNN reserves for its backward is an estimate",
    "aten.mkldnn_rnn_layer.default": "what oneDNN keeps for its backward is not in it",
}

Found = TypeVar("Found")


class LossScale:
    """What a ``GradScaler`` does to a loss, without the scaler: its numbers are the user's."""

    def scale(self, loss: Tensor) -> Tensor:
        return loss * torch.ones((), dtype=torch.float32, device=loss.device)


def plainly(draws: StepDraws | None = None, scaler: LossScale | None = None) -> Run:
    """The plain step on the whole batch; ``draws`` where it is one that may be split."""

    def run(declared: DeclaredStep, batch: Any) -> object:
        return plain_backward(declared, batch, declared.layout(batch), scaler, draws)

    return run


def handed_over(step: WholeStep) -> Run:
    """``step`` as plans run it: gradients set apart in backward, and handed over."""

    def run(declared: DeclaredStep, batch: Any) -> object:
        parameters = [p for p in parameters_of(declared.modules) if p.requires_grad]
        standing = dataclasses.replace(step, declared=declared, parameters=parameters)
        return standing.backward(batch, declared.layout(batch))

    return run


def in_chunks(step: ChunkedStep, sizes: Sequence[int], scaler: LossScale | None = None) -> Run:
    """``step`` in chunks of ``sizes`` rows, handed over. Chunks of a batch on the host arrive ahead, as they do."""
    chunks = ArrivingRows()

    def run(declared: DeclaredStep, batch: Any) -> object:
        aliases = ParameterAliases(step.aliases.roots)
        standing: ChunkedStep
        if isinstance(step, SplitStep):
            standing = dataclasses.replace(step, declared=declared, aliases=aliases, chunks=chunks)
        else:
            standing = dataclasses.replace(step, declared=declared, aliases=aliases)
        return standing.backward(batch, declared.layout(batch), sizes, scaler)

    return run


def trace_step(
    declared: DeclaredStep,
    batch: Any,
    *,
    device: str = "cuda",
    run: Run | None = None,
    sizes: Sequence[int] | None = None,
    stands: Stands | None = None,
    repeats: bool = False,
) -> Trace:
    """Two steps of ``declared`` on ``batch``: ``run``, the optimizer's step, gradients cleared.

    The model may be on any device or on none (meta); the step is followed as on ``device``, "cuda" or "cpu". Leaves of
    the batch that are where the model is are there as a whole, and so are leaves on meta; but a model on the CPU that
    is followed on CUDA leaves its batch on the host. For as long as this takes, torch's CUDA kernels for autocast and a
    few layers are replaced, in other threads too. ``run``: by default the plain step. ``sizes``: written down as the
    chunks' rows. ``stands``: what stands on the twins before the first step and until after the last,
    and yields what goes around each backward. ``repeats``: this step is known to do the same in both up to the
    optimizer's turn, which spares running the second.
    Raises CannotTrace, with the module and the operation, for what needs values, and for what the step raises.
    """
    dispatch, notes = _dispatch(device)
    layout = declared.layout(batch)
    modules = named_modules(declared)
    notes |= _notes_on(declared, modules)
    run = plainly() if run is None else run
    operations, events, pieces = _followed(declared, batch, dispatch, run, stands or _nothing_stands, notes, repeats)
    unsure = sorted({operation.name for operation in operations} & _UNSURE.keys())
    return Trace(
        operations=operations,
        events=events,
        device=dispatch.device.type,
        batch_rows=layout.rows,
        sizes=(layout.rows,) if sizes is None else tuple(sizes),
        notes=notes | {name: _UNSURE[name] for name in unsure},
        pieces=pieces,
        module_classes={
            path: type(part).__name__ for path, part in modules if path.rpartition(".")[2].isdecimal()
        },
    )


def _dispatch(device: str) -> tuple[CpuDispatch | CudaDispatch, dict[str, str]]:
    if torch.device(device).type == "cpu":
        return CpuDispatch(), {}
    if torch.device(device).type != "cuda":
        raise CannotTrace(
            asked=f"follow a step as on {device!r}", found="neither 'cuda' nor 'cpu'", do="name one of the two"
        )
    reason = cuda_trial.why_not()
    if not reason:
        return CudaDispatch(), {}
    return CpuDispatch(), {"cuda": f"the CPU's kernels were followed, since CUDA's could not be ({reason})"}


def look_at(
    declared: DeclaredStep, batch: Any, look: Callable[[DeclaredStep, Any], Found], *, device: str = "cuda"
) -> Found:
    """What ``look(declared, batch)`` finds on twins without data; what it runs is followed and not written down.

    Nothing of the user's changes. Raises CannotTrace as ``trace_step`` does.
    """
    dispatch, _ = _dispatch(device)
    with _in_place(declared, batch, dispatch) as (_, standing, rows):
        return look(standing, rows)


def _nothing_stands(_: DeclaredStep) -> contextlib.AbstractContextManager[Around]:
    return contextlib.nullcontext(contextlib.nullcontext)


def _followed(
    declared: DeclaredStep,
    batch: Any,
    dispatch: CpuDispatch | CudaDispatch,
    run: Run,
    stands: Stands,
    notes: dict[str, str],
    repeats: bool,
) -> tuple[tuple[Operation, ...], tuple[MemoryEvent, ...], dict[int, tuple[int, ...]]]:
    with _in_place(declared, batch, dispatch) as (recorder, standing, rows), stands(standing) as around:
        # What was put in another's place is for what that was for.
        recorder.twins.forget_replaced()
        _claim_residents(recorder, standing, rows)
        pieces = _pieces(recorder, standing)
        run = Again(recorder, run) if repeats else run
        for index in range(STEPS):
            recorder.step = index
            _one_step(standing, rows, recorder, run, around, notes)
        if recorder.values_read:
            where = ", ".join(sorted(recorder.values_read)[:3])
            notes["values"] = f"the code reads values of the batch (in {where}); another batch may go another way"
        # Before the twins go: they live between steps.
        return tuple(recorder.operations), recorder.events(), pieces


@contextlib.contextmanager
def _in_place(
    declared: DeclaredStep, batch: Any, dispatch: CpuDispatch | CudaDispatch
) -> Iterator[tuple[Recorder, DeclaredStep, Any]]:
    """Twins in the place of the step's tensors, and who writes down what is done with them."""
    modules = named_modules(declared)
    refuse_hooks_in_backward(modules)
    paths = {id(part): path for path, part in reversed(modules)}
    twins = Twins(declared.device, dispatch.device)
    recorder = Recorder(dispatch, twins, paths, gradients_of=declared.modules)
    with contextlib.ExitStack() as stack:
        stack.enter_context(undisturbed(declared.modules, declared.device, held_with_hooks(declared, modules)))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        numbers = read_numbers(declared.optimizer)
        if isinstance(dispatch, CudaDispatch):
            stack.enter_context(dispatch.followed())
        stack.enter_context(generators_at_rest())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(standing_in(modules, twins))
        standing, rows = _standing(declared, batch, dispatch.device, twins, numbers)
        _claim_residents(recorder, standing, rows)
        stack.enter_context(explained(recorder))
        stack.enter_context(known_values.shown())
        stack.enter_context(recorder)
        stack.enter_context(recorder.following_modules())
        stack.enter_context(listening(recorder))
        yield recorder, standing, rows


def _notes_on(declared: DeclaredStep, modules: NamedModules) -> dict[str, str]:
    compiled = [path or "the model" for path, part in modules if is_compiled(part)]
    notes = dict.fromkeys(compiled, "compiled; its operations were followed one by one, as without compilation")
    if declared.model is not declared.network:
        notes["ranks"] = "followed as one rank without the others; buckets for their gradients are not in it"
    return notes


def _standing(
    declared: DeclaredStep, batch: Any, device: torch.device, twins: Twins, numbers: Numbers
) -> tuple[DeclaredStep, Any]:
    """The step and the batch on twins. A model that other processes share is followed as this process runs it."""
    optimizer = None
    if declared.optimizer is not None:
        optimizer = shadow_optimizer(declared.optimizer, twins, numbers)
    standing = dataclasses.replace(declared, model=declared.network, device=device, optimizer=optimizer)
    # A model on the CPU is one whose device is not at hand; its batch starts from the host there as it does here.
    on_host = declared.device.type == "cpu" and device.type == "cuda"
    rows = shadow_batch(batch, Twins(device, device) if on_host else twins)
    return standing, rows


def _claim_residents(recorder: Recorder, declared: DeclaredStep, batch: Any) -> None:
    for part in declared.modules:
        recorder.claim(part.parameters(), Category.PARAMETERS)
        recorder.claim(part.buffers(), Category.BUFFERS)
    if declared.optimizer is not None:
        recorder.claim([p for group in declared.optimizer.param_groups for p in group["params"]], Category.PARAMETERS)
    recorder.claim_gradients()
    recorder.claim(census.state_tensors(declared.optimizer), Category.OPTIMIZER_STATE)
    recorder.arrived(batch)


def _pieces(recorder: Recorder, declared: DeclaredStep) -> dict[int, tuple[int, ...]]:
    """The storages of weights that were moved to the device one by one before their layer laid them out as one."""
    found = {}
    for layer in (layer for part in declared.modules for layer in part.modules() if isinstance(layer, nn.RNNBase)):
        weights = [weight for weight in layer._flat_weights if isinstance(weight, Tensor)]
        numbers = {recorder.number_of(weight) for weight in weights}
        if len(numbers) == 1 and len(weights) > 1 and (number := numbers.pop()) is not None:
            found[number] = tuple(weight.nbytes for weight in weights)
    return found


def _one_step(
    declared: DeclaredStep, batch: Any, recorder: Recorder, run: Run, around: Around, notes: dict[str, str]
) -> None:
    with around():
        recorder.announce(Phase.FORWARD)
        loss = run(declared, batch)
    recorder.announce(Phase.OPTIMIZER)
    if declared.optimizer is not None:
        try:
            declared.optimizer.step()
        except (NotImplementedError, RuntimeError, TypeError) as error:
            # Steps that read values (line searches) end here; what they set up first is written down.
            name = type(declared.optimizer).__name__
            notes["optimizer"] = f"{name}'s step could not be followed to its end ({first_line(error)})"
        recorder.claim(census.state_tensors(declared.optimizer), Category.OPTIMIZER_STATE)
        declared.optimizer.zero_grad(set_to_none=True)
    for part in declared.modules:
        part.zero_grad(set_to_none=True)
    del loss
    with around():
        # What leaves as the next step begins is written down with this one, which brought it.
        pass
