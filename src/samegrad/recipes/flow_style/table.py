"""``plan --table``: the document's memory, speed and quality tables, ours beside its own.

Memory and time are those of real steps at a few rows, drawn out to the table's rows by laws ("+ again": every ODE step
runs again in backward). What a compiled step and cuDNN's trials bring is timed on ``batch_size`` rows, forward and
backward, where there is a GPU or it is asked for. Noise: how far the style loss's gradient on the styled latents strays
from that of all patches when a share of them is compared.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

import samegrad as sg
from samegrad.recipes._recipe import Cell, LongTable

from . import data
from .calling import Calling, CompiledCalling
from .losses import Energy
from .model import StyleFlow, make_flow
from .options import FlowStyleOptions
from .splits import open_splits

_OLD_ROWS, _OLD_STEPS, _NEW_STEPS = 240, 5, 10
_NEW_ROWS, _NEW_ACCUMULATION = 32, 2
_MEMORY_LINES, _SPEED_LINES = 7, 3
_COVERAGES = ((0.0166, "undersampled"), (0.25, "optimal"), (1.0, None))
_DRAWS, _TIMED = 6, 3
# Rows of the batch that laws are found on.
_PROBED_ROWS = 8


def rows_of_table(options: FlowStyleOptions, energy: Energy) -> LongTable:
    """The table's rows: what each is about, figures where they are known, and the document's claim."""
    latents = open_splits(options).training
    batch_of = functools.partial(_batch, options, latents, energy)
    rows = itertools.chain(
        _memory(options, latents, energy, batch_of), _speed(options, latents, energy, batch_of),
        _noise(latents, energy, options),
    )  # fmt: skip
    # What compiling costs once is a line of its own.
    return LongTable(_MEMORY_LINES + _SPEED_LINES + _compiles(options) + len(_COVERAGES), rows)


def _compiles(options: FlowStyleOptions) -> bool:
    """Compiling for a CPU takes a minute of it; who wants to know asks."""
    return sg.find_device(options.device).type == "cuda" or bool(options.use_compile)


def _batch(options: FlowStyleOptions, latents: data.Latents, energy: Energy, rows: int) -> data.StyleBatch:
    drawing = data.Drawing(
        rows=rows, label_drop_probability=options.label_drop_prob, patch_sizes=energy.patch_sizes,
        projections=options.num_projections, max_samples=options.max_samples or None,
    )  # fmt: skip
    return data.draw_batch(latents, drawing, earliest=0.0, seed=(options.random_seed, rows))


def _model(options: FlowStyleOptions, latents: data.Latents, ode_steps: int) -> StyleFlow:
    return make_flow(
        len(latents.names), base_channels=options.size("base_channels"), ode_steps=ode_steps, seed=options.random_seed,
        dtype=latents.latents.dtype,
    ).to(sg.find_device(options.device))  # fmt: skip


def _memory(
    options: FlowStyleOptions, latents: data.Latents, energy: Energy, batch_of: Callable[[int], data.StyleBatch]
) -> Iterator[Mapping[str, Cell]]:
    """The document's old and new settings, and the same logical batch with less held."""

    def measured(rows: int, ode_steps: int, every: int) -> sg.Footprint:
        model = _model(options, latents, ode_steps)
        model.checkpoint_every = every
        optimizer = torch.optim.AdamW(model.parameters())
        step = sg.Step(
            model, energy, optimizer=optimizer, forward=Calling(options.dtype), batch_axes=data.ROW_AXES
        )
        with step:
            found = sg.measure_step(step, batch_of(min(rows, _PROBED_ROWS)))
        # Laws of a few rows, asked about the table's; how many patches are compared does not grow with the rows.
        return dataclasses.replace(found, batch_rows=rows)

    def line(part: str, footprint: sg.Footprint, way: str, rows: int, document: str | None) -> Mapping[str, Cell]:
        return {
            "part": part,
            "way": way,
            "rows": footprint.batch_rows,
            "at_a_time": rows,
            "peak_bytes": footprint.predicted_peak_bytes(rows=rows),
            "step_seconds": footprint.predicted_seconds(rows=rows),
            "document": document,
        }

    logical, few, many = _NEW_ROWS * _NEW_ACCUMULATION, f"{_OLD_STEPS} steps", f"{_NEW_STEPS} steps"
    yield line("old", measured(_OLD_ROWS, _OLD_STEPS, 0), few, _OLD_ROWS, "6.8GB")
    yield line("old", measured(_OLD_ROWS, _NEW_STEPS, 0), many, _OLD_ROWS, "OOM")
    keeping, again = measured(logical, _NEW_STEPS, 0), measured(logical, _NEW_STEPS, 1)
    yield line("new", keeping, many, logical, None)
    yield line("new", keeping, many, _NEW_ROWS, "~5.2GB")
    yield line("new", again, "+ again", logical, "2 x model")
    yield line("new", again, "+ again", _NEW_ROWS, None)
    yield line("new", again, "+ again", 1, None)


