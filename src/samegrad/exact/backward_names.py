"""Which module's backward did it: gradients at the inputs and outputs of every module, for errors that name one."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, cast

from torch import Tensor, nn

from samegrad import trees
from samegrad.exact.module_names import label

# Whether the gradients of one tensor, one from each trace, are as they should be.
Agree = Callable[[Sequence[Tensor]], bool]


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call of the module at ``path``: the gradients that came to its outputs and left by its inputs, by place."""

    path: str
    label: str
    inputs: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    outputs: dict[int, Tensor] = dataclasses.field(default_factory=dict)


class BackwardTrace:
    """The calls of one forward, in order, whose gradients the backward that follows fills in."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []

    @contextlib.contextmanager
    def of(self, network: nn.Module) -> Iterator[None]:
        """Around the forward."""
        running: list[_Call] = []
        handles = []

        def before(path: str) -> Callable[[nn.Module, Any, Any], None]:
            def hook(part: nn.Module, args: Any, kwargs: Any) -> None:
                running.append(_Call(path, label(path, part)))
                self.calls.append(running[-1])
                _caught((args, kwargs), running[-1].inputs)

            return hook

        def after(_: nn.Module, __: Any, output: Any) -> None:
            _caught(output, running.pop().outputs)

        try:
            for path, part in network.named_modules():
                handles.append(part.register_forward_pre_hook(before(path), with_kwargs=True))
                handles.append(part.register_forward_hook(after))
            yield
        finally:
            for handle in handles:
                handle.remove()


def _caught(tree: Any, into: dict[int, Tensor]) -> None:
    def catch(place: int) -> Callable[[Tensor], None]:
        return lambda gradient: into.__setitem__(place, gradient.detach())

    for place, leaf in enumerate(trees.leaves_of(tree)):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            # torch has no types here.
            cast(Any, leaf).register_hook(catch(place))


def first_at_fault(traces: Sequence[BackwardTrace], agree: Agree, parameters: Collection[str] = ()) -> str:
    """The innermost module, nearest to the loss, that is given gradients that agree and passes on some that do not.

    ``parameters``: names of those whose gradients are wrong. The traces are of the same calls.
    """
    first, *others = (trace.calls for trace in traces)
    found: _Call | None = None
    for index, call in enumerate(first):
        same = [call, *(calls[index] for calls in others if index < len(calls) and calls[index].path == call.path)]
        if len(same) < len(traces):
            break
        mine = f"{call.path}." if call.path else ""
        clean = _all_agree([one.outputs for one in same], agree)
        passed_on = _all_agree([one.inputs for one in same], agree)
        if clean and (not passed_on or any(name.startswith(mine) for name in parameters)):
            inner = found is None or _depth(call.path) >= _depth(found.path)
            found = call if inner else found
    return "the model" if found is None else found.label


def _all_agree(gradients: Sequence[dict[int, Tensor]], agree: Agree) -> bool:
    places = set.intersection(*(set(one) for one in gradients))
    return all(agree([one[place] for one in gradients]) for place in sorted(places))


def _depth(path: str) -> int:
    return len(path.split(".")) if path else 0
