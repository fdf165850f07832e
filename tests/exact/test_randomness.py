"""Keyed draws: the same for every split, every order of rows, again in backward, compiled, and in a whole step."""

from __future__ import annotations

import copy
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from samegrad.errors import CannotSplit
from samegrad.exact.draws import Draws
from samegrad.exact.randomness import DrawSites, LeadingRows, StepKey, keyed, learn_sites, recording
from samegrad.verify import tolerance

ROWS = 29
SPLITS = ([1, 27, 1], [8, 8, 13], [29])
Function = Callable[[Tensor], Any]

# Every covered draw as a function of x (rows, 6, 5).
DRAWS: dict[str, Function] = {
    "F.dropout": lambda x: F.dropout(x, 0.3),
    "F.dropout in place": lambda x: F.dropout(x.clone(), 0.3, inplace=True),
    "torch.dropout": lambda x: torch.dropout(x, 0.3, True),
    "native_dropout": lambda x: torch.native_dropout(x, 0.3, True),
    "dropout1d": lambda x: F.dropout1d(x, 0.4),
    "dropout2d": lambda x: F.dropout2d(x.unsqueeze(-1), 0.4),
    "dropout3d": lambda x: F.dropout3d(x[..., None, None], 0.4),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.3, True),
    "feature_alpha_dropout": lambda x: F.feature_alpha_dropout(x, 0.3, True),
    "rand": lambda x: torch.rand(len(x), 7),
    "rand double": lambda x: torch.rand((len(x), 7), dtype=torch.float64),
    "rand bfloat16": lambda x: torch.rand(len(x), 7, dtype=torch.bfloat16),
    "randn": lambda x: torch.randn(len(x), 3),
    "randn sizes": lambda x: torch.randn(size=(len(x), 3), dtype=x.dtype),
    "randint": lambda x: torch.randint(-4, 90, (len(x), 3)),
    "randint wide": lambda x: torch.randint(2**40, (len(x), 3)),
    "randint_like": lambda x: torch.randint_like(x, 9),
    "rand_like": torch.rand_like,
    "randn_like": lambda x: torch.randn_like(x.transpose(1, 2)),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "bernoulli p": lambda x: torch.bernoulli(x, 0.3),
    "normal": lambda x: torch.normal(x, x.abs()),
    "normal float": lambda x: torch.normal(2.0, 3.0, (len(x), 4)),
    "bernoulli_": lambda x: x.clone().bernoulli_(0.2),
    "bernoulli_ tensor": lambda x: torch.empty_like(x).bernoulli_(x.sigmoid()),
    "uniform_": lambda x: x.clone().uniform_(-2, 5),
    "normal_": lambda x: x.clone().normal_(std=3),
    "exponential_": lambda x: x.clone().exponential_(2.0),
    "random_": lambda x: x.clone().random_(3, 30),
    "random_ full": lambda x: x.long().random_(),
    "geometric_": lambda x: x.clone().geometric_(0.2),
    "cauchy_": lambda x: x.clone().cauchy_(1, 2),
    "log_normal_": lambda x: x.clone().log_normal_(),
    "multinomial": lambda x: torch.multinomial(x[:, 0].exp(), 3),
    "multinomial again": lambda x: torch.multinomial(x[:, 0].exp(), 9, replacement=True),
    "gumbel_softmax": lambda x: F.gumbel_softmax(x, hard=True),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "fractional_max_pool": lambda x: F.fractional_max_pool2d(x.unsqueeze(1), 2, output_size=(3, 3)),
    "flattened rows": lambda x: F.dropout(x.flatten(0, 1), 0.3).view(x.shape),
    "attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.4, is_causal=True),
    "two draws": lambda x: F.dropout(F.dropout(x, 0.2) + torch.rand_like(x), 0.5),
}


def rows_of_batch(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, 6, 5, generator=torch.Generator().manual_seed(1))


def sites_of(function: Function, make: Callable[[int], Tensor] = rows_of_batch) -> DrawSites:
    seen = []
    for rows in (8, 5):
        x = make(rows)
        with recording() as recorder, torch.no_grad():
            function(x)
        seen.append(recorder)
    return learn_sites(seen[0], seen[1])


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [part for part in result if isinstance(part, Tensor)]


