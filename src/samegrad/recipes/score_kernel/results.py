"""What a run leaves behind: weights and centers in two formats, and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
from torch import Tensor

import samegrad as sg
from samegrad.recipes._recipe.written import save_picture, save_weights

from .model import KernelModel, log_density
from .options import ScoreKernelOptions
from .splits import PointSets
from .toys import eight_gaussians_optimum

# Points a side at which a density is drawn.
GRID = 120
SHOWN_PICTURES = 8


class Finished(Protocol):
    """What is shown of a program."""

    model: KernelModel
    options: ScoreKernelOptions
    points: PointSets
    history: list[tuple[float, float]]

    @property
    def drawn(self) -> Tensor: ...

    @property
    def iterations_done(self) -> list[int]: ...

    def means_of(self, samples: Tensor) -> tuple[Tensor, dict[str, Tensor]]: ...


def write_results(program: Finished, folder: Path) -> list[Path]:
    """Writes weights, centers and pictures into ``folder``, then weights and centers into ``--save`` too; their paths.

    Raises ModuleNotFoundError without matplotlib, EnvironmentProblem where ``--save`` cannot be written.
    """
    from . import pictures

    written = write_weights(program.model, program.points.centers, folder)
    if program.history:
        curve = pictures.draw_losses(program.iterations_done, program.history, _optimum(program))
        written.append(save_picture(curve, folder / "matching_loss.png"))
    drawn, points = program.drawn.double().cpu().numpy(), program.points
    test = points.test.double().cpu().numpy()
    if points.image_shape is not None:
        figure = pictures.draw_pictures(drawn[:SHOWN_PICTURES], _nearest(program), points.image_shape)
    else:
        figure = pictures.draw_samples(drawn, test, points.centers.double().cpu().numpy())
    written.append(save_picture(figure, folder / "samples.png"))
    if points.dim == 2:
        extent = 1.15 * float(abs(test).max())
        density, centers = _log_density_on_grid(program, extent), points.centers.double().cpu().numpy()
        contours = pictures.draw_density(density, extent, test, centers)
        written.append(save_picture(contours, folder / "density.png"))
    if program.options.save is not None:
        # Last, so that the run has its own files whatever stands in the way there.
        written += _write_copy(program, program.options.save)
    return written


def _write_copy(program: Finished, folder: Path) -> list[Path]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return write_weights(program.model, program.points.centers, folder)
    except OSError as error:
        raise sg.EnvironmentProblem(
            asked=f"--save {folder}",
            found=error.strerror or str(error),
            do="give the same run --resume with another --save; the weights are in its own folder already",
            file=str(folder),
            option="save",
        ) from error


def write_weights(model: KernelModel, centers: Tensor, folder: Path) -> list[Path]:
    """``factornet`` and ``centers``, each as safetensors and as a ``.pt`` that loads with ``weights_only=True``."""
    on_host = centers.detach().cpu().contiguous().clone()
    paths = [folder / "centers.safetensors", folder / "centers.pt"]
    safetensors.torch.save_file({"centers": on_host}, paths[0])
    torch.save(on_host, paths[1])
    return [*save_weights(model.factornet, folder, "factornet"), *paths]


def _optimum(program: Finished) -> float | None:
    """The matching loss of the true score on the validation samples, where the density is known."""
    if program.options.data != "8gaussians":
        return None
    return eight_gaussians_optimum(program.points.validation.double().cpu().numpy())


def _nearest(program: Finished) -> Any:
    """To each shown sample the training point next to it: what is memorised looks the same."""
    known = torch.cat([program.points.centers, program.points.train])
    shown = program.drawn[:SHOWN_PICTURES]
    return known[torch.cdist(shown.double(), known.double()).argmin(1)].double().cpu().numpy()


def _log_density_on_grid(program: Finished, extent: float) -> Any:
    """log η on a square grid of side 2 ``extent``, (GRID, GRID), rows from below."""
    centers = program.points.centers
    line = torch.linspace(-extent, extent, GRID, dtype=centers.dtype)
    y, x = torch.meshgrid(line, line, indexing="ij")
    lse, _ = program.means_of(torch.stack([x.flatten(), y.flatten()], dim=1))
    return log_density(lse, len(centers), 2).reshape(GRID, GRID).double().cpu().numpy()
