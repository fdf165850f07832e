"""Vector-quantised autoencoder of machine sounds that finds anomalous ones, with exact BatchNorm (document 003).

Trained on normal clips only: patches of log-mel spectrograms are reconstructed through a codebook, and two heads tell
the machine id and how the clip was transformed. A clip that is reconstructed badly, or by rare codes, is anomalous. A
row of a batch is a clip with all its patches.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import samegrad as sg
from samegrad.recipes._recipe import Program, Recipe, needed_for_pictures
from samegrad.recipes._recipe.precision import autocast

from .data import Batch, Clips, shuffled_batches
from .declared import make_model, make_objective, make_optimizer, make_step, narrow_dtype
from .model import Objective, Outputs, VQSpectrogram
from .options import VQSpectrogramOptions
from .results import Results, write_pictures, write_scores, write_weights
from .schedule import phases, stage_of
from .scores import Judged, code_scores, code_usage, judge_clips, judging, mean_scores, perplexity, score_machines
from .sources import Splits, open_splits
from .table import table

# Keys of draws: training and validation clips share none.
_TRAINED, _VALIDATED = 0, 1
# Clips that are run at a time where nothing is kept for backward.
_JUDGED_ROWS = 8


@dataclasses.dataclass(kw_only=True)
class VQSpectrogramProgram(Program):
    """Training on the normal clips of ``splits``: a batch is a logical one, and one optimizer step."""

    model: VQSpectrogram
    objective: Objective
    options: VQSpectrogramOptions
    splits: Splits

    def start(self) -> None:
        if self.options.codebook_start == "data":
            self.model.codebook.begin_at(self._latents_of_clips())

    def begin_epoch(self, epoch: int) -> None:
        stage = stage_of(self.options, epoch)
        self.objective.vq_scale, self.objective.heads_scale = stage.vq_scale, stage.heads_scale
        for group in self.optimizer.param_groups:
            group["lr"] = stage.lr
        self.model.train()
        self.model.codebook.train(stage.codebook_learns)

    def batches(self, epoch: int) -> Iterable[Batch]:
        seed, clips = self.options.random_seed, self.splits.train
        for indices in shuffled_batches(len(clips.clips), self.options.logical_clips, seed=seed, epoch=epoch):
            yield self._batch(clips, indices, key=(seed, _TRAINED, epoch))

    def validate(self) -> float:
        """The full loss on the validation clips, whose transformations are the same in every epoch."""
        whole, clips = make_objective(self.options), self.splits.validation
        total, count = 0.0, len(clips.clips)
        with judging(self.model):
            for start in range(0, count, _JUDGED_ROWS):
                places = range(start, min(start + _JUDGED_ROWS, count))
                batch = self._batch(clips, places, key=(self.options.random_seed, _VALIDATED))
                here = {name: tensor.to(self.step.declared.device) for name, tensor in batch.items()}
                total += float(whole(self.run(here["patches"]), here)) * len(places)
        return total / count

    def evaluate(self) -> dict[str, float]:
        results = self._judged()
        chosen = self.options.chosen_score
        found: dict[str, float] = {}
        for name, machines in results.machines.items():
            auc, pauc = mean_scores(machines)
            if name == chosen:
                found |= {"auc": auc, "pauc": pauc}
            found |= {f"auc_{name}": auc, f"pauc_{name}": pauc}
        for one in results.machines[chosen]:
            found[f"auc {one.machine}"] = one.auc
        return found | {
            "codebook_perplexity": perplexity(code_usage(results.judged.codes, self.options.num_codes)),
            "test_clips": len(results.clips.clips),
        }

    def write(self, folder: Path) -> list[Path]:
        results = self._judged()
        patching = self.splits.patching
        with needed_for_pictures(), judging(self.model):
            drawn = write_pictures(results, self.run, patching, folder)
        return [*write_weights(self.model, patching, folder), *write_scores(results, folder), *drawn]

    def describe(self) -> list[str]:
        options, splits = self.options, self.splits
        parts = ", ".join(str(len(part.clips)) for part in (splits.train, splits.validation, splits.test))
        parameters = sum(p.numel() for p in self.model.parameters()) + self.model.codebook.sums.numel()
        full_from, frozen_from = phases(options)
        norm = "BatchNorm" if options.norm == "batch" else "GroupNorm (another model than the document's)"
        stages = f"heads from epoch {full_from}, codebook frozen from epoch {frozen_from}"
        return [
            f"clips: {splits.described}; train, validation, test: {parts}; {len(splits.machines)} machine ids",
            f"rows: a clip with {options.clip_patches} patches of {options.patch_len} frames, stride "
            f"{options.patch_stride}; {options.logical_clips} clips an optimizer step "
            f"({options.batch_clips} x {options.gradient_accumulation_steps})",
            f"model: {parameters:,} parameters, codebook {options.num_codes} x {options.latent_dim} included; {norm}",
            f"training: AdamW, learning rate {options.lr:g}, {options.total_epochs} epochs, "
            + ("one stage" if options.no_staged_training else stages),
        ]

    def run(self, patches: Tensor) -> Outputs:
        """The model on patches (B, N, 1, H, W) of any device, computed as in training."""
        device = self.step.declared.device
        with autocast(narrow_dtype(self.options, device), device):
            outputs: Outputs = self.model(patches.to(device, next(self.model.parameters()).dtype))
        return outputs

    def _batch(self, clips: Clips, indices: Sequence[int], *, key: Sequence[int]) -> Batch:
        batch = self.splits.patching.batch(clips, indices, self.splits.machines, key=key)
        dtype = next(self.model.parameters()).dtype
        return {name: t.to(dtype) if t.is_floating_point() else t for name, t in batch.items()}

    @torch.no_grad()
    def _latents_of_clips(self) -> Tensor:
        """(K, D): latents of places drawn from a few training clips, each clip's patches at once."""
        draws = torch.Generator().manual_seed(self.options.random_seed)
        clips = self.splits.train
        places = torch.randperm(len(clips.clips), generator=draws)[: 2 * _JUDGED_ROWS].tolist()
        patches = self.splits.patching.plain(clips, places).to(next(self.model.parameters()))
        flat = self._latents(patches)
        return flat[torch.randint(len(flat), (self.options.num_codes,), generator=draws).to(flat.device)]

    def _latents(self, patches: Tensor) -> Tensor:
        """(places, D) as the encoder gives them in training, with the statistics of these patches."""
        encoder = self.model.encoder
        kept = {name: buffer.clone() for name, buffer in encoder.named_buffers()}
        latents: Tensor = encoder(patches.flatten(0, 1))
        for name, buffer in encoder.named_buffers():
            buffer.copy_(kept[name])
        return latents.movedim(1, -1).reshape(-1, latents.shape[1])

    def _judged(self) -> Results:
        splits, codes = self.splits, self.options.num_codes

        def judged(clips: Clips) -> Judged:
            return judge_clips(self.run, splits.patching, clips, rows=_JUDGED_ROWS)

        with judging(self.model):
            test, trained = judged(splits.test), judged(splits.train)
        kinds = {
            "reconstruction": test.errors,
            "codes": code_scores(splits.test, test, splits.train, trained, codes),
            "mean_energy": test.levels,
        }
        ordered = dict(sorted(kinds.items(), key=lambda item: item[0] != self.options.chosen_score))
        machines = {name: score_machines(splits.test, scores) for name, scores in ordered.items()}
        return Results(
            clips=splits.test, scales=splits.scales, judged=test, num_codes=codes, scores=ordered, machines=machines
        )


