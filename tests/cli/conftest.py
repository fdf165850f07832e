"""The command line called in this process, where torch is imported once, and small steps to call it on."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from samegrad.cli.main import main


@dataclasses.dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """stdout as one JSON document; fails when it is anything else."""
        return json.loads(self.out, parse_constant=pytest.fail)


Cli = Callable[..., Ran]

STEPS = '''
    import time
    import torch
    from torch import nn
    import samegrad as sg

    def declared(**how):
        model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 4))
        optimizer = torch.optim.Adam(model.parameters())
        return sg.Step(model, lambda out, b: nn.functional.cross_entropy(out, b[1]), optimizer=optimizer, **how)

    class Batches:
        """Drawn from the default generator as training goes, so only an exact resume sees the same ones."""

        def __init__(self, count, seconds=0.0):
            self.count, self.seconds = count, seconds

        def __len__(self):
            return self.count

        def __iter__(self):
            for _ in range(self.count):
                time.sleep(self.seconds)
                yield torch.randn(64, 16), torch.randint(0, 4, (64,))

    def train():
        return declared(), Batches(12)

    def one_batch():
        return declared(), (torch.randn(64, 16), torch.randint(0, 4, (64,)))

    class Drawn(torch.utils.data.Dataset):
        def __len__(self):
            return 64 * 40

        def __getitem__(self, index):
            time.sleep(0.0005)
            generator = torch.Generator().manual_seed(index)
            return torch.randn(16, generator=generator), index % 4

    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter([(torch.randn(16), 0)] * 64 * 3)

    def with_a_worker():
        return declared(), torch.utils.data.DataLoader(Drawn(), batch_size=64, num_workers=1)

    def without_a_length():
        return declared(), torch.utils.data.DataLoader(Endless(), batch_size=64)

    def scheduled():
        step = declared()
        optimizer = step.declared.optimizer
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.1)
        optimizer.register_step_post_hook(lambda *_: scheduler.step())
        return step, Batches(12)

    def budgeted(budget=None):
        return declared(budget=budget), Batches(3)

    def pinned():
        return declared(rows=[32, 32]), Batches(3)

    def rounded():
        return declared(allow=sg.Exactness.ROUNDED), Batches(3)

    def slow():
        return declared(), Batches(40, seconds=0.02)

    def coupled():
        class Centred(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.randn(16, 4))

            def forward(self, x):
                return (x - x.mean(0)) @ self.weight

        model = Centred()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        step = sg.Step(model, lambda out, b: nn.functional.cross_entropy(out, b[1]), optimizer=optimizer)
        return step, Batches(2)

    def diverging():
        step, batches = train()
        return step, [(torch.full((64, 16), float("nan")), torch.zeros(64, dtype=torch.int64))]

    def other_dtype():
        return declared(), [(torch.randn(64, 16).double(), torch.randint(0, 4, (64,)))]

    def other_keys():
        return declared(), [{"image": torch.randn(64, 16), "label": torch.randint(0, 4, (64,))}]

    def one_label_less():
        return declared(), [(torch.randn(64, 16), torch.zeros(63, dtype=torch.int64))]

    def nothing_counts():
        step, batches = train()
        return step, [(torch.randn(64, 16), torch.full((64,), -100))]

    def raising():
        raise KeyError("no such thing")

    def raising_in_loss():
        model = nn.Linear(16, 4)
        def loss(out, batch):
            return undefined_name
        return sg.Step(model, loss, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)), Batches(2)

    def exhausted():
        step, batches = train()
        def loss(out, batch):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return sg.Step(step.declared.model, loss, optimizer=step.declared.optimizer), batches

    def exiting():
        import sys
        sys.exit()

    def without_room():
        raise torch.OutOfMemoryError("CUDA out of memory")

    def not_allowed():
        raise PermissionError(13, "Permission denied", "rows.npy")

    def wrong_shape():
        return declared()

    def empty():
        return declared(), []
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder but for ``steps.py``."""
    (tmp_path / "steps.py").write_text(textwrap.dedent(STEPS))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def cli(folder: Path, capfd: pytest.CaptureFixture[str]) -> Cli:
    """``cli("plan", "steps.py:train")``: exit code, stdout and stderr of that line."""

    def call(*line: str) -> Ran:
        capfd.readouterr()
        code = main([str(token) for token in line])
        captured = capfd.readouterr()
        return Ran(code, captured.out, captured.err)

    return call


def metrics(run: Path, kind: str = "step") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]
