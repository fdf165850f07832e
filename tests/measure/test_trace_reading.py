"""What a trace says of a step: its operations, what lives at its peak, how its batch arrives."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from samegrad.declared import declare
from samegrad.measure import trace_reading
from samegrad.measure.trace import in_chunks, plainly, trace_step
from samegrad.records import Category, Phase

from .traced import (
    ROWS,
    SIZES,
    Pictures,
    Words,
    declared_on,
    pictures,
    split,
    words,
)


def test_what_is_written_down_of_each_operation() -> None:
    model, rows = nn.Sequential(nn.Linear(6, 10), nn.Tanh()), 7
    declared = declare(model, lambda outputs, batch: outputs.square().sum(), optimizer=None)
    trace = trace_step(declared, torch.zeros(rows, 6), device="cpu")
    first = [operation for operation in trace.operations if operation.step == 0]
    product = next(operation for operation in first if operation.name == "aten.addmm.default")
    assert (product.module, product.phase, product.kernels, product.dtype) == ("0", Phase.FORWARD, 1, "float32")
    assert product.flops == 2 * rows * 6 * 10
    assert product.moved_bytes == 4 * (rows * 6 + 6 * 10 + 10 + rows * 10)
    backward = [operation for operation in first if operation.phase is Phase.BACKWARD]
    by_name = {operation.name: operation.module for operation in backward}
    assert by_name["aten.tanh_backward.default"] == "1" and by_name["aten.mm.default"] == "0"
    assert all(operation.kernels == 0 for operation in first if operation.name == "aten.t.default")
    assert trace.batch_rows == rows and trace.sizes == (rows,) and trace.device == "cpu"


def test_what_lives_at_the_peak_adds_up() -> None:
    trace = trace_step(declared_on(Pictures()), pictures(ROWS), device="cpu")
    peak = trace_reading.find_peak(trace)
    living = trace_reading.live_at(trace, peak)
    assert sum(storage.size_bytes for storage in living) == peak.live_bytes == sum(peak.by_category.values())
    assert living == sorted(living, key=lambda storage: -storage.size_bytes)
    assert max(trace_reading.peak_by_phase(trace).values()) == peak.live_bytes
    course = trace_reading.timeline(trace)
    assert max(sum(point.live_bytes.values()) for point in course) == peak.live_bytes
    assert {"stem", "norm", "head"} <= trace_reading.by_module_at(trace, peak).keys()
    rounded = trace_reading.find_peak(trace, round_to=trace_reading.CUDA_BLOCK_BYTES)
    assert rounded.live_bytes % 512 == 0 and 0 <= rounded.live_bytes - peak.live_bytes < 512 * len(living)


def test_models_on_no_device_and_on_the_cpu_are_followed_alike() -> None:
    here = trace_step(declared_on(Words()), words(ROWS))
    with torch.device("meta"):
        nowhere = declared_on(Words())
    there = trace_step(nowhere, words(ROWS, "meta"))
    resident = {e.storage for e in there.events if e.category is Category.INPUTS and e.operation == -1}
    assert resident and not any(e.category is Category.INPUTS and e.operation == -1 for e in here.events)
    # A batch on the host arrives in the step; from then on both hold the same.
    assert trace_reading.peak_bytes(here) == trace_reading.peak_bytes(there)


def test_chunks_from_the_host_arrive_in_two_places() -> None:
    declared, batch = declared_on(Words()), words(ROWS)
    trace = trace_step(declared, batch, run=in_chunks(split(declared, batch), SIZES), sizes=SIZES)
    inputs = [event.change_bytes for event in trace.events if event.category is Category.INPUTS]
    tokens = max(SIZES) * 11 * 8
    assert inputs == [tokens] * 4, "two leaves in two places, kept between steps"
    assert trace.sizes == SIZES


class Mapped:
    """Rows on a disk that must not be read."""

    def __init__(self, rows: int) -> None:
        self.shape, self.dtype = (rows, 11), torch.int64

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        raise AssertionError("a trace has read")


def test_rows_on_disk_are_not_read() -> None:
    declared = declared_on(Words())
    step, batch = split(declared, words(ROWS)), (Mapped(ROWS), Mapped(ROWS))
    for run in (plainly(), in_chunks(step, SIZES)):
        for device in ("cpu", "cuda"):
            assert trace_step(declared, batch, run=run, device=device).operations


def test_a_phase_begins_with_its_first_operation_also_where_no_memory_changes() -> None:
    trace = trace_step(declare(nn.Sequential(nn.Linear(6, 4)), lambda outputs, batch: outputs.sum(), optimizer=None),
                       torch.zeros(7, 6), device="cpu")  # fmt: skip
    own = [index for index, operation in enumerate(trace.operations) if operation.step == 1]
    assert [point.phase for point in trace_reading.timeline(trace)] == [trace.operations[i].phase for i in own]
    # Without what changes nothing the course has gaps.
    assert not set(own) <= {event.operation for event in trace.events}
