"""Time and host memory of one trace (two steps), each in a fresh process, and what it foretells against real peaks.

No GPU is needed. Real peaks: ``max_memory_allocated`` of steps 2 to 4 on one NVIDIA H200, torch 2.11.0+cu130, default
allocator; libraries' workspaces are in them and not in a trace. Exit code 1 when a limit is not kept.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import _results
from _trace_models import gpt_step, resnet_step

from samegrad.declared import DeclaredStep
from samegrad.measure import cuda_trial, trace_reading
from samegrad.measure.trace import trace_step

Made = tuple[DeclaredStep, Any]
STEPS: dict[str, Callable[[], Made]] = {
    "ResNet-34, 105 rows": lambda: resnet_step(105),
    "ResNet-34, 105 rows, bfloat16 autocast": lambda: resnet_step(105, autocast=True),
    "ResNet-34, 105 rows, blocks recomputed": lambda: resnet_step(105, recomputed=True),
    "ResNet-34, 35 rows": lambda: resnet_step(35),
    "GPT 124M, 4 x 1024": lambda: gpt_step(4),
    "GPT 124M, 4 x 1024, bfloat16 autocast": lambda: gpt_step(4, autocast=True),
    "GPT 124M, 16 x 1024, blocks recomputed": lambda: gpt_step(16, recomputed=True),
    "GPT-2 XL, 4 x 1024": lambda: gpt_step(4, layers=48, width=1600, heads=25),
}
REAL_PEAK_BYTES = {
    "ResNet-34, 105 rows": 3_688_696_832,
    "ResNet-34, 105 rows, bfloat16 autocast": 2_164_154_368,
    "ResNet-34, 105 rows, blocks recomputed": 1_747_312_640,
    "ResNet-34, 35 rows": 1_424_889_856,
    "GPT 124M, 4 x 1024": 6_492_484_608,
    "GPT 124M, 4 x 1024, bfloat16 autocast": 5_262_648_832,
    "GPT 124M, 16 x 1024, blocks recomputed": 12_153_771_008,
}
LIMITS_SECONDS = {"ResNet-34, 105 rows": 2.0, "GPT-2 XL, 4 x 1024": 6.0}
LIMIT_HOST_BYTES = 2 * 2**30


def traced(name: str) -> dict[str, Any]:
    """One trace in this process: seconds, peak host bytes, and the peak that it foretells."""
    declared, batch = STEPS[name]()
    start = time.perf_counter()
    reason = cuda_trial.why_not()
    tested = time.perf_counter()
    start_processor = time.process_time()
    trace = trace_step(declared, batch)
    figures = {
        "seconds": round(time.perf_counter() - tested, 3),
        "processor_seconds": round(time.process_time() - start_processor, 3),
        "self_test_seconds": round(tested - start, 3),
        "host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "operations": len(trace.operations),
        "followed": reason or trace.device,
        "predicted_peak_bytes": trace_reading.peak_bytes(trace, round_to=trace_reading.CUDA_BLOCK_BYTES),
    }
    if name in REAL_PEAK_BYTES:
        real = REAL_PEAK_BYTES[name]
        figures |= {"real_peak_bytes": real, "missing_bytes": real - figures["predicted_peak_bytes"]}
    return figures


def apart(name: str) -> dict[str, Any]:
    """``traced`` in a process of its own."""
    done = subprocess.run([sys.executable, __file__, "--only", name], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=STEPS, help="trace this one here and print its figures")
    options = parser.parse_args()
    if options.only:
        print(json.dumps(traced(options.only)))
        return 0
    rows = {name: apart(name) for name in STEPS}
    kept = all(rows[name]["seconds"] <= limit for name, limit in LIMITS_SECONDS.items())
    kept = kept and all(row["host_peak_bytes"] <= LIMIT_HOST_BYTES for row in rows.values())
    limits = {"seconds": LIMITS_SECONDS, "host_bytes": LIMIT_HOST_BYTES}
    _results.write("trace_speed", {"steps": rows, "limits": limits, "within_limits": kept})
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
