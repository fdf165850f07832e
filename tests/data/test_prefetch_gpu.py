"""On a CUDA device: the chunks are the slices, and copying hides behind computing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import samegrad as sg
from samegrad import trees
from samegrad.data.prefetch import Prefetcher, stream_chunks
from samegrad.data.rows import Rows

pytestmark = pytest.mark.gpu

ROWS, WIDTH = 5000, 257


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ROWS, WIDTH), dtype=np.float32)


SOURCES: dict[str, Callable[[np.ndarray, Path], Any]] = {
    "tensor": lambda values, path: torch.from_numpy(values),
    "pinned tensor": lambda values, path: torch.from_numpy(values).pin_memory(),
    "tensor on the device": lambda values, path: torch.from_numpy(values).cuda(),
    "rows in memory": lambda values, path: Rows(values),
    "mapped rows": lambda values, path: _saved(values, path),
    "two files": lambda values, path: Rows([values[:17], torch.from_numpy(values[17:].copy())]),
}


def _saved(values: np.ndarray, path: Path) -> Rows:
    np.save(path / "x.npy", values)
    return sg.open_rows(path / "x.npy")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("sizes", [[1250] * 4, [1999, 1999, 1002], [ROWS], [1] * 40 + [ROWS - 40]], ids=str)
def test_chunks_on_the_device_are_the_slices(source: str, sizes: list[int], values: np.ndarray, tmp_path: Path) -> None:
    batch = {"x": SOURCES[source](values, tmp_path), "w": torch.arange(3.0), "t": torch.arange(ROWS)}
    want, start = torch.from_numpy(values), 0
    for chunk in stream_chunks(batch, trees.find_rows(batch), sizes, "cuda"):
        stop = start + len(chunk["t"])
        assert {leaf.device.type for leaf in chunk.values()} == {"cuda"}
        assert torch.equal(chunk["x"].cpu(), want[start:stop])
        assert chunk["t"].tolist() == list(range(start, stop))
        start = stop
        del chunk
    assert start == ROWS


def test_shuffled_epochs_arrive_in_their_order(values: np.ndarray, tmp_path: Path) -> None:
    rows = _saved(values, tmp_path)
    with Prefetcher("cuda") as prefetcher:
        for epoch in range(3):
            shuffled = rows.shuffled(seed=1, epoch=epoch)
            layout = trees.find_rows(shuffled)
            got = [chunk.cpu() for chunk in prefetcher.stream(shuffled, layout, trees.even_sizes(ROWS, 900))]
            assert torch.equal(torch.cat(got), shuffled.read(0, ROWS))


def test_slow_kernels_still_read_their_own_chunk(values: np.ndarray) -> None:
    """The host runs ahead of the device; a place must not be overwritten under a kernel that waits its turn."""
    rows = Rows(values)
    sums = []
    for chunk in stream_chunks(rows, trees.find_rows(rows), [100] * 50, "cuda"):
        torch.cuda._sleep(3_000_000)
        sums.append(chunk.double().sum(1))
        del chunk
    torch.testing.assert_close(torch.cat(sums).cpu(), torch.from_numpy(values).double().sum(1), rtol=1e-12, atol=1e-9)


def test_the_consumer_may_work_on_a_stream_of_its_own(values: np.ndarray) -> None:
    rows, mine = Rows(values), torch.cuda.Stream()
    sums = []
    with torch.cuda.stream(mine):
        for chunk in stream_chunks(rows, trees.find_rows(rows), [100] * 50, "cuda"):
            torch.cuda._sleep(1_000_000)
            sums.append(chunk.double().sum(1))
            del chunk
    mine.synchronize()
    torch.testing.assert_close(torch.cat(sums).cpu(), torch.from_numpy(values).double().sum(1), rtol=1e-12, atol=1e-9)


def test_the_device_holds_two_partitions(values: np.ndarray) -> None:
    rows = Rows(values)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with Prefetcher("cuda") as prefetcher:
        for chunk in prefetcher.stream(rows, trees.find_rows(rows), [500] * 10):
            torch.cuda._sleep(1_000_000)
            del chunk
        held = prefetcher.device_bytes
        assert held == 2 * 500 * WIDTH * 4
        assert prefetcher.pinned_bytes >= held
    assert torch.cuda.max_memory_allocated() - before <= held + 2 * 512
    assert torch.cuda.memory_allocated() == before


def test_a_pinned_batch_may_be_overwritten_once_the_last_chunk_is_out(values: np.ndarray) -> None:
    pinned = torch.from_numpy(values).pin_memory()
    sums = []
    for chunk in stream_chunks(pinned, trees.find_rows(pinned), [1000] * 5, "cuda"):
        torch.cuda._sleep(20_000_000)
        sums.append(chunk.double().sum(1))
        del chunk
    pinned.fill_(0)
    torch.testing.assert_close(torch.cat(sums).cpu(), torch.from_numpy(values).double().sum(1), rtol=1e-12, atol=1e-9)


def test_a_graph_is_captured_while_the_reader_works(values: np.ndarray) -> None:
    rows, static = Rows(values), torch.empty(500, WIDTH, device="cuda")
    graph, total = None, torch.zeros((), device="cuda", dtype=torch.float64)
    for chunk in stream_chunks(rows, trees.find_rows(rows), [500] * 10, "cuda"):
        static.copy_(chunk)
        del chunk
        if graph is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                total += static.double().sum()
        graph.replay()
    torch.testing.assert_close(total.cpu(), torch.from_numpy(values).double().sum(), rtol=1e-9, atol=1e-6)


def test_a_stopped_consumer_leaves_a_prefetcher_that_works(values: np.ndarray) -> None:
    rows = Rows(values)
    with Prefetcher("cuda") as prefetcher:
        for _ in range(5):
            for _chunk in prefetcher.stream(rows, trees.find_rows(rows), [50] * 100):
                break
        del _chunk
        got = [chunk.cpu() for chunk in prefetcher.stream(rows, trees.find_rows(rows), [2500, 2500])]
    assert torch.equal(torch.cat(got), torch.from_numpy(values))


def _synchronous(rows: Rows, sizes: list[int]) -> Iterator[torch.Tensor]:
    start = 0
    for size in sizes:
        yield rows.read(start, start + size).cuda()
        start += size


def test_copying_hides_behind_computing(tmp_path: Path) -> None:
    """One epoch of a full-batch autoencoder step over rows on disk, against read, copy, compute in turn."""
    count, width = 60_000, 2304
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((count, width), dtype=np.float32))
    rows = sg.open_rows(tmp_path / "x.npy").shuffled(seed=0, epoch=0)
    layout, sizes = trees.find_rows(rows), trees.even_sizes(count, 5000)
    weights = [torch.randn(width, width, device="cuda") / 48 for _ in range(8)]

    def compute(chunk: torch.Tensor) -> torch.Tensor:
        for weight in weights:
            chunk = torch.relu(chunk @ weight)
        return chunk.square().sum()

    def timed(chunks: Callable[[], Iterator[torch.Tensor]]) -> tuple[float, float]:
        best, total = float("inf"), 0.0
        for _ in range(3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            parts = [compute(chunk) for chunk in chunks()]
            total = float(torch.stack(parts).double().sum())
            best = min(best, time.perf_counter() - start)
        return best, total

    on_device = [rows.read(0, 5000).cuda(), rows.read(5000, 10_000).cuda()] * 6
    compute_seconds, _ = timed(lambda: iter(on_device))
    in_turn_seconds, in_turn = timed(lambda: _synchronous(rows, sizes))
    with Prefetcher("cuda") as prefetcher:
        ahead_seconds, ahead = timed(lambda: prefetcher.stream(rows, layout, sizes))
    data_bytes = count * rows.row_bytes
    print(
        f"\n{data_bytes / 2**20:.0f} MiB in {len(sizes)} chunks: compute alone {compute_seconds * 1e3:.1f} ms, "
        f"in turn {in_turn_seconds * 1e3:.1f} ms, ahead {ahead_seconds * 1e3:.1f} ms "
        f"({data_bytes / ahead_seconds / 1e9:.1f} GB/s)"
    )
    assert ahead == in_turn
    assert ahead_seconds < in_turn_seconds
