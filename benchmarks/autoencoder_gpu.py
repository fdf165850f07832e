"""Autoencoder epochs on one GPU: rows on the host against rows on the device, and budgets kept.

An epoch is one exact full-batch step over all rows. Times are medians of epochs after two to warm up, the two places
taken in turn. A budget caps what the allocator may reserve, so a peak above it would be an out-of-memory error.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import _results
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.recipes.autoencoder.model import Autoencoder


def make_model(width: int) -> nn.Module:
    torch.manual_seed(0)
    return Autoencoder(width, 50).cuda()


def loss_fn(outputs: Tensor, batch: Tensor) -> Tensor:
    return F.mse_loss(outputs, batch)


def epoch_seconds(step: sg.Step, batch: Any, optimizer: torch.optim.Optimizer) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    step.backward(batch)
    optimizer.step()
    optimizer.zero_grad()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def compare_places(rows: Tensor, chunk_rows: int, epochs: int, order: str) -> dict[str, Any]:
    model = make_model(rows.shape[1])
    optimizer = torch.optim.Adam(model.parameters())
    host = sg.Rows(rows)
    on_device = rows.cuda()
    seconds: dict[str, list[float]] = {"host": [], "device": []}
    with (
        sg.Step(model, loss_fn, rows=chunk_rows, optimizer=optimizer) as from_host,
        sg.Step(model, loss_fn, rows=chunk_rows, optimizer=optimizer) as from_device,
    ):
        for epoch in range(epochs + 2):
            batch = host.shuffled(seed=0, epoch=epoch) if order == "shuffled" else host
            seconds["host"].append(epoch_seconds(from_host, batch, optimizer))
            seconds["device"].append(epoch_seconds(from_device, on_device, optimizer))
    medians = {place: statistics.median(values[2:]) for place, values in seconds.items()}
    return {
        "chunk_rows": chunk_rows,
        "order": order,
        "host_seconds": medians["host"],
        "device_seconds": medians["device"],
        "host_speed_fraction": medians["device"] / medians["host"],
    }


def keep_budget(rows: Tensor, budget: str, epochs: int) -> dict[str, Any]:
    model = make_model(rows.shape[1])
    optimizer = torch.optim.Adam(model.parameters())
    host = sg.Rows(rows)
    with sg.Step(model, loss_fn, budget=budget, optimizer=optimizer, enforce=True) as step:
        batches = (host.shuffled(seed=0, epoch=epoch) for epoch in range(epochs))
        results = list(sg.train(step, batches))
        verdict = sg.verify_step(step, host)
        plan, footprint, limit = step.plan, step.footprint, step.budget
    assert plan is not None
    assert footprint is not None
    assert limit is not None
    peak = max(r.peak_reserved_bytes or 0 for r in results)
    return {
        "budget": budget,
        "budget_bytes": limit.total_bytes,
        "plan": plan.levers,
        "predicted_peak_allocated_bytes": plan.predicted_peak_bytes,
        "measured_peak_allocated_bytes": max(r.peak_allocated_bytes or 0 for r in results),
        "measured_peak_reserved_bytes": peak,
        "within_budget": peak <= limit.total_bytes,
        "allocator_retries": results[-1].allocator_retries,
        "epoch_seconds": statistics.median(r.seconds for r in results[1:]),
        "losses": [r.loss for r in results],
        "verdict": verdict.answer.value,
        "max_relative_error": verdict.max_relative_error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--epochs", type=int, default=7)
    arguments = parser.parse_args()
    rows = torch.rand(arguments.rows, 2304)
    figures: dict[str, Any] = {"rows": arguments.rows, "width": rows.shape[1], "budgets": [], "places": []}
    for budget in ("1GiB", "2GiB", "4GiB"):
        torch.cuda.empty_cache()
        figures["budgets"].append(keep_budget(rows, budget, arguments.epochs))
        _results.write("autoencoder_gpu", figures)
    for chunk_rows in (4096, 16384, 33334):
        for order in ("shuffled", "as stored"):
            figures["places"].append(compare_places(rows, chunk_rows, arguments.epochs, order))
            _results.write("autoencoder_gpu", figures)


if __name__ == "__main__":
    main()
