"""What is judged and kept at the end of a run: errors of rows, weights in two formats, pictures."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from samegrad.recipes._recipe.written import save_picture, save_weights

from .data import ReadRows, partitions

SHOWN_ROWS = 8


@torch.no_grad()
def row_errors(reconstruct: Callable[[Tensor], Tensor], rows: ReadRows, partition_rows: int) -> Tensor:
    """The mean squared error of every row, (N,) float64 on the host; one partition is on the device at a time.

    ``reconstruct`` takes rows (B, D) on the host and returns reconstructions (B, D) on any device.
    """
    errors = torch.empty(len(rows), dtype=torch.float64)
    for start, stop in partitions(len(rows), partition_rows):
        read = rows.read(start, stop)
        reconstructed = reconstruct(read)
        squares = (reconstructed - read.to(reconstructed.device)).square_()
        errors[start:stop] = squares.mean(dim=1, dtype=torch.float64)
    return errors


def mean_squared_error(reconstruct: Callable[[Tensor], Tensor], rows: ReadRows, partition_rows: int) -> float:
    """The mean squared error over all elements: a row counts the same in a short partition as in a full one."""
    return float(row_errors(reconstruct, rows, partition_rows).mean())


def write_results(
    model: nn.Module, folder: Path, *, test: ReadRows, errors: Tensor, pca_test_mse: float
) -> list[Path]:
    """Writes the weights twice (safetensors, and a ``.pt`` for ``weights_only=True``) and the pictures; their paths.

    ``errors`` (N,) are those of the test rows. Sample reconstructions are drawn where rows are squares. Raises
    ModuleNotFoundError without matplotlib.
    """
    from . import pictures

    written = save_weights(model, folder, "autoencoder")
    histogram = pictures.draw_histogram(errors.numpy(), pca_mse=pca_test_mse)
    written.append(save_picture(histogram, folder / "reconstruction_error_histogram.png"))
    shown = test.read(0, min(SHOWN_ROWS, len(test)))
    if math.isqrt(shown.shape[1]) ** 2 == shown.shape[1]:
        with torch.no_grad():
            rebuilt = model(shown.to(next(model.parameters()).device)).cpu()
        figure = pictures.draw_reconstructions(shown.double().numpy(), rebuilt.double().numpy())
        written.append(save_picture(figure, folder / "reconstructions.png"))
    return written
