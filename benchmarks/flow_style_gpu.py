"""Style-flow steps on one GPU: the plain step, every ODE step checkpointed by hand, and samegrad within budgets.

    python benchmarks/flow_style_gpu.py            batch 32 and 240, 10 ODE steps, 20.3 M parameters, 8, 4 and 2 GiB
    python benchmarks/flow_style_gpu.py --small    a tiny model on the CPU, counted bytes: shows that it works

Times are medians of whole steps (backward and AdamW) after two to warm up. The budgeted step caps what the allocator
may reserve, so a peak above it would be an out-of-memory error. ``gradient_difference`` is the norm of the difference
of all gradients from the plain step's, as a share of their norm; where the plain step does not fit, from the
checkpointed one. ``verdict`` is that of verify_step, in float64 on as many rows as fit.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import _results
import torch
from torch import Tensor

import samegrad as sg
from samegrad.recipes.flow_style.calling import Calling
from samegrad.recipes.flow_style.data import ROW_AXES, Drawing, Latents, StyleBatch, draw_batch
from samegrad.recipes.flow_style.losses import Energy
from samegrad.recipes.flow_style.model import StyleFlow, make_flow

ENERGY, WARM_UP = Energy(), 2


class Case:
    """One model and batch; every way starts from the same weights."""

    def __init__(self, rows: int, base_channels: int, ode_steps: int, side: int, dtype: str, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(64, 4, side, side, generator=generator)
        source = Latents(latents, torch.arange(64) % 2, ("a", "b"))
        self.batch = draw_batch(source, Drawing(rows=rows), earliest=0.01, seed=(rows,))
        self.sizes = {"base_channels": base_channels, "ode_steps": ode_steps, "seed": 0}
        self.device, self.calling = torch.device(device), Calling(dtype)

    def model(self, checkpoint_every: int = 0) -> StyleFlow:
        model = make_flow(2, **self.sizes).to(self.device)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            # The flow starts as the identity, where most gradients are zero.
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator).to(self.device)
        model.checkpoint_every = checkpoint_every
        return model


def run_by_hand(case: Case, checkpoint_every: int, steps: int) -> tuple[dict[str, Any], list[Tensor] | None]:
    """Ordinary PyTorch, whole batch; gradients of the first step on the host."""
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
        return {"fits": False}, None


def run_budgeted(case: Case, budget: str, steps: int) -> tuple[dict[str, Any], list[Tensor] | None]:
    """samegrad within ``budget``, with its plan, prediction and verdict."""
    model = case.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    try:
        step = sg.Step(
            model, ENERGY, budget=budget, optimizer=optimizer, forward=case.calling, batch_axes=ROW_AXES, enforce=True
        )
        with step:
            begun = time.perf_counter()
            step.prepare(case.batch)
            planning_seconds = time.perf_counter() - begun
            figures, gradients = measured(
                case, model, optimizer, lambda: float(step.backward(case.batch)), steps,
                lambda: sg.count_bytes(step),
            )  # fmt: skip
            plan, verdict = step.plan, sg.verify_step(step, case.batch)
    except (torch.OutOfMemoryError, sg.SamegradError) as error:
        return {"fits": False, "found": " ".join(str(error).split())}, None
    assert plan is not None and plan.budget is not None
    return {
        **figures,
        "budget_bytes": plan.budget.total_bytes,
        "within_budget": figures["peak_bytes"] <= plan.budget.total_bytes,
        "plan": plan.levers,
        "predicted_peak_bytes": plan.predicted_peak_bytes,
        "predicted_seconds": plan.predicted_seconds,
        "planning_seconds": planning_seconds,
        "verdict": verdict.answer.value,
        "max_relative_error": verdict.max_relative_error,
    }, gradients


def measured(
    case: Case,
    model: StyleFlow,
    optimizer: torch.optim.Optimizer,
    backward: Callable[[], float],
    steps: int,
    counter_of: Callable[[], Any] | None = None,
) -> tuple[dict[str, Any], list[Tensor]]:
    loss = backward()
    gradients = [p.grad.double().cpu() for p in model.parameters() if p.grad is not None]
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
    figures: dict[str, Any] = {"fits": True, "loss": loss, "seconds": statistics.median(seconds[WARM_UP:])}
    if cuda:
        figures["peak_bytes"] = torch.cuda.max_memory_reserved()
        figures["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
        return figures, gradients
    if counter_of is None:
        step = sg.Step(model, ENERGY, rows=len(case.batch.source), optimizer=optimizer, forward=case.calling,
                       batch_axes=ROW_AXES)  # fmt: skip
        counter_of = lambda: sg.count_bytes(step)
    with counter_of() as counter:
        backward()
    figures["peak_bytes"] = counter.peak_bytes
    return figures, gradients


def difference(found: list[Tensor] | None, reference: list[Tensor] | None) -> float | None:
    if found is None or reference is None:
        return None
    apart = sum(float((a - b).square().sum()) for a, b in zip(found, reference))
    return (apart / sum(float(b.square().sum()) for b in reference)) ** 0.5


def compare(case: Case, budgets: list[str], steps: int) -> dict[str, Any]:
    batch: StyleBatch = case.batch
    plain, gradients = run_by_hand(case, 0, steps)
    again, checkpointed = run_by_hand(case, 1, steps)
    again["gradient_difference"] = difference(checkpointed, gradients)
    reference = gradients if gradients is not None else checkpointed
    found: dict[str, Any] = {
        "rows": len(batch.source), "dtype": case.calling.dtype, "ode_steps": case.sizes["ode_steps"],
        "parameters": sum(p.numel() for p in case.model().parameters()), "plain": plain,
        "every_step_checkpointed": again, "samegrad": [],
    }  # fmt: skip
    for budget in budgets:
        if case.device.type == "cuda":
            torch.cuda.empty_cache()
        figures, mine = run_budgeted(case, budget, steps)
        figures |= {"budget": budget, "gradient_difference": difference(mine, reference)}
        for name, other in (("plain", plain), ("every_step_checkpointed", again)):
            if figures["fits"] and other["fits"]:
                figures[f"speed_of_{name}"] = other["seconds"] / figures["seconds"]
        if figures["fits"] and again["fits"] and "budget_bytes" in figures:
            figures["every_step_checkpointed_fits"] = again["peak_bytes"] <= figures["budget_bytes"]
        found["samegrad"].append(figures)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a tiny model on the CPU")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"cases": []}
    if arguments.small:
        case = Case(12, base_channels=4, ode_steps=3, side=8, dtype="float32", device="cpu")
        figures["cases"].append(compare(case, ["4MiB", "3MiB", "1MiB"], 2))
        _results.write("flow_style_cpu", figures)
        return
    for dtype in arguments.dtypes:
        for rows in (32, 240):
            case = Case(rows, base_channels=128, ode_steps=10, side=32, dtype=dtype, device="cuda")
            figures["cases"].append(compare(case, ["8GiB", "4GiB", "2GiB"], arguments.steps))
            _results.write("flow_style_gpu", figures)


if __name__ == "__main__":
    main()
