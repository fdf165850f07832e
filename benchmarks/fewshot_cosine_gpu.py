"""The few-shot document's out-of-memory story on one GPU: ResNet34, 224 pixels, 5 ways, 5 shots, 16 queries.

In float32 and under AMP: the document's formulation (two forwards, the d x d covariance), ours before any lever (one
forward, Gram trick), then ours inside 4, 2.5 and 1.75 GiB. Of each the peak that the allocator reserved, the
milliseconds of a step with its optimizer's turn (the median of --steps after three), and how far its gradients are
from those of ours before any lever and from those in float64 (of a net that has not learnt, AMP's are far from both),
beside how far two plain calls are from each other. A budget caps the allocator
while it is planned for and run, so a peak above it would be an out-of-memory error. Where all queries at once do not
fit, the head takes 16 at a time, and the line says so.

Every cell is printed and written when it is done, and one that the file holds is not measured again, so that parts of
a few minutes add up: ``--dtypes auto --only samegrad --budgets 4GiB`` is one cell. ``planning`` says where planning
spent its time, and how many plain steps it ran.

``--cpu`` is the same on the CPU with Conv4 and 28 pixels and budgets of its own, in counted bytes: to see that it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import gc
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import _results
import torch
from _planning_cost import PlanningCost
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
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=self.device.type == "cuda")
        shape = (self.options.episode_images, self.options.channels, self.options.image_side, self.options.image_side)
        self.episode = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)
        self.amp = stepping.amp_dtype(self.options, self.device)

    @functools.cached_property
    def reference(self) -> list[Tensor]:
        """The gradients of ours before any lever, on the host."""
        with capped(self.device, None):
            return gradients_of(self, self.plain())

    @functools.cached_property
    def reference_in_float64(self) -> list[Tensor]:
        """The same gradients in float64, of a copy of the model."""
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model).double()
        twin.optimizer = torch.optim.AdamW(twin.model.parameters(), lr=1e-5)
        twin.episode, twin.amp = self.episode.double(), None
        with capped(self.device, None):
            return gradients_of(twin, twin.plain())

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
    gc.collect()
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


def measured(case: Case, step: sg.Step, steps: int) -> dict[str, Any]:
    """Gradients first, from the weights of the reference; then timed steps, whose weights are put back."""
    found = gradients_of(case, step)
    figures: dict[str, Any] = {
        "gradient_difference": difference(found, case.reference),
        "difference_from_float64": difference(found, case.reference_in_float64),
    }
    del found
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
        "reasons": None if step.plan is None else step.plan.reasons,
    }


def plain_cell(case: Case, steps: int) -> dict[str, Any]:
    """Ours before any lever, and how far two calls of it are apart."""
    _ = case.reference_in_float64
    twice = difference(gradients_of(case, case.plain()), case.reference)
    with capped(case.device, None):
        return {"plain_twice_difference": twice, **measured(case, case.plain(), steps)}


def document_cell(case: Case, steps: int) -> dict[str, Any]:
    _ = case.reference, case.reference_in_float64
    with capped(case.device, None):
        try:
            return measured(case, case.document(), steps)
        except torch.OutOfMemoryError as error:
            case.optimizer.zero_grad()
            return {"runs": False, "error": str(error).splitlines()[0]}


def attempt(case: Case, budget: str, query_rows: int, steps: int) -> dict[str, Any]:
    """Planned and run inside ``budget``, the queries ``query_rows`` at a time (0: all at once)."""
    _ = case.reference, case.reference_in_float64
    # The backbone sees all images of an episode.
    cost = PlanningCost(type(case.model.backbone), case.options.episode_images)
    figures: dict[str, Any] = {"budget": budget, "query_rows": query_rows, "planning": cost.phases}
    with capped(case.device, budget):
        start = time.perf_counter()
        try:
            with cost.counted():
                step = case.budgeted(budget, query_rows)
        except SamegradError as refused:
            return figures | {"planned": False, "found": refused.found}
        figures |= {"planned": True, "plan_seconds": time.perf_counter() - start}
        with step:
            try:
                return figures | measured(case, step, steps)
            except torch.OutOfMemoryError as error:
                case.optimizer.zero_grad()
                plan = None if step.plan is None else step.plan.levers
                return figures | {"runs": False, "plan": plan, "error": " ".join(str(error).split())}


def budget_cell(case: Case, budget: str, steps: int, beside: dict[str, Any]) -> dict[str, Any]:
    """All queries at once, or, where that does not fit, 16 at a time. ``beside``: the cell of the plain step."""
    found = attempt(case, budget, 0, steps)
    if "milliseconds" not in found:
        found = attempt(case, budget, STREAMED_QUERIES, steps) | {"all_queries_at_once": found}
    if "milliseconds" in found and "milliseconds" in beside:
        found["times_plain"] = found["milliseconds"] / beside["milliseconds"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true", help="small, on the CPU")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "auto"], choices=["float32", "auto"])
    parser.add_argument("--budgets", nargs="+", help="(4GiB 2560MiB 1792MiB; 90MiB 60MiB with --cpu)")
    kinds = ["plain", "document", "samegrad"]
    parser.add_argument("--only", nargs="+", default=kinds, choices=kinds)
    parser.add_argument("--again", action="store_true", help="measure cells that are there already")
    arguments = parser.parse_args()
    weights: dict[str, Any] = {"lambda_I": 1.0, "lambda_V": 0.5, "lambda_C": 0.1}
    if arguments.cpu:
        device, size = torch.device("cpu"), {"backbone": "Conv4", "image_size": 28}
        budgets = arguments.budgets or ["90MiB", "60MiB"]
    else:
        device, size = torch.device("cuda"), {"backbone": "ResNet34", "dataset": "miniImagenet"}
        budgets = arguments.budgets or ["4GiB", "2560MiB", "1792MiB"]
    facts = {"episode": "5-way 5-shot 16-query", **size, **weights}
    name = "fewshot_cosine_cpu" if arguments.cpu else "fewshot_cosine_gpu"
    cells = _results.Cells(name, facts, again=arguments.again)
    wanted = [
        (dtype, kind, budget)
        for dtype in arguments.dtypes
        for kind in arguments.only
        for budget in (budgets if kind == "samegrad" else [""])
        if " ".join(filter(None, (dtype, kind, budget))) not in cells
    ]
    if len(wanted) > 1:
        # Each in a process of its own: what one leaves in the allocator would be the next one's.
        for cell in wanted:
            run_apart(*cell, arguments)
        return
    for dtype, kind, budget in wanted:
        case = Case(FewShotOptions(dtype=dtype, **size, **weights), device)
        about = {"amp": case.amp, "embedding_width": case.model.head.attention.leave.out_features}
        if kind == "samegrad":
            found = budget_cell(case, budget, arguments.steps, cells.cells.get(f"{dtype} plain", {}))
        else:
            found = (plain_cell if kind == "plain" else document_cell)(case, arguments.steps)
        cells.add(" ".join(filter(None, (dtype, kind, budget))), about | found)


def run_apart(dtype: str, kind: str, budget: str, arguments: argparse.Namespace) -> None:
    command = [sys.executable, __file__, "--dtypes", dtype, "--only", kind, "--steps", str(arguments.steps)]
    command += ["--budgets", budget] if budget else []
    command += [flag for flag in ("--cpu", "--again") if getattr(arguments, flag.strip("-"))]
    subprocess.run(command, check=False)


if __name__ == "__main__":
    main()
