"""A network with BatchNorm as a list of stages: what is independent of other rows, between statistics of all rows.

``torch.fx`` records the calls of the network's forward. Before every BatchNorm stands a barrier: the statistics of its
input need all rows. What is computed between two barriers is a stage, a function of row values that crossed the cuts
before it. The normalisation itself is never a barrier and never crosses a cut: every stage that uses it computes it
from the layer's input and statistics. What no row enters (weights put together, say) is computed where it is used.

Modules without a BatchNorm in training mode are called as they are, whatever they do inside.

Of several stages taken ``together`` only what later groups need crosses a cut, and statistics: each of them computes
again, from what enters the group, what the ones before it have computed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx import Node
from torch.nn.modules.batchnorm import _BatchNorm

from samegrad import trees
from samegrad.errors import CannotSplit, Untraceable
from samegrad.exact.batchnorm import coupled_layers, moments_of, normalised, widened
from samegrad.exact.out_of_memory import is_out_of_memory
from samegrad.exact.recorded import Recorded, agree, filled
from samegrad.exact.replaced_forward import forward_replaced
from samegrad.exact.state import StateRule
from samegrad.exact.undisturbed import undisturbed

_ASKED = "record what the model computes, to cut it at its BatchNorm layers"
_DO = "let its chunks meet at each BatchNorm (rendezvous), recompute blocks of the full batch, or run the step whole"


@dataclasses.dataclass(frozen=True)
class Stage:
    """``nodes`` in order, from the values ``inputs`` (row values) to ``outputs``; its barrier's statistics come last.

    ``normalised``: BatchNorm calls among the nodes, whose statistics are inputs as well. ``observed``: the input of the
    BatchNorm call ``barrier``, None in the last stage. ``last_uses[i]``: values not needed after ``nodes[i]``.
    """

    number: int
    nodes: tuple[Node, ...]
    inputs: tuple[Node, ...]
    shared: tuple[Node, ...]
    normalised: tuple[Node, ...]
    outputs: tuple[Node, ...]
    observed: Node | None
    barrier: Node | None
    last_uses: tuple[tuple[Node, ...], ...]


@dataclasses.dataclass(frozen=True)
class Stages:
    """A network cut at its BatchNorm layers, for calls of one kind.

    ``inputs``: one placeholder a tensor leaf of the arguments. ``output``: what the network returned, of nodes.
    ``constants``: tensors that its code made while it was recorded. ``carried``: nodes that depend on rows;
    ``computed_twice``: BatchNorm calls whose result several stages compute for themselves.
    """

    graph: fx.Graph
    stages: tuple[Stage, ...]
    inputs: tuple[Node, ...]
    output: Any
    constants: Mapping[str, Tensor]
    carried: frozenset[Node]
    computed_twice: frozenset[Node]

    def layer_names(self) -> list[str]:
        """The BatchNorm of every barrier in order; one that is called twice stands there twice."""
        return [str(stage.barrier.target) for stage in self.stages if stage.barrier is not None]

    def callers_of(self, rules: Sequence[StateRule]) -> dict[StateRule, tuple[int, ...]]:
        """The stages that change the state of each of ``rules``, the one that does it first in front.

        Raises CannotSplit for state that not one call changes.
        """
        found: dict[StateRule, tuple[int, ...]] = {}
        for rule in rules:
            calls = [
                (node, stage.number)
                for stage in self.stages
                for node in stage.nodes
                if node.op == "call_module" and f"{rule.path}.".startswith(f"{node.target}.")
            ]
            callers = {node for node, _ in calls}
            if len(callers) != 1:
                raise CannotSplit(
                    asked="run BatchNorm exactly a few rows at a time",
                    found=f"{rule.name} is changed by {len(callers)} calls between BatchNorm layers, and what a chunk "
                    "adds to it can be told of one alone",
                    do=f"call {rule.path or 'that module'} once in a forward, recompute blocks of the full batch "
                    "(recomputed_blocks), or run the step whole",
                )
            found[rule] = tuple(number for _, number in calls)
        return found


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
            raise _untraceable(f"in {tracer.place()}: {type(error).__name__}: {reason[:300]}") from error
        finally:
            # Tensors made by the code are left on the network by the tracer.
            made = {name: vars(network).pop(name) for name in set(vars(network)) - attributes}
        if drew := generators.advanced():
            raise _untraceable(f"code outside of leaf modules draws random numbers ({', '.join(drew)})")
        if changed := state.changed():
            raise _untraceable(f"code outside of leaf modules changes {', '.join(changed[:3])}")
        staged = _cut(tracer, graph, leaves, made, rows, together)
        _check_few_rows(network, tracer.layers.values(), staged, trees.unflatten(_few_rows(leaves, rows), spec))
    return staged


_CHECK_ROWS = 2


def _few_rows(leaves: Sequence[Any], rows: int) -> list[Any]:
    return [leaf.detach()[:_CHECK_ROWS] if is_rows(leaf, rows) else leaf for leaf in leaves]


@torch.no_grad()
def _check_few_rows(network: nn.Module, layers: Iterable[_BatchNorm], staged: Stages, arguments: Any) -> None:
    """What was recorded must compute what the network does: code may have branched on what a stand-in is not."""
    args, kwargs = arguments
    with contextlib.ExitStack() as stack:
        # The layers' own forward would talk to other ranks, and update buffers.
        for layer in layers:
            stack.enter_context(forward_replaced(layer, functools.partial(_alone, layer)))
        with undisturbed([network], torch.device("cpu")) as (generators, state):
            plain = type(network).forward(network, *args, **kwargs)
            state.restore()
            generators.restore()
            values = dict(zip(staged.inputs, [x for x in trees.leaves_of(arguments) if isinstance(x, Tensor)]))
            Recorded.of(network, staged.constants).run(staged.graph.nodes, values)
            recorded = filled(staged.output, values.__getitem__)
    (ours, our_spec), (theirs, their_spec) = trees.flatten(recorded), trees.flatten(plain)
    if our_spec != their_spec or not all(agree(a, b) for a, b in zip(ours, theirs)):
        raise _untraceable("its code takes another way while it is recorded (it asks what kind of value it is given)")


def _alone(layer: _BatchNorm, x: Tensor) -> Tensor:
    moments = moments_of(x)
    dtype = widened(x).dtype
    return normalised(layer, x, moments.mean.to(dtype), (moments.squares / moments.count).to(dtype))


def is_rows(leaf: Any, rows: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == rows


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
            raise _untraceable(f"{name} has hooks, which would see rows a few at a time or not at all")
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


def _untraceable(found: str) -> Untraceable:
    return Untraceable(asked=_ASKED, found=found, do=_DO)


def _cut(
    tracer: _Tracer, graph: fx.Graph, leaves: Sequence[Any], constants: Mapping[str, Tensor], rows: int, together: int
) -> Stages:
    nodes = list(graph.nodes)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    carried = {node for node, leaf in zip(tracer.inputs, tensors) if is_rows(leaf, rows)}
    for node in nodes:
        if any(source in carried for source in node.all_input_nodes):
            carried.add(node)
    barriers = [n for n in nodes if n.op == "call_module" and str(n.target) in tracer.layers]
    for node in barriers:
        if node not in carried or len(node.all_input_nodes) != 1:
            raise _untraceable(f"{node.target} is called on something that is not rows")
    for node in nodes:
        if node.target is F.batch_norm and (node.kwargs.get("training") or (*node.args, *(False,) * 6)[5]):
            raise _untraceable("the code calls torch.nn.functional.batch_norm in training mode")
    stages = _Cutter(nodes, frozenset(carried), barriers, together).stages()
    normalised = [node for stage in stages for node in stage.normalised]
    return Stages(
        graph, stages, tuple(tracer.inputs), nodes[-1].args[0], constants, frozenset(carried),
        frozenset(node for node in normalised if normalised.count(node) > 1 and len(node.users) > 1),
    )  # fmt: skip


class _Cutter:
    """Nodes sorted into the stages between ``barriers``, ``together`` of which make a group."""

    def __init__(
        self, nodes: Sequence[Node], carried: frozenset[Node], barriers: Sequence[Node], together: int
    ) -> None:
        self._nodes, self._carried, self._barriers = nodes, carried, barriers
        self._together = together
        # The stage that computes each node first.
        self._stage_of: dict[Node, int] = {}
        self._place = {node: i for i, node in enumerate(nodes)}
        self._coupled = set(barriers)
        self._results = [n for n in nodes[-1].all_input_nodes if n in carried]

    def stages(self) -> tuple[Stage, ...]:
        own = self._own()
        self._stage_of = {node: number for number, nodes in enumerate(own) for node in nodes}
        roots: list[list[Node]] = []
        for number, nodes in enumerate(own):
            roots.append([*nodes])
            if number < len(self._barriers):
                roots[-1].append(self._observed(number))
            else:
                # A normalisation that is returned is computed in the last stage; it never crosses a cut.
                roots[-1] += [n for n in self._results if n in self._coupled]
        needed = [self._needed(number, r, set(o)) for number, (r, o) in enumerate(zip(roots, own))]
        crossing = {n for number, part in enumerate(needed) for n in part if self._crosses(n, number)}
        return tuple(
            self._stage(number, own[number], needed[number], crossing) for number in range(len(own))
        )

    def _own(self) -> list[list[Node]]:
        """The nodes that depend on rows, by the stage that computes them first; BatchNorm calls are in none."""
        own: list[list[Node]] = [[]]
        for node in self._nodes[:-1]:
            if node in self._coupled:
                own.append([])
            elif node in self._carried and node.op != "placeholder":
                own[-1].append(node)
        return own

    def _observed(self, number: int) -> Node:
        return self._barriers[number].all_input_nodes[0]

    def _crosses(self, node: Node, number: int) -> bool:
        """Whether stage ``number`` is given ``node``, and does not compute it again."""
        if node not in self._carried or node in self._coupled:
            return False
        first = self._stage_of.get(node)
        return first is None or first // self._together != number // self._together

    def _needed(self, number: int, roots: Sequence[Node], own: set[Node]) -> set[Node]:
        """What the stage takes from outside or computes again: crossing values, normalisations, rowless nodes."""
        found: set[Node] = set()
        open_nodes = [n for root in roots for n in ([root] if root not in own else root.all_input_nodes)]
        while open_nodes:
            node = open_nodes.pop()
            if node in own or node in found:
                continue
            found.add(node)
            if not self._crosses(node, number):
                open_nodes += node.all_input_nodes
        return found

    def _stage(self, number: int, own: Sequence[Node], needed: set[Node], crossing: set[Node]) -> Stage:
        last = number == len(self._barriers)
        outputs = [n for n in own if n in crossing or n in self._results]
        if last:
            outputs += [n for n in self._results if n in self._coupled]
        again = [n for n in needed if not self._crosses(n, number) and n.op != "placeholder"]
        run = sorted({*own, *again}, key=self._place.__getitem__)
        observed = None if last else self._observed(number)
        ordered = sorted(needed, key=self._place.__getitem__)
        return Stage(
            number=number,
            nodes=tuple(run),
            inputs=tuple(n for n in ordered if self._crosses(n, number)),
            shared=tuple(n for n in ordered if n not in self._carried and n.op == "placeholder"),
            normalised=tuple(n for n in ordered if n in self._coupled),
            outputs=tuple(outputs),
            observed=observed,
            barrier=None if last else self._barriers[number],
            last_uses=_last_uses(run, {*outputs, observed}),
        )


def _last_uses(run: Sequence[Node], kept: set[Node | None]) -> tuple[tuple[Node, ...], ...]:
    last: dict[Node, int] = {}
    for index, node in enumerate(run):
        for value in (node, *node.all_input_nodes):
            last[value] = index
    return tuple(
        tuple(n for n, at in last.items() if at == index and n not in kept) for index in range(len(run))
    )
