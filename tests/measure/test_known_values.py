"""Code that looks at whole numbers of the batch is followed the way that this batch goes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samegrad.declared import declare
from samegrad.errors import CannotTrace
from samegrad.measure import known_values
from samegrad.measure.trace import in_chunks, plainly, trace_step

from .traced import counted_peaks, split, traced_peaks

ROWS, LENGTH = 6, 9


class Masked(nn.Module):
    """``reads(values, mask)`` of (rows, length, 4) values and a (rows, length) mask of whole numbers."""

    def __init__(self, reads: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.reads = reads

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.reads(self.layer(batch[0]), batch[1])


def hidden(values: Tensor, mask: Tensor) -> Tensor:
    return values if bool(mask.all()) else values * mask[..., None]


def longest(values: Tensor, mask: Tensor) -> Tensor:
    return values[:, : int(mask.sum(1).max())]


def listed(values: Tensor, mask: Tensor) -> Tensor:
    rows = mask.flatten().nonzero()[:, 0]
    return values.flatten(0, 1).index_select(0, rows)


def written(values: Tensor, mask: Tensor) -> Tensor:
    count = mask.clone().add_(1)
    count[:, 0] += 2
    return values * int(count.max())


WAYS = {f.__name__: f for f in (hidden, longest, listed)}


def batch(hides: int) -> tuple[Tensor, Tensor]:
    mask = torch.ones(ROWS, LENGTH, dtype=torch.int64)
    mask[:, LENGTH - hides :] = 0
    return torch.randn(ROWS, LENGTH, 4), mask


def step_of(reads: Callable[[Tensor, Tensor], Tensor]) -> Any:
    model = Masked(reads)
    return declare(model, lambda outputs, _: outputs.square().sum(), forward=lambda model, rows: model(rows))


@pytest.mark.parametrize("hides", [0, 4])
@pytest.mark.parametrize("name", WAYS)
def test_the_way_of_this_batch_is_followed_to_the_byte(name: str, hides: int) -> None:
    declared, rows = step_of(WAYS[name]), batch(hides)
    assert traced_peaks(declared, rows, plainly()) == counted_peaks(declared, rows, plainly())
    for device in ("cpu", "cuda"):
        assert "values of the batch" in trace_step(declared, rows, device=device).notes["values"]


def test_chunks_that_arrive_bring_their_values() -> None:
    declared, rows = step_of(hidden), batch(2)
    trace = trace_step(declared, rows, run=in_chunks(split(declared, rows), [4, 2]))
    assert "values" in trace.notes


def test_a_batch_without_data_says_what_is_missing() -> None:
    rows = tuple(leaf.to("meta") for leaf in batch(2))
    with pytest.raises(CannotTrace, match="_local_scalar_dense"):
        trace_step(step_of(hidden), rows)


def test_what_was_written_in_part_is_not_known_any_more() -> None:
    with pytest.raises(CannotTrace, match="values"):
        trace_step(step_of(written), batch(2), device="cpu")


def test_numbers_with_a_fraction_are_not_carried_along() -> None:
    with pytest.raises(CannotTrace, match="values"):
        trace_step(step_of(lambda values, mask: values * float(mask.float().mean())), batch(2), device="cpu")


def test_a_planted_wrong_value_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate = known_values.evaluate

    def wrong(func: Any, args: Any, kwargs: Any) -> Any:
        return 1 if "_local_scalar_dense" in str(func) else evaluate(func, args, kwargs)

    monkeypatch.setattr(known_values, "evaluate", wrong)
    declared, rows = step_of(longest), batch(4)
    assert traced_peaks(declared, rows, plainly()) != counted_peaks(declared, rows, plainly())
