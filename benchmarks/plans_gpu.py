"""Two hundred plans on one GPU: does each run at the first try inside its budget, and how fast?

A budget is what must be there (parameters, gradients, optimizer state) and a share of what the plain step's steady cap
has above that. Each plan is made and run in a process of its own, the allocator capped at the budget: six steps, an
out-of-memory error is a failure. ``--step NAME --share X`` is one such process; without it all run, several at a time,
which slows them: times are compared with the plain step under the same crowd.

Plans are written as they are done, and one that the file holds is not made again, so that parts of a few minutes add
up: ``--seconds 540`` begins none after that time.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import _results
import _steps
import torch

import samegrad as sg
from samegrad.errors import BudgetTooSmall, CannotSplit

MEASURED = Path(__file__).parent / "results" / "peaks_gpu.json"
SHARES = (1.1, 0.9, 0.8, 0.72, 0.65, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15, 0.1, 0.05)
STEPS = 6
MOST_SECONDS = 400
CASES = [
    "resnet34 105 bf16", "resnet34 64 fp32", "resnet34 35 fp32", "resnet50 48 fp32", "resnet50 64 bf16",
    "resnet50_gn 48 fp32", "resnet50_gn 64 bf16", "vit_b16 48 fp32", "vit_b16 96 bf16", "gpt2 4 fp32", "gpt2 8 bf16",
    "gpt_small 24 fp32", "gpt_small 32 bf16", "unet 16 fp32", "unet 32 bf16", "lstm 64 fp32", "lstm 96 bf16",
    "mlp 8192 fp32", "mlp 16384 bf16", "vit_s16 96 bf16",
]  # fmt: skip


def resident_bytes(case: _steps.StepCase) -> int:
    model = _steps.make_model(case, "meta")
    copies = 3 if case.optimizer == "sgd" else 4
    return copies * sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())


def run_one(case: _steps.StepCase, budget_bytes: int) -> dict[str, Any]:
    torch.backends.cudnn.benchmark = False
    model = _steps.make_model(case, "cuda")
    batch = _steps.make_batch(case, "cuda")
    optimizer = _steps.make_optimizer(case, model)
    step = sg.Step(
        model, _steps.loss_of, optimizer=optimizer, forward=_steps.forward_of(case), budget=budget_bytes, enforce=True
    )
    start = time.perf_counter()
    try:
        plan = step.prepare(batch)
    except (BudgetTooSmall, CannotSplit) as refused:
        return {"planned": False, "found": refused.found, "plan_seconds": time.perf_counter() - start}
    plan_seconds = time.perf_counter() - start
    torch.cuda.reset_peak_memory_stats()
    seconds, retries = [], []
    try:
        for _ in range(STEPS):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            step.backward(batch)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
            retries.append(torch.cuda.memory_stats()["num_alloc_retries"])
    except torch.OutOfMemoryError as error:
        return {"planned": True, "runs": False, "plan": plan.levers, "error": str(error)[:300]}
    stats = torch.cuda.memory_stats()
    return {
        "planned": True,
        "runs": True,
        "plan": plan.levers,
        "predicted_peak_bytes": plan.predicted_peak_bytes,
        "predicted_seconds": plan.predicted_seconds,
        "peak_allocated_bytes": stats["allocated_bytes.all.peak"],
        "peak_reserved_bytes": stats["reserved_bytes.all.peak"],
        "retries_after_second_step": retries[-1] - retries[1],
        "within_budget": stats["reserved_bytes.all.peak"] <= budget_bytes,
        "seconds": min(seconds[2:]),
        "plan_seconds": plan_seconds,
    }


def in_own_process(name: str, budget_bytes: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--step", name, "--budget", str(budget_bytes)]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=MOST_SECONDS)
    except subprocess.TimeoutExpired:
        return {"planned": False, "failed": f"not done after {MOST_SECONDS} s"}
    if finished.returncode:
        return {"planned": False, "failed": finished.stderr[-800:]}
    return json.loads(finished.stdout.splitlines()[-1])


def measure(case: _steps.StepCase, share: float, steady_cap_bytes: int, until: float) -> dict[str, Any] | None:
    """What became of the plan; none where there is no time to begin."""
    if time.monotonic() > until:
        return None
    floor = resident_bytes(case)
    budget_bytes = int(floor + share * (steady_cap_bytes - floor))
    return {"name": case.name, "share": share, "budget_bytes": budget_bytes} | in_own_process(case.name, budget_bytes)


def summed_up(plans: Collection[dict[str, Any]]) -> dict[str, Any]:
    run = [plan for plan in plans if plan.get("runs")]
    return {
        "asked": len(plans),
        "planned": sum(plan["planned"] for plan in plans),
        "out_of_memory": sum(plan["planned"] and not plan["runs"] for plan in plans),
        "failed": sum("failed" in plan for plan in plans),
        "over_budget": sum(not plan["within_budget"] for plan in run),
        "with_retries": sum(plan["retries_after_second_step"] > 0 for plan in run),
        "median_plan_seconds": statistics.median(plan["plan_seconds"] for plan in run) if run else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step")
    parser.add_argument("--budget", type=int)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES)
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no plan after so long")
    parser.add_argument("--again", action="store_true", help="make plans that are there already")
    arguments = parser.parse_args()
    by_name = {case.name: case for case in _steps.CASES}
    if arguments.step is not None:
        print(json.dumps(run_one(by_name[arguments.step], arguments.budget)))  # for the process that asked
        return
    until = time.monotonic() + arguments.seconds
    known = {c["name"]: c for c in json.loads(MEASURED.read_text())["cases"] if c["runs"]}
    caps = {name: known[name].get("steady_cap_bytes") or known[name]["peak_reserved_bytes"] for name in CASES}
    cells = _results.Cells("plans_gpu", {}, again=arguments.again)
    # Share by share, so that a part has some of every case.
    names = [name for name in CASES if arguments.only in name]
    asked = {f"{n} {share}": (by_name[n], share, caps[n], until) for share in arguments.shares for n in names}
    with concurrent.futures.ThreadPoolExecutor(arguments.workers) as pool:
        running = {pool.submit(measure, *one): key for key, one in asked.items() if key not in cells}
        for done in concurrent.futures.as_completed(running):
            if (plan := done.result()) is not None:
                cells.add(running[done], plan)
    print(json.dumps(summed_up(cells.cells.values()), indent=2))


if __name__ == "__main__":
    main()
