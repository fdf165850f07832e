"""The numerical contract, tier by tier: networks in float32, TF32 and bfloat16 autocast, split and verified.

On CUDA where there is one; on the CPU without TF32. A table, a JSON file, and exit code 1 when any tier fails.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import _results
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import samegrad as sg
from samegrad.records import Verdict

CLASSES, STEPS, WIDTH = 10, 24, 32


class Convolutions(nn.Module):
    """Images (n, 3, 32, 32) of noise."""

    def __init__(self) -> None:
        super().__init__()
        channels = (3, 32, 64, 64)
        blocks = [
            nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(4, b), nn.SiLU())
            for a, b in itertools.pairwise(channels)
        ]
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels[-1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


class Encoder(nn.Module):
    """A transformer encoder over sequences (n, 24, 32)."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean(1))


class Recurrent(nn.Module):
    """A long short-term memory over sequences (n, 24, 32)."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, 48, batch_first=True)
        self.head = nn.Linear(48, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (Convolutions, (3, 32, 32)),
    "transformer encoder": (Encoder, (STEPS, WIDTH)),
    "lstm": (Recurrent, (STEPS, WIDTH)),
}


def cross_entropy(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(outputs, batch[1])


def contrastive(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    z = F.normalize(outputs.float() if outputs.dtype is torch.bfloat16 else outputs, dim=1)
    return F.cross_entropy(z @ z.T * 3, torch.arange(len(z), device=z.device))


LOSSES = {"one pass": cross_entropy, "two passes": contrastive}


@contextlib.contextmanager
def arithmetic(name: str, device: torch.device) -> Iterator[None]:
    """float32 products in full, in TF32, or bfloat16 under autocast; all settings restored."""
    backends: Any = torch.backends
    places = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "tf32" if name == "tf32" else "ieee"
        with torch.autocast(device.type, torch.bfloat16, enabled=name == "bfloat16 autocast"):
            yield
    finally:
        for place, setting in zip(places, before):
            place.fp32_precision = setting


def verify(network: str, loss: str, device: torch.device, rows: int) -> Verdict:
    make, shape = NETWORKS[network]
    torch.manual_seed(0)
    model = make().to(device)
    generator = torch.Generator().manual_seed(1)
    batch = torch.randn(rows, *shape, generator=generator), torch.randint(0, CLASSES, (rows,), generator=generator)
    with sg.Step(model, LOSSES[loss], rows=rows // 5) as step:
        return sg.verify_step(step, batch, rows=rows)


def table_of(verdict: Verdict) -> list[dict[str, Any]]:
    fields = ("tier", "name", "error", "allowed", "passed")
    return [{field: getattr(check, field) for field in fields} for check in verdict.checks]


def show(case: str, verdict: Verdict) -> None:
    print(f"{case}: {verdict.answer.value}, {verdict.reference}, {verdict.seconds:.2f} s {verdict.fault}")
    for check in verdict.checks:
        mark = "ok" if check.passed else "FAILED"
        print(f"  tier {check.tier}  {check.name:<52} {check.error:10.2e}  allowed {check.allowed:10.2e}  {mark}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=257, help="rows of a batch; a prime, so that no split is even")
    rows = parser.parse_args().rows
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    formats = ["float32", "tf32", "bfloat16 autocast"] if device.type == "cuda" else ["float32", "bfloat16 autocast"]
    cases: dict[str, Any] = {}
    started = time.perf_counter()
    for network in NETWORKS:
        for loss in LOSSES:
            for form in formats:
                with arithmetic(form, device):
                    verdict = verify(network, loss, device, rows)
                case = f"{network}; {loss}; {form}"
                show(case, verdict)
                cases[case] = {
                    "answer": verdict.answer.value,
                    "reference": verdict.reference,
                    "fault": verdict.fault,
                    "checks": table_of(verdict),
                }
    same = all(case["answer"] == "same" for case in cases.values())
    figures = {"rows": rows, "all_same": same, "seconds": time.perf_counter() - started, "cases": cases}
    _results.write(f"contract_{device.type}", figures)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
