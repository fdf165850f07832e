"""Every loss, every split: the plain step's gradients within the numerical contract, in float64."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samegrad import trees
from samegrad.errors import BadInput, FalseNormalise, GradientsDiffer
from samegrad.exact import passes, program
from samegrad.exact.findings import Examination
from samegrad.exact.losses import Form
from samegrad.exact.split import SplitStep, sliced_chunks

from . import zoo

SPLITS: list[list[int]] = [
    *(trees.even_sizes(zoo.ROWS, rows) for rows in (1, 7, 8, zoo.ROWS)),
    [1, 27, 1],
    [8, 8, 13],
]


@pytest.mark.parametrize("name", zoo.LOSSES)
def test_every_split_of_every_loss_has_the_plain_gradient(name: str) -> None:
    loss_fn, form = zoo.LOSSES[name]
    model, rows = zoo.mlp(), zoo.batch()
    split, layout = zoo.split_step(model, loss_fn, rows)
    assert split.examination.form.name == form, split.examination.reason
    loss, reference = zoo.plain_gradients(model, loss_fn, rows)
    for sizes in SPLITS:
        assert zoo.worst_error(split, rows, layout, sizes, reference) <= 1
        value = split.totals(rows, layout, sizes).loss
        torch.testing.assert_close(value, loss, rtol=16 * 2**-53, atol=1e-15)


@pytest.mark.parametrize("name", [name for name, (_, form) in zoo.LOSSES.items() if form != "COUPLED"])
def test_two_passes_agree_where_one_is_enough(name: str) -> None:
    loss_fn, _ = zoo.LOSSES[name]
    model, rows = zoo.mlp(), zoo.batch()
    split, layout = zoo.split_step(model, loss_fn, rows)
    _, reference = zoo.plain_gradients(model, loss_fn, rows)
    twice = dataclasses.replace(split, examination=Examination(Form.COUPLED, "asked for"))
    assert zoo.worst_error(twice, rows, layout, [8, 8, 8, 5], reference) <= 1


@pytest.mark.parametrize(
    ("planted", "sizes"),
    [
        ("mean of means", [8, 8, 8, 5]),
        ("half a percent", [8, 8, 8, 5]),
        ("a chunk dropped", [8, 8, 8, 5]),
    ],
)
def test_a_planted_wrong_weight_is_outside_the_contract(
    planted: str, sizes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    loss_fn, _ = zoo.LOSSES["mse"]
    model, rows = zoo.mlp(), zoo.batch()
    split, layout = zoo.split_step(model, loss_fn, rows)
    _, reference = zoo.plain_gradients(model, loss_fn, rows)
    right = [size / zoo.ROWS for size in sizes]
    wrong = {
        "mean of means": [1 / len(sizes)] * len(sizes),
        "half a percent": [right[0] * 1.005, *right[1:]],
        "a chunk dropped": [0.0, *right[1:]],
    }[planted]
    assert zoo.worst_error(split, rows, layout, sizes, reference) <= 1
    monkeypatch.setattr(SplitStep, "_shares", lambda *_: wrong)
    assert zoo.worst_error(split, rows, layout, sizes, reference) > 1e6


def test_a_chunk_without_a_valid_target_adds_nothing() -> None:
    model, rows = zoo.mlp(), zoo.batch()
    split, layout = zoo.split_step(model, lambda z, b: F.cross_entropy(z, b["y_ignored"]), rows)
    _, reference = zoo.plain_gradients(model, lambda z, b: F.cross_entropy(z, b["y_ignored"]), rows)
    # Rows 8 to 15 are the ignored ones: the second chunk's own loss is 0/0.
    assert zoo.worst_error(split, rows, layout, [8, 8, 13], reference) <= 1
    assert split.totals(rows, layout, [8, 8, 13]).loss.isfinite()


def test_a_batch_without_any_valid_target_is_refused_when_counted() -> None:
    model, rows = zoo.mlp(), zoo.batch()
    split, layout = zoo.split_step(
        model,
        lambda z, b: F.cross_entropy(z, b["y_ignored"]),
        rows,
        normalise=lambda b: (b["y_ignored"] != -100).sum(),
    )
    rows["y_ignored"] = torch.full_like(rows["y_ignored"], -100)
    with pytest.raises(BadInput, match=r"0\.0 over 29 rows"):
        split.totals(rows, layout, [8, 8, 13])


@pytest.mark.parametrize(
    ("normalise", "loss"),
    [
        ("mean", "mse"),
        ("sum", "mse sum"),
        (lambda b: (b["y_ignored"] != -100).sum(), "ignored targets"),
        (lambda b: zoo.CLASS_WEIGHTS[b["y"]].sum(), "class weights"),
        ("mean", "label smoothing"),
    ],
)
def test_a_true_declaration_takes_one_pass(normalise: object, loss: str) -> None:
    loss_fn, _ = zoo.LOSSES[loss]
    model, rows = zoo.mlp(), zoo.batch()
    split, layout = zoo.split_step(model, loss_fn, rows, normalise=normalise)
    assert split.examination.passes == 1
    _, reference = zoo.plain_gradients(model, loss_fn, rows)
    for sizes in SPLITS:
        assert zoo.worst_error(split, rows, layout, sizes, reference) <= 1


@pytest.mark.parametrize(
    ("normalise", "loss"),
    [
        ("sum", "mse"),
        ("mean", "mse sum"),
        ("mean", "class weights"),
        ("mean", "info nce"),
        ("mean", "rmse"),
        ("mean", "max over batch"),
        ("mean", "detached scale"),
        (lambda b: b["w"].sum(), "mse"),
    ],
)
def test_a_false_declaration_is_refused_with_its_residual(normalise: object, loss: str) -> None:
    loss_fn, _ = zoo.LOSSES[loss]
    with pytest.raises(FalseNormalise, match="differs by"):
        zoo.split_step(zoo.mlp(), loss_fn, zoo.batch(), normalise=normalise)


def test_a_loss_that_owns_parameters_gives_them_their_gradient_once() -> None:
    class Temperature(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_scale = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))

        def forward(self, z: Tensor, b: dict[str, Tensor]) -> Tensor:
            z = F.normalize(z, dim=1)
            return F.cross_entropy(z @ z.T * self.log_scale.exp(), torch.arange(len(z)))

    model, rows, loss_fn = zoo.mlp(), zoo.batch(), Temperature()
    loss_fn(model(rows["x"]), rows).backward()
    assert loss_fn.log_scale.grad is not None
    reference = loss_fn.log_scale.grad.clone()
    loss_fn.log_scale.grad = None
    fired: list[Tensor] = []
    loss_fn.log_scale.register_hook(fired.append)
    split, layout = zoo.split_step(model, loss_fn, rows)
    split.backward(rows, layout, [8, 8, 8, 5])
    torch.testing.assert_close(loss_fn.log_scale.grad, reference, rtol=1e-13, atol=0)
    assert len(fired) == 1


def test_a_parameter_in_the_model_and_in_the_loss_gets_the_sum_of_both() -> None:
    model, rows = zoo.mlp(), zoo.batch()

    def loss_fn(z: Tensor, b: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(z, b["t"]) + 0.3 * sum(p.pow(2).sum() for p in model.parameters())

    loss_fn(model(rows["x"]), rows).backward()
    reference = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    split, layout = zoo.split_step(model, loss_fn, rows)
    split.backward(rows, layout, [8, 8, 8, 5])
    for parameter, plain in zip(model.parameters(), reference):
        torch.testing.assert_close(parameter.grad, plain, rtol=1e-13, atol=1e-15)


def test_narrow_gradients_do_not_stagnate_over_many_chunks() -> None:
    torch.manual_seed(0)
    rows = {"x": torch.rand(1024, 6).bfloat16(), "t": torch.rand(1024, zoo.CLASSES).bfloat16()}
    model = zoo.mlp(torch.bfloat16)

    def loss_fn(z: Tensor, b: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(z.float(), b["t"].float())

    wide = zoo.mlp()
    wide.load_state_dict(model.state_dict())
    _, oracle = zoo.plain_gradients(wide, lambda z, b: F.mse_loss(z, b["t"]), {k: v.double() for k, v in rows.items()})
    _, plain = zoo.plain_gradients(model, loss_fn, rows)
    split, layout = zoo.split_step(model, loss_fn, rows)
    split = dataclasses.replace(split, sums_of=passes.GradientTotals)
    mine = split.totals(rows, layout, [1] * 1024).totals

    def distance(gradients: list[Tensor | None]) -> float:
        return float(sum((g.double() - o).pow(2).sum() for g, o in zip(gradients, oracle) if g is not None) ** 0.5)

    naive = [p.detach().clone().requires_grad_() for p in model.parameters()]
    for start in range(1024):
        part = {k: v[start : start + 1] for k, v in rows.items()}
        out = F.linear(F.gelu(F.linear(part["x"], naive[0], naive[1])), naive[2], naive[3])
        (loss_fn(out, part) / 1024).backward()
    assert distance(mine) <= 2 * distance(plain)
    assert distance([p.grad for p in naive]) > 5 * distance(plain)


def test_a_second_pass_that_is_another_function_is_refused_before_hand_over() -> None:
    class Drifting(nn.Module):
        """Changes with every call once it is armed; what a forgotten random state would do."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, zoo.CLASSES, dtype=torch.float64)
            self._state = {"armed": False, "calls": 0.0}

        def forward(self, x: Tensor) -> Tensor:
            if self._state["armed"]:
                self._state["calls"] += 1
            return self.linear(x) * (1 + 1e-6 * self._state["calls"])

    model, rows = Drifting(), zoo.batch()
    split, layout = zoo.split_step(model, zoo.LOSSES["rmse"][0], rows)
    model._state["armed"] = True
    with pytest.raises(GradientsDiffer, match="output entries differ"):
        split.backward(rows, layout, [8, 8, 8, 5])
    assert all(p.grad is None for p in model.parameters())


