"""The states of the random generators as uint8 tensors: torch on the CPU and CUDA, Python's, numpy's. No pickle."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import numpy
import torch
from torch import Tensor

from samegrad.errors import BadInput

_CPU, _PYTHON, _NUMPY, _CUDA = "torch_cpu", "python", "numpy", "torch_cuda_"


def rng_to_tensors() -> dict[str, Tensor]:
    """The states of all default generators now, by name, each (N,) uint8 on the host.

    CUDA generators are included once CUDA has started in this process: before, nothing was drawn there.
    """
    version, words, normal = random.getstate()
    legacy: Any = numpy.random.get_state(legacy=False)
    legacy["state"] = {"key": legacy["state"]["key"].tolist(), "pos": int(legacy["state"]["pos"])}
    states = {
        _CPU: torch.get_rng_state(),
        _PYTHON: _pack({"version": version, "words": list(words), "normal": normal}),
        _NUMPY: _pack(legacy),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states |= {f"{_CUDA}{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def rng_from_tensors(tensors: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Set all default generators; sentences about what could not be restored on this machine, none if exact.

    Raises BadInput for a state that is missing or damaged; no generator is then changed.
    """
    cuda = {name: state for name, state in tensors.items() if name.startswith(_CUDA)}
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    missing = sorted({_CPU, _PYTHON, _NUMPY} - tensors.keys())
    if missing:
        raise _wrong(f"no state of {', '.join(missing)}")
    before = rng_to_tensors()
    try:
        _set(tensors, cuda_devices=min(here, len(cuda)))
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError, OverflowError) as error:
        # The generators check their own states; what was set before the refusal is taken back.
        _set(before, cuda_devices=sum(name.startswith(_CUDA) for name in before))
        raise _wrong(f"{type(error).__name__}: {error}") from None
    if len(cuda) > here:
        return (f"random states of {len(cuda)} CUDA devices were saved, {here} are here: later draws will differ",)
    return ()


def _set(tensors: Mapping[str, Tensor], *, cuda_devices: int) -> None:
    words, legacy = _unpack(tensors[_PYTHON]), _unpack(tensors[_NUMPY])
    legacy["state"]["key"] = numpy.array(legacy["state"]["key"], dtype=numpy.uint32)
    torch.set_rng_state(tensors[_CPU].cpu())
    random.setstate((words["version"], tuple(words["words"]), words["normal"]))
    numpy.random.set_state(legacy)
    for i in range(cuda_devices):
        torch.cuda.set_rng_state(tensors[f"{_CUDA}{i}"].cpu(), i)


def _pack(document: Mapping[str, Any]) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(document).encode()), dtype=torch.uint8)


def _unpack(tensor: Tensor) -> Any:
    return json.loads(bytes(tensor.cpu().contiguous().numpy()))


def _wrong(found: str) -> BadInput:
    return BadInput(
        asked="restore the random generators",
        found=found,
        do="give the states that rng_to_tensors saved, unchanged",
    )
