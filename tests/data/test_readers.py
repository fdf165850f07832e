"""Files come back as the numbers that were written, or are refused with their path and row."""

from __future__ import annotations

import os
import pickle
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import samegrad as sg
from samegrad.data.readers import check_rows
from samegrad.data.rows import Rows


def numbers(rows: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, width)).astype(np.float32)


def write_parquet(path: Path, array: np.ndarray, *, kind: str = "list", row_group_size: int | None = None) -> None:
    values, rows, width = pa.array(array.reshape(-1)), len(array), array.shape[1]
    offsets = np.arange(rows + 1) * width
    column = {
        "list": lambda: pa.ListArray.from_arrays(offsets.astype(np.int32), values),
        "large_list": lambda: pa.LargeListArray.from_arrays(offsets, values),
        "fixed_size_list": lambda: pa.FixedSizeListArray.from_arrays(values, width),
    }[kind]()
    table = pa.table({"prompt": [f"p{i}" for i in range(rows)], "activation_layer_18": column})
    pq.write_table(table, path, row_group_size=row_group_size)


def write_lists(path: Path, lists: list[list[float | None] | None], row_group_size: int | None = None) -> None:
    pq.write_table(pa.table({"x": pa.array(lists, pa.list_(pa.float32()))}), path, row_group_size=row_group_size)


def all_of(rows: Rows) -> np.ndarray:
    return rows.read(0, len(rows)).numpy()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int8, np.uint16, np.bool_, np.complex64])
@pytest.mark.parametrize("shape", [(5, 3), (4,), (2, 3, 2), (0, 3)], ids=str)
def test_npy_comes_back_mapped_and_equal(tmp_path: Path, dtype: type, shape: tuple[int, ...]) -> None:
    want = (np.arange(np.prod(shape)).reshape(shape) % 7).astype(dtype)
    np.save(tmp_path / "x.npy", want)
    rows = sg.open_rows(tmp_path / "x.npy")
    assert rows.mapped
    assert all_of(rows).dtype == want.dtype
    np.testing.assert_array_equal(all_of(rows), want)


@pytest.mark.parametrize("damage", ["truncated", "longer", "empty", "junk", "claims a terabyte"])
def test_a_damaged_npy_is_refused_by_path(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.npy"
    np.save(path, numbers(100, 8))
    content = path.read_bytes()
    header = {"descr": "<f4", "fortran_order": False, "shape": (2**35, 8)}
    if damage == "claims a terabyte":
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.write(b"\0" * 64)
    else:
        changed = {"truncated": content[:-40], "longer": content + b"1234", "empty": b"", "junk": b"\0" * 500}
        path.write_bytes(changed[damage])
    with pytest.raises(sg.BadInput, match=str(path)):
        sg.open_rows(path)


def test_a_pickled_npy_is_refused_without_running_it(tmp_path: Path) -> None:
    canary = tmp_path / "canary"

    class Gadget:
        def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
            return os.mkdir, (str(canary),)

    path = tmp_path / "x.npy"
    np.save(path, np.array([Gadget()], dtype=object), allow_pickle=True)
    with pytest.raises(sg.BadInput, match="Python objects"):
        sg.open_rows(path)
    assert not canary.exists()
    # The planted fault is a live one: unpickling does run it.
    np.load(path, allow_pickle=True)
    assert canary.exists()


def test_npy_layouts_that_are_no_rows_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "columns.npy", np.asfortranarray(numbers(4, 3)))
    np.save(tmp_path / "number.npy", np.float32(1))
    np.save(tmp_path / "foreign.npy", np.arange(3, dtype=">f4"))
    for name in ("columns", "number", "foreign"):
        with pytest.raises(sg.BadInput, match=f"{name}.npy"):
            sg.open_rows(tmp_path / f"{name}.npy")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool], ids=str)
