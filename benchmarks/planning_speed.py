"""How long planning takes without a GPU: one trace, measure + plan + re-trace, the solver alone, and host memory.

Each step in a fresh process on two cores, planned for an H200 at a share of the plain step's steady cap. Processor
seconds stand beside the wall clock's, which other work on the machine lengthens. Exit code 1 when a limit is not kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import resource
import subprocess
import sys
import time
from typing import Any

import _networks
import _results
import _steps
import torch

from samegrad.errors import BudgetTooSmall
from samegrad.measure.target import Target
from samegrad.measure.trace import trace_step
from samegrad.plan.choose import choose_plan
from samegrad.plan.options import Options
from samegrad.settle import aliases_for
from samegrad.settle.following import follow
from samegrad.settle.on_card import settle_on_card, with_levers_on_card

LIMIT_SOLVE_SECONDS = 0.2
LIMIT_HOST_BYTES = 2 * 2**30


@dataclasses.dataclass(frozen=True)
class Planned:
    """A step, where its model is made, the budget as a share of the plain step's, and what planning may take."""

    case: _steps.StepCase
    device: str
    share: float
    limit_seconds: float
    limit_trace_seconds: float | None = None


STEPS = {
    "ResNet-34, 105 rows": Planned(
        _steps.StepCase("resnet34", "resnet34", 105, optimizer="sgd"), "cpu", 0.6, 10.0, 2.0
    ),
    "GPT-2 124M, 32 x 1024, bf16": Planned(_steps.StepCase("gpt2", "gpt2", 32, "bf16"), "cpu", 0.5, 20.0),
    "GPT-2 XL, 8 x 1024, bf16, on meta": Planned(
        _steps.StepCase("gpt2_xl", "gpt2_xl", 8, "bf16"), "meta", 0.7, 60.0, 6.0
    ),
}  # fmt: skip
_steps.NETWORKS["gpt2_xl"] = (lambda: _networks.GPT(48, 1600, 25), (1024,))


def planned(name: str) -> dict[str, Any]:
    """Planning in this process."""
    torch.set_num_threads(2)
    asked = STEPS[name]
    step, batch = _steps.make_step(asked.case, asked.device)
    declared, target = step.declared, Target.named("H200")
    start, start_processor = time.perf_counter(), time.process_time()
    followed, footprint = follow(declared, aliases_for(declared), batch, target)
    assert footprint.steady_cap_bytes is not None
    budget = target.budget(int(asked.share * footprint.steady_cap_bytes))
    figures: dict[str, Any] = {"budget_share": asked.share, "budget_bytes": budget.total_bytes}
    footprint = with_levers_on_card(followed, footprint, budget=budget, options=Options())
    try:
        plan, predicted = settle_on_card(followed, footprint, budget=budget, options=Options())
        figures |= {"plan": plan.levers, "steady_cap_bytes": predicted.steady_cap_bytes}
    except BudgetTooSmall as refused:
        figures |= {"refused": refused.found}
    figures |= {
        "measure_plan_retrace_seconds": round(time.perf_counter() - start, 3),
        "measure_plan_retrace_processor_seconds": round(time.process_time() - start_processor, 3),
    }
    start, start_processor = time.perf_counter(), time.process_time()
    figures["rungs"] = len(choose_plan(footprint, Options(), budget))
    figures["solve_seconds"] = round(time.perf_counter() - start, 3)
    figures["solve_processor_seconds"] = round(time.process_time() - start_processor, 3)
    start, start_processor = time.perf_counter(), time.process_time()
    trace_step(declared, batch)
    figures["trace_seconds"] = round(time.perf_counter() - start, 3)
    figures["trace_processor_seconds"] = round(time.process_time() - start_processor, 3)
    figures["host_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return figures


def apart(name: str) -> dict[str, Any]:
    """``planned`` in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--only", name], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def within_limits(name: str, figures: dict[str, Any]) -> bool:
    """By processor seconds, which other work on the machine does not lengthen."""
    asked = STEPS[name]
    trace_limit = asked.limit_trace_seconds
    return (
        "plan" in figures
        and figures["measure_plan_retrace_processor_seconds"] <= asked.limit_seconds
        and figures["solve_processor_seconds"] <= LIMIT_SOLVE_SECONDS
        and (trace_limit is None or figures["trace_processor_seconds"] <= trace_limit)
        and figures["host_peak_bytes"] <= LIMIT_HOST_BYTES
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=STEPS, help="plan this one here and print its figures")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(planned(options.only)))
        return 0
    rows = {name: apart(name) for name in STEPS}
    kept = {name: within_limits(name, row) for name, row in rows.items()}
    limits = {
        "seconds": {name: step.limit_seconds for name, step in STEPS.items()},
        "trace_seconds": {name: step.limit_trace_seconds for name, step in STEPS.items()},
        "solve_seconds": LIMIT_SOLVE_SECONDS,
        "host_bytes": LIMIT_HOST_BYTES,
    }
    _results.write("planning_speed", {"steps": rows, "limits": limits, "within_limits": kept})
    return 0 if all(kept.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
