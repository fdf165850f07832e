"""Folders of a run that torchrun started several times over."""

from __future__ import annotations

from pathlib import Path

import pytest

from samegrad.cli.ranks import first_folder, own_folder, own_rank


def test_without_torchrun_there_is_one_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert own_rank() == 0
    assert own_folder(Path("runs/a-rank-1")) == first_folder(Path("runs/a-rank-1")) == Path("runs/a-rank-1")


@pytest.mark.parametrize("rank", [0, 1, 12])
def test_every_rank_has_a_folder_and_finds_the_first_ones(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", str(rank))
    own = own_folder(Path("runs/a"))
    assert (own == Path("runs/a")) == (rank == 0)
    assert first_folder(own) == Path("runs/a")