def test_a_program_reads_only_what_it_is_bound_to() -> None:
    """Static inputs, as under capture: new rows copied into the bound tensors give the new rows' totals."""
    model, rows = zoo.mlp(), zoo.batch()
    split, _ = zoo.split_step(model, zoo.LOSSES["mse"][0], rows)
    share = torch.tensor(8 / zoo.ROWS, dtype=torch.float64)
    with split.aliases.swapped() as standing:
        sums = program.LossSums(torch.device("cpu"))
        body = program.single_pass_body(lambda c, _: (zoo.LOSSES["mse"][0](model(c["x"]), c), None), sums)
        gradients = passes.GradientTotals(standing)
        one = program.ChunkProgram(body, gradients)
        static = {k: v[:8].clone() for k, v in rows.items()}
        one.bind(static, None, share, share)
        one.run()
        for key, value in rows.items():
            static[key].copy_(value[8:16])
        one.run()
        totals = one.totals()
    part = {k: v[:16] for k, v in rows.items()}
    _, reference = zoo.plain_gradients(model, lambda z, b: F.mse_loss(z, b["t"]) * (16 / zoo.ROWS), part)
    for mine, plain in zip(totals, reference):
        torch.testing.assert_close(mine, plain, rtol=1e-13, atol=1e-16)