def in_parts(function: Function, x: Tensor, key: StepKey, sites: DrawSites, ids: Sequence[Tensor]) -> list[Tensor]:
    parts = []
    for chunk in ids:
        with keyed(key, chunk, sites=sites):
            parts.append(tensors(function(x[chunk])))
    return [torch.cat(leaves) for leaves in zip(*parts)]


@pytest.mark.parametrize("name", DRAWS)
def test_every_split_and_order_draws_the_same_bits(name: str) -> None:
    function, x, key = DRAWS[name], rows_of_batch(), StepKey()
    sites = sites_of(function)
    sites.check_split()
    everyone = torch.arange(ROWS)
    with keyed(key, everyone, sites=sites.for_all_rows()):
        whole = tensors(function(x))
    for split in SPLITS:
        for mine, all_rows in zip(in_parts(function, x, key, sites, everyone.split(split)), whole):
            assert torch.equal(mine, all_rows)
    order = torch.randperm(ROWS)
    for mine, all_rows in zip(in_parts(function, x, key, sites, order.split([8, 8, 13])), whole):
        assert torch.equal(mine, all_rows[order])
    with keyed(StepKey(), everyone, sites=sites):
        another = tensors(function(x))
    assert any(not torch.equal(mine, all_rows) for mine, all_rows in zip(another, whole))
    # The twin with the fault: a chunk that counts its rows from 0.
    restarted = [torch.arange(len(chunk)) for chunk in everyone.split([8, 8, 13])]
    with keyed(key, restarted[2], sites=sites):
        wrong = tensors(function(x[16:]))
    assert any(not torch.equal(mine, all_rows[16:]) for mine, all_rows in zip(wrong, whole))


RANGES = [(-3, 4), (0, 2**31), (5, 2**31 + 9), (-(2**40), 2**40), (0, 2**63), (-(2**62), 2**62)]


@pytest.mark.parametrize("low, high", RANGES)
def test_whole_numbers_fill_their_range(low: int, high: int) -> None:
    with keyed(torch.tensor(3), torch.arange(4000), sites=LeadingRows()):
        values = torch.empty(4000, 4, dtype=torch.int64)
        values.random_(*([low, high] if high < 2**63 else []))
    share = (values.double() - low) / (high - low)
    assert int(values.min()) >= low
    assert int(values.max()) < high
    assert abs(float(share.mean()) - 0.5 + 0.5 / (high - low)) < 5 / math.sqrt(12 * values.numel())
    if high - low < 10:
        counts = torch.bincount((values - low).flatten(), minlength=high - low).double()
        expected = values.numel() / (high - low)
        assert float(((counts - expected) ** 2 / expected).sum()) < high - low - 1 + 5 * math.sqrt(2 * (high - low))


def perceptron() -> tuple[nn.Module, int]:
    parts = [nn.Linear(6, 24), nn.Dropout(0.3), nn.GELU(), nn.Linear(24, 24), nn.Dropout(0.5), nn.Linear(24, 4)]
    return nn.Sequential(*parts), 0


