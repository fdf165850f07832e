"""Time of ``Step.backward`` against a hand-written loop over the same chunks, in pairs, one pass and two passes.

``--device cuda``: three networks on a card, chunks that Python runs and chunks that are captured, both ways. There a
turn is a few steps in a row, timed from the end of one to the end of the next on the device: as in training, nobody
waits for a step before the next begins.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import _results
import _steps
import torch
import torch.nn.functional as F
from keyed_dropout import graphed
from torch import Tensor, nn

import samegrad as sg

ROWS, FEATURES, HIDDEN = 2048, 512, 1024
CHUNK_ROWS = 128
# Of a turn on a card, the first of which fills the queue.
STEPS_IN_A_ROW = 6


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, FEATURES)
    )


def hand_single(model: nn.Module, x: Tensor) -> None:
    for chunk in x.split(CHUNK_ROWS):
        (F.mse_loss(model(chunk), chunk) * (len(chunk) / len(x))).backward()


def hand_two_pass(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        z = torch.cat([model(chunk) for chunk in x.split(CHUNK_ROWS)])
    z.requires_grad_()
    coupled(z, x).backward()
    for chunk, cotangent in zip(x.split(CHUNK_ROWS), z.grad.split(CHUNK_ROWS)):
        model(chunk).backward(cotangent)


def coupled(outputs: Tensor, batch: Tensor) -> Tensor:
    return F.mse_loss(outputs, batch).sqrt()


@dataclasses.dataclass(frozen=True)
class OnCard:
    """A step of ``_steps`` in chunks of ``rows``, all of one size, run by ``Step`` and by hand."""

    case: _steps.StepCase
    rows: int

    def hand_eager(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], None]:
        forward, share = _steps.forward_of(self.case), self.rows / self.case.rows

        def chunks() -> None:
            for inputs, targets in zip(*(part.split(self.rows) for part in batch)):
                (_steps.loss_of(forward(model, (inputs, targets)), (inputs, targets)) * share).backward()

        return chunks

    def hand_captured(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], None]:
        """A chunk captured once, forward and backward, into gradients that stay where they are."""
        forward, share = _steps.forward_of(self.case), self.rows / self.case.rows
        places = tuple(part[: self.rows].clone() for part in batch)

        def chunk() -> None:
            (_steps.loss_of(forward(model, places), places) * share).backward()

        replay = graphed(chunk)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]

        def chunks() -> None:
            torch._foreach_zero_(gradients)
            for parts in zip(*(part.split(self.rows) for part in batch)):
                for place, part in zip(places, parts):
                    place.copy_(part)
                replay()

        return chunks

    def measured(self, pairs: int, *, captured: bool) -> dict[str, float]:
        model, batch = _steps.make_model(self.case, "cuda"), _steps.make_batch(self.case, "cuda")
        twin = _steps.make_model(self.case, "cuda")
        levers: dict[str, Any] = {"split_rows": {"rows": self.rows}} | ({"graphs": {}} if captured else {})
        plan = sg.Plan(levers=levers, exactness=sg.Exactness.SAME_SUM, batch_rows=self.case.rows)
        by_hand = (self.hand_captured if captured else self.hand_eager)(twin, batch)
        with sg.Step(model, _steps.loss_of, forward=_steps.forward_of(self.case), plan=plan) as step:
            step.prepare(batch)

            def ours() -> None:
                model.zero_grad(set_to_none=True)
                step.backward(batch)

            def hand() -> None:
                if not captured:
                    twin.zero_grad(set_to_none=True)
                by_hand()

            return paired_ratio(ours, hand, pairs, seconds_of_steps)


ON_CARD = {
    "GPT-2 124M, 32 by 8, bf16": OnCard(_steps.StepCase("gpt2 32 bf16", "gpt2", 32, "bf16"), 8),
    "ViT-B/16, 128 by 32, bf16": OnCard(_steps.StepCase("vit_b16 128 bf16", "vit_b16", 128, "bf16"), 32),
    "ResNet-50-GN, 128 by 32, bf16": OnCard(_steps.StepCase("resnet50_gn 128 bf16", "resnet50_gn", 128, "bf16"), 32),
}


def seconds_of_one(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def seconds_of_steps(run: Callable[[], None]) -> float:
    """Median of ``STEPS_IN_A_ROW`` on the device, but for the first."""
    ends: list[Any] = []
    for _ in range(STEPS_IN_A_ROW):
        run()
        ends.append(torch.cuda.Event(enable_timing=True))
        ends[-1].record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(ends)) / 1000


def paired_ratio(
    ours: Callable[[], None],
    theirs: Callable[[], None],
    pairs: int,
    seconds_of: Callable[[Callable[[], None]], float] = seconds_of_one,
) -> dict[str, float]:
    """Median of ours / theirs, pair by pair, so that a machine that drifts cancels out."""
    ours(), theirs()
    ratios, mine, other = [], [], []
    for turn in range(pairs):
        times = {}
        for run in (ours, theirs) if turn % 2 else (theirs, ours):
            times[run] = seconds_of(run)
        ratios.append(times[ours] / times[theirs])
        mine.append(times[ours])
        other.append(times[theirs])
    return {
        "median_ratio": statistics.median(ratios),
        "ours_seconds": statistics.median(mine),
        "hand_seconds": statistics.median(other),
        "pairs": pairs,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, help="(40; 8 on a card)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    arguments = parser.parse_args()
    pairs = arguments.pairs or (8 if arguments.device == "cuda" else 40)
    if arguments.device == "cuda":
        figures = {
            f"{name}, {'captured' if captured else 'eager'}": one.measured(pairs, captured=captured)
            for name, one in ON_CARD.items()
            for captured in (False, True)
        }
        _results.write("engine_overhead_cuda", figures)
        return
    model = make_model()
    x = torch.randn(ROWS, FEATURES)
    single = sg.Step(model, lambda outputs, batch: F.mse_loss(outputs, batch), rows=CHUNK_ROWS)
    double = sg.Step(model, coupled, rows=CHUNK_ROWS)

    def run(step: Callable[[], object]) -> Callable[[], None]:
        def once() -> None:
            model.zero_grad()
            step()

        return once

    _results.write(
        "engine_overhead",
        {
            "rows": ROWS,
            "chunk_rows": CHUNK_ROWS,
            "single_pass": paired_ratio(run(lambda: single.backward(x)), run(lambda: hand_single(model, x)), pairs),
            "two_pass": paired_ratio(run(lambda: double.backward(x)), run(lambda: hand_two_pass(model, x)), pairs),
        },
    )


if __name__ == "__main__":
    main()
