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

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx import Node
from torch.nn.modules.batchnorm import _BatchNorm

from samegrad.errors import CannotSplit, Untraceable
from samegrad.exact.state import StateRule

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


def is_rows(leaf: Any, rows: int) -> bool:
    """Whether ``leaf`` is a tensor of ``rows`` rows."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == rows


def untraceable(found: str) -> Untraceable:
    """The error that says why a network cannot be cut at its BatchNorm layers."""
    return Untraceable(asked=_ASKED, found=found, do=_DO)


def cut_stages(
    graph: fx.Graph,
    leaves: Sequence[Any],
    inputs: Sequence[Node],
    layers: Mapping[str, _BatchNorm],
    constants: Mapping[str, Tensor],
    rows: int,
    together: int,
) -> Stages:
    """The stages of ``graph``, whose placeholders ``inputs`` stand for the tensors among ``leaves``.

    ``layers``: by name what barriers are calls of. Raises Untraceable.
    """
    nodes = list(graph.nodes)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    carried = {node for node, leaf in zip(inputs, tensors) if is_rows(leaf, rows)}
    for node in nodes:
        if any(source in carried for source in node.all_input_nodes):
            carried.add(node)
    barriers = [n for n in nodes if n.op == "call_module" and str(n.target) in layers]
    for node in barriers:
        if node not in carried or len(node.all_input_nodes) != 1:
            raise untraceable(f"{node.target} is called on something that is not rows")
    for node in nodes:
        if node.target is F.batch_norm and (node.kwargs.get("training") or (*node.args, *(False,) * 6)[5]):
            raise untraceable("the code calls torch.nn.functional.batch_norm in training mode")
    stages = _Cutter(nodes, frozenset(carried), barriers, together).stages()
    normalised = [node for stage in stages for node in stage.normalised]
    return Stages(
        graph, stages, tuple(inputs), nodes[-1].args[0], constants, frozenset(carried),
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
