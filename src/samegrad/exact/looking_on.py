"""Dispatch modes that leave alone what users have compiled.

torch's compiler gives up, for good, on code that it meets while a dispatch mode looks on: a model that was only
measured would run in Python ever after. So what is compiled runs in Python inside such a block, and as before after it.
"""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LookingOn(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types here
    """A dispatch mode of ours."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()  # type: ignore[no-untyped-call]  # torch has no types here

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types here
        self._stances: list[Any] = []

    def __enter__(self) -> Self:
        # Slow to import, and nothing was compiled without it.
        compiles = "torch._dynamo" in sys.modules and not torch.compiler.is_compiling()
        stance: Any = torch.compiler.set_stance("force_eager") if compiles else None
        if stance is not None:
            stance.__enter__()
        self._stances.append(stance)
        super().__enter__()  # type: ignore[no-untyped-call]  # torch has no types here
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]  # torch has no types here
        stance = self._stances.pop()
        if stance is not None:
            stance.__exit__(kind, error, trace)
