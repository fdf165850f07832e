"""The document's three set-up functions, thin: one exact step, whatever the chunks or devices.

    chunked_trainer = setup_chunked_training(factornet, centers, chunk_size=50)
    loss = chunked_trainer.compute_loss(samples, stab=1e-6)
    loss.backward()

``factornet`` maps centers (K, D) to packed factors (K, D (D + 1) / 2), see ``model.FactorNet``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

import samegrad as sg

from .model import DEFAULT_STABILITY, KernelModel
from .objective import BATCH_AXES, kernel_outputs, matching_loss, streamed_loss, streamed_means
from .options import even_sizes
from .parallel import Across, AcrossDevices, AcrossRanks, joined, shard_of

DEFAULT_LEARNING_RATE, DEFAULT_WEIGHT_DECAY = 1e-4, 1e-4


class ChunkedTraining:
    """The loss of all centers, ``chunk_size`` of them at a time. ``factornet`` is the network that was given."""

    def __init__(self, factornet: nn.Module, centers: Tensor, chunk_size: int | Literal["auto"]) -> None:
        self.factornet = _refused_data_parallel(factornet)
        self.centers = centers
        self.chunk_size = chunk_size

    def compute_loss(self, samples: Tensor, stab: float = DEFAULT_STABILITY) -> Tensor:
        """The loss () of ``samples`` (B, D), with its graph: of the same value and gradient for every chunk size."""
        centers = self.centers.to(samples)
        if self.chunk_size in ("auto", 0):
            self.chunk_size = _planned_chunk(self.factornet, samples, centers, stab)
        assert isinstance(self.chunk_size, int)
        return streamed_loss(self.factornet, samples, centers, stab, rows=self.chunk_size)


def _planned_chunk(factornet: nn.Module, samples: Tensor, centers: Tensor, stab: float) -> int:
    """As many centers at a time as fit what is free now."""
    model = KernelModel(factornet, stability=stab)
    batch = {"centers": centers, "samples": samples}
    with sg.Step(
        model, matching_loss, forward=kernel_outputs, batch_axes=BATCH_AXES, reduce="softmax_mean"
    ) as step:
        return max(step.sizes_for(batch))


class GradientAccumulationTraining:
    """One optimizer step a call, the centers in ``accumulation_steps`` chunks."""

    def __init__(self, factornet: nn.Module, centers: Tensor, accumulation_steps: int) -> None:
        if not isinstance(accumulation_steps, int) or not 1 <= accumulation_steps <= len(centers):
            raise sg.UsageError(
                asked=f"accumulation_steps={accumulation_steps!r}",
                found=f"there are {len(centers)} centers, and a chunk has at least one",
                do=f"give a whole number from 1 to {len(centers)}",
                option="accumulation_steps",
            )
        self.accumulation_steps = accumulation_steps
        self.factornet = _refused_data_parallel(factornet)
        self.centers = centers

    def training_step(
        self, samples: Tensor, optimizer: torch.optim.Optimizer, stab: float = DEFAULT_STABILITY
    ) -> Tensor:
        """Clears gradients, takes them over all centers, steps once; returns the loss (), detached."""
        optimizer.zero_grad()
        loss = self._loss(samples, stab)
        torch.autograd.backward(loss)
        optimizer.step()
        return loss.detach()

    def _loss(self, samples: Tensor, stab: float) -> Tensor:
        model, centers = KernelModel(self.factornet, stability=stab), self.centers.to(samples)
        # All larger chunks, then all smaller ones: each kind has one size, and one softmax joins the two.
        sizes = even_sizes(len(centers), self.accumulation_steps)
        in_larger = sizes[0] * sizes.count(sizes[0])
        kinds = ((centers[:in_larger], sizes[0]), (centers[in_larger:], sizes[-1]))
        found = [streamed_means(model, samples, some, rows=rows) for some, rows in kinds if len(some)]
        return matching_loss(joined(found, samples.device), {"centers": centers, "samples": samples})


class ModelParallelTraining(nn.Module):
    """The loss of all centers, which are shared out over devices or ranks; ``factornet`` is the one set of weights."""

    def __init__(self, factornet: nn.Module, centers: Tensor, across: Across) -> None:
        super().__init__()
        self.factornet = _refused_data_parallel(factornet)
        self.centers = centers
        self.across = across

    def compute_loss(self, samples: Tensor, stab: float = DEFAULT_STABILITY) -> Tensor:
        """The loss () of ``samples`` (B, D), the same on every rank, with its graph."""
        model = KernelModel(self.factornet, stability=stab)
        centers = shard_of(self.centers, self.across).to(samples)
        batch = {"centers": centers, "samples": samples}
        return matching_loss(self.across(model, batch), batch)

    def forward(self, samples: Tensor, stab: float = DEFAULT_STABILITY) -> Tensor:
        return self.compute_loss(samples, stab)


def setup_chunked_training(
    factornet: nn.Module, centers: Tensor, chunk_size: int | Literal["auto"] = "auto"
) -> ChunkedTraining:
    """``chunk_size`` centers at a time; "auto" or 0: as many as fit what is free at the first loss."""
    if chunk_size != "auto" and (not isinstance(chunk_size, int) or chunk_size < 0):
        raise sg.UsageError(
            asked=f"chunk_size={chunk_size!r}", found="not a number of centers", do="give 1 or more, or 'auto'",
            option="chunk_size",
        )  # fmt: skip
    return ChunkedTraining(factornet, centers, chunk_size)


def setup_gradient_accumulation_training(
    factornet: nn.Module, centers: Tensor, accumulation_steps: int
) -> GradientAccumulationTraining:
    """One exact step a call, the centers in ``accumulation_steps`` chunks. Raises UsageError for more than centers."""
    return GradientAccumulationTraining(factornet, centers, accumulation_steps)


def setup_model_parallel_training(
    factornet: nn.Module, centers: Tensor, device_ids: Sequence[int | str], args: Any
) -> tuple[ModelParallelTraining, torch.optim.Optimizer]:
    """The model and AdamW of its one set of weights, with centers shared out over ``device_ids`` (or names).

    Where ranks were joined (torchrun, ``torch.distributed.init_process_group``), over the ranks instead, each on the
    device that its weights are on. ``args`` may have ``lr``, ``weight_decay`` and ``chunk_size``, centers at a time on
    each device.
    """
    devices = tuple(torch.device("cuda", i) if isinstance(i, int) else torch.device(i) for i in device_ids)
    if not devices:
        raise sg.UsageError(
            asked="setup_model_parallel_training(..., device_ids=[])", found="no device to put centers on",
            do="give device_ids such as [0, 1], or ['cpu', 'cpu']", option="device_ids",
        )  # fmt: skip
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    rows = getattr(args, "chunk_size", None) or -(-len(centers) // max(ranks, len(devices)))
    across = AcrossRanks(dist.group.WORLD, rows) if ranks > 1 else AcrossDevices(devices, rows)
    model = ModelParallelTraining(factornet, centers, across)
    optimizer = torch.optim.AdamW(
        factornet.parameters(),
        lr=getattr(args, "lr", DEFAULT_LEARNING_RATE),
        weight_decay=getattr(args, "weight_decay", DEFAULT_WEIGHT_DECAY),
    )
    return model, optimizer


def _refused_data_parallel(factornet: nn.Module) -> nn.Module:
    if isinstance(factornet, nn.DataParallel):
        raise sg.UsageError(
            asked="centers through nn.DataParallel",
            found="it copies the centers to every device and splits the samples, so nothing gets smaller",
            do="give factornet.module; setup_model_parallel_training shares the centers out",
        )
    return factornet
