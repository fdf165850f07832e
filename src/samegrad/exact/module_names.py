"""Which module did it: paths of the modules that run, for errors that name them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from samegrad import trees


def label(name: str, part: nn.Module) -> str:
    return f"{name or 'the model'} ({type(part).__name__})"


@contextlib.contextmanager
def looked_at(network: nn.Module, look: Callable[[str, Tensor | None], None]) -> Iterator[None]:
    """Calls ``look(module path and kind, first output tensor)`` after every module's forward."""

    def after(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            tensors = [leaf for leaf in trees.leaves_of(output) if isinstance(leaf, Tensor)]
            look(name, tensors[0].detach() if tensors else None)

        return hook

    handles = []
    try:
        for name, part in network.named_modules():
            handles.append(part.register_forward_hook(after(label(name, part))))
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_module(network: nn.Module, run: Callable[[], object], happened: Callable[[], bool]) -> str:
    """The module whose own code made ``happened()`` true first: seen where modules inside it begin, and at its end."""
    running: list[str] = []
    found: list[str] = []

    def look() -> None:
        if running and not found and happened():
            found.append(running[-1])

    def before(name: str) -> Callable[[nn.Module, Any], None]:
        def hook(_: nn.Module, __: Any) -> None:
            look()
            running.append(name)

        return hook

    def after(_: nn.Module, __: Any, ___: Any) -> None:
        look()
        running.pop()

    handles = []
    try:
        for name, part in network.named_modules():
            handles += [part.register_forward_pre_hook(before(label(name, part))), part.register_forward_hook(after)]
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "code outside its modules"


@contextlib.contextmanager
def entered(network: nn.Module) -> Iterator[list[str]]:
    """The modules that are running, outermost first; after an exception, those it came through."""
    running: list[str] = []

    def before(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda _, __: running.append(name)

    def after(_: nn.Module, __: Any, ___: Any) -> None:
        running.pop()

    handles = []
    try:
        for name, part in network.named_modules():
            handles += [part.register_forward_pre_hook(before(label(name, part))), part.register_forward_hook(after)]
        yield running
    finally:
        for handle in handles:
            handle.remove()
