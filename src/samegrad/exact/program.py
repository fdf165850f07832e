"""The work of one chunk, in a shape that can run eagerly or be captured once and replayed.

A program is bound to its inputs, run, and asked for totals at the end of the step. Bodies read tensors and write
tensors: no Python numbers that change from chunk to chunk and no transfers to the host, so that what was captured
(``chunk_graphs.py``) for one chunk is right for every chunk of that shape. Weights and counters are device tensors.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from samegrad import trees
from samegrad.errors import CannotSplit
from samegrad.exact.aliases import GradientTotals
from samegrad.exact.phases import announce
from samegrad.records import Phase

# forward(chunk, ids): the model's outputs; ids (rows,) int64 on the device, each row's place in the batch, or None
# where nothing is drawn.
Forward = Callable[[Any, Tensor | None], Any]
# loss_of(chunk, ids): the loss of a chunk's rows alone, () with its graph, and what a COUNTED one is divided by.
LossOfChunk = Callable[[Any, Tensor | None], tuple[Tensor, Tensor | None]]


def backward_outside_autocast(roots: Sequence[Tensor], cotangents: Sequence[Tensor]) -> None:
    """``torch.autograd.backward`` as it runs after the user's autocast block: each operation in its forward's dtype."""
    device_type = roots[0].device.type
    if not torch.is_autocast_enabled(device_type):
        torch.autograd.backward(roots, cotangents)
        return
    with _no_autocast(device_type):
        torch.autograd.backward(roots, cotangents)
    # Casts of the aliases are cached until the outermost autocast block ends; their graph is spent now.
    torch.clear_autocast_cache()


def gradients_outside_autocast(loss: Tensor, cotangent: Tensor, leaves: Sequence[Tensor]) -> list[Tensor | None]:
    with _no_autocast(loss.device.type):
        return list(torch.autograd.grad(loss, list(leaves), cotangent, allow_unused=True))


def _no_autocast(device_type: str) -> torch.autocast:
    return torch.autocast(device_type, enabled=False)


class ChunkProgram:
    """One chunk's forward, loss and backward into the sums of the step, run by Python.

    ``bind`` names the inputs of the next ``run``. ``totals`` ends the step: gradients in the order of the aliases.
    """

    def __init__(self, body: Callable[..., None], gradients: GradientTotals) -> None:
        self._body = body
        self._gradients = gradients
        self._inputs: tuple[Any, ...] = ()

    def bind(self, *inputs: Any) -> None:
        self._inputs = inputs

    def run(self) -> None:
        self._body(*self._inputs)
        self._gradients.fold()

    def run_once(self, *inputs: Any) -> None:
        """Bound, run, and let go of: the memory of a chunk is needed for another one."""
        self.bind(*inputs)
        try:
            self.run()
        finally:
            self._inputs = ()

    def totals(self, factor: Tensor | None = None) -> list[Tensor | None]:
        self._inputs = ()
        return self._gradients.taken(factor)


class LossSums:
    """Sums over chunks that a single pass keeps on the device: the loss, and the count that divides it.

    ``dtype``: of the chunks' losses, which is the step's.
    """

    def __init__(self, device: torch.device) -> None:
        self.dtype: torch.dtype | None = None
        self.loss = torch.zeros((), dtype=torch.float64, device=device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)

    def zero(self) -> None:
        """Back to nothing, in place."""
        self.loss.zero_()
        self.count.zero_()

    def add(self, loss: Tensor, weight: Tensor) -> None:
        self.dtype = loss.dtype
        self.loss.add_(loss.detach() * weight)

    def add_counted(self, loss: Tensor, weight: Tensor) -> None:
        self.dtype = loss.dtype
        # A chunk without a valid target has loss 0/0 and weight 0; its share is nothing, not NaN.
        share = torch.where(weight == 0, torch.zeros_like(self.loss), loss.detach().to(self.loss.dtype) * weight)
        self.loss.add_(share)
        self.count.add_(weight)


def single_pass_body(
    loss_of: LossOfChunk, sums: LossSums
) -> Callable[[Any, Tensor | None, Tensor, Tensor], None]:
    """Body of one chunk when the loss is a sum over rows: ``(chunk, ids, weight, cotangent)``.

    weight: () float64, the chunk's share of the loss (rows over batch rows, or 1); COUNTED losses bring their own.
    cotangent: () float64, what the gradient of the chunk's loss is multiplied by, loss scaling included; for COUNTED
    the cotangent of one unit of the count.
    """

    def body(chunk: Any, ids: Tensor | None, weight: Tensor, cotangent: Tensor) -> None:
        loss, count = loss_of(chunk, ids)
        if count is not None:
            weight = count.to(weight.dtype)
            cotangent = cotangent * weight
            sums.add_counted(loss, weight)
        else:
            sums.add(loss, weight)
        announce(Phase.BACKWARD)
        backward_outside_autocast([loss], [cotangent.to(loss.dtype)])

    return body


def idle_body(
    forward: Callable[[Any], Any], used_by_loss: Callable[[Any, Any], Sequence[bool]]
) -> Callable[[Any], None]:
    """Body of a chunk of zero weight, run since other ranks wait for its collectives: ``(chunk,)``.

    ``used_by_loss(outputs, chunk)``: for every output tensor whether the loss depends on it. Zeros go in where the
    loss's gradient would, not through the loss, in which they can meet an infinity.
    """

    def body(chunk: Any) -> None:
        announce(Phase.FORWARD)
        outputs = forward(chunk)
        used = used_by_loss(outputs, chunk)
        live = [leaf for leaf, here in zip(tensors_in(outputs), used, strict=True) if here]
        del outputs
        announce(Phase.BACKWARD)
        backward_of_nothing(live)

    return body


def backward_of_nothing(outputs: Sequence[Tensor]) -> None:
    """Backward with zeros, for its hooks and collectives."""
    live = [leaf for leaf in outputs if leaf.requires_grad]
    if live:
        backward_outside_autocast(live, [torch.zeros_like(leaf) for leaf in live])


@dataclasses.dataclass
class OutputRows:
    """The outputs of all chunks joined: row leaves of ``rows`` rows each, and what else the model returned."""

    rows: int
    spec: Any = None
    paths: tuple[str, ...] = ()
    joined: list[Any] = dataclasses.field(default_factory=list)

    def allocate(self, outputs: Any, chunk_rows: int) -> None:
        """Room for all rows, shaped after the first chunk's outputs. Raises CannotSplit naming a leaf without rows."""
        leaves, self.spec = trees.flatten(outputs)
        self.paths = tuple(path for path, _ in trees.flatten_with_paths(outputs, "outputs"))
        for path, leaf in zip(self.paths, leaves):
            if isinstance(leaf, Tensor):
                check_row_output(path, leaf, chunk_rows)
                self.joined.append(leaf.new_empty((self.rows, *leaf.shape[1:])))
            else:
                self.joined.append(leaf)

    def leaves(self) -> list[Tensor]:
        return [leaf for leaf in self.joined if isinstance(leaf, Tensor)]

    def tree(self) -> Any:
        return trees.unflatten(self.joined, self.spec)