def test_safetensors_come_back_mapped_and_equal(tmp_path: Path, dtype: torch.dtype) -> None:
    want = torch.from_numpy(numbers(6, 3)).to(dtype)
    other = torch.zeros(11, dtype=torch.uint8)
    save_file({"acts": want, "other": other}, tmp_path / "x.safetensors")
    rows = sg.open_rows(tmp_path / "x.safetensors", column="acts")
    assert (rows.mapped, rows.resident_bytes, rows.dtype) == (True, 0, dtype)
    assert torch.equal(rows.read(0, 6).view(torch.uint8), want.view(torch.uint8))


def test_a_safetensors_tensor_must_be_named_unless_it_is_the_only_one(tmp_path: Path) -> None:
    save_file({"acts": torch.ones(2, 2)}, tmp_path / "one.safetensors")
    assert len(sg.open_rows(tmp_path / "one.safetensors")) == 2
    save_file({"acts": torch.ones(2, 2), "labels": torch.ones(2)}, tmp_path / "two.safetensors")
    with pytest.raises(sg.BadInput, match="'acts', 'labels'"):
        sg.open_rows(tmp_path / "two.safetensors")
    with pytest.raises(sg.BadInput, match="column='labels'"):
        sg.open_rows(tmp_path / "two.safetensors", column="label")


@pytest.mark.parametrize("damage", ["truncated", "header of a terabyte", "overlapping", "empty"])
def test_a_damaged_safetensors_is_refused_by_path(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"acts": torch.ones(20, 4), "more": torch.ones(20, 4)}, path)
    content = path.read_bytes()
    changed = {
        "truncated": content[:-8],
        "header of a terabyte": struct.pack("<Q", 2**40) + content[8:],
        "overlapping": content.replace(b"[320,640]", b"[300,620]"),
        "empty": b"",
    }[damage]
    assert changed != content
    path.write_bytes(changed)
    with pytest.raises(sg.BadInput, match=str(path)):
        sg.open_rows(path, column="acts")


@pytest.mark.parametrize("kind", ["list", "large_list", "fixed_size_list"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int32])
def test_parquet_lists_come_back_equal_over_row_groups(tmp_path: Path, kind: str, dtype: type) -> None:
    want = (numbers(250, 6) * 9).astype(dtype)
    write_parquet(tmp_path / "x.parquet", want, kind=kind, row_group_size=60)
    assert pq.ParquetFile(tmp_path / "x.parquet").num_row_groups == 5
    rows = sg.open_rows(tmp_path / "x.parquet", column="activation_layer_18")
    assert (rows.mapped, rows.resident_bytes) == (False, want.nbytes)
    assert all_of(rows).dtype == want.dtype
    np.testing.assert_array_equal(all_of(rows), want)


def test_rows_wider_than_a_batch_and_batches_of_many_rows_agree(tmp_path: Path) -> None:
    # 2**19 floats are two read batches' worth in one row; 2**17 of them make 16 rows of the other file.
    for rows, width in ((3, 2**19), (70_000, 4)):
        want = numbers(rows, width)
        write_parquet(tmp_path / "x.parquet", want)
        assert np.array_equal(all_of(sg.open_rows(tmp_path / "x.parquet")), want)


def test_parquet_parts_of_a_directory_follow_the_order_of_their_names(tmp_path: Path) -> None:
    parts = [numbers(n, 4, seed=n) for n in (5, 1, 3)]
    for name, part in zip(("c", "a", "b"), parts):
        write_parquet(tmp_path / f"part_{name}.parquet", part)
    (tmp_path / "_SUCCESS").touch()
    rows = sg.open_rows(tmp_path)
    np.testing.assert_array_equal(all_of(rows), np.concatenate([parts[1], parts[2], parts[0]]))
    assert rows.place(4) == f"{tmp_path / 'part_c.parquet'} row 0"
    assert len(sg.open_rows(tmp_path, pattern="part_[ab].parquet")) == 4


