"""Centers shared out over devices: of one process, or one a process under torchrun. One set of weights.

Each device streams its own centers, a few at a time, and what crosses is what the loss needs of them: for every sample
a log-sum-exp and the means of force and curvature, B x (D + 2) numbers. They are joined by a softmax over the devices,
so the whole is the softmax over all centers, and gradients come back into the weights that the model has. (Copies with
optimizers of their own, as in the document, drift apart.)
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import samegrad as sg

from .model import FactorNet, KernelModel, implicit_matching, softmax_means
from .objective import Batch, Reduced

# Entries of a gradient may differ by so many units in the last place of its largest one.
_ALLOWED_UNITS = 128.0
_CHECKED_SAMPLES, _CHECKED_NUMBERS = 5, 4


@dataclasses.dataclass(frozen=True)
class AcrossDevices:
    """A forward that shares the batch's centers out over ``devices``, ``rows`` at a time on each."""

    devices: tuple[torch.device, ...]
    rows: int

    @property
    def places(self) -> int:
        return len(self.devices)

    def __call__(self, model: nn.Module, batch: Batch) -> Reduced:
        shards = batch["centers"].tensor_split(len(self.devices))
        # One after the other is in order here: kernels of other devices run on while the next ones are launched.
        samples = batch["samples"]
        found = [self._on(device, model, shard, samples) for device, shard in zip(self.devices, shards) if len(shard)]
        return joined(found, samples.device)

    def _on(self, device: torch.device, model: nn.Module, shard: Tensor, samples: Tensor) -> Reduced:
        weights = {name: tensor.to(device) for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        # In backward the devices run side by side, a thread each, and all would put their weights into one model.
        own = _without_weights(model)

        def terms(some: Tensor, shared: Any) -> Any:
            points, here = shared
            return torch.func.functional_call(own, here, (some, points))

        reduced: Reduced = sg.over(
            terms, shard.to(device), shared=(samples.to(device), weights), reduce="softmax_mean", rows=self.rows
        )
        return reduced


def _without_weights(model: nn.Module) -> nn.Module:
    """A copy of the modules of ``model`` alone; its tensors are on meta."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): torch.empty_like(tensor, device="meta") for tensor in tensors})


def joined(parts: Sequence[Reduced], device: torch.device) -> Reduced:
    """The means over all centers, of those over disjoint parts of them: each part counts by its share of η."""
    log_sum_exps = torch.stack([lse.to(device) for lse, _ in parts])
    values = {
        name: torch.stack([means[name].to(device) for _, means in parts]) for name in ("force", "curvature")
    }
    return softmax_means(log_sum_exps, values)


@dataclasses.dataclass(frozen=True)
class AcrossRanks:
    """A forward whose batch holds this rank's centers, ``rows`` at a time; its result is that of all ranks'."""

    group: Any
    rows: int

    @property
    def places(self) -> int:
        return dist.get_world_size(self.group)

    def __call__(self, model: nn.Module, batch: Batch) -> Reduced:
        def terms(some: Tensor, shared: Any) -> Any:
            module, points = shared
            return module(some, points)

        reduced: Reduced = sg.over(
            terms, batch["centers"], shared=(model, batch["samples"]), reduce="softmax_mean", rows=self.rows,
            process_group=self.group,
        )  # fmt: skip
        return reduced


Across = AcrossDevices | AcrossRanks


@dataclasses.dataclass(frozen=True)
class Unsharded:
    """What a forward over places must equal: all centers of all places at once, through one softmax.

    ``group``: that of the ranks, each of which brings its own centers; None where the batch has all of them.
    """

    group: Any = None

    def __call__(self, model: nn.Module, batch: Batch) -> Reduced:
        centers = batch["centers"] if self.group is None else _of_all_ranks(batch["centers"], self.group)
        return softmax_means(*model(centers, batch["samples"]))


def unsharded(across: Across) -> Unsharded:
    """The plain forward of what runs ``across`` places."""
    return Unsharded(across.group if isinstance(across, AcrossRanks) else None)


def _of_all_ranks(centers: Tensor, group: Any) -> Tensor:
    """The centers (K, D) of every rank, (K of all, D); a rank may have fewer than another."""
    counts = [torch.zeros((), dtype=torch.int64, device=centers.device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, torch.tensor(len(centers), device=centers.device), group)
    longest = max(int(count) for count in counts)
    mine = centers.new_zeros(longest, centers.shape[1])
    mine[: len(centers)] = centers
    everyone = [torch.empty_like(mine) for _ in counts]
    dist.all_gather(everyone, mine, group)
    return torch.cat([theirs[: int(count)] for theirs, count in zip(everyone, counts)])


def shard_of(centers: Tensor, across: Across) -> Tensor:
    """The centers that the batch of this process holds."""
    if isinstance(across, AcrossDevices):
        return centers
    return centers.tensor_split(across.places)[dist.get_rank(across.group)]


def ranks_asked() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def joined_ranks(device: torch.device, timeout_seconds: int) -> tuple[Any, torch.device]:
    """The group of all ranks, and this rank's device; joined once a process.

    A rank that is lost ends the others' next collective with an error, at the latest after ``timeout_seconds``.
    """
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_seconds))
    return dist.group.WORLD, device


def visible_devices(names: Sequence[str], device: torch.device) -> tuple[torch.device, ...]:
    """The devices named, or all of the kind of ``device`` that this process sees. Raises EnvironmentProblem."""
    if names:
        return tuple(sg.find_device(name) for name in names)
    if device.type == "cuda":
        return tuple(torch.device("cuda", number) for number in range(torch.cuda.device_count()))
    return (device,)


def check_places(across: Across, device: torch.device) -> float:
    """The largest error of a gradient over these very places against the plain loss, of that gradient's largest entry.

    In float64 on a small model of the same kind, whose weights are drawn; every rank calls it, with the same result.
    Raises GradientsDiffer above the contract's allowance.
    """
    drawn = torch.Generator().manual_seed(0)
    factornet = FactorNet(_CHECKED_NUMBERS, hidden=8, depth=2, generator=drawn, dtype=torch.float64)
    with torch.no_grad():
        factornet.last.weight.normal_(0, 0.3, generator=drawn)
    model = KernelModel(factornet, stability=0.01).to(device)
    count = _CHECKED_SAMPLES + 3 * across.places + 1
    points = torch.randn(count, _CHECKED_NUMBERS, generator=drawn, dtype=torch.float64).to(device)
    samples, centers = points[:_CHECKED_SAMPLES], points[_CHECKED_SAMPLES:]
    few = dataclasses.replace(across, rows=2)
    ours = _gradients(few(model, {"centers": shard_of(centers, few), "samples": samples}), model)
    plain = _gradients(softmax_means(*model(centers, samples)), model)
    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, plain))
    allowed = _ALLOWED_UNITS * torch.finfo(torch.float64).eps
    if not error <= allowed:
        raise sg.GradientsDiffer(
            asked=f"the plain step's gradient with centers over {across.places} places",
            found=f"on {len(centers)} centers in float64 it differs by {error:.2g}, {allowed:.2g} is allowed",
            do="report it; --strategy chunked goes round it",
        )
    return error


def _gradients(reduced: Reduced, model: nn.Module) -> list[Tensor]:
    parameters = list(model.parameters())
    return list(torch.autograd.grad(implicit_matching(reduced[1]).mean(), parameters))
