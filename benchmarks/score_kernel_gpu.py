"""The kernel score model at CIFAR-10's width: budgets kept, peaks against the number of centers, time, and two GPUs.

    python benchmarks/score_kernel_gpu.py                      the H200: D = 3072, 1000 and 5000 centers inside 8 GiB
    torchrun --nproc-per-node 2 benchmarks/score_kernel_gpu.py --ranks       the same centers over two GPUs (NCCL)
    python benchmarks/score_kernel_gpu.py --small --device cpu               every path on a few numbers

The hand-written loop is what one would write without this library: two passes over chunks of centers, the softmax's
sums in the first, a surrogate with detached coefficients in the second. It runs as many centers at a time as the plan.
Points are noise; neither bytes nor times depend on them. Times are medians of steps after two to warm up, the two in
turn. A budget caps what the allocator may reserve.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import _results
import torch
import torch.distributed as dist
from torch import Tensor

import samegrad as sg
from samegrad.recipes.score_kernel.model import FactorNet, KernelModel
from samegrad.recipes.score_kernel.objective import BATCH_AXES, Batch, kernel_outputs, matching_loss
from samegrad.recipes.score_kernel.parallel import AcrossRanks, check_places

STABILITY = 0.01


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What is measured: numbers of a point, samples of a step, centers, units of the network, budget, steps timed."""

    dim: int
    samples: int
    centers: tuple[int, ...]
    hidden: int
    depth: int
    budget: str
    steps: int


FULL = Sizes(dim=3072, samples=8, centers=(250, 1000, 5000), hidden=64, depth=5, budget="8GiB", steps=5)
SMALL = Sizes(dim=24, samples=8, centers=(60, 240, 960), hidden=16, depth=2, budget="512KiB", steps=3)


def make(sizes: Sizes, device: torch.device) -> tuple[KernelModel, torch.optim.Optimizer]:
    factornet = FactorNet(
        sizes.dim, hidden=sizes.hidden, depth=sizes.depth, generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        factornet.last.weight.normal_(0, 1e-3, generator=torch.Generator().manual_seed(1))
    model = KernelModel(factornet, stability=STABILITY).to(device)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-5, fused=device.type == "cuda")


def points(sizes: Sizes, centers: int, device: torch.device) -> Batch:
    drawn = torch.Generator().manual_seed(2)
    return {
        "centers": torch.randn(centers, sizes.dim, generator=drawn).to(device),
        "samples": torch.randn(sizes.samples, sizes.dim, generator=drawn).to(device),
    }


def make_step(model: KernelModel, optimizer: torch.optim.Optimizer, **options: Any) -> sg.Step:
    return sg.Step(
        model, matching_loss, forward=kernel_outputs, batch_axes=BATCH_AXES, reduce="softmax_mean",
        optimizer=optimizer, **options,
    )  # fmt: skip


def by_hand(model: KernelModel, batch: Batch, rows: int) -> Tensor:
    """The best loop by hand: the same gradient in ``.grad``, the loss returned."""
    samples, parts = batch["samples"], torch.split(batch["centers"], rows)
    top = torch.full((len(samples),), -torch.inf, device=samples.device)
    total, curvature = torch.zeros_like(top), torch.zeros_like(top)
    force = torch.zeros_like(samples)
    with torch.no_grad():
        for part in parts:
            weights, values = model(part, samples)
            higher = torch.maximum(top, weights.amax(0))
            old, terms = (top - higher).exp(), (weights - higher).exp()
            total = total * old + terms.sum(0)
            force = force * old[:, None] + torch.einsum("kb,kbd->bd", terms, values["force"])
            curvature = curvature * old + (terms * values["curvature"]).sum(0)
            top = higher
        force, curvature = force / total[:, None], curvature / total
        size = force.square().sum(1)
    for part in parts:
        weights, values = model(part, samples)
        with torch.no_grad():
            shares = (weights - top).exp() / total
            along = torch.einsum("kbd,bd->kb", values["force"], force)
            of_weights = 2 * shares * (values["curvature"] - curvature - along + size)
        surrogate = (
            (2 * shares * values["curvature"]).sum()
            - 2 * torch.einsum("kb,kbd,bd->", shares, values["force"], force)
            + (of_weights * weights).sum()
        )
        (surrogate / len(samples)).backward()
    return (2 * curvature - size).mean()


