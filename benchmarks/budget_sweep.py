"""Everybody at the same budgets, on one machine, in one run: how fast, and is it still the same gradient?

A budget is what must be there (parameters, gradients, optimizer state) and x % of what the plain step reserves above
that; the allocator is capped at it. For each cell: peak reserved bytes, milliseconds a step (median of eight after
three, from event to event on the device: as in training, nobody waits for one step before the next begins), rows a
second, the norm of the difference to the plain step's gradients over their norm, how far its gradients and the plain
step's are from those in float64 (the contract allows twice as far), or that it did not fit, or that it computes another
function.

    python benchmarks/budget_sweep.py [--workload NAME ...] [--budget X ...] [--contender NAME ...]

Each cell has a process of its own: what one leaves in the allocator or the compiler would be another's. Those that
choose by memory alone get ready side by side, as many as the card holds, and are then timed one after the other;
samegrad, which times what it chooses from, has the card to itself throughout. Beside them stand two floors, below which
no step of this arithmetic comes: its operations over the card's rate, and the bytes of weights, gradients and optimizer
state over its bandwidth.

Cells that were measured before stay in the file, so that parts of under ten minutes add up.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import copy
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import _results
import torch
from _sweep_contenders import CONTENDERS, IN_PARTS, Backward, emptied, samegrad
from _sweep_training import WORKLOADS, Training, loss_of
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import samegrad as sg
from samegrad.errors import SamegradError
from samegrad.exact.out_of_memory import is_out_of_memory
from samegrad.measure.devices import find_card

BUDGETS = (100.0, 50.0, 25.0, 12.5)
WARM, TIMED = 3, 9
# Of a group: a broken process keeps the others waiting no longer.
MOST_SECONDS_TO_GET_READY = 500.0
_FLOAT64_ROWS = 4
# Contexts, of half a gigabyte each, are beside what is capped.
_MOST_OF_CARD = 0.85
# Compilers start processes of their own.
_CORES_A_CELL = 2


def reference(name: str, gradients_file: Path) -> dict[str, Any]:
    """What the budgets are made of, and the floors. The plain step's gradients go to ``gradients_file``."""
    _settings()
    training = Training.of(WORKLOADS[name])
    # Counted apart: a counter keeps what it looks at.
    with FlopCounterMode(display=False) as counter:
        training.loss(training.batch).backward()
    plain = _gradients_of(training.model)
    in_float64 = _in_float64(training)
    torch.save((plain, in_float64), gradients_file)
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    # The twin in float64 took workspaces and segments of its own.
    torch._C._cuda_clearCublasWorkspaces()
    emptied()
    torch.cuda.reset_peak_memory_stats()
    cell = _timed(training, lambda: training.loss(training.batch).backward())
    weights = sum(p.nbytes for p in training.model.parameters())
    card = find_card(torch.cuda.get_device_name())
    return {
        "floor_bytes": 4 * weights,
        "plain_reserved_bytes": cell["peak_reserved_bytes"],
        "plain_seconds": cell["seconds"],
        "plain_error": _apart_by(plain, in_float64),
        "operations_floor_seconds": counter.get_total_flops() / card.flops_per_second["bfloat16"],
        # Read for the forward and the backward; gradients written and read; weights and two moments read and written.
        "bytes_floor_seconds": (2 + 2 + 6) * weights / card.bandwidth_bytes_per_second,
    }


class Turn:
    """Of cells that get ready side by side: all are timed after the last one is ready, one after the other."""

    ready: Any = None
    timed: Any = None

    @classmethod
    def share(cls, ready: Any, timed: Any) -> None:
        """What a group's processes start with: a barrier and a lock."""
        cls.ready, cls.timed = ready, timed

    def __init__(self) -> None:
        self._waited = self.ready is None

    def wait(self) -> None:
        if not self._waited:
            self._waited = True
            self.ready.wait(MOST_SECONDS_TO_GET_READY)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        self.wait()
        with self.timed or contextlib.nullcontext():
            yield


