"""What training steps really hold on one GPU: peaks, caps and times, each in a process of its own.

For each case: the peak that is allocated and reserved when nothing holds the allocator back, the steady cap (the
smallest under which steps after the second run without an allocator retry) and the smallest cap that runs at all,
both bisected to one percent. ``--step NAME`` is one such process; without it all cases run, several side by side,
which makes no difference to bytes.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import _results
import _steps
import torch

STEPS = 6
WITHIN = 0.01
SHOWN = ("name", "peak_allocated_bytes", "peak_reserved_bytes", "steady_cap_bytes", "smallest_cap_bytes", "failed")


def run_one(case: _steps.StepCase, cap_bytes: int | None, history: Path | None) -> dict[str, Any]:
    """The case's steps in this process, under ``cap_bytes``."""
    torch.backends.cudnn.benchmark = False
    device = torch.device("cuda", 0)
    free_before = torch.cuda.mem_get_info(device)[0]
    total = torch.cuda.get_device_properties(device).total_memory
    context_bytes = total - free_before
    step, batch = _steps.make_step(case, "cuda")
    # What examining the step took is not the step's.
    step.sizes_for(batch)
    layout = step.declared.layout(batch)
    step.draws_for(batch, layout)
    if case.rows_at_a_time is not None:
        step.split_for(batch, layout)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    if cap_bytes is not None:
        torch.cuda.set_per_process_memory_fraction(cap_bytes / total, device)
    if history is not None:
        torch.cuda.memory._record_memory_history(max_entries=1_000_000, stacks="python", context=None)
    torch.cuda.reset_peak_memory_stats()
    standing = torch.cuda.memory_allocated()
    seconds, retries, peaks = [], [], []
    try:
        for _ in range(STEPS):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            step.backward(batch)
            step.declared.optimizer.step()
            step.declared.optimizer.zero_grad(set_to_none=True)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
            stats = torch.cuda.memory_stats()
            retries.append(stats["num_alloc_retries"])
            peaks.append((stats["allocated_bytes.all.peak"], stats["reserved_bytes.all.peak"]))
    except torch.OutOfMemoryError as error:
        return {"runs": False, "steps": len(peaks), "error": str(error)[:200]}
    if history is not None:
        save_history(history)
    stats = torch.cuda.memory_stats()
    held = torch.cuda.memory_allocated()
    torch._C._cuda_clearCublasWorkspaces()
    return {
        "runs": True,
        "steady": retries[-1] == retries[1],
        "retries": retries,
        "standing_bytes": standing,
        "peak_allocated_bytes": max(p for p, _ in peaks[1:]),
        "peak_allocated_first_bytes": peaks[0][0],
        "peak_reserved_bytes": max(r for _, r in peaks),
        "peak_requested_bytes": stats["requested_bytes.all.peak"],
        "cublas_workspace_bytes": held - torch.cuda.memory_allocated(),
        "context_bytes": context_bytes,
        "seconds": min(seconds[2:]),
        "total_bytes": total,
    }


def save_history(path: Path) -> None:
    """Every request of the run, in order: action, address, bytes."""
    import numpy as np

    [events] = [t for t in torch.cuda.memory._snapshot()["device_traces"] if t]
    actions = sorted({event["action"] for event in events})
    np.savez_compressed(
        path,
        actions=np.array(actions),
        action=np.array([actions.index(event["action"]) for event in events], dtype=np.uint8),
        address=np.array([event["addr"] for event in events], dtype=np.uint64),
        size=np.array([event["size"] for event in events], dtype=np.uint64),
    )


def in_own_process(name: str, cap_bytes: int | None = None, history: Path | None = None) -> dict[str, Any]:
    command = [sys.executable, __file__, "--step", name]
    command += [] if cap_bytes is None else ["--cap", str(cap_bytes)]
    command += [] if history is None else ["--history", str(history)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400)
    if finished.returncode:
        return {"runs": False, "failed": finished.stderr[-600:]}
    return json.loads(finished.stdout.splitlines()[-1])


class Caps:
    """Runs of one case under caps; what one of them showed is not asked again."""

    def __init__(self, name: str, low: int, high: int) -> None:
        """``low``: a cap that is too small; ``high``: one under which it runs without a retry."""
        self._name = name
        self._found: dict[int, dict[str, Any]] = {low: {}, high: {"steady": True, "runs": True}}

    def smallest(self, good: str) -> int:
        """The smallest cap, to one percent, under which the run says yes to ``good``."""
        while True:
            high = min(cap for cap, run in self._found.items() if run.get(good, False))
            low = max(cap for cap, run in self._found.items() if cap < high and not run.get(good, False))
            if high - low <= WITHIN * high:
                return high
            middle = (low + high) // 2
            self._found[middle] = in_own_process(self._name, middle)


def measure(case: _steps.StepCase, histories: Path | None) -> dict[str, Any]:
    history = None if histories is None else histories / f"{case.name.replace(' ', '_')}.npz"
    free = in_own_process(case.name, history=history)
    if not free["runs"] or case.calibrates:
        return {"name": case.name, **free}
    caps = Caps(case.name, int(0.9 * free["peak_allocated_bytes"]), free["peak_reserved_bytes"])
    return {
        "name": case.name,
        **free,
        "steady_cap_bytes": caps.smallest("steady"),
        "smallest_cap_bytes": caps.smallest("runs"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--step")
    parser.add_argument("--cap", type=int)
    parser.add_argument("--history", type=Path)
    parser.add_argument("--workers", type=int, default=10)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    arguments = parser.parse_args()
    if arguments.step is not None:
        [case] = [case for case in _steps.CASES if case.name == arguments.step]
        print(json.dumps(run_one(case, arguments.cap, arguments.history)))  # for the process that asked
        return
    cases = [case for case in _steps.CASES if arguments.only in case.name]
    histories = Path(os.environ["HISTORIES"]) if "HISTORIES" in os.environ else None
    if histories is not None:
        histories.mkdir(parents=True, exist_ok=True)
    figures: list[dict[str, Any]] = []
    with concurrent.futures.ThreadPoolExecutor(arguments.workers) as pool:
        for done in concurrent.futures.as_completed([pool.submit(measure, case, histories) for case in cases]):
            figures.append(done.result())
            print(json.dumps({key: figures[-1].get(key) for key in SHOWN}), flush=True)
            # Written each time, so that a run cut short leaves what it found.
            _results.write("peaks_gpu", {"cases": sorted(figures, key=lambda figure: figure["name"])}, quiet=True)


if __name__ == "__main__":
    main()
