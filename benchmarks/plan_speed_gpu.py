"""How much slower is a step in a fraction of its memory? One GPU, nothing beside it.

Memory is what the allocator reserves above parameters, gradients and optimizer state; each plan is made for a share of
the plain step's and run under a cap at that budget. Times are medians of eight steps after three.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from typing import Any

import _results
import _steps
import torch
from plans_gpu import resident_bytes

import samegrad as sg
from samegrad.errors import BudgetTooSmall, CannotSplit

CASES = {
    "gpt2 32 bf16": (_steps.StepCase("gpt2 32 bf16", "gpt2", 32, "bf16"), (0.5, 0.25, 0.1)),
    "resnet50 192 fp32": (_steps.StepCase("resnet50 192 fp32", "resnet50", 192), (0.65, 0.5)),
    "resnet50 192 bf16": (_steps.StepCase("resnet50 192 bf16", "resnet50", 192, "bf16"), (0.65, 0.5)),
    "vit_b16 192 bf16": (_steps.StepCase("vit_b16 192 bf16", "vit_b16", 192, "bf16"), (0.5, 0.25, 0.1)),
}
WARM, TIMED = 3, 8


def run(case: _steps.StepCase, budget_bytes: int | None) -> dict[str, Any]:
    """The step under a budget, or the plain one."""
    # What libraries keep of the step before lies inside its large segments, and would count against this one.
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    model, batch = _steps.make_model(case, "cuda"), _steps.make_batch(case, "cuda")
    optimizer = _steps.make_optimizer(case, model)
    rows = case.rows if budget_bytes is None else None
    start = time.perf_counter()
    with sg.Step(
        model, _steps.loss_of, optimizer=optimizer, forward=_steps.forward_of(case), rows=rows, budget=budget_bytes,
        enforce=budget_bytes is not None,
    ) as step:  # fmt: skip
        try:
            plan = step.prepare(batch)
        except (BudgetTooSmall, CannotSplit) as refused:
            return {"planned": False, "found": refused.found}
        plan_seconds = time.perf_counter() - start
        step.draws_for(batch, step.declared.layout(batch))
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(WARM + TIMED):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            step.backward(batch)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
        stats = torch.cuda.memory_stats()
        facts = step.footprint.facts if step.footprint is not None else {}
        return {
            "planned": True,
            "plan": plan.levers,
            "reasons": plan.reasons,
            "plan_seconds": plan_seconds,
            "predicted_seconds": plan.predicted_seconds,
            "seconds": statistics.median(seconds[WARM:]),
            "peak_allocated_bytes": stats["allocated_bytes.all.peak"],
            "peak_reserved_bytes": stats["reserved_bytes.all.peak"],
            "facts": facts,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--shares", type=float, nargs="+", help="only these of each case's")
    parser.add_argument("--again", action="store_true", help="measure what the file already holds")
    arguments = parser.parse_args()
    cells = _results.Cells("plan_speed_gpu", {"warm_steps": WARM, "timed_steps": TIMED}, again=arguments.again)
    for name, (case, shares) in CASES.items():
        if arguments.only not in name:
            continue
        if name not in cells:
            cells.add(name, {**run(case, None), "floor_bytes": resident_bytes(case)})
        plain = cells.cells[name]
        for share in shares if arguments.shares is None else set(shares) & set(arguments.shares):
            key = f"{name} at {share:.0%}"
            if key in cells:
                continue
            budget = int(plain["floor_bytes"] + share * (plain["peak_reserved_bytes"] - plain["floor_bytes"]))
            found = run(case, budget)
            if found["planned"]:
                found["more_time"] = found["seconds"] / plain["seconds"] - 1
            cells.add(key, {"budget_bytes": budget, **found})


if __name__ == "__main__":
    main()
