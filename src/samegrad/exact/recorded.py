"""What ``torch.fx`` recorded of a network, run node by node, and compared with the network itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node

from samegrad.exact.dataless import has_data


@dataclasses.dataclass(frozen=True)
class Recorded:
    """The modules and tensors that nodes name. ``constants``: tensors that the code made while it was recorded."""

    network: nn.Module
    modules: Mapping[str, nn.Module]
    constants: Mapping[str, Tensor]

    @classmethod
    def of(cls, network: nn.Module, constants: Mapping[str, Tensor]) -> Recorded:
        return cls(network, dict(network.named_modules()), constants)

    def evaluated(self, node: Node, values: Mapping[Node, Any]) -> Any:
        """What ``node`` is, given ``values`` of the nodes it uses."""
        args = filled(node.args, values.__getitem__)
        kwargs = filled(node.kwargs, values.__getitem__)
        if node.op == "call_module":
            return self.modules[str(node.target)](*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "get_attr":
            return self.attribute(str(node.target))
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def attribute(self, path: str) -> Any:
        if path in self.constants:
            return self.constants[path]
        found: Any = self.network
        for name in path.split("."):
            found = getattr(found, name)
        return found

    def run(self, nodes: Iterable[Node], values: dict[Node, Any]) -> None:
        for node in nodes:
            if node not in values and node.op != "output":
                values[node] = self.evaluated(node, values)

    def parameters_of(self, node: Node) -> list[nn.Parameter]:
        """The parameters that evaluating ``node`` may use."""
        if node.op == "call_module":
            return list(self.modules[str(node.target)].parameters())
        found = self.attribute(str(node.target)) if node.op == "get_attr" else None
        if isinstance(found, nn.Module):
            return list(found.parameters())
        return [found] if isinstance(found, nn.Parameter) else []


def filled(structure: Any, of_node: Callable[[Node], Any]) -> Any:
    """``structure`` of a node's arguments with values in place of nodes, in ordinary lists and dicts."""
    if isinstance(structure, Node):
        return of_node(structure)
    if isinstance(structure, (list, tuple)):
        parts = [filled(part, of_node) for part in structure]
        if isinstance(structure, list):
            return parts
        return type(structure)(*parts) if hasattr(structure, "_fields") else tuple(parts)
    if isinstance(structure, dict):
        return {key: filled(part, of_node) for key, part in structure.items()}
    if isinstance(structure, slice):
        return slice(*(filled(part, of_node) for part in (structure.start, structure.stop, structure.step)))
    return structure


def nodes_in(structure: Any) -> list[Node]:
    found: list[Node] = []
    fx.node.map_arg(structure, lambda node: found.append(node))
    return found


def agree(a: Any, b: Any) -> bool:
    """Whether two results of one network on the same rows are the same, up to what kernels may do in another run.

    Without data only shapes can tell.
    """
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return not isinstance(a, Tensor) and not isinstance(b, Tensor)
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not has_data(a) or not has_data(b):
        return True
    if not a.is_floating_point():
        return torch.equal(a, b)
    scale = float(b.double().abs().nan_to_num(0, 0, 0).max()) if b.numel() else 0.0
    return torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-3 * scale, equal_nan=True)