# What a model may return beside tensors: values that can be compared as they are.
_PLAIN_OUTPUTS = (int, float, str, type(None), enum.Enum, torch.Size, torch.dtype, torch.device)


class Unseen:
    """Stands for an output whose tensors cannot be seen, such as a cache. A loss that looks at it is refused."""

    def __init__(self, path: str, kind: str) -> None:
        self._path, self._kind = path, kind

    def _refuse(self, *_: Any) -> NoReturn:
        raise CannotSplit(
            asked="split the rows of a step",
            found=f"the loss uses {self._path}, a {self._kind}, and the tensors inside it cannot be seen",
            do="return a dict, tuple, list or NamedTuple, register that class with torch.utils._pytree."
            "register_pytree_node, or run the step whole (a larger budget, or rows=<the batch's rows>)",
        )

    __getattr__ = __getitem__ = __iter__ = __len__ = __bool__ = __call__ = _refuse


def seen(outputs: Any) -> Any:
    """``outputs`` with everything in it that is neither a tensor nor a plain value as ``Unseen``."""
    if isinstance(outputs, Tensor):
        return outputs
    leaves, spec = trees.flatten(outputs)
    if all(isinstance(leaf, (Tensor, *_PLAIN_OUTPUTS)) for leaf in leaves):
        return outputs
    return trees.unflatten(
        [
            leaf if isinstance(leaf, (Tensor, *_PLAIN_OUTPUTS)) else Unseen(path, type(leaf).__name__)
            for path, leaf in trees.flatten_with_paths(outputs, "outputs")
        ],
        spec,
    )


