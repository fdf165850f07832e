"""The modelled CUDA allocator against the real one: recorded histories replayed, predicted caps tried on the device.

Records training steps (dense, convolutions with BatchNorm, transformer, LSTM), each from an empty allocator in a
process of its own, with ordinary and with expandable segments. Then replays exactly the recorded requests through the
model and compares what is reserved after every request, where each block lies, segments and retries. From the
requests of a run without a cap it predicts the steady cap and the smallest cap, and runs again under each and under
2 MiB less. Last it records what single operations take besides their results (library workspaces).

Writes allocator_gpu.json, and allocator_histories.npz with the recorded histories, to $OUT or benchmarks/results.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _results
import numpy as np
import torch
from _allocator_steps import ACTIONS

from samegrad.measure.allocator_rules import SEGMENT_ROUNDING_BYTES, AllocatorRules
from samegrad.measure.caps import predict_reserved
from samegrad.measure.recorded_history import HistoryEntry, compare_history, requests_of

STEPS_SCRIPT = Path(__file__).parent / "_allocator_steps.py"
CASES = (
    ("dense", "float32"), ("pictures", "float32"), ("pictures", "bfloat16"), ("words", "bfloat16"),
    ("words", "float32"), ("series", "float32"),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """One recorded process. ``purpose``: "free", or which cap was set."""

    model: str
    precision: str
    expandable: bool
    purpose: str = "free"
    cap_bytes: int | None = None

    @property
    def name(self) -> str:
        return f"{self.model} {self.precision} {'expandable' if self.expandable else 'ordinary'} {self.purpose}"

    @property
    def rules(self) -> AllocatorRules:
        return AllocatorRules(expandable_segments=self.expandable)


def record(run: Run, folder: Path) -> Path | None:
    """Runs the process and returns the file it wrote; None, with the reason printed, when it failed."""
    output = folder / f"{run.name.replace(' ', '_')}.npz"
    arguments = [sys.executable, str(STEPS_SCRIPT), run.model, str(output), "--precision", run.precision]
    if run.cap_bytes is not None:
        arguments += ["--cap_bytes", str(run.cap_bytes)]
    settings = "expandable_segments:True" if run.expandable else "expandable_segments:False"
    return output if _run(arguments, run.name, settings) else None


def _run(arguments: list[str], name: str, settings: str) -> bool:
    environment = {**os.environ, "PYTORCH_ALLOC_CONF": settings}
    environment.pop("PYTORCH_CUDA_ALLOC_CONF", None)
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=150, check=False)
    if done.returncode:
        print(f"{name}: failed\n{done.stdout[-500:]}\n{done.stderr[-2000:]}", file=sys.stderr)
    return done.returncode == 0


def load(path: Path) -> tuple[tuple[HistoryEntry, ...], dict[str, Any]]:
    with np.load(path) as arrays:
        columns = [arrays[key].tolist() for key in ("actions", "addresses", "sizes", "streams")]
        facts = json.loads(arrays["facts"].tobytes())
    return tuple(HistoryEntry(ACTIONS[a], place, size, s) for a, place, size, s in zip(*columns)), facts


def judge(run: Run, history: tuple[HistoryEntry, ...], facts: dict[str, Any]) -> dict[str, Any]:
    """The comparison with the driver's addresses as seen, and with the model's own rule for them."""
    start = time.perf_counter()
    seen = compare_history(history, run.rules, cap_bytes=run.cap_bytes)
    seconds = time.perf_counter() - start
    own = compare_history(history, run.rules, cap_bytes=run.cap_bytes, recorded_segments=False)
    return {
        "run": dataclasses.asdict(run),
        "exact": seen.first is None and seen.retries == facts["retries"],
        "exact_with_own_addresses": own.first is None and own.retries == facts["retries"],
        "replay_seconds": seconds,
        "recorded": facts,
        "seen_addresses": dataclasses.asdict(seen),
        "own_addresses": dataclasses.asdict(own),
    }


def judge_cap(run: Run, facts: dict[str, Any]) -> dict[str, Any]:
    """Whether the device did under the cap what the prediction says.

    Under less than the predicted cap cuDNN may find that its workspace does not fit and take another algorithm, which
    no replay of the requests without a cap can know: such runs do better than predicted.
    """
    retries = facts["retries_after_step"]
    runs = not facts["out_of_memory"]
    steady = runs and len(retries) > 2 and retries[-1] == retries[1]
    expected = {"steady": steady, "steady less": not steady, "smallest": runs, "smallest less": not runs}
    return {"runs": runs, "steady": steady, "retries_after_step": retries, "as_predicted": expected[run.purpose]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=6, help="how many record at a time")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("allocator_gpu.py: no CUDA device, nothing recorded")
    start = time.perf_counter()
    figures: dict[str, Any] = {"runs": {}, "caps": {}}
    histories: dict[str, Path] = {}
    with tempfile.TemporaryDirectory() as name, concurrent.futures.ThreadPoolExecutor(options.processes) as pool:
        folder = Path(name)
        hidden = folder / "hidden.json"
        # Alone, since it reads what the whole device has in use.
        hidden_works = _run(
            [sys.executable, str(STEPS_SCRIPT), "hidden", str(hidden)], "hidden", "expandable_segments:False"
        )
        figures["hidden"] = json.loads(hidden.read_text()) if hidden_works else None
        free = [Run(model, precision, expandable) for model, precision in CASES for expandable in (False, True)]
        capped = []
        for run, path in zip(free, pool.map(lambda run: record(run, folder), free)):
            if path is None:
                continue
            history, facts = load(path)
            histories[run.name] = path
            figures["runs"][run.name] = judge(run, history, facts)
            predicted = predict_reserved(requests_of(history, facts["step_starts"][1:]), run.rules)
            figures["caps"][run.name] = {
                "steady_cap_bytes": predicted.steady.cap_bytes,
                "smallest_cap_bytes": predicted.smallest.cap_bytes,
                "peak_reserved_bytes": predicted.free_running.peak_reserved_bytes,
            }
            for purpose, cap in (("steady", predicted.steady), ("smallest", predicted.smallest)):
                capped.append(dataclasses.replace(run, purpose=purpose, cap_bytes=cap.cap_bytes))
                less = cap.cap_bytes - SEGMENT_ROUNDING_BYTES
                capped.append(dataclasses.replace(run, purpose=f"{purpose} less", cap_bytes=less))
        for run, path in zip(capped, pool.map(lambda run: record(run, folder), capped)):
            if path is None:
                continue
            history, facts = load(path)
            histories[run.name] = path
            figures["runs"][run.name] = {**judge(run, history, facts), "cap": judge_cap(run, facts)}
        _keep(histories)
    runs = figures["runs"].values()
    figures["summary"] = {
        "seconds": time.perf_counter() - start,
        "runs": len(runs),
        "exact": sum(run["exact"] for run in runs),
        "exact_with_own_addresses": sum(run["exact_with_own_addresses"] for run in runs),
        **{
            f"{purpose.replace(' ', '_')}_as_predicted": sum(
                run["cap"]["as_predicted"] for run in runs if run["run"]["purpose"] == purpose
            )
            for purpose in ("steady", "steady less", "smallest", "smallest less")
        },
    }
    _results.write("allocator_gpu", figures)
    print(json.dumps(figures["summary"], indent=2), file=sys.stderr)


def _keep(histories: dict[str, Path]) -> None:
    """All histories in one file, smaller ones first, as long as they stay under 4 MiB together."""
    folder = Path(os.environ.get("OUT", _results.RESULTS))
    folder.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Any] = {}
    size = 0
    # Runs without a cap and under the steady one say most.
    order = sorted(histories, key=lambda name: (not name.endswith(("free", "steady")), histories[name].stat().st_size))
    for name in order:
        size += histories[name].stat().st_size
        if size > 4 * 2**20:
            break
        with np.load(histories[name]) as arrays:
            kept.update({f"{name}/{key}": arrays[key] for key in arrays.files})
    np.savez_compressed(folder / "allocator_histories.npz", **kept)


if __name__ == "__main__":
    main()
