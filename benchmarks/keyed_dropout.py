"""Time of keyed dropout against torch's own, forward and backward, in pairs; and of a keyed normal draw.

As in a chunk of a model: one keyed block with several dropouts, one after the other.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import _results
import torch
import torch.nn.functional as F
from torch import Tensor

from samegrad.exact.randomness import LeadingRows, keyed

SHAPES = {"cpu": [(64, 256), (1024, 1024), (4096, 1024)], "cuda": [(1024, 1024), (8192, 4096), (32, 1024, 4096)]}
DTYPES = {"cpu": [torch.float32], "cuda": [torch.float32, torch.bfloat16]}
DROP = 0.1
DROPOUTS = 4


def seconds_of(run: Callable[[], object], device: str, repeats: int) -> float:
    """Of one ``run``, when ``repeats`` of them are queued one after the other."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000 / repeats
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats


def paired(
    ours: Callable[[], object], theirs: Callable[[], object], device: str, pairs: int, draws: int
) -> dict[str, float]:
    """Median of ours / theirs, pair by pair, so that a machine that drifts cancels out; seconds are of one draw."""
    repeats = 8 if device == "cuda" else 1
    for run in (ours, theirs, ours, theirs):
        seconds_of(run, device, 1)
    times: dict[Callable[[], object], list[float]] = {ours: [], theirs: []}
    for turn in range(pairs):
        for run in (ours, theirs) if turn % 2 else (theirs, ours):
            times[run].append(seconds_of(run, device, repeats))
    return {
        "median_ratio": statistics.median(a / b for a, b in zip(times[ours], times[theirs])),
        "ours_seconds": statistics.median(times[ours]) / draws,
        "torch_seconds": statistics.median(times[theirs]) / draws,
        "pairs": pairs,
    }


def graphed(run: Callable[[], object]) -> Callable[[], None]:
    """``run`` captured: what is left is the device's own time."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def dropouts(x: Tensor, cotangent: Tensor) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """Ours and torch's: ``DROPOUTS`` in forward as training runs them, and forward with backward."""
    key = torch.zeros((), dtype=torch.int64, device=x.device)
    ids = torch.arange(len(x), device=x.device)

    def theirs() -> Tensor:
        y = x
        for _ in range(DROPOUTS):
            y = F.dropout(y, DROP)
        return y

    def ours() -> Tensor:
        with keyed(key, ids, sites=LeadingRows()):
            return theirs()

    def both(run: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(run(), x, cotangent)

    return {"forward": (ours, theirs), "forward_and_backward": (both(ours), both(theirs))}


def normals(x: Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    key = torch.zeros((), dtype=torch.int64, device=x.device)
    ids = torch.arange(len(x), device=x.device)

    def ours() -> Tensor:
        with keyed(key, ids, sites=LeadingRows()):
            return torch.randn_like(x)

    return ours, lambda: torch.randn_like(x)


def host_seconds(run: Callable[[], object], device: str, repeats: int = 200) -> float:
    """Of the host alone: the device is waited for before, and is given little to do."""
    for _ in range(repeats):
        run()
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    return (time.perf_counter() - begin) / repeats


def host_times(device: str) -> dict[str, dict[str, float]]:
    x = torch.randn(8, 16, device=device, requires_grad=True)
    return {
        f"host {name} 8x16": {
            f"{who}_seconds": host_seconds(run, device) / DROPOUTS for who, run in zip(("ours", "torch"), both)
        }
        for name, both in dropouts(x, torch.randn_like(x)).items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=21)
    pairs = parser.parse_args().pairs
    device = "cuda" if torch.cuda.is_available() else "cpu"
    figures: dict[str, object] = {"drop": DROP, "dropouts": DROPOUTS}
    for dtype in DTYPES[device]:
        for shape in SHAPES[device]:
            x = torch.randn(shape, dtype=dtype, device=device, requires_grad=True)
            for name, (ours, theirs) in dropouts(x, torch.randn_like(x)).items():
                label = f"{name} {'x'.join(map(str, shape))} {dtype}".replace("torch.", "")
                figures[label] = paired(ours, theirs, device, pairs, DROPOUTS)
                if device == "cuda":
                    figures[f"{label} graphed"] = paired(graphed(ours), graphed(theirs), device, pairs, DROPOUTS)
    for shape in [(1024, 1024), (8192, 4096)] if device == "cuda" else [(1024, 1024)]:
        ours, theirs = normals(torch.empty(shape, device=device))
        label = f"randn_like {'x'.join(map(str, shape))}"
        figures[label] = paired(ours, theirs, device, max(pairs // 4, 3), 1)
        if device == "cuda":
            figures[f"{label} graphed"] = paired(graphed(ours), graphed(theirs), device, pairs, 1)
    figures.update(host_times(device))
    _results.write(f"keyed_dropout_{device}", figures)


if __name__ == "__main__":
    main()
