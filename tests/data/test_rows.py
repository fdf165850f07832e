"""Rows hold what they were given, in the order asked for, and nobody else's memory."""

from __future__ import annotations

import itertools
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import samegrad as sg
from samegrad import trees
from samegrad.data import rows as rows_module
from samegrad.data.rows import Rows

DTYPES = [np.float32, np.float64, np.float16, np.int64, np.uint16, np.uint8, np.bool_, np.complex64, np.complex128]


def numbered(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def fancy(array: np.ndarray, step: slice | list[int]) -> np.ndarray:
    return array[step] if isinstance(step, slice) else array[np.array(step, dtype=np.int64)]


@st.composite
def orders(draw: st.DrawFn, rows: int) -> list[slice | list[int]]:
    """Up to three selections, each over the rows that the one before left."""
    steps: list[slice | list[int]] = []
    for _ in range(draw(st.integers(0, 3))):
        indices = st.lists(st.integers(-rows, rows - 1), max_size=12) if rows else st.just([])
        step = draw(st.slices(rows) | indices)
        rows = len(fancy(np.arange(rows), step))
        steps.append(step)
    return steps


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_pieces_in_any_order_read_in_any_spans_are_numpys_fancy_indexing(data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 9), min_size=1, max_size=4))
    width = data.draw(st.sampled_from([(), (3,), (2, 2), (0,)]))
    dtype = data.draw(st.sampled_from(DTYPES))
    # A block of a few rows: the scratch path has to be crossed within one read.
    scratch_bytes = data.draw(st.sampled_from([1, 40, 4 * 2**20]))
    whole = numbered(sum(lengths), *width, dtype=dtype)
    cuts = np.cumsum(lengths)[:-1]
    pieces = [torch.from_numpy(p.copy()) if i % 2 else p for i, p in enumerate(np.split(whole, cuts))]
    rows, want = Rows(pieces), whole
    for step in data.draw(orders(sum(lengths))):
        rows, want = rows.subset(step), fancy(want, step)
    spans = sorted(data.draw(st.lists(st.integers(0, len(want)), max_size=4)) + [0, len(want)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "_SCRATCH_BYTES", scratch_bytes)
        read = [rows.read(a, b).numpy() for a, b in itertools.pairwise(spans)]
    assert rows.shape == want.shape
    assert all(part.dtype == want.dtype for part in read)
    np.testing.assert_array_equal(np.concatenate(read), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.uint32], ids=str)
def test_dtypes_that_numpy_or_torch_cannot_index_keep_their_bits(dtype: torch.dtype) -> None:
    bits = torch.randint(0, 200, (7, 3 * dtype.itemsize), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    order = [5, 0, 6, 5]
    for source in (bits.view(dtype), [bits[:4].view(dtype), bits[4:].view(dtype)]):
        read = Rows(source).subset(order).read(0, 4)
        assert read.dtype == dtype
        assert torch.equal(read.view(torch.uint8), bits[order])


def test_steps_far_larger_than_the_rows_compose() -> None:
    rows, want = Rows(numbered(5, 2)), numbered(5, 2)
    for step in (slice(None, None, -(2**21)), slice(None, None, -(2**21)), [0], slice(None, None, -(2**70))):
        rows, want = rows.subset(step), want[step]
    np.testing.assert_array_equal(rows.read(0, len(want)).numpy(), want)


def test_rows_are_a_row_source_and_find_rows_sees_their_length() -> None:
    rows = Rows(numbered(7, 3)).subset(slice(1, 6))
    assert trees.is_row_source(rows)
    layout = trees.find_rows({"x": rows, "y": torch.zeros(5)})
    assert (layout.rows, layout.axes) == (5, (0, 0))
    chunk = trees.slice_rows({"x": rows, "y": torch.zeros(5)}, layout, 2, 4)
    np.testing.assert_array_equal(chunk["x"].numpy(), numbered(7, 3)[1:6][2:4])


def test_a_read_only_mapped_file_is_read_without_a_warning(tmp_path: Path) -> None:
    path = tmp_path / "rows.bin"
    numbered(6, 2).tofile(path)
    mapped = np.memmap(path, dtype=np.float32, mode="r", shape=(6, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = Rows(mapped[1:]).subset([4, 0])
    np.testing.assert_array_equal(rows.read(0, 2).numpy(), numbered(6, 2)[1:][[4, 0]])
    assert rows.mapped
    assert str(path) in rows.described


@pytest.mark.parametrize("writer", ["tensor", "array", "mapped"])
@pytest.mark.parametrize("order", [slice(None), [3, 1, 0, 2]], ids=["in order", "gathered"])
def test_writing_to_what_was_read_never_reaches_the_users_data(
    writer: str, order: slice | list[int], tmp_path: Path
) -> None:
    path = tmp_path / "rows.bin"
    numbered(4, 2).tofile(path)
    source = {
        "tensor": torch.from_numpy(numbered(4, 2)),
        "array": numbered(4, 2),
        "mapped": np.memmap(path, dtype=np.float32, mode="r+", shape=(4, 2)),
    }[writer]
    Rows(source).subset(order).read(0, 4).fill_(-1)
    np.testing.assert_array_equal(np.asarray(source), numbered(4, 2))


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -2), [3, 1, 3]], ids=["in order", "strided", "list"])
def test_out_is_filled_in_place_also_when_it_is_not_contiguous(order: slice | list[int]) -> None:
    rows, want = Rows([numbered(3, 2), numbered(2, 2) + 50]).subset(order), None
    want = np.concatenate([numbered(3, 2), numbered(2, 2) + 50])[order]
    out = torch.full((2, len(want)), -1.0).t()
    assert rows.read(0, len(want), out=out) is out
    np.testing.assert_array_equal(out.numpy(), want)


