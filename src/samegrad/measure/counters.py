"""The CUDA allocator's counters and what is free: the only file that reads or resets them.

On the CPU there is no such allocator; what is free is the cgroup's or the host's limit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch

from samegrad.errors import EnvironmentProblem, UsageError
from samegrad.measure.allocator_rules import fraction_of_cap
from samegrad.measure.host_memory import read_host_memory
from samegrad.records import Budget, Counting
from samegrad.units import format_bytes, parse_bytes, parse_share

# Left free for what no counter sees: library handles, a kernel's own scratch, a neighbour's growth.
_FREE_MARGIN = 0.05


@dataclasses.dataclass(frozen=True)
class AllocatorReading:
    """Bytes by the CUDA allocator since its peaks were last reset; retries since the process began."""

    allocated_bytes: int
    reserved_bytes: int
    peak_allocated_bytes: int
    peak_reserved_bytes: int
    retries: int


def read_allocator(device: torch.device) -> AllocatorReading | None:
    """The counters of ``device``, or None where there is no CUDA allocator."""
    if device.type != "cuda":
        return None
    stats = torch.cuda.memory_stats(device)
    return AllocatorReading(
        allocated_bytes=stats.get("allocated_bytes.all.current", 0),
        reserved_bytes=stats.get("reserved_bytes.all.current", 0),
        peak_allocated_bytes=stats.get("allocated_bytes.all.peak", 0),
        peak_reserved_bytes=stats.get("reserved_bytes.all.peak", 0),
        retries=stats.get("num_alloc_retries", 0),
    )


def retries(device: torch.device) -> int:
    """How often the allocator gave back what it had cached and tried again, since the process began."""
    reading = read_allocator(device)
    return 0 if reading is None else reading.retries


def reset_peaks(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def release_cached(device: torch.device) -> int:
    """Frees what only cycles hold, and gives unused memory back to the driver; returns the bytes given back."""
    # Errors and the frames that they hold are cycles: what they keep would count against whatever is measured next.
    gc.collect()
    before = read_allocator(device)
    if before is None:
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return before.reserved_bytes - torch.cuda.memory_reserved(device)


def take_workspaces(device: torch.device) -> None:
    """Has cuBLAS take what it keeps for this stream, for the thread of the forward and for that of the backward.

    Taken later it would lie inside a large segment, and small as it is, keep all of it from being given back. What it
    holds from before is given back for that reason, but where a graph was captured, which may know its address.
    """
    if device.type != "cuda":
        return
    # Graphs that were closed are let go of, and their segments given back.
    release_cached(device)
    if not _has_captured(device):
        torch._C._cuda_clearCublasWorkspaces()
        release_cached(device)
    if _refuses_products():
        return
    ones = torch.ones(8, 8, device=device, requires_grad=True)
    torch.autograd.grad((ones @ ones).sum(), ones)


def retake_workspaces(device: torch.device) -> None:
    """``take_workspaces`` where cuBLAS keeps any: what multiplies no matrices pays for none."""
    kept_workspace_bytes(device)


def kept_workspace_bytes(device: torch.device) -> int:
    """What cuBLAS keeps between steps: it gives it back and takes it anew. 0 where a captured graph may know where."""
    if device.type != "cuda" or _has_captured(device):
        return 0
    before = torch.cuda.memory_allocated(device)
    torch._C._cuda_clearCublasWorkspaces()
    without = torch.cuda.memory_allocated(device)
    if without < before:
        take_workspaces(device)
    return before - without


def _refuses_products() -> bool:
    """Whether torch was told to raise where cuBLAS may add up in any order, and cuBLAS not to do so."""
    strict = torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    return strict and "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def _has_captured(device: torch.device) -> bool:
    """Whether a captured graph holds memory: its segments are of a pool of their own."""
    index = torch.device(device).index or 0
    return any(
        segment["device"] == index and tuple(segment["segment_pool_id"]) != (0, 0)
        # torch has no types here.
        for segment in cast(Any, torch.cuda).memory_snapshot()
    )


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def total_bytes(device: torch.device) -> tuple[int, str]:
    """All the memory ``device`` has, and how that was read."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1], "the driver's total"
    host = read_host_memory()
    return host.limit_bytes, host.source


