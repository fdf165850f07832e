"""Time of ``Step.backward`` against a hand-written loop over the same chunks, in pairs, one pass and two passes."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import _results
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg

ROWS, FEATURES, HIDDEN = 2048, 512, 1024
CHUNK_ROWS = 128


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, FEATURES)
    )


def hand_single(model: nn.Module, x: Tensor) -> None:
    for chunk in x.split(CHUNK_ROWS):
        (F.mse_loss(model(chunk), chunk) * (len(chunk) / len(x))).backward()


def hand_two_pass(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        z = torch.cat([model(chunk) for chunk in x.split(CHUNK_ROWS)])
    z.requires_grad_()
    coupled(z, x).backward()
    for chunk, cotangent in zip(x.split(CHUNK_ROWS), z.grad.split(CHUNK_ROWS)):
        model(chunk).backward(cotangent)


def coupled(outputs: Tensor, batch: Tensor) -> Tensor:
    return F.mse_loss(outputs, batch).sqrt()


def paired_ratio(ours: Callable[[], None], theirs: Callable[[], None], pairs: int) -> dict[str, float]:
    """Median of ours / theirs, pair by pair, so that a machine that drifts cancels out."""
    ours(), theirs()
    ratios, mine, other = [], [], []
    for turn in range(pairs):
        times = {}
        for run in (ours, theirs) if turn % 2 else (theirs, ours):
            start = time.perf_counter()
            run()
            times[run] = time.perf_counter() - start
        ratios.append(times[ours] / times[theirs])
        mine.append(times[ours])
        other.append(times[theirs])
    return {
        "median_ratio": statistics.median(ratios),
        "ours_seconds": statistics.median(mine),
        "hand_seconds": statistics.median(other),
        "pairs": pairs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=40)
    pairs = parser.parse_args().pairs
    model = make_model()
    x = torch.randn(ROWS, FEATURES)
    single = sg.Step(model, lambda outputs, batch: F.mse_loss(outputs, batch), rows=CHUNK_ROWS)
    double = sg.Step(model, coupled, rows=CHUNK_ROWS)

    def run(step: Callable[[], object]) -> Callable[[], None]:
        def once() -> None:
            model.zero_grad()
            step()

        return once

    _results.write(
        "engine_overhead",
        {
            "rows": ROWS,
            "chunk_rows": CHUNK_ROWS,
            "single_pass": paired_ratio(run(lambda: single.backward(x)), run(lambda: hand_single(model, x)), pairs),
            "two_pass": paired_ratio(run(lambda: double.backward(x)), run(lambda: hand_two_pass(model, x)), pairs),
        },
    )


if __name__ == "__main__":
    main()