def measure(name: str, by: str, budget: int, gradients_file: Path) -> dict[str, Any]:
    """One cell."""
    turn = Turn()
    try:
        return _measure(name, by, budget, gradients_file, turn)
    finally:
        # One that does not fit keeps nobody waiting.
        turn.wait()


def _measure(name: str, by: str, budget: int, gradients_file: Path, turn: Turn) -> dict[str, Any]:
    _settings()
    workload, contender = WORKLOADS[name], CONTENDERS[by]
    if contender is not samegrad:
        # That one caps the allocator itself, once it has examined the step.
        torch.cuda.set_per_process_memory_fraction(min(1.0, budget / torch.cuda.mem_get_info()[1]))
    training = Training.of(workload)
    weights = {name: tensor.cpu() for name, tensor in training.model.state_dict().items()}
    start = time.perf_counter()
    try:
        with contender(training, budget) as backward:
            training.optimizer.zero_grad(set_to_none=True)
            # Some take steps to find their rows.
            training.model.load_state_dict(weights)
            backward()
            found = _gradients_of(training.model)
            training.optimizer.step()
            training.optimizer.zero_grad(set_to_none=True)
            before_seconds = time.perf_counter() - start
            with turn.alone():
                cell = _timed(training, backward)
            plan = getattr(backward, "plan", None)
    except SamegradError as error:
        return {"fits": False, "found": error.found}
    except RuntimeError as error:
        # A compiler wraps what it met in types of its own, which do not travel between processes.
        if not is_out_of_memory(error):
            raise RuntimeError("".join(traceback.format_exception(error))) from None
        [*_, last] = traceback.extract_tb(error.__traceback__)
        return {"fits": False, "found": f"out of memory in {Path(last.filename).name}:{last.lineno}"}
    plain, in_float64 = torch.load(gradients_file)
    return {
        "fits": True,
        "gradient_difference": _apart_by(found, plain),
        "gradient_error": _apart_by(found, in_float64),
        "before_seconds": before_seconds,
        **cell,
        "rows_per_second": training.rows / cell["seconds"],
        **({} if plan is None else _of_plan(plan)),
    }


def _of_plan(plan: sg.Plan) -> dict[str, Any]:
    why = {name: plan.reasons.get(name, "") for name in ("compile", "graphs", "recompute")}
    return {"plan": plan.levers, "predicted_seconds": plan.predicted_seconds, "reasons": why}


def _timed(training: Training, backward: Backward) -> dict[str, Any]:
    ends: list[Any] = []
    for turn in range(WARM + TIMED):
        if turn == WARM:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            retries = torch.cuda.memory_stats()["num_alloc_retries"]
        backward()
        training.optimizer.step()
        training.optimizer.zero_grad(set_to_none=True)
        ends.append(torch.cuda.Event(enable_timing=True))
        ends[-1].record()
    torch.cuda.synchronize()
    milliseconds = [before.elapsed_time(after) for before, after in itertools.pairwise(ends)]
    stats = torch.cuda.memory_stats()
    return {
        "seconds": statistics.median(milliseconds[WARM:]) / 1000,
        "peak_reserved_bytes": stats["reserved_bytes.all.peak"],
        # Of the steps that are timed: what was tried to find a plan runs out now and then.
        "retries": stats["num_alloc_retries"] - retries,
    }


def _gradients_of(model: nn.Module) -> list[Tensor]:
    return [p.grad.cpu() for p in model.parameters() if p.grad is not None]


def _in_float64(training: Training) -> list[Tensor]:
    """The gradients of a copy that computes in float64 throughout, a few rows at a time where no layer couples them."""
    model = copy.deepcopy(training.model).double()
    model.zero_grad(set_to_none=True)
    rows = training.rows if training.workload.couples_rows else _FLOAT64_ROWS
    batch = [leaf.double() if leaf.is_floating_point() else leaf for leaf in training.batch]
    for inputs, targets in zip(*(leaf.split(rows) for leaf in batch)):
        loss = loss_of(model(inputs), (inputs, targets), torch.float64)
        (loss * (len(inputs) / training.rows)).backward()
    return _gradients_of(model)


