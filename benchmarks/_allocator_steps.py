"""Training steps whose allocator history is recorded on a GPU, and single operations whose hidden memory is.

Run by allocator_gpu.py, each in a process of its own: the history must begin with an empty allocator.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samegrad.measure.recorded_history import HistoryEntry, read_history

STEPS = 5
ACTIONS = ("alloc", "free_completed", "oom", "segment_alloc", "segment_free", "segment_map", "segment_unmap")
MAX_ENTRIES = 1_000_000

Batch = tuple[Tensor, Tensor]


class Residual(nn.Module):
    def __init__(self, channels: int, *, stride: int = 1) -> None:
        super().__init__()
        out = channels * stride
        self.body = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU(),
            nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out),
        )  # fmt: skip
        self.short = nn.Identity() if stride == 1 else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.short(x))


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU())
        self.body = nn.Sequential(
            Residual(64), Residual(64), Residual(64, stride=2), Residual(128), Residual(128, stride=2), Residual(256)
        )
        self.head = nn.Linear(256, 100)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(F.max_pool2d(self.stem(x), 3, 2, 1)).mean((2, 3)))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8192, 512)
        layer = nn.TransformerEncoderLayer(512, 8, 2048, dropout=0.1, batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, 6, enable_nested_tensor=False)
        self.head = nn.Linear(512, 8192, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embed(tokens))).flatten(0, 1)


class Series(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LSTM(96, 384, num_layers=2, batch_first=True, dropout=0.1)
        self.head = nn.Linear(384, 100)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


def dense() -> nn.Module:
    layers: list[nn.Module] = []
    for width_in, width_out in ((784, 4096), (4096, 3000), (3000, 2100), (2100, 1024)):
        layers += [nn.Linear(width_in, width_out), nn.ReLU(), nn.Dropout(0.1)]
    return nn.Sequential(*layers, nn.Linear(1024, 100))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "dense": dense, "pictures": Pictures, "words": Words, "series": Series,
}  # fmt: skip


def make_batch(model: str, turn: int) -> Batch:
    generator = torch.Generator().manual_seed(turn)
    if model == "words":
        tokens = torch.randint(8192, (16, 257), generator=generator)
        return tokens[:, :-1].cuda(), tokens[:, 1:].flatten().cuda()
    shape = {"dense": (4099, 784), "pictures": (45, 3, 160, 160), "series": (67, 131, 96)}[model]
    x = torch.randn(shape, generator=generator)
    return x.cuda(), torch.randint(100, shape[:1], generator=generator).cuda()


def make_optimizer(model: str, parameters: Any) -> torch.optim.Optimizer:
    if model == "pictures":
        return torch.optim.SGD(parameters, lr=0.01, momentum=0.9)
    return torch.optim.AdamW(parameters, lr=1e-4)


def record_step(model_name: str, *, precision: str, cap_bytes: int | None) -> dict[str, Any]:
    """Runs STEPS steps from an empty allocator and returns its history and counters."""
    total_bytes = start_recording(cap_bytes)
    torch.manual_seed(0)
    model = MODELS[model_name]().cuda()
    optimizer = make_optimizer(model_name, model.parameters())
    starts, retries, peaks = [], [], []
    failed = ""
    try:
        for turn in range(STEPS):
            counts = torch.cuda.memory_stats()
            starts.append(counts["allocation.all.allocated"])
            x, target = make_batch(model_name, turn)
            with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
                loss = F.cross_entropy(model(x), target)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            counts = torch.cuda.memory_stats()
            retries.append(counts.get("num_alloc_retries", 0))
            peaks.append(counts["reserved_bytes.all.peak"])
    except torch.OutOfMemoryError as error:
        failed = str(error).splitlines()[0]
    counts = torch.cuda.memory_stats()
    history = read_history(torch.cuda.memory._snapshot()["device_traces"][0])
    return {
        "history": history,
        "step_starts": starts,
        "retries_after_step": retries,
        "reserved_peak_after_step": peaks,
        "out_of_memory": failed,
        "cap_bytes": cap_bytes,
        "device_bytes": total_bytes,
        "peak_allocated_bytes": counts["allocated_bytes.all.peak"],
        "peak_requested_bytes": counts["requested_bytes.all.peak"],
        "peak_reserved_bytes": counts["reserved_bytes.all.peak"],
        "retries": counts.get("num_alloc_retries", 0),
    }


def start_recording(cap_bytes: int | None) -> int:
    """Turns the history on before the first allocation; returns the device's bytes."""
    torch.cuda.init()
    torch.cuda.memory._record_memory_history(enabled="all", context=None, max_entries=MAX_ENTRIES)
    total_bytes = torch.cuda.mem_get_info()[1]
    if cap_bytes is not None:
        # One byte more than asked: a quotient that falls short would cap a whole segment lower.
        torch.cuda.set_per_process_memory_fraction((cap_bytes + 1) / total_bytes)
    if torch.cuda.memory_reserved():
        sys.exit("the allocator is not empty before the first step; nothing can be compared")
    return total_bytes


