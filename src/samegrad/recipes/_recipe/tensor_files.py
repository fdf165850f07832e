"""Tensors from ``.pt`` and ``.safetensors`` files; or BadInput with the path. Nothing in a file is run."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from samegrad.recipes._recipe.refused_files import open_file, refused_file

# A zip file with a pickle in it, or the pickle alone: what is no sound one ends in any of these.
_READING_ERRORS = (
    OSError, ValueError, TypeError, EOFError, LookupError, AttributeError, AssertionError, RuntimeError, MemoryError,
    OverflowError, struct.error, pickle.UnpicklingError, safetensors.SafetensorError,
)  # fmt: skip
_DO = "give a file that a run wrote, or write this one anew from tensors and plain values alone"


def read_plain(path: Path, *, what: str) -> Any:
    """What a ``.pt`` file holds, on the host: tensors, numbers, words, and lists and dictionaries of them.

    ``what`` names it as the user knows it: "weights". Raises BadInput for a file that holds other things or is cut off.
    """
    try:
        with open_file(path) as file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except _READING_ERRORS as error:
        raise refused_file(path, what=what, found=error, do=_DO) from None


def read_tensors(path: Path, *, what: str) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or ``.pt`` file by name, finite and dense; one alone has the file's name.

    Raises BadInput as ``read_plain`` does, and for other content.
    """
    if path.suffix == ".safetensors":
        try:
            with open_file(path) as file:
                found: Any = safetensors.torch.load(file.read())
        except _READING_ERRORS as error:
            raise refused_file(path, what=what, found=error, do=_DO) from None
    else:
        found = read_plain(path, what=what)
    named = {path.stem: found} if isinstance(found, Tensor) else found
    problem = tensors_problem(named)
    if problem is not None:
        raise refused_file(path, what=what, found=problem, do=_DO)
    return {name: tensor.detach() for name, tensor in named.items()}


def tensors_problem(named: Any) -> str | None:
    """Why ``named`` is no dictionary of names and tensors that can be computed with; None where it is."""
    if not isinstance(named, dict):
        return f"it holds a {type(named).__name__}, not tensors by name"
    problems = (
        f"the name {name!r}, which is no text" if not isinstance(name, str) else unusable(value, name)
        for name, value in named.items()
    )
    return next(filter(None, problems), None)


def unusable(value: Any, name: str) -> str | None:
    """Why ``value``, called ``name``, is no dense tensor of finite real numbers on the host; None where it is."""
    if not isinstance(value, Tensor):
        return f"{name!r} is a {type(value).__name__}, not a tensor"
    if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or value.is_complex():
        found = f"{value.dtype}, {value.layout}, on {value.device}"
        return f"{name!r} is a tensor of {found}, not a dense one of real numbers"
    # A float8 has no isfinite of its own.
    if not bool((value.float() if value.dtype.itemsize == 1 else value).isfinite().all()):
        return f"{name!r} holds values that are not finite"
    return None
