"""Every recipe's ``plan --table`` on a terminal of 80 columns: no column, no head and no word of it is cut."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import rich.console
import torch

import samegrad as sg
from samegrad.cli.tables import DrawnTable
from samegrad.recipes import find_recipe, recipe_names
from samegrad.recipes.flow_style import table as flow_table
from samegrad.recipes.vq_spectrogram import table as vq_table
from samegrad.units import format_bytes, format_seconds

WIDTH = 80
# Small programs with all lines of their tables.
SMALL: dict[str, dict[str, Any]] = {
    "autoencoder": {"patch_rows": 60, "hidden": 8, "latent_dim": 2},
    "fewshot_cosine": {
        "backbone": "Conv4", "n_way": 3, "k_shot": 2, "n_query": 2, "n_episode": 1, "num_epoch": 1, "test_iter": 1,
    },
    "flow_style": {
        "batch_size": 2, "accumulation_steps": 1, "ode_integration_steps": 2, "base_channels": 4, "max_samples": 50,
        "num_projections": 2, "use_compile": True,
    },
    "score_kernel": {"data": "8gaussians", "train_kernel_size": 9, "train_samples_size": 40, "hiddenunits": 4},
    "vq_spectrogram": {},
}  # fmt: skip
# The widest of its kind, which a real table may hold.
WIDE_BYTES, WIDE_SECONDS, WIDE_NUMBER = 2**30 - 2**20, 0.9994, 0.0008888


def drawn(rows: Sequence[Mapping[str, Any]], width: int = WIDTH) -> str:
    screen = io.StringIO()
    rich.console.Console(width=width, file=screen).print(DrawnTable(rows))
    return screen.getvalue()


def widened(name: str, value: Any) -> Any:
    """``value`` as wide as another run may print it."""
    if not isinstance(value, (int, float)):
        return value
    if name.endswith("_bytes"):
        return WIDE_BYTES
    return WIDE_SECONDS if name.endswith("_seconds") else WIDE_NUMBER if isinstance(value, float) else value


@dataclasses.dataclass(frozen=True)
class Measured:
    """Stands for a footprint: what a table asks of one."""

    batch_rows: int = 8

    def predicted_peak_bytes(self, *, rows: int) -> int:
        return WIDE_BYTES

    def predicted_seconds(self, *, rows: int) -> float:
        return WIDE_SECONDS


def table_of(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> Sequence[Mapping[str, Any]]:
    recipe, asked = find_recipe(name), SMALL[name]
    # What is measured is another test's.
    one = sg.StepResult(index=1, loss=1.0, seconds=0.5, batch_rows=8, peak_allocated_bytes=2**29)
    monkeypatch.setattr(vq_table, "measured_step", lambda options: one)
    monkeypatch.setattr(flow_table, "_timed", lambda *_: (2.0, 1.0))
    if name == "flow_style":
        monkeypatch.setattr(sg, "measure_step", lambda step, batch: Measured())
        for style in ("monet", "photo"):
            (root / style).mkdir()
            for number in range(4):
                torch.save(torch.randn(4, 8, 8), root / style / f"{number}.pt")
        asked = {**asked, "data_root": root}
    rows = recipe.table(recipe.options(device="cpu", **asked))
    counted, rows = len(rows), list(rows)
    # A bar beside it ends where the table does.
    assert counted == len(rows)
    return [{column: widened(column, value) for column, value in row.items()} for row in rows]


@pytest.mark.parametrize("name", recipe_names())
def test_no_word_of_a_recipes_table_is_cut_at_80_columns(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = table_of(name, tmp_path, monkeypatch)
    text = drawn(rows)
    assert "…" not in text and max(map(len, text.splitlines())) <= WIDTH
    words = set(text.split())
    for row in rows:
        for column, value in row.items():
            for word in column.removesuffix("_bytes").removesuffix("_seconds").split("_"):
                assert word in words, column
            if isinstance(value, str):
                assert set(value.split()) <= words, value
            elif isinstance(value, (int, float)):
                told = (
                    format_bytes(value) if column.endswith("_bytes")
                    else format_seconds(value) if column.endswith("_seconds")
                    else f"{value:.3g}" if isinstance(value, float) else str(value)
                )  # fmt: skip
                assert told in text, column


def test_columns_that_do_not_fit_stand_below_beside_what_tells_the_rows_apart() -> None:
    rows = [{"part": "one", "way": way, **{f"figure_{n}_bytes": WIDE_BYTES for n in range(9)}} for way in ("a", "b")]
    first, second = drawn(rows, width=60).split("\n\n")[:2]
    for text in (first, second):
        assert text.count("one") == 2 and text.split()[-1] == "MiB"
    assert "figure 8" not in first
    assert drawn(rows, width=200).count("one") == 2


def test_figures_of_the_document_stay_together() -> None:
    figures = {f"our_{n}_bytes": WIDE_BYTES for n in range(6)} | {f"document_{n}_bytes": WIDE_BYTES for n in range(2)}
    first, second = drawn([{"way": "a", **figures}]).split("\n\n")[:2]
    assert "document" not in first and second.count("document") == 2


def test_an_empty_table_is_drawn() -> None:
    assert drawn([]).strip() == ""