@pytest.mark.parametrize(
    ("lists", "found"),
    [
        ([[1, 2], [3, 4], [5, 6], [7]], r"row group 1, row 1 \(row 3 of the file\) has 1 values where 2"),
        ([[1, 2], [3, 4], []], r"row group 1, row 0 \(row 2 of the file\) has 0 values"),
        ([[1, 2], None, [3, 4]], r"row group 0, row 1 \(row 1 of the file\) is null"),
        ([[1, 2], [3, 4], [5, None]], r"row group 1, row 0 \(row 2 of the file\) has a null"),
        ([[], [1, 2]], r"row group 0, row 0 \(row 0 of the file\) is empty or null"),
        ([None, [1, 2]], r"row group 0, row 0 \(row 0 of the file\) is empty or null"),
    ],
    ids=["ragged", "empty", "null", "null inside", "first empty", "first null"],
)
def test_lists_that_are_no_rows_are_refused_by_row_group_and_row(
    tmp_path: Path, lists: list[list[float | None] | None], found: str
) -> None:
    write_lists(tmp_path / "x.parquet", lists, row_group_size=2)
    with pytest.raises(sg.BadInput, match=found) as caught:
        sg.open_rows(tmp_path / "x.parquet")
    assert str(tmp_path / "x.parquet") in str(caught.value)


def test_ragged_lists_whose_sizes_add_up_are_still_refused(tmp_path: Path) -> None:
    write_lists(tmp_path / "x.parquet", [[1, 2], [3], [4, 5, 6]])
    with pytest.raises(sg.BadInput, match="row 1 of the file"):
        sg.open_rows(tmp_path / "x.parquet")


def test_parts_of_another_dtype_or_width_are_refused_naming_both_files(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", numbers(3, 4))
    for other in (numbers(3, 4).astype(np.float64), numbers(3, 5)):
        write_parquet(tmp_path / "b.parquet", other)
        with pytest.raises(sg.BadInput, match=r"b\.parquet.*\n.*a\.parquet"):
            sg.open_rows(tmp_path)


def test_a_missing_column_lists_those_there_and_the_nearest(tmp_path: Path) -> None:
    write_parquet(tmp_path / "x.parquet", numbers(3, 4))
    with pytest.raises(sg.BadInput, match="the list columns 'activation_layer_18'") as caught:
        sg.open_rows(tmp_path / "x.parquet", column="activation_layer_81")
    assert "column='activation_layer_18'" in caught.value.do
    with pytest.raises(sg.BadInput, match="its type is string"):
        sg.open_rows(tmp_path / "x.parquet", column="prompt")


def test_a_column_must_be_named_where_there_are_several(tmp_path: Path) -> None:
    lists = pa.array([[1.0, 2.0]])
    pq.write_table(pa.table({"a": lists, "b": lists}), tmp_path / "x.parquet")
    with pytest.raises(sg.BadInput, match="'a', 'b'"):
        sg.open_rows(tmp_path / "x.parquet")


def test_paths_that_hold_no_rows_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("1,2\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "mixed").mkdir()
    np.save(tmp_path / "mixed" / "a.npy", numbers(2, 2))
    write_parquet(tmp_path / "mixed" / "b.parquet", numbers(2, 2))
    pq.write_table(pa.table({"x": pa.array([], pa.list_(pa.float32()))}), tmp_path / "none.parquet")
    for name in ("x.csv", "missing.npy", "empty", "mixed", "none.parquet"):
        with pytest.raises(sg.BadInput, match=name):
            sg.open_rows(tmp_path / name)


@pytest.mark.parametrize("pattern", ["", "/*.npy", "**rows.npy"])
def test_patterns_that_are_none_are_refused_by_the_option(tmp_path: Path, pattern: str) -> None:
    np.save(tmp_path / "rows.npy", np.zeros((2, 3)))
    with pytest.raises(sg.UsageError, match="pattern") as refused:
        sg.open_rows(tmp_path, pattern=pattern)
    assert refused.value.option == "pattern"


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "rows.npy")
    # A reader in the background, so that a failure is a failure and no hang.
    held = os.open(tmp_path / "rows.npy", os.O_RDWR)
    os.write(held, b"no array")
    try:
        with pytest.raises(sg.BadInput, match="no regular file"):
            sg.open_rows(tmp_path / "rows.npy")
    finally:
        os.close(held)


@pytest.mark.parametrize(("name", "found"), [("x" * 300 + ".npy", "too long"), ("a\0b.npy", "null byte|no such file")])
def test_a_path_that_cannot_be_is_refused_by_what_the_system_says(name: str, found: str) -> None:
    with pytest.raises(sg.BadInput, match=rf"(?s)rows of .*{found}"):
        sg.open_rows(name)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    lists = pa.array([[1.0]], pa.list_(pa.float32()))
    pq.write_table(pa.table([lists, lists], names=["twice", "twice"]), tmp_path / "rows.parquet")
    for column in (None, "twice"):
        with pytest.raises(sg.BadInput, match="2 columns are called 'twice'") as refused:
            sg.open_rows(tmp_path / "rows.parquet", column=column)
        assert refused.value.file == str(tmp_path / "rows.parquet")


def test_options_that_do_not_apply_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", numbers(2, 2))
    with pytest.raises(sg.UsageError, match="column"):
        sg.open_rows(tmp_path / "x.npy", column="acts")
    with pytest.raises(sg.UsageError, match="path is a file"):
        sg.open_rows(tmp_path / "x.npy", pattern="*.npy")


@pytest.mark.parametrize("package", ["pyarrow", "safetensors"])
def test_a_missing_package_is_named_with_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    write_parquet(tmp_path / "x.parquet", numbers(2, 2))
    save_file({"x": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    for module in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)  # type: ignore[arg-type]
    with pytest.raises(sg.EnvironmentProblem, match=r"pip install 'samegrad\[recipes\]'"):
        sg.open_rows(tmp_path / ("x.parquet" if package == "pyarrow" else "x.safetensors"))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), kind=st.sampled_from(["x.npy", "x.safetensors", "x.parquet"]))