def hidden_memory() -> dict[str, Any]:
    """What single operations take besides their results: given back within the operation, and kept after it."""
    before_context = torch.cuda.mem_get_info()
    start_recording(None)
    figures: dict[str, Any] = {
        "device_used_before_bytes": before_context[1] - before_context[0],
        "cudnn": torch.backends.cudnn.version(),
        "capability": torch.cuda.get_device_capability(),
        "operations": {},
    }
    recorder = _Recorder()
    for name, make in _operations().items():
        try:
            figures["operations"][name] = recorder.run(make)
        except (RuntimeError, NotImplementedError) as error:
            figures["operations"][name] = {"failed": str(error).splitlines()[0]}
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    figures["device_used_after_bytes"] = total - free
    figures["reserved_after_bytes"] = torch.cuda.memory_reserved()
    figures["threads"] = threading.active_count()
    return figures


class _Recorder:
    def __init__(self) -> None:
        self.seen = 0

    def run(self, make: Callable[[], tuple[Tensor, list[Tensor]]]) -> dict[str, Any]:
        """Runs a forward and its backward; ``make`` returns a function's result and its leaves."""
        function, leaves = make()
        self._new()
        output = function()
        forward = self._hidden([output])
        grad = torch.ones_like(output)
        self._new()
        found = torch.autograd.grad(output, leaves, grad)
        backward = self._hidden(found)
        return {"forward": forward, "backward": backward}

    def _new(self) -> list[HistoryEntry]:
        torch.cuda.synchronize()
        entries = torch.cuda.memory._snapshot()["device_traces"][0]
        fresh = entries[self.seen :]
        self.seen = len(entries)
        kept = [e for e in fresh if e["action"] in ACTIONS]
        return list(read_history(kept)) if kept else []

    def _hidden(self, results: Any) -> dict[str, Any]:
        """Largest bytes held at once besides the results, and what stays that is no result."""
        places = {t.untyped_storage().data_ptr() for t in results}
        live: dict[int, int] = {}
        temporary, largest = [], 0
        for entry in self._new():
            if entry.action == "alloc":
                live[entry.address] = entry.size_bytes
            elif entry.action == "free_completed" and (size := live.pop(entry.address, None)) is not None:
                temporary.append(size)
            largest = max(largest, sum(size for place, size in live.items() if place not in places))
        kept = [size for place, size in live.items() if place not in places]
        return {"temporary": temporary, "kept": kept, "largest_held_bytes": largest}


def _operations() -> dict[str, Callable[[], Any]]:
    """Name to a function that makes (a forward to run, the tensors to differentiate by)."""
    made: dict[str, Callable[[], Any]] = {}

    def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)

    def add(name: str, function: Callable[..., Tensor], *shapes: tuple[int, ...], dtype: torch.dtype) -> None:
        def make() -> Any:
            leaves = [leaf(*shape, dtype=dtype) for shape in shapes]
            return (lambda: function(*leaves)), leaves

        made[f"{name} {str(dtype).removeprefix('torch.')} {' '.join(str(s) for s in shapes)}"] = make

    single, half = torch.float32, torch.bfloat16
    for dtype in (single, half):
        add("mm", torch.mm, (1031, 515), (515, 771), dtype=dtype)
        add("linear", lambda x, w, b: F.linear(x, w, b), (1024, 512), (768, 512), (768,), dtype=dtype)
        add("linear again", lambda x, w, b: F.linear(x, w, b), (1024, 512), (768, 512), (768,), dtype=dtype)
        add("bmm", torch.bmm, (16, 128, 64), (16, 64, 128), dtype=dtype)
        add(
            "attention", lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
            *[(4, 8, 512, 64)] * 3, dtype=dtype,
        )  # fmt: skip
        add("layer_norm", lambda x, w, b: F.layer_norm(x, (512,), w, b), (64, 128, 512), (512,), (512,), dtype=dtype)
        add("group_norm", lambda x, w, b: F.group_norm(x, 8, w, b), (16, 64, 56, 56), (64,), (64,), dtype=dtype)
        add(
            "batch_norm", lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
            (16, 64, 56, 56), (64,), (64,), dtype=dtype,
        )  # fmt: skip
        for channels_last in (False, True):
            for shape in _CONVOLUTIONS:
                _add_convolution(made, *shape, dtype=dtype, channels_last=channels_last)
    tokens = torch.randint(8192, (16, 256), device="cuda")
    targets = torch.randint(8192, (4096,), device="cuda")
    add("embedding", lambda w: F.embedding(tokens, w), (8192, 512), dtype=single)
    add("cross_entropy", lambda x: F.cross_entropy(x, targets), (4096, 8192), dtype=single)
    add("gather rows", lambda x: x[targets % 4096], (4096, 512), dtype=single)
    for shape in ((8192, 4096), (4096, 3072), (4096, 1001), (1024, 768), (100, 768)):
        for dtype in (single, half):
            add("sum of rows", lambda x: x.sum(0), shape, dtype=dtype)
    for kind, layers, both_ways in (
        (nn.LSTM, 1, False), (nn.LSTM, 2, False), (nn.LSTM, 3, False), (nn.LSTM, 2, True), (nn.GRU, 2, False),
    ):  # fmt: skip
        _add_recurrence(made, kind, layers, both_ways)
    return made


