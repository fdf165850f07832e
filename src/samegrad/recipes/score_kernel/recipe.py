"""Kernel score model whose softmax couples all centers: exact implicit score matching in any memory (document 002).

One optimizer step an iteration, on the implicit score matching loss of a batch of samples under kernels at *all*
centers; a plan runs so many centers at a time, streams them through their softmax, and keeps none.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

import samegrad as sg
from samegrad.recipes._recipe import Cell, Recipe
from samegrad.recipes._recipe.clipping import clip_before_step
from samegrad.recipes._recipe.precision import weight_dtype
from samegrad.recipes._recipe.tensor_files import read_tensors

from .faces import setup_chunked_training, setup_gradient_accumulation_training, setup_model_parallel_training
from .model import FactorNet, KernelModel
from .options import ScoreKernelOptions
from .parallel import Across, AcrossDevices, AcrossRanks, joined_ranks, ranks_asked, visible_devices
from .planning import plan_across, plan_on_one
from .program import ScoreKernelProgram, epochs_of
from .schedule import learning_rates
from .splits import PointSets, noised, open_points
from .start import begin_at_covariance
from .strategy_table import strategy_table

__all__ = [
    "RECIPE",
    "ScoreKernelProgram",
    "build",
    "setup_chunked_training",
    "setup_gradient_accumulation_training",
    "setup_model_parallel_training",
    "table",
]

_log = logging.getLogger("samegrad")


def build(options: ScoreKernelOptions) -> ScoreKernelProgram:
    """The program of ``options``. Raises BadInput, UsageError, EnvironmentProblem and what planning raises."""
    device, ranks = sg.find_device(options.device), ranks_asked()
    group, opened = None, open_points(options)
    if ranks > 1:
        _check_ranks(options, ranks, centers=len(opened.centers))
        group, device = joined_ranks(device, options.process_timeout)
    points = _on(device, opened)
    model = _make_model(options, points.dim).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.lr, weight_decay=options.weight_decay, fused=device.type == "cuda"
    )
    clip_before_step(optimizer, options.max_grad_norm)
    if options.start == "covariance" and options.load_model_path is None:
        draws = np.random.default_rng(options.random_seed)
        begin_at_covariance(
            model, noised(points.train, options.noise_deviation, draws), points.centers,
            batch_size=options.batch_size,
        )  # fmt: skip
    across = _across(options, device, group)
    samples = points.train[: options.batch_size]
    if across is None:
        planned = plan_on_one(options, model, optimizer, points.centers, samples)
    else:
        planned = plan_across(options, model, optimizer, points.centers, samples, across)
    return ScoreKernelProgram(
        step=planned.step,
        model=model,
        optimizer=optimizer,
        best=sg.BestWeights(model, patience=None),
        epochs=epochs_of(options),
        empty_cache=options.empty_cache,
        options=options,
        points=points,
        centers=planned.centers,
        rates=learning_rates(options),
        across=planned.across,
        of_shard=planned.of_shard,
        places_error=planned.places_error,
    )


def _check_ranks(options: ScoreKernelOptions, ranks: int, *, centers: int) -> None:
    if options.strategy not in ("auto", "model_parallel"):
        raise sg.UsageError(
            asked=f"--strategy {options.strategy} under torchrun with {ranks} processes",
            found="each of them would train a model of its own",
            do="give --strategy model_parallel, or start one process",
            option="strategy",
        )
    if centers < ranks:
        raise sg.UsageError(
            asked=f"{centers} centers over {ranks} processes",
            found="a process would have none",
            do="raise --train_kernel_size, or start fewer processes",
            option="train_kernel_size",
        )


def _across(options: ScoreKernelOptions, device: torch.device, group: Any) -> Across | None:
    """Over what the centers are shared out; None for one device."""
    if group is not None:
        return AcrossRanks(group, rows=1)
    if options.strategy != "model_parallel" and not options.devices:
        return None
    devices = visible_devices(options.devices, device)
    if len(devices) == 1:
        _log.warning("samegrad: --strategy model_parallel has one device here (%s), which streams all centers", device)
        return None
    return AcrossDevices(devices, rows=1)


def _on(device: torch.device, points: PointSets) -> PointSets:
    names = ("centers", "train", "validation", "test")
    return dataclasses.replace(points, **{name: getattr(points, name).to(device) for name in names})


def _make_model(options: ScoreKernelOptions, dim: int) -> KernelModel:
    factornet = FactorNet(
        dim,
        hidden=options.hiddenunits,
        depth=options.depth,
        generator=torch.Generator().manual_seed(options.random_seed),
        dtype=weight_dtype(options.dtype),
    )
    if options.load_model_path is not None:
        try:
            factornet.load_state_dict(read_tensors(options.load_model_path, what="weights"))
        except RuntimeError as error:
            raise sg.BadInput(
                asked=f"--load_model_path {options.load_model_path}",
                found=f"weights of another network ({' '.join(str(error).split())[:200]})",
                do="give the same --data, --depth and --hiddenunits as the run that wrote them",
                file=str(options.load_model_path),
            ) from None
    return KernelModel(
        factornet, stability=options.stability, leave_one_out=options.centers == "leave_one_out"
    )


def table(options: ScoreKernelOptions) -> list[Mapping[str, Cell]]:
    """The document's four strategies on this data: bytes, time and what crosses, beside its own estimate and error."""
    plain = dataclasses.replace(
        options, strategy="single_gpu", chunk_size=None, accumulation_steps=None, budget=None, devices=()
    )
    program = build(plain)
    return strategy_table(program.step, next(program.batches(0)), program.model)


RECIPE = Recipe(
    name="score_kernel",
    summary=__doc__.splitlines()[0],
    document="002",
    options=ScoreKernelOptions,
    build=build,
    table=table,
    pins={"chunk_size": "split_rows.rows", "accumulation_steps": "split_rows.rows"},
    troubleshooting=(
        "Out of memory: fewer centers (--train_kernel_size) is another model. Centers that are not run now cost "
        "nothing but themselves, so give --budget first.",
        "A smaller --batch_size saves little: beside the factors of the centers at a time a sample is small.",
        "--strategy chunked with a smaller --chunk_size holds fewer factors; gradient and loss stay those of all "
        "centers.",
        "--strategy gradient_accumulation with more --accumulation_steps is the same computation under another name.",
        "The floor is weights, gradients and optimizer state, 16 bytes a parameter with AdamW; the last layer has "
        "hiddenunits x D (D + 1) / 2 of them, so a smaller --hiddenunits is what lowers it, as another model.",
        "Slow with several GPUs: --strategy model_parallel shares the centers out; torchrun runs one process a GPU.",
        "Slow in chunks: raise --chunk_size or leave it out; each chunk reads all weights of the last layer once.",
        "Slow with many accumulation steps: lower --accumulation_steps or leave it out.",
        "The loss falls without end: a sample is one of the centers. --centers leave_one_out, or centers of their own.",
    ),
)
