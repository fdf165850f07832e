"""Which linear layer makes the logits, and whether only a loss takes them: tried on a few rows of the batch.

The layer is called with its logits deferred (``deferred_logits.py``), and what the model and the loss do with them is
noted. Nothing of the user's is left changed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from samegrad import trees
from samegrad.declared import DeclaredStep, checked_loss
from samegrad.errors import CannotSplit, UsageError
from samegrad.exact.deferred_logits import deferred_head
from samegrad.exact.examine import chosen_rows
from samegrad.exact.pending_logits import Uses
from samegrad.exact.probes import PROBE_ROWS
from samegrad.exact.replaced_forward import forward_replaced, has_own_forward
from samegrad.exact.sharded import is_sharded
from samegrad.exact.undisturbed import step_undisturbed
from samegrad.module_walk import is_compiled
from samegrad.trees import RowLayout

# Layers after the head, such as one that gives a value, that are looked past.
_LOOKED_AT = 3
# Of a chunk in the trial, which is there to see what meets the logits: few chunks, and none large.
_TRIED_POSITIONS = 1024


@dataclasses.dataclass(frozen=True)
class Head:
    """A linear layer whose output only losses take.

    ``positions_per_row``: rows of logits that a row of the batch brings.
    """

    path: str
    classes: int
    width: int
    positions_per_row: float


@dataclasses.dataclass(frozen=True)
class HeadInChunks:
    """The head at ``path``, whose loss runs ``rows`` positions at a time."""

    path: str
    rows: int

    def deferred_in(self, declared: DeclaredStep) -> DeclaredStep:
        """``declared`` whose forward defers the logits.

        The forward raises CannotSplit where the head was not called with a graph: inside a part that runs in chunks of
        its own, say.
        """

        def forward(module: nn.Module, batch: Any) -> Any:
            if _handing_on:
                return declared.forward(module, batch)
            uses = Uses(self.path)
            with deferred_head(named_head(module, self.path), rows=self.rows, uses=uses):
                outputs = declared.forward(module, batch)
            if torch.is_grad_enabled() and not uses.calls:
                raise CannotSplit(
                    asked=f"the loss of {self.path} in chunks",
                    found="that layer was not called where its output reaches the loss; it may stand inside a part of "
                    "the model that runs in chunks itself, or its weight may be used without it",
                    do="leave the lever chunk_loss out of the plan",
                )
            return outputs

        return dataclasses.replace(declared, forward=forward)

    @contextlib.contextmanager
    def handing_on(self, network: nn.Module) -> Iterator[None]:
        """A block in which the head gives what enters it, also in forwards that defer its logits."""
        with forward_replaced(named_head(network, self.path), _handed_on):
            _handing_on.append(self)
            try:
                yield
            finally:
                _handing_on.pop()


# A list, since a compiler sees that it changed; the blocks that are open.
_handing_on: list[HeadInChunks] = []


def _handed_on(hidden: Tensor) -> Tensor:
    return hidden


def named_head(module: nn.Module, path: str) -> nn.Linear:
    """The linear layer at ``path``. Raises UsageError where there is none."""
    network = module.module if isinstance(module, DistributedDataParallel) else module
    try:
        head = network.get_submodule(path)
    except AttributeError:
        head = None
    if not isinstance(head, nn.Linear):
        linear = [name for name, part in network.named_modules() if isinstance(part, nn.Linear)]
        raise UsageError(
            asked=f"head={path!r}",
            found="no such submodule" if head is None else f"it is a {type(head).__name__}, not an nn.Linear",
            do=f"name the nn.Linear that gives the logits; the last ones are {', '.join(linear[-3:]) or 'none'}",
        )
    return head


def find_head(declared: DeclaredStep, batch: Any, layout: RowLayout) -> Head:
    """The head that was declared, or the last linear layer called whose logits outweigh its hidden rows.

    Raises CannotSplit with the operation that met the logits and the module path; UsageError for a declared head that
    is no linear layer.
    """
    rows = min(PROBE_ROWS, layout.rows)
    few = trees.move(trees.take_rows(batch, layout, chosen_rows(layout.rows, rows)[0]), declared.device)
    if declared.head is not None:
        return _tried(declared, declared.head, few, rows)
    called = _called(declared, few)
    large = [path for path in called if _outweighs(named_head(declared.network, path))]
    if not large:
        raise _refused(
            called[-1] if called else "",
            "it has no more classes than its input is wide" if called else "no nn.Linear is called",
        )
    refusals = []
    for path in large[-_LOOKED_AT:][::-1]:
        try:
            return _tried(declared, path, few, rows)
        except CannotSplit as refused:
            refusals.append(refused)
    raise refusals[0]


def _refused(path: str, found: str) -> CannotSplit:
    return CannotSplit(
        asked="the loss of the model's head in chunks",
        found=f"layer {path}: {found}" if path else found,
        do="give its output to cross_entropy alone, through views, slices and casts, or name the head with head=",
    )


def _outweighs(head: nn.Linear) -> bool:
    return head.out_features > head.in_features


def _called(declared: DeclaredStep, few: Any) -> list[str]:
    """Paths of the linear layers in the order of their last calls."""
    order: dict[str, None] = {}
    handles = []

    def noted(path: str) -> Any:
        def hook(*_: Any) -> None:
            order.pop(path, None)
            order[path] = None

        return hook

    with step_undisturbed(declared), torch.no_grad():
        try:
            for path, part in declared.network.named_modules():
                if isinstance(part, nn.Linear):
                    handles.append(part.register_forward_pre_hook(noted(path)))
            declared.forward(declared.network, few)
        finally:
            for handle in handles:
                handle.remove()
    return list(order)


def _tried(declared: DeclaredStep, path: str, few: Any, rows: int) -> Head:
    head = named_head(declared.network, path)
    if has_own_forward(head) or type(head).forward is not nn.Linear.forward:
        raise _refused(path, f"a {type(head).__name__} with a forward of its own")
    if is_sharded(head.weight):
        raise _refused(path, "its weight is sharded (fully_shard) and is gathered only while the layer runs")
    if any(map(is_compiled, declared.network.modules())):
        raise _refused(path, "the model is compiled, and what a compiled graph does with logits is not seen")
    uses = Uses(path)
    with step_undisturbed(declared), torch.enable_grad(), _quiet():
        with deferred_head(head, rows=_TRIED_POSITIONS, uses=uses):
            outputs = declared.forward(declared.network, few)
        checked_loss(declared.loss_fn(outputs, few))
    if not uses.calls:
        raise _refused(path, "it is not called")
    if uses.met:
        raise _refused(path, f"its logits meet {', '.join(uses.met)}, for which they are made whole")
    if not uses.losses:
        raise _refused(path, "no cross-entropy takes its output")
    return Head(path, head.out_features, head.in_features, uses.positions / rows)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The trial is there to learn what makes the logits whole; it is no news to the user."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield
