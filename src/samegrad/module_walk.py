"""The modules below some modules, without the generators of torch: every step asks for them several times.

They come in the order of ``nn.Module.modules()``, each once.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


def parts_of(roots: Iterable[nn.Module]) -> list[nn.Module]:
    """``roots`` and all modules below them."""
    found: dict[int, nn.Module] = {}
    for root in roots:
        to_see = [root]
        while to_see:
            part = to_see.pop()
            if id(part) not in found:
                found[id(part)] = part
                to_see += [child for child in reversed(part._modules.values()) if child is not None]
    return list(found.values())


def parameters_of(roots: Iterable[nn.Module]) -> list[nn.Parameter]:
    """All parameters of ``roots`` and what is below them, each once."""
    found = {id(p): p for part in parts_of(roots) for p in part._parameters.values() if p is not None}
    return list(found.values())


def buffers_of(roots: Iterable[nn.Module]) -> list[Tensor]:
    """All buffers of ``roots`` and what is below them, each once."""
    found = {id(b): b for part in parts_of(roots) for b in part._buffers.values() if b is not None}
    return list(found.values())


def convolves(roots: Iterable[nn.Module]) -> bool:
    """Whether there are layers among them whose kernels a library chooses by their shapes."""
    return any(isinstance(part, _ConvNd) for part in parts_of(roots))


def is_compiled(part: nn.Module) -> bool:
    """By torch.compile(part), or by part.compile()."""
    return hasattr(part, "_orig_mod") or part._compiled_call_impl is not None
