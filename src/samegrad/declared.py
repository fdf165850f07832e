"""What the user declared: a model, a loss of its outputs, and how a batch is fed to the model.

Every stage is given a ``DeclaredStep``; none reaches back to ``Step``. The plain step, which every plan must equal,
is ``plain_loss(declared, batch).backward()``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samegrad import trees
from samegrad.errors import BadInput, UsageError
from samegrad.module_walk import parameters_of, parts_of
from samegrad.records import Plan
from samegrad.trees import RowLayout

Forward = Callable[[nn.Module, Any], Any]
Loss = Callable[[Any, Any], Tensor]
Normalise = Literal["mean", "sum"] | Callable[[Any], Any]
# Makes the block of one backward, for what has to be done around each.
Around = Callable[[], AbstractContextManager[None]]

# The end of what ``parameter_shapes`` says of a parameter that does not train.
FROZEN = " frozen"

# Keys of a mapping batch that belong to the loss. A model that takes labels would compute its own loss inside.
LABEL_KEYS = frozenset({"label", "labels", "target", "targets", "y"})


@dataclasses.dataclass(frozen=True, eq=False)
class Within:
    """``function``, every call of it inside a block of its own, ``block(*arguments)``: how a lever changes a step.

    An object and not a closure, so that what the user's function is and holds can still be seen.
    """

    function: Callable[..., Any]
    block: Callable[..., AbstractContextManager[object]]

    def __call__(self, *arguments: Any) -> Any:
        with self.block(*arguments):
            return self.function(*arguments)


@dataclasses.dataclass(frozen=True, eq=False)
class DeclaredStep:
    """The step as declared. ``loss_fn(outputs, batch)`` is the ordinary full-batch loss, a scalar.

    ``forward(module, batch)`` runs the model on a batch or a chunk of it. ``normalise`` declares the loss a sum over
    rows ("sum"), a mean over rows ("mean"), or a sum over rows divided by ``normalise(batch)``. ``batch_axes`` says
    where rows are when their leading axis does not (see ``trees.find_rows``). ``device`` is where the model is.
    ``segments`` names submodules that treat rows alone, for a model that couples rows elsewhere. ``head`` names the
    nn.Linear whose output only the loss takes, where it is not the last one. ``plain_forward`` is what ``forward`` must
    equal, where it computes the same by other means: rows shared out over devices, say.
    """

    model: nn.Module
    loss_fn: Loss
    forward: Forward
    device: torch.device
    optimizer: torch.optim.Optimizer | None = None
    normalise: Normalise | None = None
    batch_axes: Any = None
    segments: tuple[str, ...] | None = None
    head: str | None = None
    plain_forward: Forward | None = None

    @property
    def as_plain(self) -> DeclaredStep:
        """The step whose plain call verification compares with."""
        if self.plain_forward is None:
            return self
        return dataclasses.replace(self, forward=self.plain_forward, plain_forward=None)

    @property
    def network(self) -> nn.Module:
        """The module that computes: what DistributedDataParallel wraps, or the model itself."""
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            network: nn.Module = self.model.module
            return network
        return self.model

    @property
    def loss_module(self) -> nn.Module | None:
        loss: Any = self.loss_fn
        while isinstance(loss, Within):
            loss = loss.function
        return loss if isinstance(loss, nn.Module) else None

    @property
    def modules(self) -> list[nn.Module]:
        """The modules whose weights and state the step holds: the network, and the loss where it is one."""
        return [self.network] if self.loss_module is None else [self.network, self.loss_module]

    def layout(self, batch: Any) -> RowLayout:
        return trees.find_rows(batch, self.batch_axes)

    def model_signature(self) -> str:
        """What the model looks like to a plan: a digest of its parameters' names, shapes, dtypes and which train."""
        lines = [
            f"{name} {tuple(p.shape)} {p.dtype} {p.requires_grad}"
            for module in self.modules
            for name, p in module.named_parameters()
        ]
        return f"model {hashlib.sha256(chr(10).join(lines).encode()).hexdigest()[:12]}"

    def parameter_shapes(self) -> dict[str, str]:
        """Dtype and shape of every parameter by name; those of a loss that is a module begin with ``loss_fn``."""
        named = {
            f"{prefix}{name}": p
            for prefix, module in zip(("", "loss_fn."), self.modules)
            for name, p in module.named_parameters()
        }
        ends = {True: "", False: FROZEN}
        return {
            name: f"{str(p.dtype).removeprefix('torch.')}{list(p.shape)}{ends[p.requires_grad]}"
            for name, p in named.items()
        }

    def signed(self, plan: Plan, batch: Any) -> Plan:
        """``plan`` as one that was made for this model and batches like this one."""
        signature = f"{self.layout(batch).signature(batch)} | {self.model_signature()}"
        return dataclasses.replace(plan, signature=signature, parameters=self.parameter_shapes())

    def refuse_without_data(self, batch: Any) -> None:
        """Raises UsageError for a model, BadInput for a batch, that has no data to run a step on."""
        if self.device.type == "meta":
            raise UsageError(
                asked="run a step",
                found="the model is on meta, which has no memory",
                do="make it on a device; what it would take on a card tells measure_step(step, batch, device='H200')",
            )
        for path, leaf in trees.flatten_with_paths(batch, "batch"):
            if isinstance(leaf, Tensor) and leaf.device.type == "meta":
                raise BadInput(
                    asked="run a step",
                    found=f"{path} is on meta, which has no data",
                    do=f"give batches on the host or on {self.device}",
                )

    def mode(self) -> str:
        """Which parts of the model are in training mode; checks made in one mode do not hold in another."""
        return "".join("t" if part.training else "e" for part in parts_of(self.modules))


