"""The few-shot document's out-of-memory story on one GPU: ResNet34, 224 pixels, 5 ways, 5 shots, 16 queries.

In float32 and under AMP: the document's formulation (two forwards, the d x d covariance), ours before any lever (one
forward, Gram trick), then ours inside 4, 2.5 and 1.75 GiB. Of each the peak that the allocator reserved, the
milliseconds of a step with its optimizer's turn (the median of --steps after three), and how far its gradients are
from those of ours before any lever, beside how far two plain calls are from each other. A budget caps the allocator
while it is planned for and run, so a peak above it would be an out-of-memory error. Where all queries at once do not
fit, the head takes 16 at a time, and the line says so.

``--cpu`` is the same on the CPU with Conv4 and 28 pixels and budgets of its own, in counted bytes: to see that it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import statistics
import time
from collections.abc import Iterator
from typing import Any

import _results
import torch
from torch import Tensor

import samegrad as sg
from samegrad.errors import SamegradError
from samegrad.recipes.fewshot_cosine import courses, recipe, stepping
from samegrad.recipes.fewshot_cosine.options import FewShotOptions
from samegrad.units import parse_bytes

WARM_UP_STEPS = 3
STREAMED_QUERIES = 16


@dataclasses.dataclass
class Case:
    """One model with its optimizer and an episode, on a device."""

    options: FewShotOptions
    device: torch.device

    def __post_init__(self) -> None:
        self.model = recipe.make_model(self.options).to(self.device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        shape = (self.options.episode_images, self.options.channels, self.options.image_side, self.options.image_side)
        self.episode = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        self.amp = stepping.amp_dtype(self.options, self.device)

    def loss(self) -> Any:
        whole = dataclasses.replace(self.options, query_rows=0)
        return stepping.make_loss(whole, self.model).to(self.device)

    def document(self) -> sg.Step:
        return courses.document_step(self.model, self.loss(), self.optimizer)

    def plain(self) -> sg.Step:
        return courses.plain_step(self.model, self.loss(), self.optimizer, amp=self.amp)

    def budgeted(self, budget: str, query_rows: int) -> sg.Step:
        options = dataclasses.replace(self.options, budget=budget, query_rows=query_rows)
        return stepping.make_step(options, self.model, self.optimizer, self.episode)


@contextlib.contextmanager
def capped(device: torch.device, budget: str | None) -> Iterator[None]:
    """The allocator held to ``budget`` inside the block, with nothing cached before it."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    if budget is not None:
        torch.cuda.set_per_process_memory_fraction(parse_bytes(budget) / torch.cuda.mem_get_info()[1])
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def gradients_of(case: Case, step: sg.Step) -> list[Tensor]:
    """The step's gradients, on the host; the running statistics that it moved do not enter a training step."""
    step.backward(case.episode)
    found = [p.grad.double().cpu() for p in case.model.parameters() if p.grad is not None]
    case.optimizer.zero_grad()
    return found


def difference(found: list[Tensor], reference: list[Tensor]) -> float:
    """The norm of the difference of all gradients, relative to their norm."""
    apart = sum(float((a - b).square().sum()) for a, b in zip(found, reference, strict=True))
    return (apart / sum(float(b.square().sum()) for b in reference)) ** 0.5


def measured(case: Case, step: sg.Step, reference: list[Tensor], steps: int) -> dict[str, Any]:
    """Gradients first, from the weights of the reference; then timed steps, whose weights are put back."""
    figures: dict[str, Any] = {"gradient_difference": difference(gradients_of(case, step), reference)}
    weights = {name: value.to("cpu", copy=True) for name, value in case.model.state_dict().items()}
    counter = None if case.device.type == "cuda" else sg.count_bytes(step)
    results = list(sg.train(step, [case.episode] * (WARM_UP_STEPS + steps), counter=counter))
    case.model.load_state_dict(weights)
    timed = results[WARM_UP_STEPS:]
    return figures | {
        "milliseconds": 1e3 * statistics.median(result.seconds for result in timed),
        "peak_allocated_bytes": max(result.peak_allocated_bytes or 0 for result in results),
        "peak_reserved_bytes": max(result.peak_reserved_bytes or 0 for result in results) or None,
        "allocator_retries": timed[-1].allocator_retries,
        "plan": None if step.plan is None else step.plan.levers,
    }


def attempt(case: Case, budget: str, query_rows: int, reference: list[Tensor], steps: int) -> dict[str, Any]:
    with capped(case.device, budget):
        start = time.perf_counter()
        try:
            step = case.budgeted(budget, query_rows)
        except SamegradError as refused:
            return {"budget": budget, "query_rows": query_rows, "planned": False, "found": refused.found}
        plan_seconds = time.perf_counter() - start
        with step:
            try:
                figures = measured(case, step, reference, steps)
            except torch.OutOfMemoryError as error:
                case.optimizer.zero_grad()
                figures = {"runs": False, "error": str(error).splitlines()[0]}
    return {"budget": budget, "query_rows": query_rows, "planned": True, "plan_seconds": plan_seconds, **figures}


def run(case: Case, budgets: list[str], steps: int) -> dict[str, Any]:
    found: dict[str, Any] = {"amp": case.amp, "embedding_width": case.model.head.attention.leave.out_features}
    with capped(case.device, None):
        plain = case.plain()
        reference = gradients_of(case, plain)
        found["plain_twice_difference"] = difference(gradients_of(case, plain), reference)
        found["one_forward_gram"] = measured(case, plain, reference, steps)
    with capped(case.device, None):
        try:
            found["document"] = measured(case, case.document(), reference, steps)
        except torch.OutOfMemoryError as error:
            case.optimizer.zero_grad()
            found["document"] = {"runs": False, "error": str(error).splitlines()[0]}
    for budget in budgets:
        line = attempt(case, budget, 0, reference, steps)
        if not line["planned"] or line.get("runs") is False:
            found.setdefault("all_queries_at_once", []).append(line)
            line = attempt(case, budget, STREAMED_QUERIES, reference, steps)
        if "milliseconds" in line:
            line["times_plain"] = line["milliseconds"] / found["one_forward_gram"]["milliseconds"]
        found.setdefault("budgets", []).append(line)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="small, on the CPU")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--budgets", nargs="+")
    arguments = parser.parse_args()
    weights: dict[str, Any] = {"lambda_I": 1.0, "lambda_V": 0.5, "lambda_C": 0.1}
    if arguments.cpu:
        device, size = torch.device("cpu"), {"backbone": "Conv4", "image_size": 28}
        budgets = arguments.budgets or ["90MiB", "60MiB"]
    else:
        device, size = torch.device("cuda"), {"backbone": "ResNet34", "dataset": "miniImagenet"}
        budgets = arguments.budgets or ["4GiB", "2560MiB", "1792MiB"]
    figures: dict[str, Any] = {"episode": "5-way 5-shot 16-query", **size, **weights, "runs": []}
    for dtype in ("float32", "auto"):
        options = FewShotOptions(dtype=dtype, **size, **weights)
        figures["runs"].append(run(Case(options, device), budgets, arguments.steps))
        _results.write("fewshot_cosine_cpu" if arguments.cpu else "fewshot_cosine_gpu", figures, quiet=True)
    _results.write("fewshot_cosine_cpu" if arguments.cpu else "fewshot_cosine_gpu", figures)


if __name__ == "__main__":
    main()
