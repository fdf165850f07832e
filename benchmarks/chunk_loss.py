"""A GPT's loss in chunks of positions against the plain step: peak bytes and time of a step, optimizer included.

On the CPU a small one, counted tensor bytes. With --device cuda GPT-2 124M, 32 rows of 1024 tokens under bfloat16
autocast, the allocator's peaks. What is measured is the second step on: the optimizer's state is there. Activations are
the peak less what stays between steps. The verdict is of a few rows of the same step.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from typing import Any

import _results
import torch
from _gpt import GPT, SMALL, TINY, next_token, random_batch
from torch import Tensor

import samegrad as sg
from samegrad.measure.counting import count_bytes
from samegrad.measure.probe import claim_residents
from samegrad.records import Exactness, Plan

PLAIN = "plain"


def plan_of(case: str, rows: int) -> Plan:
    levers = {} if case == PLAIN else {"chunk_loss": {"head": "head", "rows": int(case)}}
    return Plan(levers=levers, exactness=Exactness.SAME_SUM if levers else Exactness.SAME_BITS, batch_rows=rows)


def measured(case: str, args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(args.device)
    cuda = device.type == "cuda"
    shape, rows = (SMALL, args.rows or 32) if cuda else (TINY, args.rows or 8)
    torch.manual_seed(0)
    model = GPT(shape).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=cuda)
    batch = random_batch(shape, rows, device)
    step = sg.Step(model, next_token, plan=plan_of(case, rows), optimizer=optimizer)

    def run() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16) if cuda else contextlib.nullcontext():
            loss = step.backward(batch)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    first_loss = float(run())
    run()
    figures: dict[str, Any] = {"first_loss": first_loss}
    if cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
        figures["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
    else:
        counter = count_bytes(step)
        claim_residents(counter, step.declared, batch)
        before = counter.live_bytes
        with counter:
            run()
        peak = counter.peak_bytes
    figures |= {"peak_bytes": peak, "activation_bytes": peak - before}
    figures["step_seconds"] = statistics.median(timed(run, cuda) for _ in range(args.steps))
    with torch.autocast(device.type, torch.bfloat16) if cuda else contextlib.nullcontext():
        # One row more than a chunk, so that there are two.
        several = 2 if case == PLAIN else int(case) // shape.length + 1
        verdict = sg.verify_step(step, batch, rows=min(rows, several))
    return figures | {"verdict": verdict.answer.value, "largest_relative_error": verdict.max_relative_error}


def timed(run: Any, cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, help="of the batch")
    parser.add_argument("--steps", type=int, default=10, help="that are timed")
    parser.add_argument("--positions", type=int, nargs="+", help="of a chunk")
    args = parser.parse_args()
    cuda = torch.device(args.device).type == "cuda"
    cases: dict[str, dict[str, Any]] = {}
    for case in [PLAIN, *map(str, args.positions or ([512, 1024, 2048, 4096] if cuda else [64, 128, 256]))]:
        cases[case] = measured(case, args)
        for figure in ("activation_bytes", "step_seconds"):
            cases[case][f"{figure}_over_plain"] = cases[case][figure] / cases[PLAIN][figure]
        if cuda:
            torch.cuda.empty_cache()
    name = f"chunk_loss_{torch.device(args.device).type}"
    _results.write(name, {"shape": vars(SMALL if cuda else TINY), "positions_of_a_chunk": cases})


if __name__ == "__main__":
    main()