def test_an_out_of_another_shape_or_dtype_is_refused() -> None:
    rows = Rows(numbered(4, 2))
    for out in (torch.empty(2, 3), torch.empty(3, 2), torch.empty(2, 2, dtype=torch.float64)):
        with pytest.raises(sg.UsageError, match="out is"):
            rows.read(0, 2, out=out)


def test_a_span_outside_the_rows_is_refused() -> None:
    for start, stop in ((-1, 2), (2, 1), (0, 5)):
        with pytest.raises(sg.UsageError, match="there are 4 rows"):
            Rows(numbered(4, 2)).read(start, stop)


def test_an_epochs_order_is_a_permutation_given_by_seed_and_epoch_alone() -> None:
    rows = Rows(np.arange(500))
    torch.manual_seed(1)
    np.random.seed(1)
    first = rows.shuffled(seed=3, epoch=2).read(0, 500)
    torch.manual_seed(2)
    np.random.seed(2)
    assert torch.equal(first, rows.shuffled(seed=3, epoch=2).read(0, 500))
    assert torch.equal(first.sort().values, torch.arange(500))
    others = [rows.shuffled(seed=s, epoch=e).read(0, 500) for s, e in ((3, 1), (3, 3), (2, 2), (4, 2), (2, 3))]
    assert not any(torch.equal(first, other) for other in others)


def test_shuffling_leaves_the_global_generators_alone() -> None:
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1]
    rows = Rows(np.arange(50))
    rows.shuffled(seed=0, epoch=0)
    rows.split((0.5, 0.5), seed=0)
    assert torch.equal(torch_before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])


def test_orders_compose_in_the_sequence_they_were_asked_for() -> None:
    values = torch.arange(40)
    rows = Rows(values).subset(slice(30, 4, -2)).shuffled(seed=1, epoch=0).subset(slice(2, 9))
    base = values.flip(0)[9:35:2]
    shuffled = base[Rows(torch.arange(13)).shuffled(seed=1, epoch=0).read(0, 13)]
    assert torch.equal(rows.read(0, 7), shuffled[2:9])


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(0, 60), weights=st.lists(st.integers(1, 9), min_size=1, max_size=4), seed=st.integers(0, 2**40))
def test_a_split_covers_every_row_once(rows: int, weights: list[int], seed: int) -> None:
    parts = Rows(np.arange(rows)).split([w / sum(weights) for w in weights], seed=seed)
    read = [part.read(0, len(part)) for part in parts]
    assert torch.equal(torch.cat(read).sort().values, torch.arange(rows))
    for part, weight in zip(parts, weights):
        assert abs(len(part) - rows * weight / sum(weights)) <= 1


def test_a_split_is_drawn_from_the_seed_and_no_epoch_repeats_it() -> None:
    rows = Rows(np.arange(100))
    train = [rows.split((0.5, 0.5), seed=s)[0].read(0, 50) for s in (7, 7, 8)]
    assert torch.equal(train[0], train[1])
    assert not torch.equal(train[0], train[2])
    assert not torch.equal(train[0], rows.shuffled(seed=7, epoch=0).read(0, 50).sort().values)


@pytest.mark.parametrize("fractions", [(), (0.5, 0.4), (0.5, 0.6), (1.5, -0.5), (1.0, 0.0)], ids=str)
def test_fractions_that_are_not_a_split_are_refused(fractions: tuple[float, ...]) -> None:
    with pytest.raises(sg.UsageError, match="split rows by"):
        Rows(np.arange(10)).split(fractions, seed=0)


@pytest.mark.parametrize(
    "indices", [[0, 4], [-5], [[0, 1]], [0.5], [True, False, True, True], torch.tensor([0, 9])], ids=str
)
def test_indices_that_are_not_rows_are_refused(indices: list[int] | torch.Tensor) -> None:
    with pytest.raises(sg.UsageError):
        Rows(np.arange(4)).subset(indices)


