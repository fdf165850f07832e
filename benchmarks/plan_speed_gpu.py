"""How much slower is a step in a fraction of its memory? One GPU, nothing beside it.

Memory is what the allocator reserves above parameters, gradients and optimizer state; each plan is made for a share of
the plain step's and run under a cap at that budget. Times are medians of eight steps after three.
"""

from __future__ import annotations

import argparse
import dataclasses
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
    arguments = parser.parse_args()
    figures: list[dict[str, Any]] = []
    for name, (case, shares) in CASES.items():
        if arguments.only not in name:
            continue
        plain = run(dataclasses.replace(case), None)
        floor = resident_bytes(case)
        figures.append({"name": name, "share": 1.0, **plain})
        for share in shares:
            budget = int(floor + share * (plain["peak_reserved_bytes"] - floor))
            found = run(case, budget)
            if found["planned"]:
                found["more_time"] = found["seconds"] / plain["seconds"] - 1
            figures.append({"name": name, "share": share, "budget_bytes": budget, **found})
            _results.write("plan_speed_gpu", {"plans": figures}, quiet=True)
            short = {k: len(v["blocks"]) if k == "recompute" else v for k, v in found.get("plan", {}).items()}
            print(name, share, short, {k: found.get(k) for k in ("seconds", "more_time", "plan_seconds", "found")})
    _results.write("plan_speed_gpu", {"plans": figures}, quiet=True)


if __name__ == "__main__":
    main()