def build(options: VQSpectrogramOptions) -> VQSpectrogramProgram:
    """The program that ``options`` describe; clips are found and their bands measured, nothing is trained.

    Raises what is wrong with them.
    """
    splits = open_splits(options)
    device = sg.find_device(options.device)
    model = make_model(options, len(splits.machines)).to(device)
    objective, optimizer = make_objective(options), make_optimizer(options, model)
    narrow = narrow_dtype(options, device)
    make = functools.partial(
        VQSpectrogramProgram,
        model=model,
        objective=objective,
        optimizer=optimizer,
        best=sg.BestWeights(model, patience=None),
        epochs=options.total_epochs,
        scaler=torch.amp.GradScaler(device.type) if narrow is torch.float16 else None,
        empty_cache=options.empty_cache,
        options=options,
        splits=splits,
    )
    unplanned = make(step=sg.Step(model, objective, rows=1))
    unplanned.begin_epoch(0)
    step = make_step(options, model, objective, optimizer, next(iter(unplanned.batches(0))))
    return make(step=step)


RECIPE = Recipe(
    name="vq_spectrogram",
    summary=__doc__.splitlines()[0],
    document="003",
    options=VQSpectrogramOptions,
    build=build,
    table=table,
    pins={
        "gradient_accumulation_steps": "exact_batchnorm.rows",
        "use_gradient_checkpointing": "recompute.blocks",
        "memory_saver": "recompute.blocks",
    },
    troubleshooting=(
        "Fewer patches a clip (--stride 32, --n_patches 8 or 4) need less memory in proportion, and are another "
        "data set: the same gradient with fewer bytes is --budget, or the next line.",
        "--batch_size 1 --gradient_accumulation_steps 8 is one batch of 8 clips, one at a time: BatchNorm over all "
        "8, one codebook update, one dropout mask. What is left are the layers' inputs; --use_gradient_checkpointing "
        "keeps a quarter of them.",
        "--use_amp halves activations, not weights: those stay float32. Statistics, distances to codes and losses "
        "are never taken in half precision.",
        "--use_gradient_checkpointing runs encoder and decoder again in backward; running statistics and the "
        "codebook are updated once all the same.",
        "--device cpu has no GPU limit. --budget bounds counted tensor bytes there.",
        "torch.cuda.empty_cache() after validation lowers no peak of the step; --empty_cache validation measures "
        "what it costs and gives back.",
        "If that still does not fit: a smaller model (--channels 16 32 48, --latent_dim 32, --num_codes 64), which is "
        "another model. plan --table shows the bytes of each.",
    ),
)
