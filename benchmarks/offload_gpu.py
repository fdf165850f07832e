"""How fast is a step whose saved tensors wait on the host? One GPU, nothing beside it.

ViT-B/16 on 128 images under bfloat16 autocast, with AdamW: plainly, with ``offload_saved`` on some modules, with it
when storages come only as backward asks for them (as before they came ahead), and with torch's
``save_on_cpu(pin_memory=True)`` on the same modules. What travels (``WHAT``): the large storages of all blocks or all
of every second block, about half of the saved bytes either way, and so little that a link of 50 GB/s can carry it
beside the computation.

``bound_seconds`` is what no offload of those bytes can beat: forward and backward each the longer of what the plain
step computes and of the bytes over the link's bandwidth, as both were measured here. Where the link is what bounds a
step, copies cannot hide, and no share of the plain speed can be asked for but that of the bound.

``--small``: a tiny model in float32, on the CPU if there is no GPU, to see that it runs; nothing is written.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import _networks
import _results
import _steps
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.declared import declare
from samegrad.execute.apply import applied, standing
from samegrad.levers import _host_copies
from samegrad.levers._host_copies import HostCopy
from samegrad.measure.target import Target
from samegrad.measure.timing import predict_seconds
from samegrad.measure.trace import trace_step
from samegrad.measure.trace_reading import peak_bytes
from samegrad.records import Exactness, Plan

WARM, TIMED = 3, 10
BLOCKS = 12
CASE = _steps.StepCase("vit_b16 128 bf16", "vit_b16", 128, "bf16")
SMALL = _steps.StepCase("vit_tiny 2 fp32", "vit_tiny", 2)
# Modules whose saved tensors travel, and from how many bytes on. The hidden rows of a block's perceptron have 148 MiB.
WHAT: dict[str, tuple[list[str], int]] = {
    "large storages of all blocks": ([f"blocks.{k}" for k in range(BLOCKS)], 128 * 2**20),
    "every second block": ([f"blocks.{k}" for k in range(0, BLOCKS, 2)], 2**20),
    "inputs of every second GELU": ([f"blocks.{k}.mlp.1" for k in range(0, BLOCKS, 2)], 2**20),
}
Run = Callable[[], None]


def plan_of(case: _steps.StepCase, modules: list[str], smallest_bytes: int) -> Plan:
    levers = {"offload_saved": {"smallest_bytes": smallest_bytes, "modules": modules}} if modules else {}
    return Plan(levers=levers, exactness=Exactness.SAME_BITS, batch_rows=case.rows)


@contextlib.contextmanager
def plainly(case: _steps.StepCase, device: str, modules: list[str]) -> Iterator[tuple[nn.Module, Run]]:
    """PyTorch's own step; what ``modules`` save goes to the host by ``save_on_cpu``."""
    model, batch = _steps.make_model(case, device), _steps.make_batch(case, device)
    forward = _steps.forward_of(case)
    for path in modules:
        part = model.get_submodule(path)
        part.forward = saving_on_cpu(part.forward, pin=device == "cuda")  # type: ignore[method-assign]  # the instance's
    yield model, lambda: _steps.loss_of(forward(model, batch), batch).backward()


def saving_on_cpu(forward: Callable[..., Any], *, pin: bool) -> Callable[..., Any]:
    def saving(*args: Any) -> Any:
        with torch.autograd.graph.save_on_cpu(pin_memory=pin):
            return forward(*args)

    return saving


@contextlib.contextmanager
def offloading(
    case: _steps.StepCase, plan: Plan, device: str, most_ahead: int = _host_copies.MOST_AHEAD
) -> Iterator[tuple[nn.Module, Run]]:
    model, batch = _steps.make_model(case, device), _steps.make_batch(case, device)
    before = _host_copies.MOST_AHEAD
    _host_copies.MOST_AHEAD = most_ahead
    try:
        with sg.Step(model, _steps.loss_of, plan=plan, forward=_steps.forward_of(case)) as step:
            yield model, lambda: step.backward(batch)
    finally:
        _host_copies.MOST_AHEAD = before


