"""Chunks arrive in order, whole and once, whatever happens to the reader or the consumer."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import samegrad as sg
from samegrad import trees
from samegrad.data.places import TwoPlaces
from samegrad.data.prefetch import Prefetcher, stream_chunks
from samegrad.data.rows import Rows


class Batch(NamedTuple):
    inputs: dict[str, Any]
    scale: Tensor


class WatchedRows:
    """Rows that count the reads, remember the threads and the memory handed out, and can fail or take their time."""

    def __init__(self, values: Tensor, *, fail_at: int | None = None, seconds: float = 0) -> None:
        self.values, self.fail_at, self.seconds = values, fail_at, seconds
        self.reads: list[tuple[int, int]] = []
        self.finished = 0
        self.threads: set[int] = set()
        self.alive: list[weakref.ref[Tensor]] = []
        self.most_alive = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def __len__(self) -> int:
        return len(self.values)

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        self.reads.append((start, stop))
        self.threads.add(threading.get_ident())
        time.sleep(self.seconds)
        self.finished += 1
        if len(self.reads) - 1 == self.fail_at:
            raise ConnectionResetError(104, f"the disk went away at row {start}")
        if out is not None:
            return out.copy_(self.values[start:stop])
        rows = self.values[start:stop].clone()
        self.alive.append(weakref.ref(rows))
        self.most_alive = max(self.most_alive, sum(ref() is not None for ref in self.alive))
        return rows


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("samegrad-rows")]


def values(rows: int = 10, width: int = 3) -> Tensor:
    return torch.arange(rows * width, dtype=torch.float32).view(rows, width)


def spans_of(sizes: list[int]) -> list[tuple[int, int]]:
    stops = np.cumsum(sizes).tolist()
    return list(zip([0, *stops[:-1]], stops))


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=6), data=st.data())
def test_any_sizes_give_the_slices_of_the_batch(sizes: list[int], data: st.DataObject) -> None:
    rows = sum(sizes)
    order = data.draw(st.permutations(range(rows)))
    host = Rows(values(rows)).subset(order)
    batch = Batch({"x": host, "mask": torch.rand(rows, 2), "name": "b"}, scale=torch.tensor(2.0))
    chunks = list(stream_chunks(batch, trees.find_rows(batch), sizes, "cpu"))
    assert len(chunks) == len(sizes)
    for chunk, (start, stop) in zip(chunks, spans_of(sizes)):
        assert isinstance(chunk, Batch)
        assert torch.equal(chunk.inputs["x"], values(rows)[order[start:stop]])
        assert torch.equal(chunk.inputs["mask"], batch.inputs["mask"][start:stop])
        assert chunk.inputs["name"] == "b"
        assert chunk.scale is batch.scale


def test_rows_on_another_axis_are_cut_there() -> None:
    batch = (torch.rand(4, 6), torch.rand(6))
    layout = trees.find_rows(batch, (1, 0))
    chunks = list(stream_chunks(batch, layout, [4, 2], "cpu"))
    assert torch.equal(torch.cat([x for x, _ in chunks], dim=1), batch[0])
    assert torch.equal(torch.cat([y for _, y in chunks]), batch[1])


def test_on_the_cpu_tensors_are_views_and_nothing_is_copied() -> None:
    batch = {"x": values(), "w": torch.ones(3)}
    for chunk, (start, _) in zip(stream_chunks(batch, trees.find_rows(batch), [4, 6], "cpu"), [(0, 4), (4, 10)]):
        assert chunk["x"].data_ptr() == batch["x"][start:].data_ptr()
        assert chunk["w"] is batch["w"]


def test_on_the_cpu_two_partitions_are_alive_at_most() -> None:
    source = WatchedRows(values(12))
    for chunk in stream_chunks(source, trees.find_rows(source), [2] * 6, "cpu"):
        assert chunk.shape == (2, 3)
    assert source.reads == spans_of([2] * 6)
    assert source.most_alive == 2


def test_on_the_cpu_a_consumer_that_lets_go_first_has_one_partition_alive() -> None:
    source = WatchedRows(values(12))
    for chunk in stream_chunks(source, trees.find_rows(source), [2] * 6, "cpu"):
        del chunk
    assert source.most_alive == 1


def test_the_count_of_living_partitions_catches_a_consumer_that_keeps_one() -> None:
    source = WatchedRows(values(12))
    kept = []
    for chunk in stream_chunks(source, trees.find_rows(source), [2] * 6, "cpu"):
        kept = [*kept[-1:], chunk]
    assert source.most_alive == 3


@pytest.mark.parametrize("sizes", [[], [4, 5], [5, 6], [10, 0], [11, -1]], ids=str)
def test_sizes_that_are_not_the_batch_are_refused(sizes: list[int]) -> None:
    with pytest.raises(sg.UsageError, match="the batch has 10 rows"):
        next(stream_chunks(values(), trees.find_rows(values()), sizes, "cpu"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda_is_refused_before_any_work() -> None:
    with pytest.raises(sg.EnvironmentProblem, match="no CUDA device"):
        Prefetcher("cuda")


def test_a_readers_exception_reaches_the_consumer_as_it_is() -> None:
    source = WatchedRows(values(), fail_at=1)
    stream = stream_chunks(source, trees.find_rows(source), [5, 5], "cpu")
    next(stream)
    with pytest.raises(ConnectionResetError, match="the disk went away at row 5"):
        next(stream)


# The two places, on the host: torch.cpu has streams and events too, so that order, threads and endings are the real
# ones. What only a device can show (overlap, pinning) is in test_prefetch_gpu.py.


@pytest.fixture
def places() -> Iterator[TwoPlaces]:
    places = TwoPlaces(torch.device("cpu"))
    yield places
    places.close()
    assert reader_threads() == []


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=7), min_size=1, max_size=4), st.booleans())
def test_two_places_hand_out_every_chunk_of_every_batch(batches: list[list[int]], slow: bool) -> None:
    places = TwoPlaces(torch.device("cpu"))
    for number, sizes in enumerate(batches):
        x, y = values(sum(sizes)) + number, torch.rand(2, sum(sizes))
        leaves = {0: (WatchedRows(x, seconds=0.0005 if slow else 0), 0), 3: (y, 1)}
        for chunk, (start, stop) in zip(places.stream(leaves, spans_of(sizes)), spans_of(sizes), strict=True):
            assert torch.equal(chunk[0], x[start:stop])
            assert torch.equal(chunk[3], y[:, start:stop])
            del chunk
    places.close()


def test_chunks_are_gathered_ahead_by_another_thread(places: TwoPlaces) -> None:
    source = WatchedRows(values(12))
    stream = places.stream({0: (source, 0)}, spans_of([2] * 6))
    next(stream)
    wait_for_reads(source, 3)
    assert source.reads[:2] == [(0, 2), (2, 4)]
    assert len(source.reads) <= 3
    assert threading.get_ident() not in source.threads
    stream.close()


def test_buffers_are_two_of_the_largest_chunk_and_live_on_between_batches(places: TwoPlaces) -> None:
    addresses = []
    for sizes in ([4, 6, 2], [5, 5], [6, 6]):
        source = WatchedRows(values(sum(sizes)))
        for chunk in places.stream({0: (source, 0)}, spans_of(sizes)):
            addresses.append(chunk[0].data_ptr())
            del chunk
    assert len(set(addresses)) == 2
    assert places.device_bytes == places.host_bytes == 2 * 6 * values(1).nbytes
    places.close()
    assert places.device_bytes == places.host_bytes == 0


def test_another_dtype_or_nesting_gets_other_buffers(places: TwoPlaces) -> None:
    for leaves in ({0: values(4)}, {0: values(4).double()}, {1: values(4), 2: torch.arange(4)}):
        got = next(places.stream({i: (WatchedRows(leaf), 0) for i, leaf in leaves.items()}, [(0, 4)]))
        assert got.keys() == leaves.keys()
        assert all(torch.equal(got[i], leaf) for i, leaf in leaves.items())
        assert places.device_bytes == 2 * sum(leaf.nbytes for leaf in leaves.values())


def wait_for_reads(source: WatchedRows, count: int) -> None:
    deadline = time.monotonic() + 5
    while source.finished < count and time.monotonic() < deadline:
        time.sleep(0.001)


def test_an_exception_in_the_reader_thread_surfaces_in_its_chunks_turn(places: TwoPlaces) -> None:
    source = WatchedRows(values(12), fail_at=2)
    seen = []
    with pytest.raises(ConnectionResetError, match="the disk went away at row 4"):
        for chunk in places.stream({0: (source, 0)}, spans_of([2] * 6)):
            seen.append(chunk[0].clone())
            del chunk
            wait_for_reads(source, 3)
    assert torch.equal(torch.cat(seen), values(12)[:4])
    healthy = WatchedRows(values(12))
    assert torch.equal(next(places.stream({0: (healthy, 0)}, [(0, 12)]))[0], values(12))


def test_a_consumer_that_stops_leaves_no_read_under_way_or_waiting(places: TwoPlaces) -> None:
    source = WatchedRows(values(12), seconds=0.02)
    stream = places.stream({0: (source, 0)}, spans_of([2] * 6))
    next(stream)
    while len(source.reads) < 2:
        time.sleep(0.001)
    stream.close()
    assert source.finished == len(source.reads) == 2


def test_an_exception_in_the_consumer_ends_the_stream(places: TwoPlaces) -> None:
    with pytest.raises(ZeroDivisionError):
        for _chunk in places.stream({0: (WatchedRows(values(12)), 0)}, spans_of([2] * 6)):
            raise ZeroDivisionError
    assert torch.equal(next(places.stream({0: (WatchedRows(values(4)), 0)}, [(0, 4)]))[0], values(4))


def test_closing_the_places_ends_a_stream_that_is_under_way(places: TwoPlaces) -> None:
    stream = places.stream({0: (WatchedRows(values(12)), 0)}, spans_of([2] * 6))
    next(stream)
    places.close()
    assert reader_threads() == []
    with pytest.raises(sg.UsageError, match="prefetcher was closed"):
        next(stream)


def test_a_second_batch_at_the_same_time_is_refused(places: TwoPlaces) -> None:
    stream = places.stream({0: (WatchedRows(values(4)), 0)}, spans_of([2, 2]))
    next(stream)
    with pytest.raises(sg.UsageError, match="another batch"):
        next(places.stream({0: (WatchedRows(values(4)), 0)}, spans_of([2, 2])))
    assert torch.equal(next(stream)[0], values(4)[2:])


def test_a_chunk_kept_while_its_memory_is_reused_is_refused(places: TwoPlaces) -> None:
    with pytest.raises(sg.UsageError, match="chunk 0 is still in use"):
        list(places.stream({0: (WatchedRows(values(12)), 0)}, spans_of([2] * 6)))


def test_a_chunk_in_a_dead_cycle_is_not_taken_for_a_kept_one(places: TwoPlaces) -> None:
    for chunk in places.stream({0: (WatchedRows(values(12)), 0)}, spans_of([2] * 6)):
        cycle: list[Any] = [chunk[0]]
        cycle.append(cycle)
        del chunk, cycle


def test_a_graph_that_outlives_its_chunk_is_caught_by_autograd(places: TwoPlaces) -> None:
    weight = torch.ones(3, requires_grad=True)
    stream = places.stream({0: (WatchedRows(values(12)), 0)}, spans_of([2] * 6))
    first = next(stream)[0]
    loss = (first[:, :] * weight).sum()
    del first
    next(stream)
    next(stream)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_buffers_made_under_inference_mode_serve_a_graph_later(places: TwoPlaces) -> None:
    with torch.inference_mode():
        for _ in places.stream({0: (WatchedRows(values(4)), 0)}, spans_of([2, 2])):
            pass
    weight = torch.ones(3, requires_grad=True)
    for chunk in places.stream({0: (WatchedRows(values(4)), 0)}, spans_of([2, 2])):
        (chunk[0] * weight).sum().backward()
        del chunk
    assert weight.grad is not None
    assert torch.equal(weight.grad, values(4).sum(0))


def test_a_nested_batch_is_put_together_from_what_arrives_and_what_is_there(places: TwoPlaces) -> None:
    batch = Batch({"x": Rows(values(10)).subset(range(9, -1, -1)), "y": torch.rand(10), "name": "b"}, torch.ones(3))
    prefetcher = Prefetcher("cpu")
    prefetcher._places = places  # as if the device were another one: all row leaves travel
    seen = []
    for chunk in prefetcher.stream(batch, trees.find_rows(batch), [4, 4, 2]):
        assert isinstance(chunk, Batch)
        assert (chunk.inputs["name"], chunk.scale is batch.scale) == ("b", True)
        seen.append((chunk.inputs["x"].clone(), chunk.inputs["y"].clone()))
        del chunk
    assert torch.equal(torch.cat([x for x, _ in seen]), values(10).flip(0))
    assert torch.equal(torch.cat([y for _, y in seen]), batch.inputs["y"])
    assert prefetcher.device_bytes == 2 * 4 * (3 + 1) * 4


def test_mapped_rows_stream_through_the_places(tmp_path: Path, places: TwoPlaces) -> None:
    np.save(tmp_path / "x.npy", values(40).numpy())
    rows = sg.open_rows(tmp_path / "x.npy").shuffled(seed=0, epoch=0)
    got = [chunk[0].clone() for chunk in places.stream({0: (rows, 0)}, spans_of([16, 16, 8]))]
    assert torch.equal(torch.cat(got), rows.read(0, 40))
