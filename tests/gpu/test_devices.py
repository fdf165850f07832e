"""The card at hand is in the catalogue as it says itself that it is."""

from __future__ import annotations

import pytest
import torch

from samegrad.errors import UsageError
from samegrad.measure.cards import Card
from samegrad.measure.devices import find_card

pytestmark = pytest.mark.gpu


@pytest.fixture
def card() -> Card:
    name, total_bytes = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    try:
        return find_card(name, memory_bytes=total_bytes)
    except UsageError:
        pytest.skip(f"{name} with {total_bytes} bytes is not in the catalogue")


def test_what_the_device_says_of_itself(card: Card) -> None:
    seen = torch.cuda.get_device_properties(0)
    assert card.torch_name == seen.name
    assert card.compute_capability == (seen.major, seen.minor)
    assert card.streaming_multiprocessors == seen.multi_processor_count
    # Drivers keep more or less of the card for themselves.
    assert card.memory_bytes == pytest.approx(seen.total_memory, rel=0.05)


def test_a_product_of_matrices_does_not_beat_the_stated_peak(card: Card) -> None:
    """As it would if a rate in the catalogue were too low."""
    n = 4096
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.float16) for _ in range(2))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(3):
        a @ b
    start.record()
    for _ in range(20):
        a @ b
    end.record()
    torch.cuda.synchronize()
    rate = 20 * 2 * n**3 / (start.elapsed_time(end) / 1000)
    # Cards run above their stated clock while they are cool.
    assert 0.2 < rate / card.flops_per_second["float16"] < 1.25
