"""Library workspaces: as recorded on a GPU, inserted where they are taken, and gone where a trace has no products."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest

from samegrad.errors import UsageError
from samegrad.measure import convolution_workspaces
from samegrad.measure.convolution_workspaces import forward_bytes, input_gradient_bytes, weight_gradient_bytes
from samegrad.measure.events import BEFORE_THE_STEPS, Convolution, MemoryEvent, Operation, Recurrence, Trace
from samegrad.measure.library_calibration import LibraryCalibration, blas_workspaces, calibrate_libraries
from samegrad.measure.recurrent_workspaces import recurrence_bytes, reserve_bytes
from samegrad.measure.reduction_workspaces import rows_sum_bytes
from samegrad.measure.replay import repeat_steps, replay
from samegrad.measure.workspaces import find_workspaces, with_workspaces
from samegrad.records import Category, Phase

from .traces import MIB, TraceWriter

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "h200_workspaces.json").read_text())
# By rules alone.
H200 = dataclasses.replace(calibrate_libraries(tuple(RECORDED["capability"]), RECORDED["torch"]), convolutions=None)
VARIABLES = (
    "CUBLAS_WORKSPACE_CONFIG", "CUBLASLT_WORKSPACE_SIZE", "TORCH_CUBLASLT_UNIFIED_WORKSPACE",
    "TORCH_CUBLAS_WORKSPACE_CACHE",
)  # fmt: skip


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def shape_of(name: str) -> tuple[Convolution, int]:
    """The shape and the bytes of an element, from a name such as "convolution bfloat16 contiguous n32 c64 ..."."""
    dtype, layout = name.split()[1:3]
    rows, inputs, height, outputs, kernel, stride, groups = map(int, re.findall(r"[a-z]([0-9]+)(?= |$)", name)[-7:])
    padding = 0 if stride == kernel else kernel // 2
    width = (height + 2 * padding - kernel) // stride + 1
    shape = Convolution(
        rows, inputs, outputs, height**2, width**2, kernel**2, groups, kernel == stride == 1, layout == "channels_last"
    )
    return shape, 4 if dtype == "float32" else 2


def errors() -> list[float]:
    """Of each recorded convolution: the largest workspace of its three, as a share of its tensors too much or less."""
    found = []
    for name, recorded in RECORDED["convolutions_temporary_bytes"].items():
        shape, element = shape_of(name)
        modelled = max(
            forward_bytes(shape, element, H200),
            input_gradient_bytes(shape, element, H200) if shape.inputs > 3 else 0,
            weight_gradient_bytes(shape, element, H200),
        )
        tensors = shape.rows * (shape.inputs * shape.input_pixels + shape.outputs * shape.output_pixels) * element
        found.append((modelled - max(*recorded["forward"], *recorded["backward"], 0)) / tensors)
    return found


def test_convolutions_take_what_was_recorded() -> None:
    sizes = sorted(abs(error) for error in errors())
    assert sizes[len(sizes) // 2] < 0.01
    assert sum(size < 0.06 for size in sizes) >= 0.75 * len(sizes)


def test_without_copies_it_would_not_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution_workspaces, "_copies_bytes", lambda *_, **__: 0)
    with pytest.raises(AssertionError):
        test_convolutions_take_what_was_recorded()


def test_products_keep_what_was_recorded() -> None:
    kept = RECORDED["products_kept_bytes"]
    blas = H200.blas
    plain, with_bias = (next(v for k, v in kept.items() if k.startswith(name)) for name in ("mm", "linear float"))
    # Forward and backward run in threads of their own, each with a handle.
    assert plain == {"forward": [blas.cublas_bytes], "backward": [blas.cublas_bytes]}
    assert with_bias == {"forward": [blas.cublaslt_bytes], "backward": []}
    assert blas.kept
    assert not blas.shared


@pytest.mark.parametrize(
    ("capability", "version", "cublas_mib"),
    [((9, 0), "2.11.0+cu130", 32), ((8, 0), "2.11.0", 8.125), ((12, 0), "2.11.0", 8.125), ((12, 0), "2.13.0", 32)],
)
def test_cublas_sizes_by_card_and_version(capability: tuple[int, int], version: str, cublas_mib: float) -> None:
    assert blas_workspaces(capability, version).cublas_bytes == cublas_mib * MIB


def test_cublas_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    monkeypatch.setenv("CUBLASLT_WORKSPACE_SIZE", "4096")
    monkeypatch.setenv("TORCH_CUBLASLT_UNIFIED_WORKSPACE", "0")
    blas = blas_workspaces((9, 0), "2.13.0")
    assert (blas.cublas_bytes, blas.cublaslt_bytes, blas.shared) == ((2 * 4096 + 8 * 16) * 1024, 4 * MIB, False)
    monkeypatch.setenv("TORCH_CUBLASLT_UNIFIED_WORKSPACE", "1")
    assert blas_workspaces((9, 0), "2.11.0").shared


def test_from_2_15_on_each_product_has_its_own() -> None:
    assert not blas_workspaces((9, 0), "2.15.0a0+git123").kept


@pytest.mark.parametrize("version", ["2.10.1", "2.16.0", "main"])
def test_other_versions_are_refused(version: str) -> None:
    with pytest.raises(UsageError, match=r"2\.11 to 2\.15"):
        calibrate_libraries((9, 0), version)


def products(*, steps: int = 2) -> Trace:
    """A layer with bias forward and backward, a few times."""
    writer = TraceWriter()
    for step in range(steps):
        for _ in range(3):
            writer.operation(step, Phase.FORWARD, "aten.addmm.default")
            kept = writer.take(3 * MIB)
            writer.operation(step, Phase.BACKWARD, "aten.mm.default")
            writer.give_back(writer.take(2 * MIB, Category.GRADIENTS))
            writer.give_back(kept)
    return writer.trace()


def test_a_workspace_is_taken_once_a_thread_and_kept() -> None:
    trace = products()
    found = find_workspaces(trace, H200)
    assert [(w.library, w.operation, w.size_bytes, w.until_takes is None) for w in found] == [
        ("cuBLAS", 0, 32 * MIB, True), ("cuBLASLt", 0, MIB, True), ("cuBLAS", 1, 32 * MIB, True),
    ]  # fmt: skip
    plain, seen = replay(repeat_steps(trace)), replay(repeat_steps(with_workspaces(trace, H200)))
    assert seen.peak_requested_bytes == plain.peak_requested_bytes + 65 * MIB


def test_what_cublas_keeps_is_there_before_the_first_step() -> None:
    trace = products()
    resident = MemoryEvent(100, 5 * MIB, BEFORE_THE_STEPS, Category.PARAMETERS)
    seen = with_workspaces(dataclasses.replace(trace, events=(resident, *trace.events)), H200).events
    assert seen[0] == resident
    assert [(event.change_bytes, event.operation) for event in seen[1:3]] == [(32 * MIB, BEFORE_THE_STEPS)] * 2
    assert [event.operation for event in seen if event.change_bytes == MIB] == [0]
    # Where every product has its own nothing stands.
    passing = with_workspaces(trace, calibrate_libraries((9, 0), "2.15.0")).events
    assert all(event.operation >= 0 for event in passing)


def test_a_workspace_of_one_product_comes_and_goes() -> None:
    trace = products()
    calibration = calibrate_libraries((9, 0), "2.15.0")
    found = find_workspaces(trace, calibration)
    assert [w.library for w in found[:2]] == ["cuBLASLt", "cuBLAS"]
    assert len(found) == len(trace.operations)
    seen = replay(repeat_steps(with_workspaces(trace, calibration)))
    assert seen.peak_requested_bytes == replay(repeat_steps(trace)).peak_requested_bytes + 32 * MIB


def convolution_trace(shape: Convolution) -> Trace:
    writer = TraceWriter()
    x = shape.rows * shape.inputs * shape.input_pixels * 4
    weight = shape.inputs * shape.outputs * shape.kernel_pixels * 4
    for step in range(2):
        writer.operations.append(
            Operation("aten.convolution.default", "", Phase.FORWARD, step, 0, 0, "float32", 1, shape)
        )
        kept = writer.take(shape.rows * shape.outputs * shape.output_pixels * 4)
        writer.operations.append(
            Operation("aten.convolution_backward.default", "", Phase.BACKWARD, step, 0, 0, "float32", 1, shape)
        )
        gradients = [writer.take(x, Category.TEMPORARY), writer.take(weight, Category.GRADIENTS)]
        for number in (*gradients, kept):
            writer.give_back(number)
    return writer.trace()


def test_each_gradient_of_a_convolution_has_its_workspace_behind_it() -> None:
    shape = Convolution(8, 64, 64, 56**2, 56**2, 9)
    trace = convolution_trace(shape)
    found = [(w.operation, w.after_takes, w.size_bytes) for w in find_workspaces(trace, H200)][:3]
    assert found == [
        (0, 1, forward_bytes(shape, 4, H200)),
        (1, 1, input_gradient_bytes(shape, 4, H200)),
        (1, 2, weight_gradient_bytes(shape, 4, H200)),
    ]
    seen = with_workspaces(trace, H200)
    assert [e for e in seen.events if e.storage < 6] == list(trace.events)
    sizes = [e.change_bytes for e in seen.events if e.operation == 1]
    assert sizes[1:3] == [found[1][2], -found[1][2]]
    assert sizes[4:6] == [found[2][2], -found[2][2]]


def test_channels_that_lie_right_need_no_copies() -> None:
    shape = Convolution(8, 64, 64, 56**2, 56**2, 9, channels_last=True)
    assert forward_bytes(shape, 2, H200) == 0
    odd = shape._replace(inputs=3)
    assert forward_bytes(odd, 2, H200) >= 8 * 8 * 56**2 * 2


def test_a_trace_of_the_cpu_and_one_without_shapes_stay_as_they_are() -> None:
    trace = convolution_trace(Convolution(8, 64, 64, 56**2, 56**2, 9))
    assert with_workspaces(Trace(trace.operations, trace.events, "cpu", 8, (8,)), H200).events == trace.events
    untold = tuple(operation._replace(shape=None) for operation in trace.operations)
    assert find_workspaces(Trace(untold, trace.events, "cuda", 8, (8,)), H200) == ()


def test_the_context_is_no_event() -> None:
    assert H200.context_bytes is not None
    elsewhere: LibraryCalibration = calibrate_libraries((8, 6), "2.13.0", multiprocessors=30)
    assert elsewhere.context_bytes is None
    assert elsewhere.source == "uncalibrated"
    assert elsewhere.multiprocessors == 30


@pytest.mark.parametrize("name", RECORDED["sums_temporary_bytes"])
def test_a_sum_over_rows_takes_what_was_recorded(name: str) -> None:
    rows, columns = map(int, re.findall(r"[0-9]+", name))
    assert rows_sum_bytes(rows, columns, H200) == RECORDED["sums_temporary_bytes"][name]


def test_a_sum_over_few_rows_takes_none() -> None:
    assert rows_sum_bytes(100, 4096, H200) == 0
    # Odd columns are read one by one, by more threads that each have fewer rows.
    assert rows_sum_bytes(8192, 4097, H200) != rows_sum_bytes(8192, 4096, H200)


def test_a_bias_gradient_has_its_scratch_behind_it() -> None:
    rows, columns = 8192, 4096
    writer = TraceWriter()
    for step in range(2):
        for phase in (Phase.FORWARD, Phase.BACKWARD):
            moved = (rows + 1) * columns * 4
            writer.operations.append(Operation("aten.sum.dim_IntList", "", phase, step, 0, moved, "float32", 1))
            writer.give_back(writer.take(columns * 4, Category.GRADIENTS))
    found = find_workspaces(writer.trace(), H200)
    assert [(w.operation, w.size_bytes) for w in found] == [(k, rows_sum_bytes(rows, columns, H200)) for k in (1, 3)]


@pytest.mark.parametrize("recorded", RECORDED["recurrences"], ids=lambda recorded: str([*recorded["shape"].values()]))
def test_a_recurrent_layer_takes_what_was_recorded(recorded: dict[str, Any]) -> None:
    shape, element = Recurrence(**recorded["shape"]), recorded["element_bytes"]
    # Within the alignment of their parts.
    assert 0 <= recorded["workspace_bytes"] - recurrence_bytes(shape, element) <= 1024
    assert 0 <= recorded["reserve_bytes"] - reserve_bytes(shape, element) <= 1024


def recurrent(shape: Recurrence) -> Trace:
    """A layer stack forward and backward in float32, twice, with the storages that torch gives it."""
    state, sequence = shape.layers * shape.rows * shape.hidden * 4, shape.steps * shape.rows * 4
    forward = [sequence * shape.hidden, state, state, reserve_bytes(shape, 4)]
    backward = [sequence * shape.inputs, state, state, 4 * 1234]
    writer = TraceWriter()
    for step in range(2):
        for phase, name, sizes in (
            (Phase.FORWARD, "_cudnn_rnn", forward),
            (Phase.BACKWARD, "_cudnn_rnn_backward", backward),
        ):
            writer.operations.append(Operation(f"aten.{name}.default", "", phase, step, 0, 0, "float32", 1, shape))
            for number in [writer.take(size) for size in sizes]:
                writer.give_back(number)
    return writer.trace()


def test_a_recurrent_layer_takes_it_forward_and_twice_backward() -> None:
    shape = Recurrence(steps=9, rows=5, inputs=7, hidden=11, layers=2, gates=4)
    found = [(w.operation, w.after_takes, w.until_takes) for w in find_workspaces(recurrent(shape), H200)]
    assert found[:5] == [(0, 3, 4), (1, 0, 4), (1, 0, 4), (1, 3, 3), (1, 4, 4)]


def test_rows_first_are_copied_to_steps_first_and_held_while_the_kernel_runs() -> None:
    shape = Recurrence(steps=9, rows=5, inputs=7, hidden=11, layers=2, gates=4, batch_first=True)
    trace, work = recurrent(shape), recurrence_bytes(shape, 4)
    changes = [e.change_bytes for e in with_workspaces(trace, H200).events if e.operation in (0, 1)]
    state, inputs, outputs = 2 * 5 * 11 * 4, 9 * 5 * 7 * 4, 9 * 5 * 11 * 4
    reserve = reserve_bytes(shape, 4)
    forward = [inputs, outputs, state, state, work, reserve, -work, -inputs]
    # Of the gradients of inputs and states, then of weights.
    backward = [state, state, inputs, outputs, inputs, state, state, work, -work, -outputs, -inputs, inputs, 4 * 1234]
    assert changes[:8] == forward
    assert changes[12 : 12 + len(backward)] == backward
    assert changes[25:30] == [work, -work, -inputs, -state, -state]


def test_all_workspaces_but_the_kept_are_given_back() -> None:
    shape = Recurrence(steps=9, rows=5, inputs=7, hidden=11, layers=2, gates=4, batch_first=True)
    assert sum(event.change_bytes for event in with_workspaces(recurrent(shape), H200).events) == 0
