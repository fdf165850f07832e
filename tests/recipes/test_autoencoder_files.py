"""Rows that no autoencoder can be trained on: refused by path before training, exit code 3, wherever they stand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import samegrad as sg
from samegrad.cli.main import main
from samegrad.recipes.autoencoder.options import AutoencoderOptions
from samegrad.recipes.autoencoder.splits import open_splits

ROWS, WIDTH = 40, 6
SOUND = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)


def save(values: np.ndarray) -> Callable[[Path], object]:
    return lambda path: np.save(path, values)


def with_one(row: int, value: float, dtype: type = np.float32) -> np.ndarray:
    values = SOUND.astype(dtype)
    values[row, 3] = value
    return values


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-8]), "the header says 40 rows"),
    "zero bytes": (lambda path: path.write_bytes(b""), "no readable .npy header"),
    "three axes": (save(SOUND.reshape(ROWS, 3, 2)), r"\(40, 3, 2\)"),
    "one axis": (save(SOUND[:, 0]), r"\(40,\)"),
    "no numbers a row": (save(SOUND[:, :0]), r"\(40, 0\)"),
    "complex": (save(SOUND.astype(np.complex64)), "complex64"),
    "too large for float32": (save(with_one(7, 1e300, np.float64)), "row .* holds inf"),
    "infinite": (save(with_one(7, -np.inf)), "row .* holds -inf"),
}


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_rows_are_refused_by_their_path(fault: str, tmp_path: Path) -> None:
    spoil, told = WRONG[fault]
    path = tmp_path / "rows.npy"
    np.save(path, SOUND)
    assert len(open_splits(AutoencoderOptions(data_root=path)).train) == ROWS // 2
    spoil(path)
    with pytest.raises(sg.BadInput, match=told) as refused:
        open_splits(AutoencoderOptions(data_root=path))
    assert str(path) in str(refused.value) and refused.value.exit_code == 3


@pytest.mark.parametrize("row", range(0, ROWS, 3))
def test_a_row_that_is_not_finite_is_named_on_whichever_side_of_the_split_it_is(row: int, tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    np.save(path, with_one(row, np.nan))
    with pytest.raises(sg.BadInput, match=rf"row {row} .*holds nan at position \(3,\)") as refused:
        open_splits(AutoencoderOptions(data_root=path))
    assert str(path) in str(refused.value)


def test_of_parquet_files_the_layers_column_is_checked(tmp_path: Path) -> None:
    for number, values in enumerate((SOUND, with_one(4, np.nan))):
        column = pa.array(list(values), pa.list_(pa.float32()))
        pq.write_table(pa.table({"activation_layer_0": column}), tmp_path / f"{number}.parquet")
    with pytest.raises(sg.BadInput, match=r"1\.parquet"):
        open_splits(AutoencoderOptions(data_root=tmp_path, layer_for_activation=0))


def test_a_row_that_is_not_finite_ends_the_command_with_code_3_and_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.npy"
    np.save(path, with_one(0, np.nan))
    line = f"run autoencoder --data_root {path} --latent_dim 2 --num_epochs 1 --device cpu --output {tmp_path / 'run'}"
    assert main(line.split()) == 3
    told = capsys.readouterr().err
    assert str(path) in told and "row 0" in told and "do:" in told and "Traceback" not in told