@pytest.mark.parametrize("name", ["mse", "rmse"])
def test_each_pass_ends_its_stream_before_the_next_begins(name: str) -> None:
    """A stream through buffers that are used again cannot begin while another one is open."""
    open_streams: list[int] = []
    begun: list[int] = []

    def stream(batch: Any, layout: Any, sizes: Any, device: torch.device) -> Iterator[Any]:
        assert open_streams == [], "two streams at once"
        begun.append(1)
        open_streams.append(1)
        try:
            yield from sliced_chunks(batch, layout, sizes, device)
        finally:
            open_streams.pop()

    model, rows = zoo.mlp(), zoo.batch()
    split, layout = zoo.split_step(model, zoo.LOSSES[name][0], rows)
    dataclasses.replace(split, chunks=stream).totals(rows, layout, [8, 8, 13])
    assert open_streams == []
    assert len(begun) == split.examination.passes


@pytest.mark.parametrize("passes_wanted", [1, 2])
def test_no_chunk_is_kept_while_another_but_the_next_arrives(passes_wanted: int) -> None:
    """A chunk without a share of the loss, a first and a last one: their memory is read into again two chunks later."""
    rows, alive = zoo.batch(), list[weakref.ref[Tensor]]()
    loss = zoo.LOSSES["ignored targets" if passes_wanted == 1 else "two counts"][0]
    counted = {"normalise": lambda b: (b["y_ignored"] != -100).sum()} if passes_wanted == 1 else {}
    split, layout = zoo.split_step(zoo.mlp(), loss, rows, **counted)
    assert split.examination.passes == passes_wanted

    def watched(batch: Any, layout: Any, sizes: Any, device: Any) -> Iterator[Any]:
        alive.clear()
        for chunk in sliced_chunks(batch, layout, sizes, device):
            # Of chunks handed out, only the last may still be in use.
            assert all(ref() is None for ref in alive[:-1])
            alive.append(weakref.ref(chunk["x"]))
            yield chunk
            del chunk

    dataclasses.replace(split, chunks=watched).totals(rows, layout, [8, 8, 5, 3, 5])
