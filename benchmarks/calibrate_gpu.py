"""What torch reaches on the card at hand, as a calibration file for ``samegrad/measure/calibration/``.

    python benchmarks/calibrate_gpu.py            writes calibrate_gpu.json and <card>.json beside it, in under 90 s

Each probe is work of one kind; its arithmetic and bytes are counted as a trace counts them, so that a fraction found
here means the same there. ``--device cpu --divide 64`` runs all of it small, to see that it runs; its figures say
nothing.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import _results
import torch
import torch.nn.functional as F
from _calibration_probes import Place, arithmetic_probes, bandwidth_probes
from _counted_steps import Blocks, Counter

from samegrad.measure.cards import Card
from samegrad.measure.devices import PRIOR, Calibration, find_card
from samegrad.measure.events import Operation
from samegrad.measure.operation_classes import OperationClass, class_of
from samegrad.records import Origin

# Long enough that a probe's clock settles, short enough for all probes in half a minute.
PROBE_SECONDS = 0.15
DTYPES = {"float64": torch.float64, "float32": torch.float32, "tf32": torch.float32, "float16": torch.float16,
          "bfloat16": torch.bfloat16}  # fmt: skip


class Found(NamedTuple):
    """What the operations of one kind in a probe did, and how long all of the probe took."""

    seconds: float
    flops: int
    moved_bytes: int
    operations: list[Operation]


@contextmanager
def tf32_allowed(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_seconds(run: Callable[[], object], device: torch.device) -> float:
    """Of one ``run`` among many queued ones."""
    run()
    run()
    wait(device)
    begin = time.perf_counter()
    run()
    wait(device)
    once = time.perf_counter() - begin
    repeats = min(max(math.ceil(PROBE_SECONDS / max(once, 1e-6)), 3), 1000)
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    wait(device)
    return (time.perf_counter() - begin) / repeats


def find(run: Callable[[], object], kind: OperationClass, device: torch.device) -> Found:
    run()
    with Counter() as counter:
        run()
    own = [operation for operation in counter.operations if class_of(operation.name) is kind]
    flops, moved_bytes = sum(o.flops for o in own), sum(o.moved_bytes for o in own)
    return Found(device_seconds(run, device), flops, moved_bytes, counter.operations)


def fractions_of_peak(place: Place, card: Card) -> dict[str, dict[OperationClass, float]]:
    fractions: dict[str, dict[OperationClass, float]] = {}
    for name, dtype in DTYPES.items():
        if name not in card.flops_per_second:
            continue
        with tf32_allowed(name == "tf32"):
            fractions[name] = {}
            for kind, runs in arithmetic_probes(place, dtype).items():
                found = [find(run, kind, place.device) for run in runs]
                if found and (flops := sum(f.flops for f in found)):
                    rate = flops / sum(f.seconds for f in found)
                    fractions[name][kind] = round(rate / card.flops_per_second[name], 4)
    # Dtypes that have no unit of their own on this card run at float32's rate.
    return {"any": fractions["float32"], **fractions}


def fractions_of_bandwidth(place: Place, card: Card) -> tuple[dict[OperationClass, float], dict[str, Any]]:
    dtype = torch.bfloat16 if "bfloat16" in card.flops_per_second else torch.float32
    fractions, each = {**PRIOR.bandwidth_fractions}, {}
    for kind, runs in bandwidth_probes(place, dtype).items():
        found = [find(run, kind, place.device) for run in runs]
        own = [f.moved_bytes / f.seconds / card.bandwidth_bytes_per_second for f in found]
        each[kind.value] = [round(fraction, 4) for fraction in own]
        fractions[kind] = round(sum(f.moved_bytes for f in found) / sum(f.seconds for f in found)
                                / card.bandwidth_bytes_per_second, 4)  # fmt: skip
    return fractions, each


def host_times(place: Place) -> dict[str, float]:
    """Of the host alone: views, a bare launch, and what training adds for each operation that computes."""
    tiny, out = place.tensor(8), place.tensor(8)
    repeats = max(4000 // place.divide, 10)

    def each(run: Callable[[], object]) -> float:
        wait(place.device)
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - begin) / repeats

    with torch.no_grad():
        times = {"view_seconds": each(lambda: tiny.view(2, 4)),
                 "launch_seconds": each(lambda: torch.add(tiny, tiny, out=out))}  # fmt: skip
    # As many operations as a transformer has, and next to nothing for the device to do.
    with place.device:
        model = Blocks(torch.float16, causal=True, width=96)
    x = place.tensor(1, 16, 96)
    found = find(lambda: model(x).sum().backward(), OperationClass.MATMUL, place.device)
    computing = [operation for operation in found.operations if operation.kernels]
    views = len(found.operations) - len(computing)
    rest = found.seconds - views * times["view_seconds"]
    rest -= times["launch_seconds"] * sum(operation.kernels for operation in computing)
    return times | {"dispatch_seconds": max(rest, 0.0) / len(computing)}


def kernel_seconds(place: Place) -> float:
    """What the smallest kernel takes when a graph launches it."""
    if place.device.type != "cuda":
        return PRIOR.kernel_seconds
    tiny = place.tensor(1024)
    tiny.mul_(1.0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(500):
            tiny.mul_(1.0)
    return device_seconds(graph.replay, place.device) / 500


def copies(place: Place) -> dict[str, float]:
    """Bytes a second from host to device."""
    on_device = torch.empty(256 * 2**20 // place.divide, dtype=torch.uint8, device=place.device)
    pageable = torch.zeros(on_device.shape, dtype=torch.uint8)
    hosts = {"pageable_bytes_per_second": pageable}
    if place.device.type == "cuda":
        hosts["pinned_bytes_per_second"] = pageable.pin_memory()
    found = {}
    for name, host in hosts.items():
        copy = lambda host=host: on_device.copy_(host, non_blocking=True)
        found[name] = on_device.nbytes / device_seconds(copy, place.device)
        back = lambda host=host: host.copy_(on_device, non_blocking=True)
        found[f"back_{name}"] = on_device.nbytes / device_seconds(back, place.device)
    return found


def driver_used_bytes(device: torch.device) -> int | None:
    """What the driver says is taken on the card, by all; None where it cannot be asked."""
    if device.type != "cuda":
        return None
    line = ["nvidia-smi", f"--id={device.index or 0}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        return int(subprocess.run(line, capture_output=True, text=True, check=True).stdout) * 2**20
    except (OSError, subprocess.CalledProcessError, ValueError):
        return None


def workspaces(place: Place) -> dict[str, int]:
    """Bytes that the first product and the first product with a bias leave allocated."""
    if place.device.type != "cuda":
        return {}
    x, weight, bias = (place.tensor(*shape, dtype=torch.float16) for shape in ((512, 512), (512, 512), (512,)))
    out, found = torch.empty_like(x), {}
    for library, run in (("cublas", lambda: torch.mm(x, weight, out=out)),
                         ("cublaslt", lambda: out.copy_(F.linear(x, weight, bias)))):  # fmt: skip
        before = torch.cuda.memory_allocated()
        run()
        wait(place.device)
        found[library] = torch.cuda.memory_allocated() - before
    return found


def calibrate(place: Place) -> tuple[Calibration, dict[str, Any]]:
    """The calibration and what else was seen. The context is measured first: it is made once a process."""
    before = driver_used_bytes(place.device)
    torch.zeros(1, device=place.device)
    wait(place.device)
    after = driver_used_bytes(place.device)
    on_card = place.device.type == "cuda"
    context_bytes = None
    if before is not None and after is not None:
        context_bytes = after - before - torch.cuda.memory_reserved()
    library_bytes = workspaces(place)
    total_bytes = torch.cuda.get_device_properties(place.device).total_memory if on_card else None
    name = torch.cuda.get_device_name(place.device) if on_card else "T4"
    card = find_card(name, memory_bytes=total_bytes)
    bandwidth_fractions, each = fractions_of_bandwidth(place, card)
    copied = copies(place)
    calibration = Calibration(
        card=card.name,
        origin=Origin.MEASURED,
        source="benchmarks/calibrate_gpu.py, each kind of operation timed alone",
        torch_version=torch.__version__,
        cudnn_version=str(torch.backends.cudnn.version() or ""),
        flops_fractions=fractions_of_peak(place, card),
        bandwidth_fractions=bandwidth_fractions,
        kernel_seconds=kernel_seconds(place),
        library_workspace_bytes=library_bytes,
        context_bytes=context_bytes,
        pinned_bytes_per_second=copied.get("pinned_bytes_per_second"),
        pageable_bytes_per_second=copied["pageable_bytes_per_second"],
        **host_times(place),
    )
    return calibration, {"total_memory_bytes": total_bytes, "copies": copied, "fractions_of_bandwidth_each": each}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--divide", type=int, default=1)
    arguments = parser.parse_args()
    begin = time.perf_counter()
    calibration, seen = calibrate(Place(torch.device(arguments.device), arguments.divide))
    figures = {"calibration": calibration.to_dict(), **seen}
    _results.write("calibrate_gpu", figures | {"seconds": round(time.perf_counter() - begin, 1)})
    if arguments.device == "cpu":
        return
    folder = Path(os.environ.get("OUT", _results.RESULTS))
    (folder / f"{calibration.card.lower().replace(' ', '_')}.json").write_text(calibration.to_json())


if __name__ == "__main__":
    main()