def _apart_by(gradients: list[Tensor], reference: list[Tensor]) -> float:
    """The norm of the difference of all gradients over the norm of the reference."""
    apart = sum(float((a.double() - b.double()).norm()) ** 2 for a, b in zip(gradients, reference, strict=True))
    return (apart / sum(float(b.double().norm()) ** 2 for b in reference)) ** 0.5


def _file_name() -> str:
    """One file a card: times of two are never in one table."""
    card = find_card(torch.cuda.get_device_name()).name
    return f"budget_sweep_{card.split()[0].lower()}"


def _known() -> dict[str, Any]:
    for folder in (Path(os.environ.get("OUT", _results.RESULTS)), _results.RESULTS):
        path = folder / f"{_file_name()}.json"
        if path.exists():
            known: dict[str, Any] = json.loads(path.read_text())["workloads"]
            return known
    return {}


def _settings() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


class Cell(NamedTuple):
    workload: str
    x: float
    contender: str
    budget: int

    @property
    def key(self) -> str:
        return f"{self.x:g} {self.contender}"


def groups(cells: list[Cell], most_bytes: int, most_cells: int) -> Iterator[list[Cell]]:
    """Cells that get ready side by side: no more bytes in all than the card has; samegrad's alone, after the rest."""
    group: list[Cell] = []
    for cell in (cell for cell in cells if cell.contender != "samegrad"):
        if group and (len(group) == most_cells or sum(c.budget for c in [*group, cell]) > most_bytes):
            yield group
            group = []
        group.append(cell)
    if group:
        yield group
    yield from ([cell] for cell in cells if cell.contender == "samegrad")


def measure_together(group: list[Cell], folder: Path) -> list[dict[str, Any]]:
    """Each in a process of its own."""
    context = multiprocessing.get_context("spawn")
    turns = (context.Barrier(len(group)), context.Lock()) if len(group) > 1 else (None, None)
    with concurrent.futures.ProcessPoolExecutor(len(group), context, Turn.share, turns) as processes:
        found = [
            processes.submit(measure, cell.workload, cell.contender, cell.budget, folder / f"{cell.workload}.pt")
            for cell in group
        ]
        return [future.result() for future in found]


def reference_apart(name: str, folder: Path) -> dict[str, Any]:
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(reference, name, folder / f"{name}.pt").result()


def cells_of(name: str, at: dict[str, Any], budgets: Sequence[float], contenders: Sequence[str]) -> Iterator[Cell]:
    for x, contender in itertools.product(budgets, contenders):
        # Without a cap that binds, one cell tells the plain step's speed.
        if x == 100 or contender != "plain":
            above_floor = at["plain_reserved_bytes"] - at["floor_bytes"]
            yield Cell(name, x, contender, int(at["floor_bytes"] + x / 100 * above_floor))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--budget", nargs="+", type=float, default=BUDGETS)
    parser.add_argument("--contender", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    arguments = parser.parse_args()
    known = _known()
    cells: list[Cell] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.workload:
            known[name] = at = known.setdefault(name, {"cells": {}}) | reference_apart(name, Path(folder))
            print(name, {key: value for key, value in at.items() if key != "cells"}, flush=True)
            cells += cells_of(name, at, arguments.budget, arguments.contender)
        most_bytes = int(_MOST_OF_CARD * torch.cuda.mem_get_info()[1])
        for group in groups(cells, most_bytes, max(1, (os.cpu_count() or 1) // _CORES_A_CELL)):
            for cell, figures in zip(group, measure_together(group, Path(folder)), strict=True):
                figures["budget_bytes"] = cell.budget
                if WORKLOADS[cell.workload].couples_rows and cell.contender in IN_PARTS:
                    figures["changed_the_function"] = True
                known[cell.workload]["cells"][cell.key] = figures
                shown = {k: v for k, v in figures.items() if k not in ("plan", "budget_bytes")}
                print(cell.workload, cell.key, shown, str(figures.get("plan", ""))[:160], flush=True)
            _results.write(_file_name(), {"workloads": known}, quiet=True)


if __name__ == "__main__":
    main()
