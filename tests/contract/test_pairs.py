"""Every pair of levers that a plan allows, over models of five kinds: ``verify_step`` says how exact it is.

A plan is as exact as its weakest lever. What rounds is the same as the plain step under that rounding, and how far the
declared step is stands beside it.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

import samegrad as sg
from samegrad.levers import find_levers
from samegrad.records import Exactness, Same, Verdict

from .lever_zoo import MODELS, forced, normalised
from .plain import cross_entropy, spread

LEVERS = find_levers()
Knobs = dict[str, dict[str, Any]]

# Knobs of each lever on each model; a lever that is not there has nothing to do on that model.
EVERYWHERE: Knobs = {
    "host_rows": {},
    "split_rows": {"rows": 5},
    "autocast": {"dtype": "bfloat16"},
    "offload_saved": {"smallest_bytes": 0},
    "optimizer_state": {},
}
KNOBS: dict[str, Knobs] = {
    "mlp": EVERYWHERE | {"recompute": {"blocks": ["0", "1"]}, "chunk_loss": {"head": "6", "rows": 4}},
    "cnn": EVERYWHERE
    | {"recompute": {"blocks": [["0", "1"], "4"]}, "chunk_loss": {"head": "9", "rows": 4}, "layout": {}},
    "transformer": EVERYWHERE | {"recompute": {"blocks": ["1"]}, "chunk_loss": {"head": "3", "rows": 4}},
    "lstm": EVERYWHERE | {"recompute": {"blocks": ["0"]}, "chunk_loss": {"head": "2", "rows": 4}},
    # Its rows are coupled: nothing splits them through the whole model.
    "batchnorm": {name: knobs for name, knobs in EVERYWHERE.items() if name != "split_rows"}
    | {
        "recompute": {"blocks": ["0", "1"]},
        "chunk_loss": {"head": "2.2", "rows": 4},
        "layout": {},
        "segments": {"rows": 5, "paths": {"2": 1}},
        "exact_batchnorm": {"rows": 5},
    },
}
# What is refused, since one of the two runs what the other would: the blocks, or the head.
REFUSED = {("exact_batchnorm", "recompute"), ("chunk_loss", "exact_batchnorm"), ("chunk_loss", "segments")}
ROUNDS = Exactness.ROUNDED


def made(kind: str, drop: float) -> tuple[nn.Module, Any]:
    return normalised(torch.float32, drop) if kind == "batchnorm" else MODELS[kind](torch.float32, drop)


def pairs_on(kind: str) -> list[tuple[str, str]]:
    names = [name for name in LEVERS if name in KNOBS[kind]]
    pairs = [pair for pair in itertools.combinations(names, 2) if LEVERS[pair[0]].slot is not LEVERS[pair[1]].slot]
    return [pair for pair in pairs if tuple(sorted(pair)) not in REFUSED]


CASES = [(kind, pair) for kind in KNOBS for pair in pairs_on(kind)]
# Each pair on every second of the kinds of models that it is for; on all where there is time.
EVERY_SECOND = pytest.mark.parametrize(
    ("kind", "pair"),
    [
        pytest.param(
            kind, pair, id=f"{kind}-{'+'.join(pair)}",
            marks=[pytest.mark.slow] * (sum(pair == other for _, other in CASES[:place]) % 2),
        )
        for place, (kind, pair) in enumerate(CASES)
    ],
)  # fmt: skip
EVERY = pytest.mark.parametrize(("kind", "pair"), CASES, ids=lambda v: v if isinstance(v, str) else "+".join(v))


def verified(kind: str, loss_fn: Any, drop: float, **levers: dict[str, Any]) -> Verdict:
    model, batch = made(kind, drop)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with forced(model, loss_fn, optimizer=optimizer, **levers) as step:
        # What stands between steps is in force when the step is verified, as it is in a run.
        torch.manual_seed(1)
        scaler = torch.amp.GradScaler("cpu") if levers.get("autocast", {}).get("dtype") == "float16" else None
        step.backward(batch, scaler=scaler)
        model.zero_grad()
        return sg.verify_step(step, batch)


def assert_proven(verdict: Verdict, *levers: str) -> None:
    assert verdict.answer is Same.SAME, [check for check in verdict.checks if not check.passed]
    asked = max(LEVERS[name].exactness for name in levers)
    assert verdict.asked is asked and verdict.found is not None and verdict.found <= asked
    assert (verdict.departure is not None) == (asked is ROUNDS) == (verdict.found is ROUNDS)
    if verdict.departure is not None:
        assert verdict.departure.levers == ("autocast",)
        assert 0 < verdict.departure.gradient_norm_fraction < 1
        assert verdict.reference.startswith("the plain step under autocast in ")


@EVERY_SECOND
def test_a_pair_is_as_exact_as_its_weakest_lever(kind: str, pair: tuple[str, str]) -> None:
    assert_proven(verified(kind, cross_entropy, 0.3, **{name: KNOBS[kind][name] for name in pair}), *pair)


@pytest.mark.slow
@pytest.mark.parametrize("drop", [0.0, 0.3], ids=["no draws", "dropout"])
@EVERY
def test_a_pair_under_a_loss_that_couples_rows(kind: str, pair: tuple[str, str], drop: float) -> None:
    levers = {name: KNOBS[kind][name] for name in pair}
    if "chunk_loss" in pair:
        with pytest.raises(sg.CannotSplit):
            verified(kind, spread, drop, **levers)
        return
    assert_proven(verified(kind, spread, drop, **levers), *pair)


@pytest.mark.parametrize("pair", sorted(REFUSED), ids="+".join)
def test_a_pair_that_excludes_each_other_is_refused_by_name(pair: tuple[str, str]) -> None:
    with pytest.raises(sg.CannotSplit, match=f"{'chunk_loss' if 'chunk_loss' in pair else 'exact_batchnorm'}"):
        verified("batchnorm", cross_entropy, 0.0, **{name: KNOBS["batchnorm"][name] for name in pair})


@pytest.mark.parametrize("kind", KNOBS)
def test_all_levers_together(kind: str) -> None:
    levers = {name: knobs for name, knobs in KNOBS[kind].items() if name not in ("segments", "exact_batchnorm")}
    assert_proven(verified(kind, cross_entropy, 0.3, **levers), *levers)


WAYS: dict[str, list[str]] = {
    "whole": [], "split": ["split_rows"], "recomputed": ["recompute"], "both": ["split_rows", "recompute"],
}  # fmt: skip
HEADS = {"mlp": "6", "cnn": "9", "transformer": "3", "lstm": "2"}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("loss_fn", [cross_entropy, spread], ids=["one pass", "two passes"])
# torch has no LSTM in float16 on the CPU.
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(kind, dtype) for kind in HEADS for dtype in ("bfloat16", "float16") if (kind, dtype) != ("lstm", "float16")],
)
def test_autocast_with_parts_in_full_precision_or_a_scaler(kind: str, dtype: str, loss_fn: Any, way: str) -> None:
    autocast = {"dtype": dtype, "full_precision": [HEADS[kind]]}
    levers = {name: KNOBS[kind][name] for name in WAYS[way]} | {"autocast": autocast}
    verdict = verified(kind, loss_fn, 0.3, **levers)
    assert_proven(verdict, *levers)
    assert verdict.dtype == dtype and verdict.reference == (
        f"the plain step under autocast in {dtype} but for {HEADS[kind]} on cpu"
    )


@pytest.mark.parametrize("kind", KNOBS)
@pytest.mark.parametrize("lever", ["offload_saved", "optimizer_state", "recompute"])
def test_a_lever_of_the_same_bits_is_found_to_have_them(kind: str, lever: str) -> None:
    verdict = verified(kind, spread, 0.3, **{lever: KNOBS[kind][lever]})
    assert (verdict.asked, verdict.found) == (Exactness.SAME_BITS, Exactness.SAME_BITS)
    assert verdict.same and all(check.error == 0 for check in verdict.checks if check.tier == 0)


def test_a_plan_that_rounds_is_verified_only_where_it_is_allowed() -> None:
    model, batch = made("mlp", 0.0)
    plan = sg.Plan(levers={"autocast": {}}, exactness=Exactness.SAME_BITS, batch_rows=len(batch[0]))
    # What the plan says of itself does not make its lever any more exact.
    with pytest.raises(sg.UsageError, match="a narrower dtype than declared"):
        sg.verify_step(sg.Step(model, cross_entropy, plan=plan), batch)