def _speed(
    options: FlowStyleOptions, latents: data.Latents, energy: Energy, batch_of: Callable[[int], data.StyleBatch]
) -> Iterator[Mapping[str, Cell]]:
    """Forward and backward of ``batch_size`` rows: as written, compiled, and with cuDNN's trials."""
    model = _model(options, latents, options.ode_integration_steps)
    device = sg.find_device(options.device)
    rows = int(options.size("batch_size"))
    batch = batch_of(rows).to(device)
    part: dict[str, Cell] = {"part": "speed", "rows": rows, "at_a_time": rows}
    _, plain = _timed(model, Calling(options.dtype), energy, batch)
    yield part | {"way": "plain", "step_seconds": plain, "document": "~450ms"}
    if _compiles(options):
        compiled = CompiledCalling(
            options.dtype, model.network, mode=options.compile_mode, fullgraph=options.fullgraph,
            recompile_limit=options.cache_size_limit,
        )  # fmt: skip
        first, later = _timed(model, compiled, energy, batch)
        yield part | {"way": "compiled", "step_seconds": later, "document": "~420ms"}
        yield part | {"way": "compiling, once", "step_seconds": first - later, "document": "~20-30s"}
    else:
        yield part | {"way": "compiled", "step_seconds": None, "document": "~420ms"}
    seconds = None
    if device.type == "cuda":
        with torch.backends.cudnn.flags(benchmark=True):
            _, seconds = _timed(model, Calling(options.dtype), energy, batch)
    yield part | {"way": "cuDNN", "step_seconds": seconds, "document": "~410ms"}


def _timed(model: StyleFlow, calling: Calling, energy: Energy, batch: data.StyleBatch) -> tuple[float, float]:
    """Seconds of the first step and the median of those after it."""
    taken = []
    for _ in range(1 + _TIMED):
        begun = time.perf_counter()
        torch.autograd.backward(energy(calling(model, batch), batch))
        model.zero_grad()
        if batch.source.is_cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - begun)
    return taken[0], statistics.median(taken[1:])


def _noise(latents: data.Latents, energy: Energy, options: FlowStyleOptions) -> Iterator[Mapping[str, Cell]]:
    """How far the style loss's gradient strays from that of all patches, by the share of patches that are compared."""
    rows = int(options.logical_rows)
    every = data.patches_in(rows, latents.latents)
    base = _batch(options, latents, energy, rows)

    def gradient(share: float, draw: int) -> Tensor:
        drawing = data.Drawing(
            rows=rows, patch_sizes=energy.patch_sizes, projections=options.num_projections,
            max_samples=max(1, round(share * every)),
        )  # fmt: skip
        places, _ = data.draw_projections(base.source, drawing, data.generator_of(options.random_seed, draw))
        leaf = base.source.clone().requires_grad_()
        distance, _ = energy.parts(leaf, base._replace(places=places, directions=directions))
        (found,) = torch.autograd.grad(distance, leaf)
        return found

    whole = data.Drawing(rows=rows, patch_sizes=energy.patch_sizes, projections=options.num_projections)
    _, directions = data.draw_projections(base.source, whole, data.generator_of(options.random_seed))
    best = gradient(1.0, 0)
    for share, claim in _COVERAGES:
        strays = [float((gradient(share, draw) - best).norm() / best.norm()) for draw in range(1, 1 + _DRAWS)]
        yield {
            "part": "quality",
            "way": f"{share:.1%}",
            "rows": rows,
            "noise": statistics.mean(strays),
            "document": claim,
        }
