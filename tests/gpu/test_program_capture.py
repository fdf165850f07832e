"""A chunk program captured once and replayed for every chunk, handed over under DistributedDataParallel."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from samegrad.exact import program
from samegrad.exact.aliases import GradientTotals, ParameterAliases
from samegrad.exact.handoff import hand_over
from samegrad.exact.losses import Form

pytestmark = pytest.mark.gpu

ROWS, CHUNK = 64, 16


def loss_fn(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(outputs, batch[1])


def test_captured_and_replayed_equals_eager_under_ddp() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("nccl", rank=0, world_size=1)
    try:
        _compare()
    finally:
        dist.destroy_process_group()


def _compare() -> None:
    device = torch.device("cuda")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 256), nn.GELU(), nn.Linear(256, 8)).to(device)
    ddp = DistributedDataParallel(network, device_ids=[0])
    x, y = torch.randn(ROWS, 32, device=device), torch.randn(ROWS, 8, device=device)
    chunks = list(zip(x.split(CHUNK), y.split(CHUNK)))
    share = torch.tensor(CHUNK / ROWS, dtype=torch.float64, device=device)
    aliases = ParameterAliases({"": network})
    totals: dict[str, list[Tensor | None]] = {}
    losses: dict[str, Tensor] = {}
    for way in ("eager", "captured"):
        with aliases.swapped() as standing:
            sums = program.LossSums(device)
            body = program.single_pass_body(lambda c, _: network(c[0]), loss_fn, Form.ROW_MEAN, sums)
            one = program.ChunkProgram(body, GradientTotals(standing))
            if way == "eager":
                for chunk in chunks:
                    one.bind(chunk, None, share, share)
                    one.run()
            else:
                one.preallocate()
                static = tuple(leaf.clone() for leaf in chunks[0])
                one.bind(static, None, share, share)
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    one.run()
                torch.cuda.current_stream().wait_stream(stream)
                for alias in standing:
                    assert alias.grad is not None
                    alias.grad.zero_()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    one.run()
                # Neither the warm-up nor the capture belongs to the step.
                sums.loss.zero_()
                sums.count.zero_()
                for alias in standing:
                    assert alias.grad is not None
                    alias.grad.zero_()
                for chunk in chunks:
                    for place, leaf in zip(static, chunk):
                        place.copy_(leaf)
                    graph.replay()
            totals[way] = [None if t is None else t.clone() for t in one.totals()]
            losses[way] = sums.loss.clone()
    torch.testing.assert_close(losses["captured"], losses["eager"], rtol=1e-6, atol=0)
    for a, b in zip(totals["captured"], totals["eager"]):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    expected = [None if t is None else t.clone() for t in totals["captured"]]
    hand_over(ddp, aliases.parameters, totals["captured"])
    for parameter, total in zip(aliases.parameters, expected):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, total, rtol=0, atol=0)
