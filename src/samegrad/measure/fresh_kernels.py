"""A measurement that leaves no choice of cuDNN's behind, and meets none.

cuDNN chooses the kernel of a convolution once for each shape, and takes a slow one where the memory for a fast one's
workspace is missing. PyTorch keeps that choice as long as the thread lives: a plan that was tried with too little
memory would slow every plan after it, and telling cuDNN to try all its kernels would change nothing. So a plan with
convolutions is tried on a thread of its own, forward and backward.

A thread does not see what is in force on another one (autocast, modes, hooks on saved tensors), and parts that were
compiled may belong to theirs: where there is any of that, the measurement stays where it is.

Source: PyTorch, aten/src/ATen/native/cudnn/Conv_v8.cpp: thread-local caches by shape, strides and alignment.
"""

from __future__ import annotations

import concurrent.futures
import contextvars
from collections.abc import Callable
from typing import TypeVar

import torch

from samegrad.declared import DeclaredStep
from samegrad.measure import counters
from samegrad.module_walk import convolves, is_compiled, parts_of

Found = TypeVar("Found")


def with_fresh_kernels(declared: DeclaredStep, run: Callable[[], Found]) -> Found:
    """What ``run`` returns, which runs the step; on a thread of its own where it convolves there and that changes
    nothing else. Raises what it raises."""
    device = declared.device
    if device.type != "cuda" or not convolves(declared.modules) or _belongs_here(declared):
        return run()
    stream = torch.cuda.current_stream(device)

    def apart() -> Found:
        with (
            torch.cuda.device(device),
            torch.cuda.stream(stream),
            torch.autograd.set_multithreading_enabled(False),
            counters.workspaces_of_two_threads(device),
        ):
            return run()

    # An interrupt comes to this thread and waits for the other one, which would go on with the user's model.
    with concurrent.futures.ThreadPoolExecutor(1, "samegrad-measurement") as thread:
        return thread.submit(contextvars.copy_context().run, apart).result()


def _belongs_here(declared: DeclaredStep) -> bool:
    """Whether something is in force that only this thread sees, or was made for it."""
    hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    in_force = (
        torch.is_autocast_enabled("cuda"),
        torch.is_autocast_enabled("cpu"),
        not torch.is_grad_enabled(),
        torch._C._len_torch_function_stack() > 0,
        torch._C._len_torch_dispatch_stack() > 0,
        hooks is None or hooks(False) is not None,
    )
    compiled = any(map(is_compiled, parts_of(declared.modules)))
    # Its pool was made on this thread, and workspaces that it knows cannot be given back.
    return any(in_force) or compiled or counters.has_captured(declared.device)