def seconds_of(run: Callable[[], object], optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    optimizer.step()
    optimizer.zero_grad()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def within_budget(sizes: Sizes, centers: int, device: torch.device) -> dict[str, Any]:
    """Exact steps inside the budget, its plan, its peak, and its verdict on a few centers."""
    release(device)
    model, optimizer = make(sizes, device)
    batch = points(sizes, centers, device)
    with make_step(model, optimizer, budget=sizes.budget, enforce=device.type == "cuda") as step:
        step.prepare(batch)
        counter = sg.count_bytes(step) if device.type == "cpu" else None
        results = list(sg.train(step, [batch] * (sizes.steps + 1), counter=counter))
        plan, limit, rows = step.plan, step.budget, max(step.sizes_for(batch))
    assert plan is not None
    assert limit is not None
    peaks = [r.peak_reserved_bytes or r.peak_allocated_bytes or 0 for r in results]
    return {
        "centers": centers,
        "centers_bytes": batch["centers"].nbytes,
        "dense_precision_bytes": centers * sizes.dim**2 * 4,
        "budget_bytes": limit.total_bytes,
        "centers_at_a_time": rows,
        "kept_chunks": plan.levers.get("split_rows", {}).get("kept_chunks", 0),
        "predicted_peak_allocated_bytes": plan.predicted_peak_bytes,
        "measured_peak_bytes": max(peaks),
        "within_budget": max(peaks) <= limit.total_bytes,
        "allocator_retries": results[-1].allocator_retries,
        "seconds": statistics.median(r.seconds for r in results[1:]),
    }


def peak_at(sizes: Sizes, centers: int, rows: int, device: torch.device) -> dict[str, Any]:
    """The peak of a step with ``rows`` centers at a time, whatever their number."""
    release(device)
    model, optimizer = make(sizes, device)
    batch = points(sizes, centers, device)
    with make_step(model, optimizer, rows=rows) as step:
        counter = sg.count_bytes(step) if device.type == "cpu" else None
        *_, result = sg.train(step, [batch] * 3, counter=counter)
    return {
        "centers": centers,
        "centers_at_a_time": rows,
        "centers_bytes": batch["centers"].nbytes,
        "peak_allocated_bytes": result.peak_allocated_bytes,
        "peak_reserved_bytes": result.peak_reserved_bytes,
    }


def beside_the_hand(sizes: Sizes, centers: int, rows: int, device: torch.device) -> dict[str, Any]:
    """The planned step against the loop by hand, in turn, from the same weights; and how far their gradients are."""
    release(device)
    model, optimizer = make(sizes, device)
    batch = points(sizes, centers, device)
    seconds: dict[str, list[float]] = {"samegrad": [], "by_hand": []}
    with make_step(model, optimizer, rows=rows) as step:
        step.backward(batch)
        ours = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.zero_grad()
        by_hand(model, batch, rows)
        theirs = [p.grad for p in model.parameters() if p.grad is not None]
        error = max(float((a - b).norm() / b.norm()) for a, b in zip(ours, theirs, strict=True))
        del ours, theirs
        optimizer.zero_grad()
        for _ in range(sizes.steps + 2):
            seconds["samegrad"].append(seconds_of(lambda: step.backward(batch), optimizer, device))
            seconds["by_hand"].append(seconds_of(lambda: by_hand(model, batch, rows), optimizer, device))
    medians = {name: statistics.median(values[2:]) for name, values in seconds.items()}
    return {
        "centers": centers,
        "centers_at_a_time": rows,
        "seconds": medians["samegrad"],
        "by_hand_seconds": medians["by_hand"],
        "times_by_hand": medians["samegrad"] / medians["by_hand"],
        "gradient_difference_fraction": error,
    }


def over_ranks(sizes: Sizes, device: torch.device, rows: int) -> dict[str, Any] | None:
    """A step of all centers on one GPU (rank 0 alone), then over all ranks; for the first rank to write."""
    centers, world = sizes.centers[-1], dist.get_world_size()
    whole = points(sizes, centers, device)
    alone: list[float] = []
    if dist.get_rank() == 0:
        release(device)
        model, optimizer = make(sizes, device)
        with make_step(model, optimizer, rows=rows) as step:
            alone = [seconds_of(lambda: step.backward(whole), optimizer, device) for _ in range(sizes.steps + 2)][2:]
        del model, optimizer, step
    dist.barrier()
    release(device)
    across = AcrossRanks(dist.group.WORLD, rows)
    places_error = check_places(across, device)
    model, optimizer = make(sizes, device)
    mine = {**whole, "centers": whole["centers"].tensor_split(world)[dist.get_rank()].clone()}

    def run() -> None:
        matching_loss(across(model, mine), mine).backward()

    together = []
    for _ in range(sizes.steps + 2):
        dist.barrier()
        together.append(seconds_of(run, optimizer, device))
    peak = torch.cuda.max_memory_reserved(device) if device.type == "cuda" else None
    if dist.get_rank() != 0:
        return None
    return {
        "ranks": world,
        "centers": centers,
        "centers_at_a_time": rows,
        "one_gpu_seconds": statistics.median(alone),
        "all_ranks_seconds": statistics.median(together[2:]),
        "speedup": statistics.median(alone) / statistics.median(together[2:]),
        "small_model_gradient_error": places_error,
        "peak_reserved_bytes": peak,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="few numbers, to see that it works")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--ranks", action="store_true", help="under torchrun: all centers over the ranks")
    parser.add_argument("--rows", type=int, help="centers at a time where they are not planned; default 8")
    asked = parser.parse_args()
    sizes, device, rows = SMALL if asked.small else FULL, torch.device(asked.device), asked.rows or 8
    name = f"score_kernel_{'small' if asked.small else 'gpu'}"
    figures: dict[str, Any] = dataclasses.asdict(sizes)
    if asked.ranks:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        found = over_ranks(sizes, device, rows)
        if found is not None:
            _results.write(f"{name}_ranks", {**figures, "over_ranks": found})
        dist.destroy_process_group()
        return
    figures |= {"budgets": [], "peaks": [], "times": []}
    for centers in sizes.centers[1:]:
        figures["budgets"].append(within_budget(sizes, centers, device))
        _results.write(name, figures, quiet=True)
    for centers in sizes.centers:
        figures["peaks"].append(peak_at(sizes, centers, rows, device))
    for at_a_time in (rows, figures["budgets"][0]["centers_at_a_time"]):
        figures["times"].append(beside_the_hand(sizes, sizes.centers[1], at_a_time, device))
        _results.write(name, figures, quiet=True)
    _results.write(name, figures)


if __name__ == "__main__":
    main()