def check_step(step: object, *, asked: str) -> None:
    """Raises UsageError where something else than a declared step, such as a module, was given as one."""
    if not isinstance(getattr(step, "declared", None), DeclaredStep):
        raise UsageError(
            asked=asked,
            found=f"step is a {type(step).__name__}, not a samegrad.Step",
            do="declare it first: step = samegrad.Step(model, loss_fn, budget=..., optimizer=optimizer)",
        )


def is_one_batch(batches: object) -> bool:
    """Whether ``batches`` looks like a batch and not like several: (x, y), or a dictionary of tensors.

    Iterated over, these would give tensors one by one, or names. A list of tensors is several.
    """
    if isinstance(batches, Mapping):
        return True
    return isinstance(batches, tuple) and bool(batches) and all(isinstance(entry, Tensor) for entry in batches)


def declare(
    model: nn.Module,
    loss_fn: Loss,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    forward: Forward | None = None,
    normalise: Normalise | None = None,
    batch_axes: Any = None,
    segments: Sequence[str] | None = None,
    head: str | None = None,
    plain_forward: Forward | None = None,
    device: torch.device | str | None = None,
) -> DeclaredStep:
    """A DeclaredStep, with the arguments checked. Raises UsageError naming the argument."""
    if not isinstance(model, nn.Module):
        raise UsageError(
            asked="Step(model, loss_fn)",
            found=f"model is a {type(model).__name__}, not a torch.nn.Module",
            do="pass the module that holds the parameters; how it is called goes into forward=",
        )
    if not callable(loss_fn):
        raise UsageError(
            asked="Step(model, loss_fn)",
            found=f"loss_fn is a {type(loss_fn).__name__}, which cannot be called",
            do="pass loss_fn(outputs, batch) that returns the full-batch loss",
        )
    if type(loss_fn) in (nn.CrossEntropyLoss, nn.NLLLoss) or loss_fn in (F.cross_entropy, F.nll_loss):
        # Those of numbers may be meant: a batch can be its own target.
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise UsageError(
            asked=f"Step(model, {name})",
            found=f"{name} takes outputs and targets; loss_fn is called with outputs and the whole batch",
            do="loss_fn=lambda outputs, batch: loss(outputs, batch[1])",
        )
    _check_arguments("loss_fn", loss_fn, "(outputs, batch)", do="take the outputs and the whole batch, as in "
                     "loss_fn=lambda outputs, batch: loss(outputs, batch[1])")  # fmt: skip
    for argument, called in (("forward", forward), ("plain_forward", plain_forward)):
        if called is not None:
            _check_arguments(argument, called, "(model, batch)", do=f"{argument}=lambda model, batch: model(batch[0])")
    scattered = [name for name, part in model.named_modules() if isinstance(part, nn.DataParallel)]
    if scattered:
        raise UsageError(
            asked=f"Step({f'a model whose {scattered[0]} is an ' if scattered[0] else ''}nn.DataParallel(...), ...)",
            found="DataParallel scatters each chunk again and copies its module on every forward",
            do="pass the inner module, or one process per device with DistributedDataParallel and torchrun",
        )
    if normalise is not None and normalise not in ("mean", "sum") and not callable(normalise):
        raise UsageError(
            asked=f"normalise={normalise!r}",
            found="neither 'mean', 'sum' nor a function of the batch",
            do="normalise='mean', normalise='sum', or normalise=lambda batch: (batch[1] != -100).sum()",
        )
    _check_optimizer(optimizer, model, loss_fn)
    return DeclaredStep(
        model=model,
        loss_fn=loss_fn,
        forward=forward if forward is not None else default_forward,
        device=torch.device(device) if device is not None else _device_of(model),
        optimizer=optimizer,
        normalise=normalise,
        batch_axes=batch_axes,
        segments=_checked_names(segments),
        head=head,
        plain_forward=plain_forward,
    )


