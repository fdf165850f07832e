"""The predicted time of a step against steps that ran on one H200, without a GPU: what the roofline can and cannot say.

    python benchmarks/timing_h200.py          compares; --write-calibration also writes the fitted h200.json

The measured milliseconds are of whole optimizer steps (torch 2.11, TF32 allowed, AdamW fused, median of 3 to 8 steps
after warm-up). Rows that the calibration is fitted to are marked; the others it has not seen. "Left out" is the error
on a model's whole batch, by a calibration fitted to the other models.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import _results
import torch
from _counted_steps import Gpt, Vit, count_step, gpt_loss, pictures_loss, resnet34
from _fitted_calibration import Timed, fit_calibration
from torch import Tensor, nn

from samegrad.measure import devices
from samegrad.measure.devices import PRIOR, Calibration, find_card
from samegrad.measure.events import Trace
from samegrad.measure.operation_classes import OperationClass
from samegrad.measure.timing import StepSeconds, predict_seconds
from samegrad.records import Origin

# Of the peak and of the bandwidth, for operations of every kind: the simplest model, to compare with.
FLAT_FLOPS, FLAT_BANDWIDTH = 0.5, 0.75


class Use(enum.Enum):
    """What a row says to the calibration."""

    UNSEEN = "nothing"
    DEVICE = "how fast the device is"
    HOST = "how fast the host is"


class Row(NamedTuple):
    """``chunk_rows`` at a time; ``graphed`` steps are replayed from CUDA graphs, so that the host does not count."""

    model: str
    chunk_rows: int
    measured_milliseconds: float
    use: Use = Use.UNSEEN
    graphed: bool = False


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module], Callable[[int], Tensor]], int]] = {
    "resnet34 tf32": (lambda: resnet34(torch.float32), pictures_loss, 105),
    "resnet34 bf16": (lambda: resnet34(torch.bfloat16), pictures_loss, 105),
    "gpt2 bf16": (lambda: Gpt(torch.bfloat16), gpt_loss, 32),
    "gpt2 tf32": (lambda: Gpt(torch.float32), gpt_loss, 32),
    "vit_b16 bf16": (lambda: Vit(torch.bfloat16), pictures_loss, 128),
}
ROWS = [
    Row("resnet34 tf32", 105, 32.51, Use.DEVICE),
    *(Row("resnet34 tf32", *row) for row in (
        (53, 36.29), (35, 39.98), (21, 56.76), (15, 103.44), (10, 124.87), (7, 185.24), (5, 346.44), (3, 540.45))),
    Row("resnet34 tf32", 1, 1442.95, Use.HOST),
    *(Row("resnet34 tf32", *row, graphed=True) for row in ((35, 36.63), (15, 48.53), (5, 86.21))),
    Row("resnet34 tf32", 1, 317.7, Use.DEVICE, graphed=True),
    Row("resnet34 bf16", 105, 28.88, Use.DEVICE),
    *(Row("resnet34 bf16", *row) for row in (
        (53, 32.69), (35, 44.3), (21, 75.01), (15, 90.09), (10, 148.57), (7, 254.64), (5, 374.57), (3, 606.12),
        (1, 1632.26))),
    Row("gpt2 bf16", 32, 201.03, Use.DEVICE),
    *(Row("gpt2 bf16", *row) for row in ((16, 209.25), (8, 223.07), (4, 255.86), (2, 364.0))),
    Row("gpt2 bf16", 1, 802.53, Use.HOST),
    *(Row("gpt2 bf16", *row, graphed=True) for row in ((8, 226.12), (4, 241.11), (2, 269.81))),
    Row("gpt2 bf16", 1, 327.94, Use.DEVICE, graphed=True),
    Row("gpt2 tf32", 32, 278.24, Use.DEVICE),
    Row("gpt2 tf32", 16, 285.01),
    Row("vit_b16 bf16", 128, 48.41, Use.DEVICE),
    Row("vit_b16 bf16", 16, 152.82),
    Row("vit_b16 bf16", 8, 315.88, Use.HOST),
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


BASE = dataclasses.replace(
    PRIOR,
    card="H200",
    origin=Origin.MEASURED,
    source="fitted to whole steps of ResNet-34, GPT-2 124M and ViT-B/16 (benchmarks/timing_h200.py); "
    "library workspaces from GPT-2's measured peaks; no operation was timed alone",
    torch_version="2.11.0+cu130",
    library_workspace_bytes={"cublas": 32 * 2**20, "cublaslt": 32 * 2**20},
)


def fitted(traces: dict[Row, Trace], *, without: str = "") -> Calibration:
    """From the marked rows of all models but those whose name begins with ``without``."""
    steps = [
        Timed(trace.operations, row.measured_milliseconds / 1e3, by_host=row.use is Use.HOST)
        for row, trace in traces.items()
        if row.use is not Use.UNSEEN and not (without and row.model.startswith(without))
    ]
    return fit_calibration(steps, find_card("H200"), BASE)


def error(row: Row, trace: Trace, calibration: Calibration) -> float:
    seconds = predict_seconds(trace, find_card("H200"), calibration=calibration, matmul_tf32=True)
    return round(milliseconds(seconds, row) / row.measured_milliseconds - 1, 3)


def compare(row: Row, trace: Trace, calibration: Calibration) -> dict[str, Any]:
    found: dict[str, Any] = row._asdict() | {"use": row.use.value}
    seconds = predict_seconds(trace, find_card("H200"), calibration=calibration, matmul_tf32=True)
    found["predicted_milliseconds"] = round(milliseconds(seconds, row), 2)
    found["host_milliseconds"] = round(1e3 * seconds.host_seconds, 2)
    found["device_milliseconds"] = round(1e3 * seconds.device_seconds, 2)
    for name, other in (("calibrated", calibration), ("flat", flat(calibration)), ("uncalibrated", PRIOR)):
        found[f"{name}_error"] = error(row, trace, other)
    return found


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    def errors(name: str, rows: list[dict[str, Any]]) -> dict[str, float]:
        sizes = [abs(row[f"{name}_error"]) for row in rows]
        return {"rows": len(sizes), "median": round(statistics.median(sizes), 3), "worst": max(sizes)}

    unseen = [row for row in found if row["use"] == Use.UNSEEN.value]
    whole = [row for row in found if row["chunk_rows"] == MODELS[row["model"]][2]]
    groups = {"fitted": [row for row in found if row not in unseen], "unseen": unseen, "whole batch": whole}
    return {
        name: {group: errors(name, rows) for group, rows in groups.items()}
        for name in ("calibrated", "flat", "uncalibrated")
    }


def count_rows() -> dict[Row, Trace]:
    traces = {}
    for name, (make, loss_of, batch_rows) in MODELS.items():
        with torch.device("meta"):
            model = make()
        for row in (row for row in ROWS if row.model == name):
            operations = count_step(model, loss_of(model), row.chunk_rows, batch_rows, "adamw")
            traces[row] = Trace(tuple(operations), (), "cuda", batch_rows, (row.chunk_rows,))
    return traces


def left_out(traces: dict[Row, Trace]) -> dict[str, float]:
    found = {}
    for family in ("resnet34", "gpt2", "vit_b16"):
        calibration = fitted(traces, without=family)
        for row, trace in traces.items():
            if row.model.startswith(family) and row.chunk_rows == MODELS[row.model][2]:
                found[row.model] = error(row, trace, calibration)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write-calibration", action="store_true")
    arguments = parser.parse_args()
    traces = count_rows()
    calibration = fitted(traces)
    if arguments.write_calibration:
        Path(devices.__file__).with_name("calibration").joinpath("h200.json").write_text(calibration.to_json())
    found = [compare(row, trace, calibration) for row, trace in traces.items()]
    errors = summary(found)
    _results.write("timing_h200", {"absolute_errors": errors, "left_out_errors": left_out(traces), "rows": found})


if __name__ == "__main__":
    main()
