"""Batch 16 x 16 patches of the vector-quantised autoencoder inside 512 and 128 MiB: exact, and at what time.

For each budget: the plan, what it holds as predicted and measured, its verdict against the plain step, gradients and
buffers beside the plain step's of the same weights, and the time of an epoch against the plain one, taken in turn.
A budget on a GPU caps what the allocator may reserve; ``--device cpu`` counts tensor bytes, for a look at the script.
A refusal is a result too: it says what is needed at least.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import _results
import torch
from torch import Tensor

import samegrad as sg
from samegrad.recipes.vq_spectrogram.declared import make_model, make_objective, make_optimizer
from samegrad.recipes.vq_spectrogram.model import Objective, VQSpectrogram
from samegrad.recipes.vq_spectrogram.options import VQSpectrogramOptions
from samegrad.recipes.vq_spectrogram.table import MACHINE_IDS, drawn_batch

Batch = dict[str, Tensor]


def made(options: VQSpectrogramOptions) -> tuple[VQSpectrogram, Objective, Batch]:
    """The model as it begins, and a batch of noise in its shapes, on the device."""
    device = torch.device(options.device)
    model, objective = make_model(options, MACHINE_IDS).to(device), make_objective(options)
    batch = {name: tensor.to(device) for name, tensor in drawn_batch(options).items()}
    return model, objective, batch


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def in_float64(options: VQSpectrogramOptions, plan: sg.Plan) -> dict[str, float]:
    """The largest differences that the plan leaves beside the plain step, on copies in float64, dropout off.

    Relative to the largest entry of each gradient and each buffer.
    """
    model, objective, batch = made(options)
    model = model.double()
    batch = {name: t.double() if t.is_floating_point() else t for name, t in batch.items()}
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    sides = []
    for plainly in (True, False):
        twin = copy.deepcopy(model)
        if plainly:
            objective(twin(batch["patches"]), batch).backward()
        else:
            free = sg.Plan(levers=plan.levers, exactness=plan.exactness, batch_rows=plan.batch_rows)
            with sg.Step(twin, objective, plan=free) as step:
                step.backward(batch)
        sides.append(twin)
    plain, ours = sides
    largest = max(float(p.grad.abs().max()) for p in plain.parameters() if p.grad is not None)
    gradients = [
        float((a.grad - b.grad).abs().max()) / max(float(a.grad.abs().max()), 1e-3 * largest)
        for a, b in zip(plain.parameters(), ours.parameters()) if a.grad is not None and b.grad is not None
    ]  # fmt: skip
    buffers = [
        float((a.double() - b.double()).abs().max()) / max(1.0, float(a.double().abs().max()))
        for a, b in zip(plain.buffers(), ours.buffers())
    ]
    return {"largest_gradient_difference": max(gradients), "largest_buffer_difference": max(buffers)}


def step_seconds(step: sg.Step, optimizer: torch.optim.Optimizer, batch: Batch, device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    step.backward(batch)
    optimizer.step()
    optimizer.zero_grad()
    synchronize(device)
    return time.perf_counter() - start


def keep_budget(options: VQSpectrogramOptions, budget: str, steps: int) -> dict[str, Any]:
    model, objective, batch = made(options)
    optimizer = make_optimizer(options, model)
    on_gpu = options.device != "cpu"
    figures: dict[str, Any] = {"budget": budget}
    with sg.Step(model, objective, budget=budget, optimizer=optimizer, enforce=on_gpu) as step:
        try:
            plan = step.prepare(batch)
        except sg.SamegradError as refusal:
            return figures | {"fits": False, "refusal": str(refusal)}
        counter = None if on_gpu else sg.count_bytes(step)
        results = list(sg.train(step, [batch] * steps, counter=counter))
        verdict = sg.verify_step(step, batch)
        limit = step.budget
    assert limit is not None
    held = [(r.peak_reserved_bytes if on_gpu else r.peak_allocated_bytes) or 0 for r in results]
    return figures | {
        "fits": True,
        "plan": plan.levers,
        "predicted_peak_allocated_bytes": plan.predicted_peak_bytes,
        "measured_peak_allocated_bytes": max(r.peak_allocated_bytes or 0 for r in results),
        "measured_peak_bytes_that_count": max(held),
        "within_budget": max(held) <= limit.total_bytes,
        "allocator_retries": results[-1].allocator_retries,
        "verdict": verdict.answer.value,
        "max_relative_error": verdict.max_relative_error,
        "beside_the_plain_step_in_float64": in_float64(options, plan),
        "epoch": compare_times(options, plan, steps),
    }


def compare_times(options: VQSpectrogramOptions, plan: sg.Plan, steps: int) -> dict[str, float]:
    """Medians of steps after two to warm up, the plain and the planned one in turn, nothing capped."""
    free = sg.Plan(levers=plan.levers, exactness=plan.exactness, batch_rows=plan.batch_rows)
    whole = sg.Plan(levers={}, exactness=sg.Exactness.SAME_BITS, batch_rows=plan.batch_rows)
    seconds: dict[str, list[float]] = {"plain": [], "planned": []}
    sides = {}
    for name, one in (("plain", whole), ("planned", free)):
        model, objective, batch = made(options)
        optimizer = make_optimizer(options, model)
        sides[name] = sg.Step(model, objective, plan=one, optimizer=optimizer), optimizer, batch
    for _ in range(steps + 2):
        for name, (step, optimizer, batch) in sides.items():
            seconds[name].append(step_seconds(step, optimizer, batch, options.device))
    for step, _, _ in sides.values():
        step.close()
    medians = {name: statistics.median(values[2:]) for name, values in seconds.items()}
    return {
        "plain_seconds_a_step": medians["plain"],
        "planned_seconds_a_step": medians["planned"],
        "times_plain": medians["planned"] / medians["plain"],
    }


def plain_bytes(options: VQSpectrogramOptions) -> dict[str, Any]:
    """What the plain step holds, from its second optimizer step."""
    model, objective, batch = made(options)
    optimizer = make_optimizer(options, model)
    whole = sg.Plan(levers={}, exactness=sg.Exactness.SAME_BITS, batch_rows=options.logical_clips)
    with sg.Step(model, objective, plan=whole, optimizer=optimizer) as step:
        counter = None if options.device != "cpu" else sg.count_bytes(step)
        last = list(sg.train(step, [batch, batch], counter=counter))[-1]
    return {
        "peak_allocated_bytes": last.peak_allocated_bytes,
        "peak_reserved_bytes": last.peak_reserved_bytes,
        "parameters": sum(p.numel() for p in model.parameters()) + model.codebook.sums.numel(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--n_patches", type=int, default=16)
    parser.add_argument("--budgets", nargs="+", default=["512MiB", "256MiB", "128MiB"])
    parser.add_argument("--steps", type=int, default=12)
    asked = parser.parse_args()
    options = VQSpectrogramOptions(
        device=asked.device, batch_size=asked.batch_size, n_patches=asked.n_patches, stride=16
    )
    figures: dict[str, Any] = {
        "clips": asked.batch_size,
        "patches": asked.n_patches,
        "counted": "allocator" if asked.device != "cpu" else "tensor bytes",
        "plain": plain_bytes(options),
        "budgets": [],
    }
    for budget in asked.budgets:
        if asked.device != "cpu":
            torch.cuda.empty_cache()
        figures["budgets"].append(keep_budget(options, budget, asked.steps))
        _results.write("vq_spectrogram_gpu", figures)


if __name__ == "__main__":
    main()
