"""Kernel score model whose softmax couples all centers: exact implicit score matching in any memory (document 002).

One optimizer step an iteration, on the implicit score matching loss of a batch of samples under kernels at *all*
centers; a plan runs so many centers at a time, streams them through their softmax, and keeps none.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import samegrad as sg
from samegrad.recipes._recipe import Cell, Program, Recipe

from . import judging
from .faces import setup_chunked_training, setup_gradient_accumulation_training, setup_model_parallel_training
from .model import FactorNet, KernelModel, draw_samples, implicit_matching, score_of
from .objective import Batch, evaluated_means
from .options import TEST_BATCHES, ScoreKernelOptions
from .parallel import Across, AcrossDevices, AcrossRanks, joined_ranks, ranks_asked, visible_devices
from .planning import plan_across, plan_on_one
from .results import write_results
from .schedule import learning_rates
from .splits import INSTALL, PointSets, noised, open_points, read_state
from .start import begin_at_covariance
from .strategies import Strategy, documents_choice, memory_estimate, strategy_of
from .strategy_table import strategy_table
from .toys import eight_gaussians_optimum, eight_gaussians_score

__all__ = [
    "RECIPE",
    "ScoreKernelProgram",
    "build",
    "setup_chunked_training",
    "setup_gradient_accumulation_training",
    "setup_model_parallel_training",
    "table",
]

# What is validated and saved at once: an epoch of this program.
EPOCH_ITERATIONS = 50
JUDGED_SAMPLES = 1000

_log = logging.getLogger("samegrad")


@dataclasses.dataclass(kw_only=True)
class ScoreKernelProgram(Program):
    """Implicit score matching on ``points``: an epoch is fifty iterations, each with samples of its own.

    ``centers`` are those of this process; ``across`` says how they are shared out, None where they are not.
    """

    model: KernelModel
    options: ScoreKernelOptions
    points: PointSets
    centers: Tensor
    rates: tuple[float, ...]
    across: Across | None = None
    of_shard: sg.Footprint | None = None
    places_error: float | None = None
    history: list[tuple[float, float]] = dataclasses.field(default_factory=list)

    def batches(self, epoch: int) -> Iterator[Batch]:
        first = epoch * EPOCH_ITERATIONS
        draws = np.random.default_rng([self.options.random_seed, epoch])
        for iteration in range(first, min(first + EPOCH_ITERATIONS, self.options.niters)):
            chosen = draws.integers(len(self.points.train), size=self.options.batch_size)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rates[iteration]
            samples = noised(self.points.train[torch.from_numpy(chosen)], self.options.noise_deviation, draws)
            yield {"centers": self.centers, "samples": samples}

    def validate(self) -> float:
        validation = self.points.validation
        value = self._matching(validation)
        self.history.append((self._matching(self._training_like(len(validation))), value))
        return value

    def evaluate(self) -> dict[str, float]:
        test = self.points.test
        batches = torch.tensor([self._matching(part) for part in test.chunk(TEST_BATCHES)], dtype=torch.float64)
        drawn = self.drawn
        known = torch.cat([self.points.train, self.points.centers])
        found = {
            "ism": float(batches.mean()),
            "ism_std": float(batches.std()),
            "gaussian_ism": judging.gaussian_matching(self._training_like(len(self.points.train)), test),
            "energy_distance": judging.energy_distance(drawn, test),
            "energy_distance_of_training": judging.energy_distance(self._training_like(JUDGED_SAMPLES), test),
            "memorisation_ratio": judging.memorisation_ratio(drawn, test, known),
            "test_samples": len(test),
        }
        if self.options.data == "8gaussians":
            found |= self._against_the_truth(test)
        return found

    def write(self, folder: Path) -> list[Path]:
        try:
            return write_results(self, folder)
        except ModuleNotFoundError as error:
            raise sg.EnvironmentProblem(asked="the pictures of the run", found=str(error), do=INSTALL) from None

    def describe(self) -> list[str]:
        points, options = self.points, self.options
        parameters = sum(p.numel() for p in self.model.parameters())
        left_out = ", each without weight at itself" if options.centers == "leave_one_out" else ""
        return [
            f"points: {points.described}, {points.dim} numbers each; centers, training, validation, test: "
            f"{len(points.centers)}{left_out}, {len(points.train)}, {len(points.validation)}, {len(points.test)}",
            f"model: factor network {points.dim} - {options.depth} x {options.hiddenunits} - "
            f"{points.dim * (points.dim + 1) // 2}, {parameters:,} parameters; diagonal at least {options.stability:g}",
            f"objective: implicit score matching, one softmax over all centers; {options.batch_size} samples a step, "
            f"{options.dtype}",
            f"optimizer: AdamW, learning rate up to {options.lr:g} ({options.scheduler_type}), "
            f"weight decay {options.weight_decay:g}, gradients scaled down to norm {options.max_grad_norm:g}",
        ]

    def told_of(self, plan: sg.Plan, footprint: sg.Footprint) -> list[str]:
        """The plan in the document's words: its strategy, what its rule would have said, and its memory estimate."""
        strategy = self.strategy(plan)
        alone, centers = self.of_shard or footprint, self.points.centers
        need_bytes = max(law.peak_bytes(rows=len(centers), batch_rows=len(centers)) for law in alone.plain_laws)
        places = f" on each of {strategy.places} devices" if strategy.places > 1 else ""
        told = [
            f"Strategy: {strategy.name}, {strategy.chunk_size} centers at a time in {strategy.steps} "
            f"{'chunk' if strategy.steps == 1 else 'chunks'}{places}: {strategy.reason}.",
        ]
        if plan.budget is not None:
            rule = documents_choice(need_bytes, plan.budget.total_bytes, strategy.places)
            told.append(
                f"The document's 80 / 60 / 150 % rule on {sg.format_bytes(need_bytes)} for all centers at once: {rule}."
            )
        estimate = memory_estimate(
            alone,
            rows=strategy.chunk_size,
            centers=len(centers),
            dim=self.points.dim,
            itemsize=centers.element_size(),
            parameter_bytes=sum(p.nbytes for p in self.model.parameters()),
            total_bytes=plan.predicted_peak_bytes or 0,
        )
        if self.places_error is not None:
            told.append(
                f"Over these places a small model of this kind has the plain gradient, in float64, within "
                f"{self.places_error:.1e}."
            )
        return [*told, *estimate.lines()]

    def strategy(self, plan: sg.Plan) -> Strategy:
        """The document's name for how ``plan`` runs."""
        places = 1 if self.across is None else self.across.places
        here = -(-len(self.points.centers) // places)
        chunks = -(-here // self.center_rows)
        return strategy_of(
            self.options, chunk_size=min(self.center_rows, here), steps=chunks, places=places, plan=plan
        )

    def state(self) -> dict[str, Any]:
        return {**super().state(), "history": self.history}

    def load_state(self, state: Mapping[str, Any], best_weights: dict[str, Tensor]) -> None:
        super().load_state(state, best_weights)
        self.history = [(train, validation) for train, validation in state["history"]]

    @property
    def iterations_done(self) -> list[int]:
        """After how many iterations each entry of ``history`` was."""
        return [min((n + 1) * EPOCH_ITERATIONS, self.options.niters) for n in range(len(self.history))]

    @property
    def center_rows(self) -> int:
        """Centers at a time in a training step; what fits with gradients fits without."""
        if self.across is not None:
            return self.across.rows
        # As many samples as in training, for which the plan was made.
        samples = self.points.train[torch.arange(self.options.batch_size) % len(self.points.train)]
        return max(self.step.sizes_for({"centers": self.centers, "samples": samples}))

    @functools.cached_property
    def drawn(self) -> Tensor:
        """Samples of the model, (1000, D), with the weights it has when it is first asked."""
        generator = torch.Generator().manual_seed(self.options.random_seed + 1)
        return draw_samples(
            self.model.factornet, self.points.centers, JUDGED_SAMPLES, stability=self.options.stability,
            generator=generator,
        )  # fmt: skip

    def means_of(self, samples: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Log-sum-exp (N,) and means of ``samples`` (N, D) under the model now."""
        return evaluated_means(
            self.model, samples, self.points.centers, rows=self.center_rows, batch_size=self.options.batch_size
        )

    def _training_like(self, count: int) -> Tensor:
        """The first ``count`` training samples with noise, the same each time."""
        draws = np.random.default_rng(self.options.random_seed)
        return noised(self.points.train[:count], self.options.noise_deviation, draws)

    def _matching(self, samples: Tensor) -> float:
        return float(implicit_matching(self.means_of(samples)[1]).mean(dtype=torch.float64))

    def _against_the_truth(self, test: Tensor) -> dict[str, float]:
        """For a known density: its own loss on the test points, and the mean squared distance of the scores."""
        points = test.double().cpu().numpy()
        truth = torch.from_numpy(eight_gaussians_score(points))
        away = score_of(self.means_of(test)[1]).double().cpu() - truth
        return {
            "ism_of_true_score": eight_gaussians_optimum(points),
            "score_error": float(away.square().sum(1).mean()),
        }


def build(options: ScoreKernelOptions) -> ScoreKernelProgram:
    """The program of ``options``. Raises BadInput, UsageError, EnvironmentProblem and what planning raises."""
    device, ranks = sg.find_device(options.device), ranks_asked()
    group = None
    if ranks > 1:
        _check_ranks(options, ranks)
        group, device = joined_ranks(device, options.process_timeout)
    points = _on(device, open_points(options))
    model = _make_model(options, points.dim).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=options.lr, weight_decay=options.weight_decay, fused=device.type == "cuda"
    )
    if options.max_grad_norm:
        optimizer.register_step_pre_hook(functools.partial(_clip, options.max_grad_norm))
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
        epochs=-(-options.niters // EPOCH_ITERATIONS),
        empty_cache=options.empty_cache,
        options=options,
        points=points,
        centers=planned.centers,
        rates=learning_rates(options),
        across=planned.across,
        of_shard=planned.of_shard,
        places_error=planned.places_error,
    )


def _check_ranks(options: ScoreKernelOptions, ranks: int) -> None:
    if options.strategy not in ("auto", "model_parallel"):
        raise sg.UsageError(
            asked=f"--strategy {options.strategy} under torchrun with {ranks} processes",
            found="each of them would train a model of its own",
            do="give --strategy model_parallel, or start one process",
            option="strategy",
        )
    if options.train_kernel_size < ranks:
        raise sg.UsageError(
            asked=f"{options.train_kernel_size} centers over {ranks} processes",
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
        dtype=torch.float64 if options.dtype == "float64" else torch.float32,
    )
    if options.load_model_path is not None:
        try:
            factornet.load_state_dict(read_state(options.load_model_path))
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


def _clip(norm: float, optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Before each optimizer step, once, on the total gradient."""
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], norm)


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
