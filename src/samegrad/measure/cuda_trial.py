"""Whether CUDA's dispatch can be followed with the torch that is installed: a toy step is tried, once a process."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from samegrad.measure.cuda_dispatch import CUDA, CudaDispatch
from samegrad.measure.failures import first_line
from samegrad.measure.recorder import Recorder
from samegrad.measure.replaced import generators_at_rest
from samegrad.measure.shadows import Twins


@functools.cache
def why_not() -> str:
    """Why CUDA's dispatch cannot be followed with this torch, "" where it can: a toy step is tried, once a process."""
    dispatch = CudaDispatch()
    try:
        with (
            dispatch.followed(),
            generators_at_rest(),
            FakeTensorMode(allow_non_fake_inputs=True),
            Recorder(dispatch, Twins(CUDA, CUDA), {}),
        ):
            return _tried()
    except (AttributeError, NotImplementedError, OSError, RuntimeError, TypeError, ValueError) as error:
        return f"torch {torch.__version__}: {first_line(error)}"


def _tried() -> str:
    """What is not as expected in a toy step: a linear layer under autocast, attention that runs again in backward."""
    rows = torch.empty(2, 4, 16, 8, device=CUDA)
    layer = nn.Linear(8, 8, device=CUDA)
    seen: dict[str, Any] = {"device": rows.device.type, "is_cuda": rows.is_cuda}

    def attend(values: Tensor) -> Tensor:
        projected = layer(values)
        seen["linear"] = projected.dtype
        return nn.functional.scaled_dot_product_attention(projected, projected, projected)

    with torch.autocast("cuda", torch.bfloat16):
        made = torch.utils.checkpoint.checkpoint(attend, rows, use_reentrant=False)
        seen["softmax"] = made.softmax(-1).dtype
    made.sum().backward()
    grad = layer.weight.grad
    seen["gradient"] = None if grad is None else grad.device.type
    expected = {
        "device": "cuda", "is_cuda": True, "linear": torch.bfloat16, "softmax": torch.float32, "gradient": "cuda",
    }  # fmt: skip
    wrong = [f"{name} is {seen.get(name)}, not {value}" for name, value in expected.items() if seen[name] != value]
    return f"torch {torch.__version__}: {'; '.join(wrong)}" if wrong else ""