def free_now(device: torch.device) -> tuple[int, str]:
    """Bytes a step could take on ``device`` now, a margin left, and how that was read."""
    reading = read_allocator(device)
    if reading is not None:
        driver_free = torch.cuda.mem_get_info(device)[0]
        # What the allocator holds already counts towards a budget, whether it is in use or cached.
        free = driver_free + reading.reserved_bytes
        how = f"driver-free {format_bytes(driver_free)} and reserved {format_bytes(reading.reserved_bytes)}"
        cap = int(torch.cuda.get_per_process_memory_fraction(device) * torch.cuda.mem_get_info(device)[1])
        if cap < free:
            free, how = cap, f"the allocator's cap {format_bytes(cap)}"
        return int(free * (1 - _FREE_MARGIN)), f"{how}, less {_FREE_MARGIN:.0%}"
    host = read_host_memory()
    how = f"{host.source} {format_bytes(host.limit_bytes)} less {format_bytes(host.used_bytes)} in use"
    return int(host.available_bytes * (1 - _FREE_MARGIN)), f"{how}, less {_FREE_MARGIN:.0%}"


def read_budget(asked: str | int | None, device: torch.device, *, host: str | int | None = None) -> Budget:
    """The budget that ``asked`` means on ``device``: bytes, "6GiB", "80%", or None for what is free now."""
    counting = Counting.CUDA_ALLOCATOR if device.type == "cuda" else Counting.TENSOR_BYTES
    if asked is None:
        amount, how = free_now(device)
        source = f"what is free now: {how}"
    else:
        amount, source = asked_bytes(asked, lambda: total_bytes(device))
    host_bytes = parse_bytes(host, option="host_budget") if isinstance(host, str) else host
    if host_bytes is None and device.type == "cuda":
        # What plans pin there cannot be swapped out.
        host_bytes = int(read_host_memory().available_bytes * (1 - _FREE_MARGIN))
    name = device_name(device)
    return Budget(total_bytes=amount, device=name, counting=counting, source=source, host_bytes=host_bytes)


def asked_bytes(asked: str | int, whole: Callable[[], tuple[int, str]]) -> tuple[int, str]:
    """Bytes that ``asked`` means, and its source in words. ``whole``: all there is, and how that is known."""
    if isinstance(asked, int) and not isinstance(asked, bool):
        if asked <= 0:
            raise UsageError(
                asked=f"budget={asked}", found="not a positive number of bytes", do="give bytes, or text such as '6GiB'"
            )
        return asked, f"budget={asked}"
    if isinstance(asked, str):
        share = parse_share(asked)
        if share is None:
            return parse_bytes(asked), f"budget {asked}"
        total, how = whole()
        return int(total * share), f"budget {asked} of {format_bytes(total)} ({how})"
    raise UsageError(
        asked=f"budget={asked!r}",
        found=f"a {type(asked).__name__}",
        do="give whole bytes, or text such as '6GiB' or '80%'",
    )


def driver_process_bytes(device: torch.device) -> int | None:
    """What the driver says this process holds on ``device``: context and libraries too. None where it cannot be asked.

    Needs nvidia-ml-py (the extra ``gpu``); inside containers the driver may know the process by another number.
    """
    if device.type != "cuda" or importlib.util.find_spec("pynvml") is None:
        return None
    import pynvml

    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        return next((process.usedGpuMemory for process in running if process.pid == os.getpid()), None)
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def find_device(name: str) -> torch.device:
    """The device called ``name``; "auto" is CUDA where there is one. Raises UsageError or EnvironmentProblem."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(
            asked=f"device {name!r}", found="not a device's name", do="use cpu, cuda, cuda:1 or auto", option="device"
        ) from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise EnvironmentProblem(
            asked=f"device {name!r}",
            found=f"{torch.cuda.device_count()} CUDA devices (torch {torch.__version__})",
            do="try --device cpu, or see 'samegrad doctor'",
            option="device",
        )
    if device.type == "cuda":
        return torch.device("cuda", device.index or 0)
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:
        # Each backend that this torch or this machine lacks says so in a way of its own.
        raise EnvironmentProblem(
            asked=f"device {name!r}",
            found=f"torch {torch.__version__} cannot use it here: {str(error).splitlines()[0]}",
            do="try --device cpu, or see 'samegrad doctor'",
            option="device",
        ) from error
    return device


def cap_allocator(device: torch.device, budget_bytes: int) -> float | None:
    """Makes the allocator refuse to reserve more than ``budget_bytes``; returns the fraction that did it."""
    if device.type != "cuda":
        return None
    fraction = fraction_of_cap(budget_bytes, torch.cuda.mem_get_info(device)[1])
    torch.cuda.set_per_process_memory_fraction(fraction, device)
    return fraction


@contextlib.contextmanager
def capped(device: torch.device, most_bytes: int) -> Iterator[None]:
    """A block in which the allocator refuses to reserve more than ``most_bytes``, or what it was capped at before."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_per_process_memory_fraction(device)
    fraction = fraction_of_cap(most_bytes, torch.cuda.mem_get_info(device)[1])
    torch.cuda.set_per_process_memory_fraction(min(before, fraction), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


def uncap_allocator(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_per_process_memory_fraction(1.0, device)
