"""Centers shared out over gloo processes: the plain gradient on every rank, and a lost rank that ends all of them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn

import samegrad as sg
from samegrad.recipes.score_kernel import parallel
from samegrad.recipes.score_kernel.faces import setup_model_parallel_training
from samegrad.recipes.score_kernel.model import KernelModel, score_implicit_matching_stable
from samegrad.recipes.score_kernel.objective import BATCH_AXES, Batch, Reduced, matching_loss, streamed_means

from ..exact.processes import here, on_ranks
from .test_score_kernel_model import network, points

STAB, CENTERS = 1e-3, 23
SMALL = (
    "--data 8gaussians --train_kernel_size 21 --train_samples_size 60 --test_samples_size 6 --hiddenunits 8 --depth 2 "
    "--batch_size 5 --device cpu"
).split()


class OwnCentersAlone(parallel.AcrossRanks):
    """Nothing crosses: every rank has the softmax over its own centers."""

    def __call__(self, model: nn.Module, batch: Batch) -> Reduced:
        return streamed_means(cast(KernelModel, model), batch["samples"], batch["centers"], rows=self.rows)


def compared(rank: int) -> dict[str, Any]:
    """Centers over the ranks beside all of them here, and what the verifier says of them and of a faulty twin."""
    device = here()
    ours, plain = network().to(device), network().to(device)
    samples, centers = points(5, 1).to(device), points(CENTERS, 2).to(device)
    # Ranks take other numbers of centers at a time.
    args = types.SimpleNamespace(lr=1e-2, weight_decay=0.0, chunk_size=(4, 5)[rank])
    model, optimizer = setup_model_parallel_training(ours, centers, [device], args)
    loss = model.compute_loss(samples, STAB)
    torch.autograd.backward(loss)
    theirs = score_implicit_matching_stable(plain, samples, centers, STAB)
    torch.autograd.backward(theirs)
    errors = [float((loss - theirs).detach().abs() / theirs.detach().abs())]
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        errors.append(float((a.grad - b.grad).abs().max() / b.grad.abs().max()))
    optimizer.step()
    across = parallel.AcrossRanks(dist.group.WORLD, rows=2)
    verdicts = [
        sg.verify_step(
            sg.Step(
                KernelModel(network().to(device), stability=STAB), matching_loss,
                forward=forward, batch_axes=BATCH_AXES, plain_forward=parallel.unsharded(across),
                plan=sg.Plan(levers={}, exactness=sg.Exactness.SAME_SUM, batch_rows=len(mine)),
            ),
            {"centers": mine, "samples": samples},
        )
        for mine in (parallel.shard_of(centers, across),)
        for forward in (across, OwnCentersAlone(dist.group.WORLD, rows=2))
    ]  # fmt: skip
    return {
        "verdicts": [verdict.same for verdict in verdicts],
        "error": max(errors),
        "weights": [p.detach().flatten()[:3].tolist() for p in ours.parameters()],
        "held": len(parallel.shard_of(centers, across)),
        "places": parallel.check_places(across, device),
    }


def test_every_rank_has_the_plain_gradient_and_the_same_weights() -> None:
    first, second = on_ranks(compared, 2)
    for found in (first, second):
        assert found["error"] < 1e-12
        assert found["places"] < 1e-13
        assert found["verdicts"] == [True, False]
    assert first["weights"] == second["weights"]
    assert (first["held"], second["held"]) == (12, 11)


def started(output: Path, *more: str, ranks: int = 2) -> list[subprocess.Popen[str]]:
    """``samegrad run score_kernel`` as torchrun starts it: one process a rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-c", "from samegrad.cli.main import main; raise SystemExit(main())", "run", "score_kernel"]
    processes = []
    for rank in range(ranks):
        place = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }  # fmt: skip
        asked = [*SMALL, "--strategy", "model_parallel", "--output", str(output), "--process_timeout", "20", *more]
        process = subprocess.Popen(
            [*line, *asked], env={**os.environ, **place}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
    return processes


def losses(folder: Path) -> list[float]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "step"]


@pytest.mark.slow
def test_a_killed_rank_ends_all_within_the_time_out_and_the_run_is_resumed(tmp_path: Path) -> None:
    output = tmp_path / "run"
    processes = started(output, "--niters", "100000", "--save_every", "1")
    try:
        deadline = time.monotonic() + 120
        while not list(output.glob("checkpoints/*")):
            assert time.monotonic() < deadline and processes[0].poll() is None
            time.sleep(0.2)
        processes[1].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        processes[0].communicate(timeout=60)
        assert time.monotonic() - killed < 30
        assert processes[0].returncode != 0
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    done = len(losses(output))
    assert list(output.glob("checkpoints/*")) and done >= 50
    goal = str(50 * (done // 50 + 2))
    for process in started(output, "--resume", "--steps", goal):
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    assert len(losses(output)) == int(goal)


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    for process in started(tmp_path / "two", "--niters", "60", "--dtype", "float64", "--chunk_size", "4"):
        out, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
    # Only the first one speaks.
    assert out == ""
    line = [*SMALL, "--niters", "60", "--dtype", "float64", "--output", str(tmp_path / "one")]
    program = "from samegrad.cli.main import main; raise SystemExit(main())"
    subprocess.run([sys.executable, "-c", program, "run", "score_kernel", *line], check=True, capture_output=True)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-9)