def check_row_output(path: str, leaf: Tensor, rows: int) -> None:
    if leaf.dim() == 0 or leaf.shape[0] != rows:
        raise CannotSplit(
            asked="a model whose outputs are rows",
            found=f"{path} has shape {tuple(leaf.shape)} for {rows} rows, so it is not one entry a row",
            do="compute it in loss_fn from the row outputs, or run the step whole with rows=<the batch's rows>",
        )


def tensors_in(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in trees.leaves_of(outputs) if isinstance(leaf, Tensor)]


def first_pass_body(forward: Forward) -> Callable[[Any, Tensor | None, Sequence[Tensor]], None]:
    """Body of one chunk of the first of two passes: ``(chunk, ids, places)``, the outputs written into ``places``.

    Before the first chunk nothing is known of the outputs; the caller runs ``forward`` itself then.
    """

    def body(chunk: Any, ids: Tensor | None, places: Sequence[Tensor]) -> None:
        announce(Phase.FORWARD)
        for place, leaf in zip(places, tensors_in(forward(chunk, ids))):
            place.copy_(leaf.detach())

    return body


# Compared as whole numbers of their width, so that bits are what is compared: not a number equals itself.
_WHOLE_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(values: Tensor) -> Tensor:
    whole = _WHOLE_NUMBERS.get(values.dtype.itemsize)
    return torch.view_as_real(values).view(torch.int64) if whole is None else values.view(whole)


def different_bits(again: Tensor, before: Tensor) -> Tensor:
    """() int64: how many entries differ in any bit."""
    return (_bits(again.detach()) != _bits(before)).sum()


def second_pass_body(
    forward: Forward, mismatches: Tensor
) -> Callable[[Any, Tensor | None, Sequence[Tensor], Sequence[Tensor | None]], None]:
    """Body of one chunk of the second pass: ``(chunk, ids, first-pass rows, cotangents)``.

    mismatches: () int64 on the device, grows by the number of entries that differ in any bit from the first pass.
    """

    def body(
        chunk: Any, ids: Tensor | None, first: Sequence[Tensor], cotangents: Sequence[Tensor | None]
    ) -> None:
        announce(Phase.FORWARD)
        leaves = tensors_in(forward(chunk, ids))
        for again, before in zip(leaves, first):
            mismatches.add_(different_bits(again, before))
        backward_of_rows(leaves, cotangents)

    return body


def backward_of_rows(leaves: list[Tensor], cotangents: Sequence[Tensor | None]) -> None:
    """Backward from output rows with a graph; ``leaves`` is emptied, so that each graph goes as it is used."""
    announce(Phase.BACKWARD)
    live = [(leaf, c) for leaf, c in zip(leaves, cotangents) if c is not None and leaf.requires_grad]
    leaves.clear()
    if live:
        backward_outside_autocast([leaf for leaf, _ in live], [c for _, c in live])
