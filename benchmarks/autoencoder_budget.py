"""The autoencoder on rows mapped from disk, inside budgets of counted bytes: predicted and measured, same losses.

Writes ``--rows`` patches of the bundled pictures to a ``.npy`` once, then trains ``--epochs`` whole-batch epochs at
each budget and reads the highest counted bytes of every step.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import _results
import torch
import torch.nn.functional as F
from torch import Tensor

import samegrad as sg
from samegrad.recipes.autoencoder.data import write_patches
from samegrad.recipes.autoencoder.model import Autoencoder

BUDGETS = ("1GiB", "512MiB", "256MiB")


def loss_fn(outputs: Tensor, batch: Tensor) -> Tensor:
    return F.mse_loss(outputs, batch)


def resident_bytes() -> dict[str, int]:
    """This process's memory as the kernel counts it: anonymous (ours) and file-backed (the mapped rows)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: int(fields[key].split()[0]) * 1024 for name, key in (("own", "RssAnon"), ("mapped", "RssFile"))}


def train_within(rows: sg.Rows, budget: str, epochs: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = Autoencoder(rows.shape[1], 50)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with sg.Step(model, loss_fn, budget=budget, optimizer=optimizer) as step:
        counter = sg.count_bytes(step)
        batches = (rows.shuffled(seed=42, epoch=epoch) for epoch in range(epochs))
        start = time.perf_counter()
        results = list(sg.train(step, batches, counter=counter))
        seconds = time.perf_counter() - start
        plan, limit = step.plan, step.budget
    assert plan is not None
    assert plan.predicted_peak_bytes is not None
    assert limit is not None
    measured = max(result.peak_allocated_bytes or 0 for result in results)
    return {
        "budget": budget,
        "budget_bytes": limit.total_bytes,
        "plan": plan.levers,
        "predicted_peak_bytes": plan.predicted_peak_bytes,
        "measured_peak_bytes": measured,
        "within_budget": measured <= limit.total_bytes,
        "measured_over_predicted": measured / plan.predicted_peak_bytes,
        "losses": [result.loss for result in results],
        "seconds": seconds,
        "process": resident_bytes(),
    }


def same_losses(rows: sg.Rows, epochs: int) -> dict[str, float]:
    """Whole-batch descent in plain PyTorch against the split step, float64 and SGD, on a smaller set."""
    whole = rows.read(0, len(rows)).double()
    losses: dict[str, list[float]] = {}
    for way in ("plain", "split"):
        torch.manual_seed(0)
        model = Autoencoder(rows.shape[1], 50).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        step = sg.Step(model, loss_fn, rows=383, optimizer=optimizer)
        losses[way] = []
        for _ in range(epochs):
            if way == "plain":
                loss = loss_fn(model(whole), whole)
                loss.backward()
            else:
                loss = step.backward(whole)
            losses[way].append(float(loss.detach()))
            optimizer.step()
            optimizer.zero_grad()
    pairs = list(zip(losses["plain"], losses["split"]))
    return {
        "rows": len(rows),
        "chunk_rows": 383,
        "epochs": epochs,
        "largest_relative_difference": max(abs(a - b) / abs(a) for a, b in pairs),
        "first_loss": pairs[0][0],
        "last_loss": pairs[-1][0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    arguments = parser.parse_args()
    path = arguments.folder / f"patches-{arguments.rows}.npy"
    if not path.exists():
        part = path.with_suffix(f".{os.getpid()}.npy")
        write_patches(part, arguments.rows).rename(path)
    rows = sg.open_rows(path)
    figures: dict[str, Any] = {"rows": len(rows), "width": rows.shape[1], "file_bytes": path.stat().st_size}
    figures["same_losses"] = same_losses(rows.subset(slice(0, 3001)), 20)
    figures["budgets"] = [train_within(rows, budget, arguments.epochs) for budget in BUDGETS]
    _results.write("autoencoder_budget", figures)


if __name__ == "__main__":
    main()
