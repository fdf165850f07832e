"""What it costs to see that code is the same for any number of rows: three numbers of rows, in a fresh process each.

No GPU is needed. ``first`` is the first time in a process, when torch loads what follows a step without data; ``again``
the smallest of three more, as for another shape of batch. ``blind`` says that the code need not be followed at all.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import _results
import torch
import torch.nn.functional as F
from _networks import BasicBlock, ResNet
from _trace_models import gpt_step
from torch import nn

from samegrad.declared import DeclaredStep, declare
from samegrad.exact.compare_calls import first_difference
from samegrad.exact.row_blind import is_row_blind
from samegrad.measure.follow_calls import follow_calls

Made = tuple[DeclaredStep, Any]
ROWS = 61
CHUNKS = (8, 5)


def perceptron_step() -> Made:
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    return declare(model, lambda z, b: F.cross_entropy(z, b[1])), (torch.randn(ROWS, 64), labels())


def resnet_step() -> Made:
    model = ResNet(BasicBlock, [2, 2, 2, 2]).eval()
    return declare(model, lambda z, b: F.cross_entropy(z, b[1])), (torch.randn(ROWS, 3, 32, 32), labels())


def labels() -> torch.Tensor:
    return torch.randint(0, 10, (ROWS,))


STEPS: dict[str, Callable[[], Made]] = {
    "MLP": perceptron_step,
    "ResNet-18": resnet_step,
    "GPT 124M": lambda: gpt_step(ROWS),
}


def looked_at(name: str) -> dict[str, Any]:
    """Seconds to follow and to compare in this process, and how many calls there are."""
    declared, batch = STEPS[name]()
    layout = declared.layout(batch)
    start = time.perf_counter()
    blind = is_row_blind(declared, batch)
    seconds = [time.perf_counter() - start]
    for _ in range(4):
        start = time.perf_counter()
        runs = follow_calls(declared, batch, layout, (*CHUNKS, layout.rows), with_loss=True)
        if first_difference(runs) is not None or any(run.failure for run in runs):
            raise AssertionError(f"{name} is the same for any number of rows")
        seconds.append(time.perf_counter() - start)
    figures = {"blind_seconds": seconds[0], "first_seconds": seconds[1], "again_seconds": min(seconds[2:])}
    return {"blind": blind, "calls": len(runs[0].calls)} | {key: round(value, 4) for key, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=STEPS, help="one step, in this process")
    only = parser.parse_args().only
    if only is not None:
        print(json.dumps(looked_at(only)))
        return
    figures = {}
    for name in STEPS:
        ran = subprocess.run([sys.executable, __file__, "--only", name], capture_output=True, text=True, check=True)
        figures[name] = json.loads(ran.stdout)
    _results.write("row_counts", {"rows": [*CHUNKS, ROWS], "steps": figures})


if __name__ == "__main__":
    main()