class First(nn.Module):
    """The first output of ``inner``, as nn.LSTM returns it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.inner(x)[0]
        return outputs


# Models and the axis of their rows; x is (29, 5, 6) or (5, 29, 6).
MODELS: dict[str, Callable[[], tuple[nn.Module, int]]] = {
    "perceptron": perceptron,
    "encoder, rows first": lambda: (nn.TransformerEncoderLayer(6, 2, 16, batch_first=True), 0),
    "encoder, time first": lambda: (nn.TransformerEncoderLayer(6, 2, 16), 1),
    "lstm, time first": lambda: (First(nn.LSTM(6, 7, 2, dropout=0.4)), 1),
    "gru, rows first": lambda: (First(nn.GRU(6, 7, 3, dropout=0.4, bidirectional=True, batch_first=True)), 0),
    "elman": lambda: (First(nn.RNN(6, 7, 2, dropout=0.4, bias=False)), 1),
    "projected lstm": lambda: (First(nn.LSTM(6, 7, 2, dropout=0.4, proj_size=3)), 1),
}


def model_and_input(name: str) -> tuple[nn.Module, Callable[[int], Tensor], int]:
    torch.manual_seed(0)
    model, axis = MODELS[name]()
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(ROWS, 5, 6, generator=generator, dtype=torch.float64)
    return model.double(), lambda rows: x[:rows].transpose(0, axis), axis


Ids = Callable[[int, int], Tensor]


def gradients(
    model: nn.Module, x: Tensor, axis: int, key: StepKey, sites: DrawSites, split: list[int], ids: Ids = torch.arange
) -> tuple[list[Tensor], list[Tensor]]:
    """Gradients of the sum of squares over chunks, and the sums of the chunks' absolute gradients."""
    parameters = list(model.parameters())
    totals = [torch.zeros_like(p) for p in parameters]
    magnitudes = [torch.zeros_like(p) for p in parameters]
    start = 0
    for size in split:
        with keyed(key, ids(start, start + size), sites=sites):
            loss = model(x.narrow(axis, start, size)).pow(2).sum()
        for total, magnitude, g in zip(totals, magnitudes, torch.autograd.grad(loss, parameters)):
            total += g
            magnitude += g.abs()
        start += size
    return totals, magnitudes


def largest_error(mine: list[Tensor], plain: list[Tensor], magnitudes: list[Tensor]) -> float:
    anywhere = max(float(m.max()) for m in magnitudes)
    return max(
        float((a - b).abs().max()) / tolerance.entry_scale(float(m.max()), anywhere)
        for a, b, m in zip(mine, plain, magnitudes)
    )


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_whole_batch_under_the_same_key(name: str) -> None:
    model, make, axis = model_and_input(name)
    sites, key, x = sites_of(model, make), StepKey(), make(ROWS)
    sites.check_split()
    plain, _ = gradients(model, x, axis, key, sites.for_all_rows(), [ROWS])
    allowed = tolerance.entry_allowed(torch.float64)
    for split in ([1, 27, 1], [8, 8, 13]):
        mine, magnitudes = gradients(model, x, axis, key, sites, split)
        assert largest_error(mine, plain, magnitudes) <= allowed
    faults: list[tuple[StepKey, Ids]] = [
        (key, lambda start, end: torch.arange(end - start)),  # the rows of a chunk counted from 0
        (StepKey(), torch.arange),  # another key, as a draw made anew
    ]
    for another, ids in faults:
        wrong, magnitudes = gradients(model, x, axis, another, sites, [8, 8, 13], ids)
        assert largest_error(wrong, plain, magnitudes) > 1e-3


