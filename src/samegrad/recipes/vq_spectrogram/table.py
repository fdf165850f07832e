"""The document's hardware table and its list of options, measured: real steps, counted or allocated bytes.

Bytes do not depend on what is in the patches, so they are drawn. "x" is times the bytes and the step of batch 8.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import samegrad as sg
from samegrad.recipes._recipe import Cell, LongTable

from .data import BANDS, TRANSFORMS, Batch
from .declared import make_model, make_objective, make_optimizer, make_step, narrow_dtype, pinned_plan
from .options import VQSpectrogramOptions

MACHINE_IDS = 4
# Clips of the first step of each setting, on which the step is examined: as few as uneven chunks can be made of.
_EXAMINED_CLIPS = 3
# The document's options are measured against this: its default, at half the patches of its comfortable setting.
COMPARED = "comfortable: batch 8"
_PLAIN: dict[str, Any] = {"batch_size": 8, "n_patches": 16, "stride": 16}
# What is measured; what the document says of it, in short.
SETTINGS: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("comfortable: batch 16", {"batch_size": 16}, "6-8 GiB"),
    (COMPARED, {}, "6-8 GiB"),
    (
        "tight",
        {"batch_size": 1, "n_patches": 8, "stride": 32, "gradient_accumulation_steps": 8, "use_amp": True,
         "use_gradient_checkpointing": True},
        "~4 GiB",
    ),
    ("minimal: tight sizes only",
     {"batch_size": 1, "n_patches": 8, "stride": 32, "gradient_accumulation_steps": 8}, "any, CPU"),
    ("1. 8 patches, stride 32", {"n_patches": 8, "stride": 32}, "proportional"),
    ("1. 4 patches, stride 32", {"n_patches": 4, "stride": 32}, "proportional"),
    ("2. batch 1, accumulation 8", {"batch_size": 1, "gradient_accumulation_steps": 8}, "smaller"),
    ("3. --use_amp", {"use_amp": True}, "lower"),
    ("4. checkpointing", {"use_gradient_checkpointing": True}, "30-50 % less"),
    ("4. --memory_saver", {"memory_saver": True}, "16 in 24 GB"),
    (
        "the example command",
        {"batch_size": 1, "n_patches": 4, "stride": 32, "gradient_accumulation_steps": 8, "use_amp": True,
         "use_gradient_checkpointing": True},
        "<= ~4 GiB",
    ),
    ("model: --latent_dim 32", {"latent_dim": 32}, "smaller"),
    ("model: --channels 16 32 48", {"channels": (16, 32, 48)}, "smaller"),
    ("model: --num_codes 64", {"num_codes": 64}, "no more"),
)  # fmt: skip


def drawn_batch(options: VQSpectrogramOptions) -> Batch:
    """A logical batch of noise in the shapes that ``options`` ask for."""
    draws = torch.Generator().manual_seed(options.random_seed)
    rows = options.logical_clips
    return {
        "patches": torch.randn(rows, options.clip_patches, 1, BANDS, options.patch_len, generator=draws),
        "machine": torch.randint(MACHINE_IDS, (rows,), generator=draws),
        "transform": torch.randint(len(TRANSFORMS), (rows,), generator=draws),
    }


def table(options: VQSpectrogramOptions) -> LongTable:
    """Every setting of the document: the peak of an optimizer step and its time, and what the document says."""
    return LongTable(len(SETTINGS), _lines(options))


def _lines(options: VQSpectrogramOptions) -> Iterator[Mapping[str, Cell]]:
    kept = dataclasses.replace(
        options, budget=None, use_amp=False, use_gradient_checkpointing=False, memory_saver=False,
        gradient_accumulation_steps=1, batch_size=None, n_patches=None, stride=None,
    )  # fmt: skip
    settings = {name: dataclasses.replace(kept, **(_PLAIN | changes)) for name, changes, _ in SETTINGS}
    # First, because every line is told in times of it.
    whole = measured_step(settings[COMPARED])
    for name, _, document in SETTINGS:
        result = whole if name == COMPARED else measured_step(settings[name])
        yield {
            "setting": name,
            "peak_bytes": result.peak_allocated_bytes,
            "step_seconds": result.seconds,
            "bytes_x": (result.peak_allocated_bytes or 0) / (whole.peak_allocated_bytes or 1),
            "time_x": result.seconds / whole.seconds,
            "document": document,
        }


def measured_step(options: VQSpectrogramOptions) -> sg.StepResult:
    """A step of ``options`` by its pins alone, whose optimizer's state is there and whose kernels have run before.

    The first step is of a few clips: examining the step on a whole batch takes longer than all steps together.
    """
    device = sg.find_device(options.device)
    batch = drawn_batch(options)
    model = make_model(options, MACHINE_IDS).to(device)
    optimizer = make_optimizer(options, model)
    few = {name: rows[:_EXAMINED_CLIPS] for name, rows in batch.items()}
    plan = pinned_plan(options, model, len(batch["machine"]))
    step = make_step(options, model, make_objective(options), optimizer, batch, plan=plan)
    narrow = narrow_dtype(options, device)
    scaler = torch.amp.GradScaler(device.type) if narrow is torch.float16 else None
    with step:
        counter = sg.count_bytes(step) if device.type == "cpu" else None
        results = []
        for result in sg.train(step, [few, batch, batch], scaler=scaler, counter=counter):
            results.append(result)
            # What examining left in cycles is not the step's, and would be counted for as long as it is there.
            gc.collect()
        if counter is None:
            return results[-1]
        # Counting takes the host's time, so the time is another step's.
        [plain] = sg.train(step, [batch], scaler=scaler)
        return dataclasses.replace(results[-1], seconds=plain.seconds, counted=False)
