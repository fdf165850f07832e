"""Records with ``torch.fx`` what a network computes, and checks on a few rows that the recording computes the same."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node
from torch.nn.modules.batchnorm import _BatchNorm

from samegrad import trees
from samegrad.exact.batchnorm import coupled_layers, moments_of, normalised, widened
from samegrad.exact.out_of_memory import is_out_of_memory
from samegrad.exact.recorded import Recorded, agree, filled
from samegrad.exact.replaced_forward import forward_replaced
from samegrad.exact.stages import Stages, cut_stages, is_rows, untraceable
from samegrad.exact.undisturbed import undisturbed


def trace_stages(
    network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, rows: int, together: int = 1
) -> Stages:
    """The stages of ``network(*args, **kwargs)``. Tensor leaves of leading length ``rows`` carry rows.

    ``together``: how many stages make a group.

    Raises Untraceable with the reason and the module where recording stopped; nothing is changed or drawn.
    """
    leaves, spec = trees.flatten((tuple(args), dict(kwargs)))
    device = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), torch.device("cpu"))
    tracer = _Tracer(network, leaves, spec)
    with undisturbed([network], device) as (generators, state):
        attributes = set(vars(network))
        try:
            with torch.no_grad():
                graph = tracer.trace(network)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = " ".join(str(error).split()) or type(error).__name__
            raise untraceable(f"in {tracer.place()}: {type(error).__name__}: {reason[:300]}") from error
        finally:
            # Tensors made by the code are left on the network by the tracer.
            made = {name: vars(network).pop(name) for name in set(vars(network)) - attributes}
        if drew := generators.advanced():
            raise untraceable(f"code outside of leaf modules draws random numbers ({', '.join(drew)})")
        if changed := state.changed():
            raise untraceable(f"code outside of leaf modules changes {', '.join(changed[:3])}")
        staged = cut_stages(graph, leaves, tracer.inputs, tracer.layers, made, rows, together)
        few = trees.unflatten(_few_rows(leaves, rows), spec)
        _check_few_rows(network, tracer.layers.values(), staged, few, device)
    return staged


_CHECK_ROWS = 2


def _few_rows(leaves: Sequence[Any], rows: int) -> list[Any]:
    return [leaf.detach()[:_CHECK_ROWS] if is_rows(leaf, rows) else leaf for leaf in leaves]


@torch.no_grad()
def _check_few_rows(
    network: nn.Module, layers: Iterable[_BatchNorm], staged: Stages, arguments: Any, device: torch.device
) -> None:
    """What was recorded must compute what the network does: code may have branched on what a stand-in is not."""
    args, kwargs = arguments
    with contextlib.ExitStack() as stack:
        # The layers' own forward would talk to other ranks, and update buffers.
        for layer in layers:
            stack.enter_context(forward_replaced(layer, functools.partial(_alone, layer)))
        with undisturbed([network], device) as (generators, state):
            plain = type(network).forward(network, *args, **kwargs)
            state.restore()
            generators.restore()
            values = dict(zip(staged.inputs, [x for x in trees.leaves_of(arguments) if isinstance(x, Tensor)]))
            Recorded.of(network, staged.constants).run(staged.graph.nodes, values)
            recorded = filled(staged.output, values.__getitem__)
    (ours, our_spec), (theirs, their_spec) = trees.flatten(recorded), trees.flatten(plain)
    if our_spec != their_spec or not all(agree(a, b) for a, b in zip(ours, theirs)):
        raise untraceable("its code takes another way while it is recorded (it asks what kind of value it is given)")


def _alone(layer: _BatchNorm, x: Tensor) -> Tensor:
    moments = moments_of(x)
    dtype = widened(x).dtype
    return normalised(layer, x, moments.mean.to(dtype), (moments.squares / moments.count).to(dtype))


class _Tracer(fx.Tracer):
    def __init__(self, network: nn.Module, leaves: Sequence[Any], spec: Any) -> None:
        super().__init__()
        self.layers = coupled_layers(network)
        self._coupled = set(self.layers.values())
        self._leaves, self._spec = leaves, spec
        self._entered: list[str] = []
        self.inputs: list[Node] = []

    def place(self) -> str:
        return self._entered[-1] if self._entered else "the model's own forward"

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m in self._coupled or self._coupled.isdisjoint(m.modules())

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        name = self.path_of_module(m)
        if (m in self._coupled or not self.is_leaf_module(m, name)) and has_hooks(m):
            raise untraceable(f"{name} has hooks, which would see rows a few at a time or not at all")
        self._entered.append(name)
        result = super().call_module(m, forward, args, kwargs)
        # Kept after an exception, so that its place can be named.
        self._entered.pop()
        return result

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """One placeholder a tensor leaf; everything else is what it is in this call, and branches on it are taken."""
        arguments = []
        for leaf in self._leaves:
            if isinstance(leaf, Tensor):
                proxy = self.create_proxy("placeholder", f"input_{len(self.inputs)}", (), {})
                self.inputs.append(proxy.node)
                arguments.append(proxy)
            else:
                arguments.append(leaf)
        args, kwargs = trees.unflatten(arguments, self._spec)
        return (lambda root: root_fn(root, *args, **kwargs)), [self.root]


def has_hooks(module: nn.Module) -> bool:
    return any(
        vars(module).get(kind)
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )
