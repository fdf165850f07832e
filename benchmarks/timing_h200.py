"""The predicted time of a step against steps that ran on one H200, without a GPU: what the roofline can and cannot say.

The measured milliseconds are of whole optimizer steps (torch 2.11, TF32 allowed, AdamW fused, eager, median of 3 to 8
steps after warm-up). Rows that the calibration was fitted to are marked; the others it has not seen.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import _results
import torch
from _counted_steps import Gpt, Vit, count_step, gpt_loss, pictures_loss, resnet34
from torch import Tensor, nn

from samegrad.measure.devices import PRIOR, Calibration, find_calibration, find_card
from samegrad.measure.events import Trace
from samegrad.measure.operation_classes import OperationClass
from samegrad.measure.timing import StepSeconds, predict_seconds

# Of the peak and of the bandwidth, for operations of every kind: the simplest model, to compare with.
FLAT_FLOPS, FLAT_BANDWIDTH = 0.5, 0.75


class Row(NamedTuple):
    """``chunk_rows`` at a time; ``graphed`` steps are replayed from CUDA graphs, so that the host does not count."""

    model: str
    chunk_rows: int
    measured_milliseconds: float
    fitted: bool = False
    graphed: bool = False


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Callable[[int], Tensor]], int]] = {
    "resnet34 tf32": (lambda: resnet34(torch.float32), pictures_loss, 105),
    "resnet34 bf16": (lambda: resnet34(torch.bfloat16), pictures_loss, 105),
    "gpt2 bf16": (lambda: Gpt(torch.bfloat16), gpt_loss, 32),
    "gpt2 tf32": (lambda: Gpt(torch.float32), gpt_loss, 32),
    "vit_b16 bf16": (lambda: Vit(torch.bfloat16), pictures_loss, 128),
}
ROWS = [
    Row("resnet34 tf32", 105, 32.51, fitted=True),
    *(Row("resnet34 tf32", *row) for row in (
        (53, 36.29), (35, 39.98), (21, 56.76), (15, 103.44), (10, 124.87), (7, 185.24), (5, 346.44), (3, 540.45))),
    Row("resnet34 tf32", 1, 1442.95, fitted=True),
    *(Row("resnet34 tf32", *row, graphed=True) for row in ((35, 36.63), (15, 48.53), (5, 86.21))),
    Row("resnet34 tf32", 1, 317.7, fitted=True, graphed=True),
    Row("resnet34 bf16", 105, 28.88, fitted=True),
    *(Row("resnet34 bf16", *row) for row in (
        (53, 32.69), (35, 44.3), (21, 75.01), (15, 90.09), (10, 148.57), (7, 254.64), (5, 374.57), (3, 606.12),
        (1, 1632.26))),
    Row("gpt2 bf16", 32, 201.03, fitted=True),
    *(Row("gpt2 bf16", *row) for row in ((16, 209.25), (8, 223.07), (4, 255.86), (2, 364.0))),
    Row("gpt2 bf16", 1, 802.53, fitted=True),
    *(Row("gpt2 bf16", *row, graphed=True) for row in ((8, 226.12), (4, 241.11), (2, 269.81))),
    Row("gpt2 bf16", 1, 327.94, fitted=True, graphed=True),
    Row("gpt2 tf32", 32, 278.24, fitted=True),
    Row("gpt2 tf32", 16, 285.01),
    Row("vit_b16 bf16", 128, 48.41, fitted=True),
    *(Row("vit_b16 bf16", *row) for row in ((16, 152.82), (8, 315.88))),
]  # fmt: skip


def flat(calibration: Calibration) -> Calibration:
    """One fraction of the peak and one of the bandwidth for all kinds, the host as measured."""
    return dataclasses.replace(
        calibration,
        flops_fractions={"any": dict.fromkeys(OperationClass, FLAT_FLOPS)},
        bandwidth_fractions=dict.fromkeys(OperationClass, FLAT_BANDWIDTH),
    )


def milliseconds(seconds: StepSeconds, row: Row) -> float:
    return 1e3 * (seconds.device_seconds if row.graphed else seconds.seconds)


def compare(row: Row, trace: Trace) -> dict[str, Any]:
    card = find_card("H200")
    own = find_calibration(card, torch_version="2.11.0")
    found: dict[str, Any] = {**row._asdict()}
    for name, calibration in (("calibrated", own), ("flat", flat(own)), ("uncalibrated", PRIOR)):
        seconds = predict_seconds(trace, card, calibration=calibration, matmul_tf32=True)
        found[f"{name}_milliseconds"] = round(milliseconds(seconds, row), 2)
        found[f"{name}_error"] = round(milliseconds(seconds, row) / row.measured_milliseconds - 1, 3)
        if name == "calibrated":
            found["host_milliseconds"] = round(1e3 * seconds.host_seconds, 2)
            found["device_milliseconds"] = round(1e3 * seconds.device_seconds, 2)
    return found


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    def errors(name: str, rows: list[dict[str, Any]]) -> dict[str, float]:
        sizes = [abs(row[f"{name}_error"]) for row in rows]
        return {"rows": len(sizes), "median": round(statistics.median(sizes), 3), "worst": max(sizes)}

    unseen = [row for row in found if not row["fitted"]]
    whole = [row for row in found if row["chunk_rows"] == MODELS[row["model"]][2]]
    groups = {"fitted": [row for row in found if row["fitted"]], "unseen": unseen, "whole batch": whole}
    return {
        name: {group: errors(name, rows) for group, rows in groups.items()}
        for name in ("calibrated", "flat", "uncalibrated")
    }


def main() -> None:
    found = []
    for name, (make, loss_of, batch_rows) in MODELS.items():
        with torch.device("meta"):
            model = make()
        for row in (row for row in ROWS if row.model == name):
            operations = count_step(model, loss_of(model), row.chunk_rows, batch_rows, "adamw")
            trace = Trace(tuple(operations), (), "cuda", batch_rows, (row.chunk_rows,))
            found.append(compare(row, trace))
    _results.write("timing_h200", {"absolute_errors": summary(found), "rows": found})


if __name__ == "__main__":
    main()