def test_files_with_changed_bytes_are_read_or_refused_by_path(tmp_path: Path, data: st.DataObject, kind: str) -> None:
    path = tmp_path / kind
    np.save(tmp_path / "x.npy", numbers(4, 3))
    save_file({"x": torch.ones(4, 3)}, tmp_path / "x.safetensors")
    write_parquet(tmp_path / "x.parquet", numbers(4, 3))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)) | st.just(len(content)))])
    try:
        rows = sg.open_rows(path)
    except sg.BadInput as refused:
        assert str(path) in str(refused)
    else:
        assert rows.read(0, len(rows)).shape == rows.shape


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 7, 9])
def test_check_rows_names_the_first_row_that_is_not_finite(tmp_path: Path, value: float, row: int) -> None:
    array = numbers(10, 3)
    np.save(tmp_path / "good.npy", array)
    array[row, 1] = array[9, 2] = value
    np.save(tmp_path / "wrong.npy", array)
    check_rows(sg.open_rows(tmp_path / "good.npy"), partition_rows=4)
    with pytest.raises(sg.BadInput, match=rf"row {row} \(.*wrong\.npy row {row}\) holds (nan|-?inf)") as caught:
        check_rows(sg.open_rows(tmp_path / "wrong.npy"), partition_rows=4)
    assert "position (1,)" in str(caught.value)


def test_check_rows_counts_in_the_order_given_and_reads_narrow_dtypes() -> None:
    array = numbers(6, 2)
    array[1, 0] = np.nan
    with pytest.raises(sg.BadInput, match=r"row 2 .*row 1"):
        check_rows(Rows(array).subset([5, 0, 1]))
    eight_bits = torch.tensor([[0.5], [float("nan")]]).to(torch.float8_e4m3fn)
    with pytest.raises(sg.BadInput, match=r"row 1 .*nan"):
        check_rows(Rows(eight_bits))
    check_rows(Rows(np.arange(4)))


def test_errors_survive_the_way_out_of_a_worker(tmp_path: Path) -> None:
    write_lists(tmp_path / "x.parquet", [[1, 2], [3]])
    with pytest.raises(sg.BadInput) as caught:
        sg.open_rows(tmp_path / "x.parquet")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
