"""Style-flow steps on one GPU: the plain step, every ODE step checkpointed by hand, and samegrad within budgets.

    python benchmarks/flow_style_gpu.py            batch 32 and 240, 10 ODE steps, 20.3 M parameters, 8, 4 and 2 GiB
    python benchmarks/flow_style_gpu.py --small    a tiny model on the CPU, counted bytes: shows that it works

Every cell is printed and written when it is done, and one that the file holds is not measured again, so that parts of
a few minutes add up: ``--rows 32 --dtypes bfloat16 --only samegrad --budgets 4GiB`` is one cell.

Times are medians of whole steps (backward and AdamW) after two to warm up. The budgeted step caps what the allocator
may reserve, so a peak above it would be an out-of-memory error. ``gradient_difference`` is the norm of the difference
of all gradients from the plain step's, as a share of their norm; where the plain step does not fit, from the
checkpointed one. ``verdict`` is that of verify_step on at most eight rows: in float64 a GPU's convolutions take tens of
times as long. ``planning`` says where planning spent its time, and how many plain steps it ran.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import _results
import torch
from _planning_cost import PlanningCost
from torch import Tensor

import samegrad as sg
from samegrad.recipes.flow_style.calling import Calling
from samegrad.recipes.flow_style.data import ROW_AXES, Drawing, Latents, draw_batch
from samegrad.recipes.flow_style.losses import Energy
from samegrad.recipes.flow_style.model import StyleFlow, make_flow

ENERGY, WARM_UP = Energy(), 2
VERIFIED_ROWS = 8
Gradients = list[Tensor]


class Case:
    """One model and batch; every way starts from the same weights."""

    def __init__(self, rows: int, base_channels: int, ode_steps: int, side: int, dtype: str, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(64, 4, side, side, generator=generator)
        source = Latents(latents, torch.arange(64) % 2, ("a", "b"))
        self.batch = draw_batch(source, Drawing(rows=rows), earliest=0.01, seed=(rows,))
        self.sizes = {"base_channels": base_channels, "ode_steps": ode_steps, "seed": 0}
        self.device, self.calling = torch.device(device), Calling(dtype)

    @functools.cached_property
    def reference(self) -> Gradients | None:
        """Gradients of the plain step, on the host; where it does not fit, of the checkpointed one."""
        for checkpoint_every in (0, 1):
            model, batch = self.model(checkpoint_every), self.batch.to(self.device)
            with contextlib.suppress(torch.OutOfMemoryError):
                ENERGY(self.calling(model, batch), batch).backward()
                return gradients_of(model)
        return None

    def model(self, checkpoint_every: int = 0) -> StyleFlow:
        model = make_flow(2, **self.sizes).to(self.device)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            # The flow starts as the identity, where most gradients are zero.
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(self.device)
        model.checkpoint_every = checkpoint_every
        return model


def gradients_of(model: StyleFlow) -> Gradients:
    return [p.grad.double().cpu() for p in model.parameters() if p.grad is not None]


def run_by_hand(case: Case, checkpoint_every: int, steps: int) -> dict[str, Any]:
    """Ordinary PyTorch, whole batch."""
    model = case.model(checkpoint_every)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    batch = case.batch.to(case.device)

    def backward() -> float:
        loss = ENERGY(case.calling(model, batch), batch)
        loss.backward()
        return float(loss.detach())

    try:
        return measured(case, model, optimizer, backward, steps)
    except torch.OutOfMemoryError:
        return {"fits": False}


def run_budgeted(case: Case, budget: str, steps: int) -> dict[str, Any]:
    """samegrad within ``budget``, with its plan, prediction and verdict."""
    model = case.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    rows = len(case.batch.source)
    cost = PlanningCost(StyleFlow, rows)
    figures: dict[str, Any] = {"budget": budget, "planning": cost.phases}
    try:
        step = sg.Step(
            model, ENERGY, budget=budget, optimizer=optimizer, forward=case.calling, batch_axes=ROW_AXES, enforce=True
        )
        with step:
            begun = time.perf_counter()
            with cost.counted():
                step.prepare(case.batch)
            figures["planning_seconds"] = time.perf_counter() - begun
            figures |= measured(case, model, optimizer, lambda: float(step.backward(case.batch)), steps, step)
            plan = step.plan
        begun = time.perf_counter()
        # Beside the budget: the plain step it is compared with, in float64 too, is not what the budget is for.
        with sg.Step(model, ENERGY, plan=plan, forward=case.calling, batch_axes=ROW_AXES) as again:
            verdict = sg.verify_step(again, case.batch, rows=min(VERIFIED_ROWS, rows), reference="device")
        figures["verify_seconds"] = time.perf_counter() - begun
    except (torch.OutOfMemoryError, sg.SamegradError) as error:
        return {**figures, "fits": False, "found": " ".join(str(error).split())}
    assert plan is not None and plan.budget is not None
    return {
        **figures,
        "budget_bytes": plan.budget.total_bytes,
        "within_budget": figures["peak_bytes"] <= plan.budget.total_bytes,
        "plan": plan.levers,
        "predicted_peak_bytes": plan.predicted_peak_bytes,
        "predicted_seconds": plan.predicted_seconds,
        "verdict": verdict.answer.value,
        "verified_rows": verdict.rows_checked,
        "max_relative_error": verdict.max_relative_error,
        "failed_checks": [dataclasses.asdict(check) for check in verdict.checks if not check.passed],
    }


def measured(
    case: Case,
    model: StyleFlow,
    optimizer: torch.optim.Optimizer,
    backward: Callable[[], float],
    steps: int,
    step: sg.Step | None = None,
) -> dict[str, Any]:
    begun = time.perf_counter()
    loss = backward()
    figures: dict[str, Any] = {"fits": True, "loss": loss, "first_seconds": time.perf_counter() - begun}
    figures["gradient_difference"] = difference(gradients_of(model), case.reference)
    optimizer.step()
    optimizer.zero_grad()
    cuda = case.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(WARM_UP + steps):
        begun = time.perf_counter()
        backward()
        optimizer.step()
        optimizer.zero_grad()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    figures["seconds"] = statistics.median(seconds[WARM_UP:])
    if cuda:
        figures["peak_bytes"] = torch.cuda.max_memory_reserved()
        figures["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
        return figures
    step = step or sg.Step(
        model, ENERGY, rows=len(case.batch.source), optimizer=optimizer, forward=case.calling, batch_axes=ROW_AXES
    )
    # By train, which counts what stands between steps as well.
    [counted] = sg.train(step, [case.batch], counter=sg.count_bytes(step))
    figures["peak_bytes"] = counted.peak_allocated_bytes
    return figures


def difference(found: Gradients, reference: Gradients | None) -> float | None:
    if reference is None:
        return None
    apart = sum(float((a - b).square().sum()) for a, b in zip(found, reference))
    return (apart / sum(float(b.square().sum()) for b in reference)) ** 0.5


def kinds_of(only: Iterable[str], budgets: list[str]) -> list[str]:
    return [kind for name in only for kind in ([f"samegrad {b}" for b in budgets] if name == "samegrad" else [name])]


def run(cells: _results.Cells, case: Case, name: str, kinds: list[str], steps: int) -> None:
    """The cells of one case that are not there yet."""
    for kind in kinds:
        key = f"{name} {kind}"
        if key in cells:
            continue
        # Before anything is measured, so that nothing of it is there meanwhile.
        _ = case.reference
        if case.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
        how, _, budget = kind.partition(" ")
        figures = run_budgeted(case, budget, steps) if budget else run_by_hand(case, int(how != "plain"), steps)
        for other in ("plain", "checkpointed"):
            beside = cells.cells.get(f"{name} {other}", {})
            # Times of two cards are not compared.
            same_card = beside.get("measured_on") == cells.place
            if figures["fits"] and beside.get("fits") and how != other and same_card:
                figures[f"speed_of_{other}"] = beside["seconds"] / figures["seconds"]
        cells.add(key, figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--steps", type=int, help="timed (8; 2 with --small)")
    parser.add_argument("--rows", nargs="+", type=int, help="of a batch (32 240; 12 with --small)")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    parser.add_argument("--budgets", nargs="+", help="(8GiB 4GiB 2GiB; 4MiB 3.2MiB 1MiB with --small)")
    parser.add_argument("--only", nargs="+", default=["plain", "checkpointed", "samegrad"],
                        choices=["plain", "checkpointed", "samegrad"])  # fmt: skip
    parser.add_argument("--again", action="store_true", help="measure cells that are there already")
    arguments = parser.parse_args()
    small, device = arguments.small, "cpu" if arguments.small else "cuda"
    sizes = {"base_channels": 4, "ode_steps": 3, "side": 8} if small else {
        "base_channels": 128, "ode_steps": 10, "side": 32
    }  # fmt: skip
    budgets = arguments.budgets or (["4MiB", "3.2MiB", "1MiB"] if small else ["8GiB", "4GiB", "2GiB"])
    cells = _results.Cells(f"flow_style_{'cpu' if small else 'gpu'}", sizes, again=arguments.again)
    for rows in arguments.rows or ([12] if small else [32, 240]):
        for dtype in arguments.dtypes:
            case = Case(rows, dtype=dtype, device=device, **sizes)
            steps = arguments.steps or (2 if small else 8)
            run(cells, case, f"{dtype} {rows}", kinds_of(arguments.only, budgets), steps)


if __name__ == "__main__":
    main()
