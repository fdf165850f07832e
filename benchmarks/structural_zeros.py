"""What rounding leaves where a gradient is zero by structure: convolution biases before an instance norm.

Entries differ between one backward and chunks of 8, 23 and 30 rows by so many units of roundoff of the largest gradient
of all parameters. This is why a tensor's scale in a verification is at least a tenth of the largest one.
"""

from __future__ import annotations

from typing import Any

import _results
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 61
PARTS = [8, 23, 30]


def make_model(pixels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.InstanceNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1), nn.InstanceNorm2d(16), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * pixels * pixels, 7),
    ).double()  # fmt: skip


def gradients(model: nn.Module, x: Tensor, y: Tensor, parts: list[int]) -> dict[str, Tensor]:
    model.zero_grad()
    for rows, labels in zip(x.split(parts), y.split(parts)):
        (F.cross_entropy(model(rows), labels, reduction="sum") / ROWS).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def main() -> None:
    # With one thread both ways happen to sum in the same order, and nothing differs.
    torch.set_num_threads(2)
    cases: dict[str, Any] = {}
    worst = 0.0
    for seed in range(4):
        for pixels in (2, 8, 16):
            torch.manual_seed(seed)
            model = make_model(pixels)
            x, y = torch.randn(ROWS, 3, pixels, pixels).double(), torch.randint(0, 7, (ROWS,))
            whole, split = gradients(model, x, y, [ROWS]), gradients(model, x, y, PARTS)
            largest = max(g.abs().max() for g in whole.values())
            zeros = ("0.bias", "3.bias")
            units = max(float((whole[n] - split[n]).abs().max() / largest) for n in zeros) / 2**-53
            cases[f"seed {seed}, {pixels} pixels"] = units
            worst = max(worst, units)
    figures = {"rows": ROWS, "parts": PARTS, "largest_units_of_roundoff": worst, "cases": cases}
    _results.write("structural_zeros", figures)


if __name__ == "__main__":
    main()
