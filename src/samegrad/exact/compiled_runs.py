"""Tells the compiler which nodes of a step to compute again in backward: those that came from runs of blocks.

It is a pass over the graph of forward and backward together, before the compiler cuts it in two. torch marks what its
own checkpoints recompute in the same way; these marks need no call of them, so a model's code stays as it is.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

# A submodule's place as the compiler writes it: attributes, entries of lists, and those that were asked for by name.
_ENTRY = re.compile(r"\[['\"]?([^\[\]'\"]+)['\"]?\]")
_ASKED_FOR = re.compile(r"getattr\(([^()]*), ['\"]([^'\"]*)['\"]\)")


class RunAgain(CustomGraphPass):
    """Marks the forward nodes of ``runs`` of submodules, named from the network.

    ``graphs``: how many it has seen.
    """

    def __init__(self, runs: tuple[tuple[str, ...], ...]) -> None:
        self._runs = runs
        self._run_of = {name: index for index, run in enumerate(runs) for name in run}
        self._marked: set[int] = set()
        self.graphs = 0

    def not_found(self) -> list[str]:
        """The first submodule of each run of which no graph had a node."""
        return [run[0] for index, run in enumerate(self._runs) if index not in self._marked]

    def __call__(self, graph: Graph) -> None:
        self.graphs += 1
        for node in graph.nodes:
            if node.op == "call_function" and node.meta.get("partitioner_tag") != "is_backward":
                run = self._of(node)
                if run is not None:
                    self._marked.add(run)
                    node.meta["recompute"] = CheckpointPolicy.PREFER_RECOMPUTE
                    # What one run hands to the next is kept: that is where the numbers differ.
                    node.meta["ac_graph_id"] = run

    def uuid(self) -> str:
        """For the compiler's cache: other runs are other graphs."""
        return hashlib.sha256(repr(self._runs).encode()).hexdigest()

    def _of(self, node: Node) -> int | None:
        stack: dict[str, Any] = node.meta.get("nn_module_stack") or {}
        for place, _ in stack.values():
            run = self._run_of.get(_below_network(place))
            if run is not None:
                return run
        return None


def _below_network(place: str) -> str:
    """``L['network'].blocks.0``, ``…blocks[0]`` or ``getattr(L['network'].blocks, '0')`` as ``blocks.0``."""
    while (plainer := _ASKED_FOR.sub(r"\1.\2", place)) != place:
        place = plainer
    _, _, below = place.partition("'network']")
    return _ENTRY.sub(r".\1", below).removeprefix(".")