def test_a_run_under_the_mode_is_torch_apart_from_the_draws() -> None:
    for name in MODELS:
        model, make, _ = model_and_input(name)
        model.eval()
        with keyed(StepKey(), torch.arange(ROWS), sites=DrawSites(())) as draws:
            mine = model(make(ROWS))
        assert draws.calls == 0
        torch.testing.assert_close(mine, model(make(ROWS)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal", "grouped"])
def test_attention_written_out_is_torchs_own(mask: str) -> None:
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(3, 4, 6, 8, generator=generator, dtype=torch.float64) for _ in range(3))
    allowed = torch.rand(6, 6, generator=generator) > 0.4
    allowed[2] = False
    options: dict[str, Any] = {
        "none": {},
        "bool": {"attn_mask": allowed},
        "float": {"attn_mask": torch.randn(6, 6, generator=generator, dtype=torch.float64), "scale": 0.3},
        "causal": {"is_causal": True},
        "grouped": {"enable_gqa": True},
    }[mask]
    if mask == "grouped":
        k, v = k[:, :2], v[:, :2]
    # A probability too small to drop anything leaves the arithmetic alone.
    with keyed(StepKey(), torch.arange(3), sites=LeadingRows()) as draws:
        mine = F.scaled_dot_product_attention(q, k, v, dropout_p=1e-15, **options)
    assert draws.calls == 1
    torch.testing.assert_close(mine, F.scaled_dot_product_attention(q, k, v, **options), rtol=1e-12, atol=1e-12)


def test_the_mask_scales_values_and_gradients_of_any_order() -> None:
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    key = StepKey()

    def dropped(values: Tensor) -> Tensor:
        with keyed(key, torch.arange(6), sites=LeadingRows()):
            return F.dropout(values, 0.4)

    kept = dropped(x) / x
    assert 0 < int((kept == 0).sum()) < 30
    torch.testing.assert_close(kept[kept != 0], torch.full_like(kept[kept != 0], 1 / 0.6), rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(dropped(x).sum(), x)[0], kept.detach(), rtol=1e-12, atol=0)
    assert torch.autograd.gradcheck(dropped, x)
    assert torch.autograd.gradgradcheck(dropped, x)


def test_the_edges_of_dropout() -> None:
    x = torch.randn(4, 3)
    with keyed(StepKey(), torch.arange(4), sites=LeadingRows()) as draws:
        assert F.dropout(x, 0.5, training=False) is x
        assert F.dropout(x, 0.0) is x
        assert draws.calls == 0
        assert not F.dropout(x, 1.0).any()
        assert not F.alpha_dropout(x, 1.0, True).any()
        assert not F.dropout1d(x[..., None], 1.0).any()
        with pytest.raises(ValueError, match="between 0 and 1"):
            F.dropout(x, 1.5)


@pytest.mark.parametrize("drop", [0.1, 0.5])
def test_dropouts_keep_mean_and_variance(drop: float) -> None:
    x = torch.randn(2000, 50, generator=torch.Generator().manual_seed(0))
    with keyed(torch.tensor(11), torch.arange(2000), sites=LeadingRows()):
        kept = F.dropout(torch.ones(2000, 50), drop)
        alpha = F.alpha_dropout(F.selu(x), drop, True)
    spread = (drop * (1 - drop) / kept.numel()) ** 0.5
    assert abs(float((kept == 0).double().mean()) - drop) < 5 * spread
    torch.testing.assert_close(alpha.mean(), F.selu(x).mean(), rtol=0, atol=0.03)
    torch.testing.assert_close(alpha.std(), F.selu(x).std(), rtol=0.03, atol=0)


def test_one_number_of_the_default_generator_a_step_and_none_if_nothing_is_drawn() -> None:
    model, make, axis = model_and_input("perceptron")
    sites = sites_of(model, make)
    torch.manual_seed(5)
    expected = torch.empty((), dtype=torch.int64).random_()
    after = torch.get_rng_state()
    torch.manual_seed(5)
    before = torch.get_rng_state()
    key = StepKey()
    with keyed(key, torch.arange(4), sites=DrawSites(())):
        model[0](make(4))
    assert torch.equal(torch.get_rng_state(), before)
    assert not key.taken
    gradients(model, make(ROWS), axis, key, sites, [8, 8, 13])
    assert key.taken
    assert torch.equal(key.tensor(torch.device("cpu")), expected)
    assert torch.equal(torch.get_rng_state(), after)


def test_recording_leaves_the_generators_alone() -> None:
    before = torch.get_rng_state()
    model, make, _ = model_and_input("encoder, rows first")
    torch.set_rng_state(before)
    sites_of(model, make)
    assert torch.equal(torch.get_rng_state(), before)


def test_another_thread_draws_the_same() -> None:
    x, key = rows_of_batch(), StepKey()
    sites = sites_of(DRAWS["two draws"])
    found: list[Tensor] = []

    def again() -> None:
        with keyed(key, torch.arange(ROWS), sites=sites):
            found.append(DRAWS["two draws"](x))

    with keyed(key, torch.arange(ROWS), sites=sites):
        first = F.dropout(x, 0.2)
        thread = threading.Thread(target=again)
        thread.start()
        thread.join()
        second = F.dropout(first + torch.rand_like(x), 0.5)
    assert torch.equal(found[0], second)


def test_a_call_counted_on_over_chunks_draws_something_else() -> None:
    x, key, sites = rows_of_batch(), StepKey(), sites_of(DRAWS["F.dropout"])
    with keyed(key, torch.arange(ROWS), sites=sites):
        right = F.dropout(x, 0.3)
    with keyed(key, torch.arange(ROWS), sites=LeadingRows()) as draws:
        assert torch.equal(F.dropout(x, 0.3), right)
        assert not torch.equal(F.dropout(x, 0.3), right)
    with keyed(key, torch.arange(ROWS), sites=LeadingRows(), stream=1):
        assert not torch.equal(F.dropout(x, 0.3), right)
    assert isinstance(draws, Draws)
    with pytest.raises(CannotSplit, match="as draw 1"), keyed(key, torch.arange(ROWS), sites=sites):
        F.dropout(F.dropout(x, 0.3), 0.3)
    with pytest.raises(CannotSplit, match="made 0 draws, and 1"), keyed(key, torch.arange(ROWS), sites=sites):
        pass


def scaled_by_batch_draw(x: Tensor) -> Tensor:
    return x * torch.rand(1, 6, 5)


def varying(x: Tensor) -> Tensor:
    return F.dropout(F.dropout(x, 0.1), 0.1) if len(x) == 8 else F.dropout(x, 0.1)


kept_generator = torch.Generator()
stacked = nn.LSTM(5, 4, 2, dropout=0.1)

REFUSED: dict[str, tuple[Function, str]] = {
    "batch-wide": (scaled_by_batch_draw, r"torch.rand draws \(1, 6, 5\)"),
    "two axes": (lambda x: F.dropout(x[:, 0] @ x[:, 0].T, 0.1), r"dropout draws \(8, 8\).*more than one axis"),
    "not in proportion": (lambda x: torch.rand(len(x) + 1), "does not grow in proportion"),
    "number of axes": (lambda x: torch.rand((2,) * len(x)), "number of axes"),
    "number of draws": (varying, "dropout, dropout on 8 rows and dropout on 5"),
    "poisson": (lambda x: torch.poisson(x.abs()), "torch.poisson"),
    "randperm": (lambda x: torch.randperm(len(x)), "torch.randperm"),
    "gamma": (lambda x: torch.distributions.Gamma(x.abs(), x.abs()).sample(), "_standard_gamma"),
    "out": (lambda x: torch.rand(len(x), 2, out=torch.empty(len(x), 2)), "torch.rand is called with out="),
    "initialisation": (lambda x: nn.init.normal_(torch.empty(len(x), 2)), "normal_"),
    "kept generator": (lambda x: torch.rand(3, generator=kept_generator) + x[:, :3, 0], "generator that is kept"),
    "checkpoint": (lambda x: checkpoint(F.dropout, x, use_reentrant=False), "torch.utils.checkpoint"),
    "packed": (
        lambda x: stacked(nn.utils.rnn.pack_padded_sequence(x, [6] * len(x), batch_first=True)),
        "packed",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_rows_do_not_own_is_refused_by_name(name: str) -> None:
    function, found = REFUSED[name]
    with pytest.raises(CannotSplit, match=found):
        sites_of(function).check_split()


def gradient_of(outputs: Tensor, x: Tensor) -> Tensor:
    x.grad = None
    outputs.sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    return x.grad


def test_a_checkpoint_around_the_block_runs_the_block_again() -> None:
    x, key = rows_of_batch().requires_grad_(), StepKey()

    def block(values: Tensor) -> Tensor:
        with keyed(key, torch.arange(ROWS), sites=LeadingRows()):
            return F.dropout(F.dropout(values, 0.3) * 2, 0.3)

    for reentrant in (False, True):
        outputs = checkpoint(block, x, use_reentrant=reentrant)
        gradient = gradient_of(outputs, x)
        assert torch.equal(gradient == 0, outputs == 0)
    # The twin with the fault: what runs again draws by itself.
    again = checkpoint(
        lambda values: F.dropout(values, 0.3) * block(values), x, use_reentrant=False, preserve_rng_state=False
    )
    assert not torch.equal(gradient_of(again, x) == 0, again == 0)
    with pytest.raises(CannotSplit, match="checkpoint"), keyed(key, torch.arange(ROWS), sites=LeadingRows()):
        checkpoint(F.dropout, x, use_reentrant=True)


def test_a_draw_for_the_whole_batch_is_made_when_the_step_is_not_split() -> None:
    sites, x, key = sites_of(scaled_by_batch_draw), rows_of_batch(), StepKey()
    with pytest.raises(CannotSplit, match="no axis follows the rows"), keyed(key, torch.arange(5), sites=sites):
        scaled_by_batch_draw(x[:5])
    results = []
    for ids in (torch.arange(ROWS), torch.randperm(ROWS)):
        with keyed(key, ids, sites=sites.for_all_rows()):
            results.append(scaled_by_batch_draw(x))
    assert torch.equal(results[0], results[1])
    assert results[0].unique().numel() > 100


@pytest.mark.parametrize("time_first", [False, True])
def test_rows_flattened_after_time_show_when_a_few_rows_run_alone(time_first: bool) -> None:
    axis = int(time_first)

    def dropped(values: Tensor) -> Tensor:
        flat = values.transpose(0, axis).flatten(0, 1)
        return F.dropout(flat, 0.5).unflatten(0, (6, -1) if time_first else (-1, 6)).transpose(0, axis)

    x, key, kept, sites = rows_of_batch(), StepKey(), torch.arange(1, ROWS, 2), sites_of(dropped)
    sites.check_split()
    (among,) = in_parts(dropped, x, key, sites, [torch.arange(ROWS)])
    (alone,) = in_parts(dropped, x, key, sites, [kept])
    assert torch.equal(among[kept], alone) == (not time_first)


def test_a_generator_that_is_seeded_anew_is_left_to_draw() -> None:
    def projected(x: Tensor) -> Tensor:
        return F.dropout(x @ torch.randn(5, 2, generator=torch.Generator().manual_seed(3)), 0.2)

    sites = sites_of(projected)
    sites.check_split()
    assert len(sites.sites) == 1


def test_a_loss_draws_for_rows_and_for_the_batch_and_what_has_no_keyed_form() -> None:
    x, key = rows_of_batch(), StepKey()
    order = torch.randperm(ROWS)
    results = []
    for ids in (torch.arange(ROWS), order):
        with keyed(key, ids, sites=LeadingRows(), stream=1) as draws:
            results.append((torch.rand(ROWS, 2), torch.rand(3), torch.randperm(4)))
        assert draws.calls == 2
    assert torch.equal(results[0][0][order], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert len(x) == ROWS


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_chunk_draws_anew_when_the_key_is_overwritten(backend: str) -> None:
    model, make, _ = model_and_input("perceptron")
    sites = sites_of(model, make)

    def chunk(key: Tensor, ids: Tensor, x: Tensor) -> Tensor:
        with keyed(key, ids, sites=sites):
            outputs: Tensor = model(x) + torch.randn(len(x), 5, 4, dtype=x.dtype)
            return outputs

    def noisy(x: Tensor) -> Tensor:
        return model(x) + torch.randn(len(x), 5, 4, dtype=x.dtype)

    sites = sites_of(noisy, make)
    torch._dynamo.reset()
    try:
        compiled = torch.compile(chunk, backend=backend, fullgraph=True)
        key, ids, x = torch.tensor(1), torch.arange(3, 11), make(8)
        seen = []
        for number in (1, 2, 1):
            key.fill_(number)
            mine, eager = compiled(key, ids, x), chunk(key, ids, x)
            torch.testing.assert_close(mine, eager, rtol=1e-12, atol=1e-12)
            mine_g, eager_g = (torch.autograd.grad(y.sum(), list(model.parameters())) for y in (mine, eager))
            torch.testing.assert_close(mine_g, eager_g, rtol=1e-12, atol=1e-12)
            seen.append(mine.detach())
        assert torch.equal(seen[0], seen[2])
        assert not torch.allclose(seen[0], seen[1])
    finally:
        torch._dynamo.reset()


def test_the_mode_is_left_also_after_an_exception() -> None:
    x = rows_of_batch()
    with pytest.raises(ZeroDivisionError), keyed(StepKey(), torch.arange(ROWS), sites=LeadingRows()):
        raise ZeroDivisionError
    torch.manual_seed(0)
    first = F.dropout(x)
    torch.manual_seed(0)
    assert torch.equal(first, F.dropout(x))
    assert copy.copy(DrawSites(())) == DrawSites(())
