"""The training program: batches, the values that it is judged by, and the plan in the document's words."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import samegrad as sg
from samegrad.recipes._recipe import Program, needed_for_pictures

from . import judging
from .model import KernelModel, draw_samples, implicit_matching, score_of
from .objective import Batch, evaluated_means
from .options import TEST_BATCHES, ScoreKernelOptions
from .parallel import Across, visible_devices
from .results import write_results
from .splits import PointSets, noised
from .strategies import Strategy, documents_choice, memory_estimate, strategy_of
from .toys import eight_gaussians_optimum, eight_gaussians_score

# What is validated and saved at once: an epoch of this program.
EPOCH_ITERATIONS = 50
JUDGED_SAMPLES = 1000


def epochs_of(options: ScoreKernelOptions) -> int:
    """Epochs in which all iterations are done; the last one may be shorter."""
    return -(-options.niters // EPOCH_ITERATIONS)


@dataclasses.dataclass(kw_only=True)
class ScoreKernelProgram(Program):
    """Implicit score matching on ``points``: an epoch is fifty iterations, each with samples of its own.

    ``centers`` are those of this process; ``across`` says how they are shared out, None where they are not.
    """

    unit = "iteration"

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

    def units_in(self, epochs: int) -> int:
        return min(epochs * EPOCH_ITERATIONS, self.options.niters)

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
        with needed_for_pictures():
            return write_results(self, folder)

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
            rule = documents_choice(need_bytes, plan.budget.total_bytes, max(strategy.places, self._visible))
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
        places, sizes = 1 if self.across is None else self.across.places, self.center_sizes
        return strategy_of(
            self.options, chunk_size=max(sizes), steps=len(sizes), places=places, plan=plan, visible=self._visible
        )

    @property
    def _visible(self) -> int:
        """Devices that this process could share the centers out over."""
        return len(visible_devices(self.options.devices, self.step.declared.device))

    def state(self) -> dict[str, Any]:
        return {**super().state(), "history": self.history}

    def load_state(self, state: Mapping[str, Any], best_weights: dict[str, Tensor]) -> None:
        super().load_state(state, best_weights)
        self.history = [(train, validation) for train, validation in state["history"]]

    @property
    def iterations_done(self) -> list[int]:
        """After how many iterations each entry of ``history`` was."""
        return [self.units_in(n + 1) for n in range(len(self.history))]

    @property
    def center_sizes(self) -> Sequence[int]:
        """Centers of every chunk of a training step, at the place that has the most."""
        if self.across is not None:
            most = self.points.centers.tensor_split(self.across.places)[0]
            return [len(part) for part in torch.split(most, self.across.rows)]
        # As many samples as in training, for which the plan was made.
        samples = self.points.train[torch.arange(self.options.batch_size) % len(self.points.train)]
        return self.step.sizes_for({"centers": self.centers, "samples": samples})

    @property
    def center_rows(self) -> int:
        """Centers at a time in a training step; what fits with gradients fits without."""
        return max(self.center_sizes)

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