def _check_arguments(name: str, function: Callable[..., Any], arguments: str, *, do: str) -> None:
    """Raises UsageError where ``function`` cannot be called with two arguments, as far as it says what it takes."""
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        # Not what a decorator wraps: that may be called in another way.
        signature = inspect.signature(called, follow_wrapped=False)
    except (TypeError, ValueError):
        # Functions of C, some of them, do not say.
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise UsageError(
            asked=f"{name}{arguments}", found=f"{name} takes {signature}: {error}", do=do
        ) from None


def _check_optimizer(optimizer: torch.optim.Optimizer | None, model: nn.Module, loss_fn: Loss) -> None:
    """Raises UsageError where the optimizer would never move this model."""
    if optimizer is None:
        return
    if isinstance(optimizer, type) or not hasattr(optimizer, "param_groups"):
        found = f"the class {optimizer.__name__}" if isinstance(optimizer, type) else f"a {type(optimizer).__name__}"
        raise UsageError(
            asked="Step(model, loss_fn, optimizer=optimizer)", found=f"{found} where an optimizer is needed",
            do="make one of the model's parameters: AdamW(model.parameters())",
        )  # fmt: skip
    taken = {id(p) for group in optimizer.param_groups for p in group["params"]}
    own = parameters_of([model, *([loss_fn] if isinstance(loss_fn, nn.Module) else [])])
    if taken and own and taken.isdisjoint(map(id, own)):
        raise UsageError(
            asked="Step(model, loss_fn, optimizer=optimizer)",
            found="none of the optimizer's parameters is the model's: it was made for another model, or before this "
            "one was copied",
            do="make it from this model's parameters: AdamW(model.parameters())",
        )


def _checked_names(segments: Sequence[str] | None) -> tuple[str, ...] | None:
    if segments is None:
        return None
    names = () if isinstance(segments, str) else tuple(segments)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise UsageError(
            asked=f"segments={segments!r}",
            found="not a list of submodule names",
            do="give names as model.named_modules() shows them, such as segments=['encoder', 'decoder']",
        )
    return names


def _device_of(model: nn.Module) -> torch.device:
    devices = {p.device for p in model.parameters()}
    if len(devices) > 1:
        raise UsageError(
            asked="Step(model, ...) with one device",
            found=f"the parameters are on {', '.join(sorted(map(str, devices)))}",
            do="move the model to one device, or name the device of its first layer with device=",
        )
    return devices.pop() if devices else torch.device("cpu")


def default_forward(module: nn.Module, batch: Any) -> Any:
    """The model's outputs for ``batch``.

    A tuple or list is called as ``model(batch[0])``; a mapping with the keys that forward takes, labels left out; a
    tensor as ``model(batch)``. Anything else raises UsageError with the line to paste.
    """
    if isinstance(batch, (Tensor, trees.RowSource)):
        return module(batch)
    if isinstance(batch, Mapping):
        taken = _keywords(module)
        return module(**{k: v for k, v in batch.items() if k not in LABEL_KEYS and taken(k)})
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch):
        try:
            return module(batch[0])
        except TypeError as error:
            if len(wanted := _required(module)) < 2:
                raise
            raise UsageError(
                asked="a default forward for this batch",
                found=f"{type(module).__name__}.forward takes {', '.join(wanted)}; of a tuple it gets the first entry",
                do="say how the model is called, for example "
                f"Step(..., forward=lambda model, batch: model(*batch[:{len(wanted)}]))",
            ) from error
    raise UsageError(
        asked="a default forward for this batch",
        found=f"the batch is a {type(batch).__name__}, not a tensor, tuple, list or mapping",
        do="say how the model is called, for example Step(..., forward=lambda model, batch: model(batch.images))",
    )


def _keywords(module: nn.Module) -> Callable[[str], bool]:
    parameters = inspect.signature(module.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return lambda name: True
    named = {n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return lambda name: name in named


def _required(module: nn.Module) -> list[str]:
    """The arguments that ``module.forward`` cannot do without."""
    parameters = inspect.signature(module.forward).parameters.values()
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in parameters if p.kind in by_place and p.default is p.empty]


def plain_loss(declared: DeclaredStep, batch: Any) -> Tensor:
    """The loss of the unconstrained step on ``batch``, with its graph: what every plan must equal."""
    return checked_loss(declared.loss_fn(declared.forward(declared.model, batch), batch))


def checked_loss(loss: Any) -> Tensor:
    """``loss`` if it is a scalar tensor with a graph; raises UsageError otherwise."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
        raise UsageError(
            asked="loss_fn(outputs, batch) -> a scalar tensor",
            found=f"it returned {shape}",
            do="reduce the loss to one number, for example with .mean()"
            if loss is not None
            else "return the loss. A model that makes it from labels gets them by forward=lambda model, batch: "
            "model(**batch); otherwise labels go to loss_fn alone",
        )
    if not loss.requires_grad:
        raise UsageError(
            asked="a loss that depends on the parameters",
            found="the loss has no graph: nothing that requires grad is in it",
            do="look for .detach(), .item(), torch.no_grad() or frozen parameters on the way to the loss",
        )
    return loss.reshape(())