def measured(way: contextlib.AbstractContextManager[tuple[nn.Module, Run]], device: str) -> dict[str, Any]:
    """Median seconds of forward and backward with the optimizer's turn, and the peaks."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    with way as (model, run):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        seconds, resident = [], 0
        for turn in range(WARM + TIMED):
            if turn == WARM and device == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                resident = torch.cuda.memory_allocated()
            wait_for(device)
            begin = time.perf_counter()
            run()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            wait_for(device)
            seconds.append(time.perf_counter() - begin)
    figures: dict[str, Any] = {"seconds": statistics.median(seconds[WARM:])}
    if device == "cuda":
        figures |= {
            "resident_bytes": resident,
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        }
    return figures


def wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def travelled_bytes(case: _steps.StepCase, plan: Plan, device: str) -> tuple[int, int]:
    """What a step sends to the host, and what comes back."""
    sizes: dict[str, list[int]] = {"out": [], "back": []}
    send, coming = HostCopy._send, HostCopy.coming

    def sent(self: HostCopy, there: Tensor) -> None:
        sizes["out"].append(self.size_bytes)
        send(self, there)

    def came(self: HostCopy) -> _host_copies.Arriving:
        sizes["back"].append(self.size_bytes)
        return coming(self)

    try:
        HostCopy._send, HostCopy.coming = sent, came  # type: ignore[method-assign]  # counted, and put back below
        with offloading(case, plan, device) as (_, run):
            run()
    finally:
        HostCopy._send, HostCopy.coming = send, coming  # type: ignore[method-assign]  # as they were
    return sum(sizes["out"]), sum(sizes["back"])


def link_bytes_per_second() -> tuple[float, float]:
    """Pinned memory out and back, the best of several copies of 256 MiB."""
    there = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)

    def rate(to: Tensor, source: Tensor) -> float:
        return there.nbytes / min(seconds_on_device(lambda: to.copy_(source, non_blocking=True)) for _ in range(8))

    return rate(host, there), rate(there, host)


def seconds_on_device(run: Callable[[], Any]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def forward_and_backward_seconds(case: _steps.StepCase) -> tuple[float, float]:
    """Of the plain step, on the device."""
    model, batch = _steps.make_model(case, "cuda"), _steps.make_batch(case, "cuda")
    forward, found = _steps.forward_of(case), []
    losses: list[Tensor] = []
    for _ in range(WARM + TIMED):
        took = seconds_on_device(lambda: losses.append(_steps.loss_of(forward(model, batch), batch)))
        found.append((took, seconds_on_device(losses.pop().backward)))
        model.zero_grad(set_to_none=True)
    forwards, backwards = zip(*found[WARM:])
    return statistics.median(forwards), statistics.median(backwards)


def predicted(case: _steps.StepCase, plan: Plan, target: Target) -> dict[str, Any]:
    """As the planner sees it: followed without running it."""
    model, batch = _steps.make_model(case, "cpu"), _steps.make_batch(case, "cpu")
    declared = declare(model, _steps.loss_of, forward=_steps.forward_of(case))
    with applied(plan, declared, case.rows) as execution:
        trace = trace_step(execution.declared, batch, device="cuda", stands=functools.partial(standing, plan))
    known = predict_seconds(trace, target.card, calibration=target.calibration, torch_version=torch.__version__)
    return {"predicted_seconds": known.predicted_seconds, "predicted_peak_bytes": peak_bytes(trace)}


def with_shares(figures: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    shares = {"share_of_plain_speed": plain["seconds"] / figures["seconds"]}
    if "resident_bytes" in plain:
        held, all_of_it = (f["peak_allocated_bytes"] - f["resident_bytes"] for f in (figures, plain))
        shares["share_of_plain_activation_bytes"] = held / all_of_it
    return figures | shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="a tiny model, to see that it runs")
    small = parser.parse_args().small
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if not small and device == "cpu":
        parser.error("this needs a GPU; --small runs on the CPU")
    _steps.NETWORKS["vit_tiny"] = (lambda: _networks.VisionTransformer(BLOCKS, 32, 2, 32, 10), (3, 32, 32))
    case = SMALL if small else CASE
    plain = measured(plainly(case, device, []), device)
    cells: dict[str, Any] = {"plain": with_shares(plain, plain)}
    facts: dict[str, Any] = {"case": case.name}
    link = phases = target = None
    if device == "cuda":
        link, phases = link_bytes_per_second(), forward_and_backward_seconds(case)
        facts |= {"link_bytes_per_second": link, "forward_and_backward_seconds": phases}
    if not small:
        target = Target.at_hand(torch.device("cuda"))
        cells["plain"] |= predicted(case, plan_of(case, [], 0), target)
    for what, (modules, smallest_bytes) in WHAT.items():
        plan = plan_of(case, modules, 2**10 if small else smallest_bytes)
        sizes = travelled_bytes(case, plan, device)
        facts[what] = {"bytes_to_host": sizes[0], "bytes_back": sizes[1], "smallest_bytes": smallest_bytes}
        if link and phases:
            waited = sum(max(0.0, size / rate - took) for size, rate, took in zip(sizes, link, phases))
            bound = plain["seconds"] + waited
            facts[what] |= {"bound_seconds": bound, "bound_share_of_plain_speed": plain["seconds"] / bound}
        if target:
            facts[what] |= predicted(case, plan, target)
        ways = {
            "offload_saved": offloading(case, plan, device),
            "offload_saved, on demand": offloading(case, plan, device, 0),
            "save_on_cpu": plainly(case, device, modules),
        }
        print(f"{what}: {facts[what]}", flush=True)
        for name, way in ways.items():
            cells[f"{what}: {name}"] = with_shares(measured(way, device), plain)
            print(f"{what}: {name}: {cells[f'{what}: {name}']}", flush=True)
            if not small:
                _results.write("offload_gpu", {**facts, "cells": cells}, quiet=True)


if __name__ == "__main__":
    main()