def _add_recurrence(
    made: dict[str, Callable[[], Any]], kind: type[nn.LSTM] | type[nn.GRU], layers: int, both_ways: bool
) -> None:
    def make() -> Any:
        module = kind(128, 512, layers, batch_first=True, bidirectional=both_ways).cuda()
        x = torch.randn(48, 96, 128, device="cuda", requires_grad=True)
        return (lambda: module(x)[0]), [x, *module.parameters()]

    made[f"recurrence {kind.__name__} float32 n48 t96 i128 h512 l{layers} d{1 + both_ways}"] = make


# Rows, channels in, height, channels out, kernel, stride, groups: a residual network, a patch embedding, a depthwise.
_CONVOLUTIONS = (
    (32, 3, 224, 64, 7, 2, 1), (105, 3, 224, 64, 7, 2, 1), (32, 64, 56, 64, 3, 1, 1), (105, 64, 56, 64, 3, 1, 1),
    (8, 64, 56, 64, 3, 1, 1), (32, 64, 56, 128, 3, 2, 1), (32, 128, 28, 128, 3, 1, 1), (105, 128, 28, 128, 3, 1, 1),
    (32, 256, 14, 256, 3, 1, 1), (105, 256, 14, 256, 3, 1, 1), (105, 256, 14, 512, 3, 2, 1),
    (32, 512, 7, 512, 3, 1, 1), (105, 512, 7, 512, 3, 1, 1), (105, 64, 56, 128, 1, 2, 1), (32, 64, 56, 256, 1, 1, 1),
    (32, 256, 56, 64, 1, 1, 1), (32, 1024, 14, 256, 1, 1, 1), (32, 3, 224, 768, 16, 16, 1),
    (32, 96, 56, 96, 7, 1, 96), (16, 64, 128, 64, 3, 1, 1), (16, 128, 64, 128, 3, 1, 1), (32, 64, 56, 64, 5, 1, 1),
)  # fmt: skip


def _add_convolution(
    made: dict[str, Callable[[], Any]], rows: int, channels: int, height: int, out: int, kernel: int, stride: int,
    groups: int, *, dtype: torch.dtype, channels_last: bool,
) -> None:  # fmt: skip
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def make() -> Any:
        x = torch.randn(rows, channels, height, height, device="cuda", dtype=dtype).to(memory_format=layout)
        w = torch.randn(out, channels // groups, kernel, kernel, device="cuda", dtype=dtype).to(memory_format=layout)
        leaves = [x.requires_grad_(), w.requires_grad_()]
        padding = 0 if stride == kernel else kernel // 2
        return (lambda: F.conv2d(x, w, None, stride, padding, 1, groups)), leaves

    name = f"convolution {str(dtype).removeprefix('torch.')} {'channels_last' if channels_last else 'contiguous'}"
    made[f"{name} n{rows} c{channels} h{height} o{out} k{kernel} s{stride} g{groups}"] = make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=[*MODELS, "hidden"])
    parser.add_argument("output", type=Path)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--cap_bytes", type=int)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device; this records a real allocator")
    if options.what == "hidden":
        options.output.write_text(json.dumps(hidden_memory()))
        return
    recorded = record_step(options.what, precision=options.precision, cap_bytes=options.cap_bytes)
    history = recorded.pop("history")
    arrays = {
        "actions": np.array([ACTIONS.index(entry.action) for entry in history], np.uint8),
        "addresses": np.array([entry.address for entry in history], np.uint64),
        "sizes": np.array([entry.size_bytes for entry in history], np.uint64),
        "streams": np.array([entry.stream for entry in history], np.uint8),
        "facts": np.frombuffer(json.dumps(recorded).encode(), np.uint8),
    }
    np.savez_compressed(options.output, **arrays)


if __name__ == "__main__":
    main()
