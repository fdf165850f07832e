"""The document's table: its strategies by bytes, time and what crosses between devices, measured or predicted.

Beside each stands how far the document's own version of it is from the gradient of the loss: it averages losses of
chunks that each have a softmax of their own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

import samegrad as sg
from samegrad.recipes._recipe import Cell

from .model import KernelModel, implicit_matching, softmax_means
from .objective import Batch
from .options import DOCUMENT_CHUNK_SIZE, DOCUMENT_STEPS
from .strategies import documents_estimate

SHOWN_DEVICES = 2
# For which both gradients are taken at once.
_COMPARED_CENTERS = 128


def strategy_table(step: sg.Step, batch: Batch, model: KernelModel) -> list[Mapping[str, Cell]]:
    """Four lines for ``batch``: all centers at once, in two kinds of chunks, and over two devices."""
    footprint = sg.measure_step(step, batch)
    centers, samples = len(batch["centers"]), batch["samples"]
    itemsize, dim = samples.element_size(), samples.shape[1]
    chunk = min(DOCUMENT_CHUNK_SIZE, max(1, centers // 2))
    shard = -(-centers // SHOWN_DEVICES)
    crossing = len(samples) * (dim + 2) * itemsize
    ways = (
        ("single_gpu", centers, centers, 0),
        ("model_parallel", shard, shard, crossing),
        ("chunked", chunk, centers, 0),
        ("gradient_accumulation", -(-centers // DOCUMENT_STEPS), centers, 0),
    )
    parameters = sum(p.numel() for p in model.parameters())
    lines: list[Mapping[str, Cell]] = []
    for name, rows, held, crossing_bytes in ways:
        estimate = documents_estimate(centers=rows, batch_size=len(samples), dim=dim, parameters=parameters)
        error = 0.0 if rows == centers else _document_error(model, batch, rows / centers)
        lines.append(
            {
                "strategy": name,
                "centers_at_a_time": rows,
                "chunks": -(-held // rows),
                "predicted_peak_bytes": _peak_bytes(footprint, rows, held),
                "predicted_seconds": _seconds(footprint, rows, held),
                "crossing_bytes": crossing_bytes,
                "document_estimate_bytes": estimate,
                "document_gradient_error": error,
            }
        )
    return lines


def _peak_bytes(footprint: sg.Footprint, rows: int, held: int) -> int:
    """Of ``rows`` at a time of ``held`` centers."""
    laws = footprint.plain_laws if rows >= held else footprint.laws
    return max(law.peak_bytes(rows=rows, batch_rows=held) for law in laws)


def _seconds(footprint: sg.Footprint, rows: int, held: int) -> float | None:
    if footprint.seconds_per_row is None or footprint.seconds_per_chunk is None:
        return None
    return footprint.seconds_per_row * held + footprint.seconds_per_chunk * -(-held // rows)


def _document_error(model: KernelModel, batch: Batch, share: float) -> float:
    """|g_document - g| / |g| on the first centers, with chunks of the same share of them."""
    centers, samples = batch["centers"][:_COMPARED_CENTERS], batch["samples"].to(batch["centers"].device)
    parts = torch.split(centers, max(1, round(share * len(centers))))
    right = _gradient(model, [centers], samples)
    restricted = _gradient(model, list(parts), samples)
    return float((restricted - right).norm() / right.norm())


def _gradient(model: KernelModel, parts: list[Tensor], samples: Tensor) -> Tensor:
    """Of the mean over ``parts`` of losses whose softmax knows that part alone."""
    losses = [implicit_matching(softmax_means(*model(part, samples))[1]).mean() for part in parts]
    parameters = list(model.parameters())
    found = torch.autograd.grad(torch.stack(losses).mean(), parameters, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found)])