def test_changing_the_index_array_afterwards_changes_nothing() -> None:
    index = torch.tensor([2, 0])
    rows = Rows(np.arange(4)).subset(index)
    index[0] = 3
    assert rows.read(0, 2).tolist() == [2, 0]


@pytest.mark.parametrize("pieces", [1, 2])
@pytest.mark.parametrize("order", [slice(None), [3, 0, 2]], ids=["in order", "gathered"])
def test_converted_rows_are_to_dtype_times_scale(pieces: int, order: slice | list[int]) -> None:
    stored = torch.arange(12, dtype=torch.uint8).view(4, 3) * 20
    rows = Rows(list(stored.chunk(pieces))).converted(torch.float32, scale=1 / 255).subset(order)
    assert rows.dtype == torch.float32
    assert rows.row_bytes == 3 * 4
    assert torch.equal(rows.read(0, len(rows)), stored[order].to(torch.float32) * (1 / 255))


def test_a_conversion_that_would_drop_fractions_or_hide_another_is_refused() -> None:
    with pytest.raises(sg.UsageError, match="fractions would be lost"):
        Rows(numbered(3, 2)).converted(torch.int64)
    with pytest.raises(sg.UsageError, match="fractions would be lost"):
        Rows(np.arange(3)).converted(torch.int32, scale=0.5)
    with pytest.raises(sg.UsageError, match="imaginary parts would be lost"):
        Rows(np.zeros((3, 2), dtype=np.complex64)).converted(torch.float32)
    with pytest.raises(sg.UsageError, match="converted already"):
        Rows(numbered(3, 2)).converted(torch.float64).converted(torch.float32)


def test_resident_bytes_count_memory_and_the_index_but_not_mapped_files(tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    np.save(path, numbered(100, 8))
    mapped, held = sg.open_rows(path), Rows(numbered(100, 8))
    assert (mapped.mapped, held.mapped) == (True, False)
    assert mapped.resident_bytes == 0
    assert mapped.subset(slice(10, 90, 3)).resident_bytes == 0
    assert held.resident_bytes == held.subset(slice(5)).resident_bytes == numbered(100, 8).nbytes
    index_bytes = torch.arange(100).nbytes
    assert mapped.shuffled(seed=0, epoch=0).resident_bytes == index_bytes
    assert held.shuffled(seed=0, epoch=0).resident_bytes == numbered(100, 8).nbytes + index_bytes


def test_a_mapped_file_that_was_changed_or_deleted_is_refused_by_name(tmp_path: Path) -> None:
    for damage in ("shorter", "touched", "deleted"):
        path = tmp_path / f"{damage}.npy"
        np.save(path, numbered(50, 4))
        rows = sg.open_rows(path)
        rows.read(0, 50)
        if damage == "shorter":
            os.truncate(path, 200)
        elif damage == "touched":
            os.utime(path, ns=(0, 1))
        else:
            path.unlink()
        with pytest.raises(sg.BadInput, match=path.name):
            rows.read(0, 50)


def test_a_row_is_placed_in_the_file_it_came_from(tmp_path: Path) -> None:
    for i, length in enumerate((3, 4)):
        np.save(tmp_path / f"part_{i}.npy", numbered(length, 2) + 100 * i)
    rows = sg.open_rows(tmp_path).subset([6, 0])
    assert rows.place(0) == f"{tmp_path / 'part_1.npy'} row 3"
    assert rows.place(1) == f"{tmp_path / 'part_0.npy'} row 0"


@pytest.mark.parametrize(
    "source",
    [
        [],
        np.float32(3),
        np.array(["a", "b"]),
        np.array([object()]),
        np.ma.masked_array([1.0, 2.0], mask=[True, False]),
        np.arange(4, dtype=">f4"),
        np.arange(4)[::-1],
        [np.zeros((2, 3)), np.zeros((2, 4))],
        [np.zeros((2, 3)), np.zeros((2, 3), dtype=np.float32)],
        torch.tensor(1.0),
        torch.empty(3, device="meta"),
        torch.eye(3).to_sparse(),
    ],
    ids=lambda source: str(type(source).__name__),
)
def test_what_cannot_be_rows_is_refused(source: object) -> None:
    with pytest.raises(sg.BadInput):
        Rows(source)  # type: ignore[arg-type]


def test_reading_takes_no_part_in_autograd_and_ignores_the_default_device() -> None:
    rows = Rows(torch.ones(4, 2, requires_grad=True)).shuffled(seed=0, epoch=0)
    with torch.device("meta"):
        read = rows.read(0, 4)
        again = rows.subset([1, 0]).split((0.5, 0.5), seed=0)[0].read(0, 1)
    assert not read.requires_grad
    assert read.device.type == again.device.type == "cpu"
