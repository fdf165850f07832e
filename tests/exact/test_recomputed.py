"""Blocks of the full batch that run again in backward: the same bits, and buffers as after one run."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import samegrad as sg
from samegrad.exact import part_state
from samegrad.exact.lockstep import lockstep
from samegrad.exact.recomputed import find_blocks, recomputed_blocks
from samegrad.measure.counting import ByteCounter

from . import batchnorm_zoo as zoo
from .batchnorm_zoo import D, left_by, made, row_loss, worst_share


@pytest.mark.parametrize("name", ["residual", "mlp", "no momentum", "half frozen", "not affine", "tied", "dense"])
def test_the_step_is_the_plain_one_bit_for_bit(name: str) -> None:
    network, x = made(name)
    blocks = {"tied": ["first", "norm"], "dense": ["norms.1", "convs.1"], "residual": None}.get(name, ["layers"])
    ours = left_by(network, x, row_loss, lambda twin: recomputed_blocks(twin, blocks))
    assert all(torch.equal(ours[key], value) for key, value in left_by(network, x, row_loss).items())


class Checkpointed(nn.Module):
    """What users write: blocks under torch.utils.checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh()) for _ in range(2))
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


def test_plain_checkpointing_updates_statistics_twice_and_this_does_not() -> None:
    """pytorch#96136. Where the model itself checkpoints, the plain step updates twice, and that is what is left."""
    torch.manual_seed(0)
    network, x = Checkpointed().to(D), made("mlp")[1]
    plain = left_by(network, x, row_loss)
    assert int(plain["buffer blocks.0.1.num_batches_tracked"]) == 2
    blocks = left_by(nn.Sequential(*network.blocks, network.head), x, row_loss, recomputed_blocks)
    assert int(blocks["buffer 0.1.num_batches_tracked"]) == 1
    assert torch.equal(blocks["gradient of 0.0.weight"], plain["gradient of blocks.0.0.weight"])
    together = left_by(network, x, row_loss, lambda twin: lockstep(twin, sizes=[9, 10, 4]))
    assert int(together["buffer blocks.0.1.num_batches_tracked"]) == 1
    buffers = {key: plain[key] for key in plain if key.startswith("buffer")}
    assert worst_share(together | buffers, plain) <= 1
    outer = nn.Sequential(network, nn.Tanh())
    again = left_by(outer, x, row_loss, lambda twin: recomputed_blocks(twin, ["0"]))
    assert all(torch.equal(again[key], value) for key, value in left_by(outer, x, row_loss).items())


def test_a_planted_second_update_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x = made("residual")
    monkeypatch.setattr(part_state.PartState, "keep_changed", lambda self: self._kept.clear())
    assert worst_share(left_by(network, x, row_loss, recomputed_blocks), left_by(network, x, row_loss)) > 100


def test_draws_are_replayed_and_buffers_that_enter_the_result_are_those_of_the_first_run() -> None:
    """Spectral norm improves its buffers in every forward in training mode: a second run would be another function."""
    torch.manual_seed(0)
    block = nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)), nn.Dropout(0.3), nn.BatchNorm1d(6), nn.Tanh()
    )
    network, x = nn.Sequential(block, nn.Linear(6, 5)).to(D), made("mlp")[1]
    found = []
    for within in (lambda twin: recomputed_blocks(twin), lambda twin: recomputed_blocks(twin, ["1"])):
        torch.manual_seed(7)
        found.append(left_by(network, x, row_loss, within))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_blocks_are_found_named_and_checked() -> None:
    network = zoo.resnet18()
    assert find_blocks(network) == [f"stages.{i}.{j}" for i in range(4) for j in range(2)]
    assert find_blocks(copy.deepcopy(network).eval()) == []
    for blocks, found in [(["nothing"], "no part 'nothing'"), (["stages.0", "stages.0.1"], "is part of stages.0")]:
        with pytest.raises(sg.UsageError, match=found), recomputed_blocks(network, blocks):
            pass
    with pytest.raises(sg.UsageError, match="no block"), recomputed_blocks(network.eval()):
        pass


def test_inner_activations_are_not_kept_and_forwards_come_back_after_an_exception() -> None:
    network, _ = made("residual")
    x = torch.randn(64, 3, 32, 32, dtype=D)
    peaks = []
    for blocks in (None, ["stages"]):
        with ByteCounter(torch.device("cpu")) as counter:
            if blocks is None:
                loss = row_loss(network(x))
            else:
                with recomputed_blocks(network, blocks):
                    loss = row_loss(network(x))
        peaks.append(counter.live_bytes)
        del loss
    assert peaks[1] < 0.75 * peaks[0]
    with pytest.raises(ZeroDivisionError), recomputed_blocks(network):
        raise ZeroDivisionError
    assert all("forward" not in vars(part) for part in network.modules())
