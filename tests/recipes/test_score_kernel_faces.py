"""The document's functions, each in its own loop, against the plain loss of all centers at once, in float64."""

from __future__ import annotations

import copy
import runpy
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.cli.run import RunOptions
from samegrad.cli.target import target_call
from samegrad.exact.softmax_mean import Streamed
from samegrad.recipes.score_kernel import parallel
from samegrad.recipes.score_kernel.faces import (
    setup_chunked_training,
    setup_gradient_accumulation_training,
    setup_model_parallel_training,
)
from samegrad.recipes.score_kernel.model import FactorNet, KernelModel, score_implicit_matching_stable
from samegrad.recipes.score_kernel.objective import BATCH_AXES, kernel_outputs, matching_loss
from samegrad.recipes.score_kernel.options import ScoreKernelOptions

from .test_score_kernel_model import network, points

STAB, CENTERS = 1e-3, 23
EXAMPLES = Path(__file__).parent.parent.parent / "examples"
Loss = Callable[[FactorNet, Tensor, Tensor], Tensor]
ARGS = types.SimpleNamespace(lr=1e-2, weight_decay=0.0)


def chunked(rows: int) -> Loss:
    return lambda net, samples, centers: setup_chunked_training(net, centers, rows).compute_loss(samples, STAB)


def over_devices(*devices: str, rows: int | None = None) -> Loss:
    args = types.SimpleNamespace(**vars(ARGS), chunk_size=rows)

    def loss(net: FactorNet, samples: Tensor, centers: Tensor) -> Tensor:
        model, _ = setup_model_parallel_training(net, centers, devices, args)
        return model.compute_loss(samples, STAB)

    return loss


def error_of(loss: Loss, count: int = CENTERS) -> float:
    ours, plain = network(), network()
    samples, centers = points(5, 1), points(count, 2)
    mine, theirs = loss(ours, samples, centers), score_implicit_matching_stable(plain, samples, centers, STAB)
    for value in (mine, theirs):
        torch.autograd.backward(value)
    found = [float((mine - theirs).detach().abs() / theirs.detach().abs())]
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        found.append(float((a.grad - b.grad).abs().max() / b.grad.abs().max()))
    return max(found)


@pytest.mark.parametrize(
    "loss",
    [*map(chunked, (1, 5, 22, CENTERS, 100)), over_devices("cpu"), over_devices("cpu", "cpu"),
     over_devices("cpu", "cpu", "cpu", rows=3)],
)  # fmt: skip
def test_every_strategy_has_the_plain_loss_and_gradient(loss: Loss) -> None:
    assert error_of(loss) < 1e-12


def test_more_devices_than_centers_are_left_without() -> None:
    assert error_of(over_devices("cpu", "cpu", "cpu"), count=2) < 1e-12


def test_a_planned_step_has_them_too() -> None:
    def planned(net: FactorNet, samples: Tensor, centers: Tensor) -> Tensor:
        step = sg.Step(
            KernelModel(net, stability=STAB), matching_loss, forward=kernel_outputs, batch_axes=BATCH_AXES,
            reduce="softmax_mean", rows=[9, 13, 1],
        )  # fmt: skip
        loss = step.backward({"centers": centers, "samples": samples})
        # The gradient is there; what the comparison goes back through adds nothing to it.
        return loss + 0 * sum(p.sum() for p in net.parameters())

    assert error_of(planned) < 1e-12


def test_a_softmax_restricted_to_a_chunk_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Streamed.pulled_back

    def restricted(self: Streamed, scores: Tensor, *rest: Any) -> Any:
        return right(Streamed.of(scores.detach(), ()), scores, *rest)

    monkeypatch.setattr(Streamed, "pulled_back", restricted)
    assert error_of(chunked(5)) > 1e-3


def test_a_center_on_two_devices_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def overlapping(self: Tensor, parts: int) -> tuple[Tensor, ...]:
        return self[:12], self[11:]

    monkeypatch.setattr(Tensor, "tensor_split", overlapping)
    assert error_of(over_devices("cpu", "cpu")) > 1e-3
    monkeypatch.undo()
    assert error_of(over_devices("cpu", "cpu")) < 1e-12


def test_a_gradient_that_is_counted_twice_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Streamed.pulled_back

    def twice(self: Streamed, *rest: Any) -> Any:
        return [(result, 2 * cotangent) for result, cotangent in right(self, *rest)]

    monkeypatch.setattr(Streamed, "pulled_back", twice)
    for loss in (chunked(5), over_devices("cpu", "cpu")):
        assert error_of(loss) > 0.5
    with pytest.raises(sg.GradientsDiffer, match="2 places"):
        parallel.check_places(parallel.AcrossDevices((torch.device("cpu"),) * 2, rows=2), torch.device("cpu"))


def test_shards_joined_without_their_shares_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The document's mean over devices, each with a softmax of its own."""

    def averaged(parts: Any, device: torch.device) -> Any:
        means = {n: torch.stack([m[n] for _, m in parts]).mean(0) for n in ("force", "curvature")}
        return parts[0][0], means

    monkeypatch.setattr(parallel, "joined", averaged)
    assert error_of(over_devices("cpu", "cpu")) > 1e-3
    with pytest.raises(sg.GradientsDiffer):
        parallel.check_places(parallel.AcrossDevices((torch.device("cpu"),) * 2, rows=2), torch.device("cpu"))


