"""Predicted peaks and caps of training steps, made with no GPU at hand, against what one GPU was seen to hold.

Each case of ``_steps`` is traced on a model without data, library workspaces are added, and the allocator's model
replays the trace. ``results/peaks_gpu.json`` holds what the card said (``peaks_gpu.py``).

What was fitted to what: constants come from the cases that calibrate and from operations measured alone. Two things are
not as independent as that sounds. The workspace of recurrent layers, and the pieces that their weights come in, were
read off histories of the judged LSTM steps themselves, so these are left out of "independent". Some of the operations
measured alone have the shapes of layers of judged steps (``convolutions_gpu.py``: where those have 16, 32, 64 or 128
rows), though no step of them was used. Recorded requests of judged steps were also read to find what a trace missed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import _results
import _steps
import torch

import samegrad as sg
from samegrad.exact.findings import Examination
from samegrad.exact.losses import Form
from samegrad.exact.split import SplitStep
from samegrad.measure.caps import predict_reserved
from samegrad.measure.library_calibration import calibrate_libraries
from samegrad.measure.replay import repeat_steps
from samegrad.measure.trace import in_chunks, trace_step
from samegrad.measure.workspaces import with_workspaces
from samegrad.settle import aliases_for
from samegrad.trees import even_sizes

MEASURED = Path(__file__).parent / "results" / "peaks_gpu.json"
QUANTITIES = ("peak_allocated_bytes", "peak_reserved_bytes", "steady_cap_bytes", "smallest_cap_bytes")
TRANSFORMERS = ("gpt", "vit")
# Networks whose judged steps a rule was read off.
READ_OFF = ("lstm",)
FAMILIES = {
    "residual networks": ("resnet",), "transformers": TRANSFORMERS, "U-Nets": ("unet",), "recurrent": ("lstm",),
    "perceptrons": ("mlp",),
}  # fmt: skip


def predict(case: _steps.StepCase, capability: tuple[int, int], torch_version: str) -> dict[str, Any]:
    """The case's peaks and caps on a card of ``capability``, from a trace."""
    start = time.perf_counter()
    step, batch = _steps.make_step(case, "meta")
    declared, run, sizes = step.declared, None, None
    if case.rows_at_a_time is not None:
        sizes = even_sizes(case.rows, case.rows_at_a_time)
        # Without data nothing can be examined: the form of these losses is known.
        form = Form.ROW_MEAN if case.network.startswith("unet") else Form.COUNTED
        run = in_chunks(SplitStep(declared, aliases_for(declared), Examination(form, "known")), sizes)
    traced = trace_step(declared, batch, run=run, sizes=sizes)
    seconds = time.perf_counter() - start
    trace = with_workspaces(traced, calibrate_libraries(capability, torch_version))
    reserved = predict_reserved(repeat_steps(trace))
    return {
        "name": case.name,
        "peak_allocated_bytes": reserved.free_running.peak_allocated_bytes,
        "peak_reserved_bytes": reserved.free_running.peak_reserved_bytes,
        "steady_cap_bytes": reserved.steady.cap_bytes,
        "smallest_cap_bytes": reserved.smallest.cap_bytes,
        "trace_seconds": seconds,
        "replay_seconds": time.perf_counter() - start - seconds,
        "operations": len(trace.operations),
        "notes": trace.notes,
    }


def compare(predicted: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    """Relative errors, above zero where too much was predicted."""
    errors = {q: predicted[q] / measured[q] - 1 for q in QUANTITIES if measured.get(q)}
    return {"predicted": predicted, "measured": {q: measured.get(q) for q in QUANTITIES}, "errors": errors}


def summed_up(rows: list[dict[str, Any]]) -> dict[str, Any]:
    figures = {}
    for quantity in QUANTITIES:
        errors = [row["errors"][quantity] for row in rows if quantity in row["errors"]]
        figures[quantity] = {
            "cases": len(errors),
            "median": statistics.median(map(abs, errors)),
            "worst": max(errors, key=abs),
            "most_under": min(errors),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--calibrating", action="store_true", help="also the cases that fit the card's table")
    arguments = parser.parse_args()
    document = json.loads(MEASURED.read_text())
    measured = {case["name"]: case for case in document["cases"] if case["runs"]}
    torch_version = document["machine"]["torch"]
    rows = []
    for case in _steps.CASES:
        if arguments.only not in case.name or case.name not in measured or (case.calibrates > arguments.calibrating):
            continue
        row = compare(predict(case, (9, 0), torch_version), measured[case.name])
        rows.append(row | {"name": case.name, "calibrates": case.calibrates})
        shown = "  ".join(f"{quantity[:-6]} {error:+.2%}" for quantity, error in row["errors"].items())
        print(f"{case.name:34s} {shown}  {row['predicted']['trace_seconds']:.1f} s", flush=True)
    judged = [row for row in rows if not row["calibrates"]]
    independent = [row for row in judged if not row["name"].startswith(READ_OFF)]
    families = {family: [row for row in judged if row["name"].startswith(names)] for family, names in FAMILIES.items()}
    figures = {
        "predicted_with_torch": torch.__version__,
        "samegrad": sg.__version__,
        "all": summed_up(judged),
        "independent": summed_up(independent) if independent else None,
        "families": {family: summed_up(members) for family, members in families.items() if members},
        "cases": rows,
    }
    if not arguments.only:
        _results.write("prediction", figures)
    else:
        print(json.dumps(figures["all"], indent=2))


if __name__ == "__main__":
    main()
