"""``plan`` and ``measure`` change nothing of a program they look at: it could go on as if they had not been called."""

from __future__ import annotations

import contextlib
import hashlib
import random
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from samegrad.cli import programs
from tests.cli.conftest import Cli

PROGRAM = '''
    import random
    import numpy as np
    import torch
    from torch import nn
    import samegrad as sg

    drawn, seen, centre = [], [], torch.ones(4)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Linear(32, 4)
            self.calls, self.fails = 0, False

        def forward(self, x):
            self.calls += 1
            if self.fails and self.calls > 2:
                raise ValueError("the user's own")
            return self.last(nn.functional.dropout(self.norm(self.first(x)).relu(), 0.2))

    def batches():
        while True:
            drawn.append(1)
            yield torch.randn(64, 16), torch.randint(0, 4, (64,))

    def train(fails=False):
        net = Net()
        optimizer = torch.optim.Adam(net.parameters())

        def loss(out, batch):
            centre.mul_(0.9).add_(out.detach().mean(0), alpha=0.1)
            return nn.functional.cross_entropy(out - centre, batch[1])

        nn.functional.mse_loss(net(torch.randn(8, 16)), torch.zeros(8, 4)).backward()
        optimizer.step()
        net.last.weight.register_hook(lambda gradient: seen.append(1))
        net.fails = fails
        return sg.Step(net, loss, optimizer=optimizer), batches()

    def failing():
        return train(fails=True)
'''


@pytest.fixture
def program(folder: Path) -> Path:
    (folder / "program.py").write_text(textwrap.dedent(PROGRAM))
    return folder


class Watched:
    """The program that a command loads, and its fingerprint as it was handed over."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.training: Any = None
        load = programs.load_training

        def loading(*given: Any) -> Any:
            self.training = load(*given)
            self.before = self.fingerprint()
            return self.training

        monkeypatch.setattr(programs, "load_training", loading)

    def fingerprint(self) -> str:
        declared, digest = self.training.step.declared, hashlib.sha256()
        code = declared.loss_fn.__globals__

        def add(*parts: Any) -> None:
            for part in parts:
                is_tensor = isinstance(part, torch.Tensor)
                digest.update(part.detach().numpy().tobytes() if is_tensor else repr(part).encode())

        for path, part in declared.network.named_modules():
            add(path, part.training, len(part._forward_hooks), *part.buffers(recurse=False))
        for name, parameter in declared.network.named_parameters():
            add(name, id(parameter), parameter, parameter.requires_grad, len(parameter._backward_hooks or ()))
            add(*([] if parameter.grad is None else [parameter.grad]))
        for state in declared.optimizer.state.values():
            add(*(part for entry in sorted(state.items()) for part in entry))
        add([{k: v for k, v in group.items() if k != "params"} for group in declared.optimizer.param_groups])
        add(declared.network.calls, code["centre"], len(code["seen"]), len(code["drawn"]), *self.training.batch)
        add(torch.get_rng_state(), random.getstate(), np.random.get_state(legacy=True))
        return digest.hexdigest()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    return Watched(monkeypatch)


LINES = {
    "plan": ("plan", "program.py:train", "--budget", "1MiB"),
    "plan in less": ("plan", "program.py:train", "--budget", "60KiB"),
    "plan, below the floor": ("plan", "program.py:train", "--budget", "2KiB"),
    "plan for a card": ("plan", "program.py:train", "--device", "RTX 4070 Laptop"),
    "pareto": ("plan", "program.py:train", "--pareto"),
    "measure": ("measure", "program.py:train", "--budget", "1MiB"),
    "measure for a card": ("measure", "program.py:train", "--device", "H200"),
    "plan, raising": ("plan", "program.py:failing", "--budget", "60KiB"),
    "measure, raising": ("measure", "program.py:failing", "--budget", "1MiB"),
    "plan for a card, raising": ("plan", "program.py:failing", "--device", "H200"),
}


@pytest.mark.parametrize("name", LINES)
def test_nothing_of_the_program_changes(cli: Cli, program: Path, watched: Watched, name: str) -> None:
    ran = cli(*LINES[name], "--json")
    assert (ran.code != 0) == ("raising" in name or "below" in name), ran.err
    assert isinstance(ran.document, dict)
    assert watched.fingerprint() == watched.before
    assert len(watched.training.step.declared.loss_fn.__globals__["drawn"]) == 1


def test_a_given_plan_is_judged_without_a_trace_of_it(cli: Cli, program: Path, watched: Watched) -> None:
    assert cli("plan", "program.py:train", "--budget", "60KiB", "--output", "out").code == 0
    assert cli("plan", "program.py:train", "--plan", "out/plan.json").code == 0
    assert watched.fingerprint() == watched.before


def test_a_real_step_that_stays_is_seen(
    cli: Cli, program: Path, watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("samegrad.cli.measured.undone", lambda declared: contextlib.nullcontext())
    assert cli("measure", "program.py:train", "--budget", "1MiB").code == 0
    assert watched.fingerprint() != watched.before


def test_a_batch_more_is_seen(cli: Cli, program: Path, watched: Watched) -> None:
    assert cli("plan", "program.py:train", "--budget", "1MiB").code == 0
    next(watched.training.step.declared.loss_fn.__globals__["batches"]())
    assert watched.fingerprint() != watched.before