def plain_weights(steps: int) -> list[Tensor]:
    net, centers = network(), points(CENTERS, 2)
    optimizer = torch.optim.AdamW(net.parameters(), lr=ARGS.lr, weight_decay=0.0)
    for step in range(steps):
        optimizer.zero_grad()
        score_implicit_matching_stable(net, points(5, 10 + step), centers, STAB).backward()
        optimizer.step()
    return [p.detach() for p in net.parameters()]


def test_the_documents_ten_lines_train_as_the_plain_loop_does() -> None:
    factornet, centers = network(), points(CENTERS, 2)
    chunked_trainer = setup_chunked_training(factornet, centers, chunk_size=5)
    optimizer = torch.optim.AdamW(chunked_trainer.factornet.parameters(), lr=ARGS.lr, weight_decay=0.0)
    for step in range(3):
        samples = points(5, 10 + step)
        optimizer.zero_grad()
        loss = chunked_trainer.compute_loss(samples, STAB)
        loss.backward()
        optimizer.step()
    for mine, theirs in zip(factornet.parameters(), plain_weights(3), strict=True):
        torch.testing.assert_close(mine.detach(), theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("accumulation_steps", [1, 4, 9, CENTERS])
def test_training_steps_train_as_the_plain_loop_does(accumulation_steps: int) -> None:
    factornet = network()
    trainer = setup_gradient_accumulation_training(factornet, points(CENTERS, 2), accumulation_steps)
    optimizer = torch.optim.AdamW(trainer.factornet.parameters(), lr=ARGS.lr, weight_decay=0.0)
    for step in range(3):
        loss = trainer.training_step(points(5, 10 + step), optimizer, stab=STAB)
        assert not loss.requires_grad
    for mine, theirs in zip(factornet.parameters(), plain_weights(3), strict=True):
        torch.testing.assert_close(mine.detach(), theirs, rtol=1e-9, atol=1e-10)


def test_centers_are_cut_into_as_many_chunks_as_steps_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    factornet, over, sizes = network(), sg.over, list[int]()

    def counted(fn: Any, items: Tensor, *, rows: int, **rest: Any) -> Any:
        sizes.extend(len(part) for part in items.split(rows))
        return over(fn, items, rows=rows, **rest)

    monkeypatch.setattr(sg, "over", counted)
    trainer = setup_gradient_accumulation_training(factornet, points(11, 2), 8)
    trainer.training_step(points(5, 1), torch.optim.SGD(factornet.parameters(), lr=0.0), stab=STAB)
    assert sizes == [2, 2, 2, 1, 1, 1, 1, 1]


def test_model_parallel_trains_one_set_of_weights() -> None:
    factornet = network()
    before = copy.deepcopy(factornet)
    model, optimizer = setup_model_parallel_training(factornet, points(CENTERS, 2), ["cpu", "cpu"], ARGS)
    assert model.factornet is factornet
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in factornet.parameters()} == {id(p) for p in model.parameters()}
    model(points(5, 1), STAB).backward()
    optimizer.step()
    assert not torch.equal(factornet.last.bias, before.last.bias)


def test_a_chunk_size_of_its_own_choice_is_what_fits() -> None:
    trainer = setup_chunked_training(network(), points(CENTERS, 2))
    trainer.compute_loss(points(5, 1), STAB)
    assert trainer.chunk_size == CENTERS
    assert error_of(chunked(0)) < 1e-12


@pytest.mark.parametrize(
    ("made", "found"),
    [
        (lambda net: setup_chunked_training(nn.DataParallel(net), points(4, 1), 2), "copies the centers to every"),
        (lambda net: setup_chunked_training(net, points(4, 1), -2), "not a number of centers"),
        (lambda net: setup_gradient_accumulation_training(net, points(4, 1), 5), "a chunk has at least one"),
        (lambda net: setup_gradient_accumulation_training(net, points(4, 1), 0), "a chunk has at least one"),
        (lambda net: setup_model_parallel_training(net, points(4, 1), [], ARGS), "no device"),
    ],
)
def test_what_cannot_be_is_refused(made: Callable[[Any], Any], found: str) -> None:
    with pytest.raises(sg.UsageError, match=found):
        made(network())


@pytest.mark.parametrize(
    ("script", "line"),
    [
        ("train_wpo_sgm_chunked.py", "--niters 2 --train_kernel_size 9 --chunk_size 4 --device cpu"),
        ("train_wpo_sgm_model_parallel.py", "--niters 2 --train_kernel_size 9 --device_ids cpu cpu --chunk_size 2"),
    ],
)
def test_the_examples_run(
    script: str, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", [script, *line.split()])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    assert capsys.readouterr().out.startswith("step 0: loss -")


@pytest.mark.parametrize(
    "line",
    [
        "--train_kernel_size 1000 --data cifar10 --data_root somewhere",
        "--strategy chunked --chunk_size 50",
        "--strategy model_parallel --train_kernel_size 2000",
        "--train_kernel_size 100",
        "--train_kernel_size 500 --strategy chunked --chunk_size 50",
        "--train_kernel_size 5000 --strategy gradient_accumulation --accumulation_steps 8",
    ],
)
def test_the_documents_command_lines_are_taken(line: str) -> None:
    _, call = target_call("run", (RunOptions,), ["score_kernel", *line.split()])
    assert call.part(ScoreKernelOptions).strategy in line or "--strategy" not in line
