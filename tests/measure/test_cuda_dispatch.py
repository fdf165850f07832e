"""CUDA's choice of kernels, followed without one: what its policy, its headers and its fused kernels say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils.checkpoint import checkpoint

from samegrad.declared import declare
from samegrad.measure import autocast_policy, cuda_trial, fused_attention, recurrent_kernels, trace_reading
from samegrad.measure.cuda_dispatch import CUDA, CudaDispatch
from samegrad.measure.events import Recurrence, Trace
from samegrad.measure.recorder import Recorder
from samegrad.measure.recurrent_workspaces import reserve_bytes
from samegrad.measure.shadows import Twins
from samegrad.measure.trace import plainly, trace_step
from samegrad.records import Category, Phase

from .traced import Words, counted_peaks, cross_entropy, words


@contextmanager
def followed() -> Iterator[Recorder]:
    dispatch = CudaDispatch()
    with dispatch.followed(), FakeTensorMode(allow_non_fake_inputs=True):
        recorder = Recorder(dispatch, Twins(CUDA, CUDA), {})
        with recorder:
            yield recorder


def numbers(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="cuda", requires_grad=True)


def names(recorder: Recorder) -> list[str]:
    return [operation.name for operation in recorder.operations]


def test_traced_tensors_say_cuda_and_are_dispatched_so() -> None:
    with followed():
        x = numbers(2, 3)
        assert x.device == CUDA and x.is_cuda and torch.zeros(2, device=x.device).device == CUDA
        assert "AutogradCUDA" in str(torch._C._dispatch_keys(x)) and not torch.zeros(2).is_cuda
        (x * x).sum().backward()
        assert x.grad is not None and x.grad.device == CUDA


def test_moving_to_where_a_tensor_is_copies_nothing() -> None:
    with followed() as recorder:
        x = numbers(2, 3)
        assert x.to(CUDA).untyped_storage()._cdata == x.untyped_storage()._cdata
        assert x.to(CUDA, torch.float64).dtype is torch.float64 and x.cpu().device.type == "cpu"
        assert torch.ones(3).to(CUDA).device == CUDA
    kernels = {operation.name: operation.kernels for operation in recorder.operations}
    assert kernels["aten._to_copy.default"] == 1


# Autocast.

# As torch's documentation lists them ("Ops that can autocast to float16", "... to float32", "... promote").
LOWERED: dict[str, Callable[[Tensor], Tensor]] = {
    "matmul": lambda x: x @ x.t(),
    "linear": lambda x: F.linear(x, x),
    "conv1d": lambda x: F.conv1d(x[None], x[:, :, None]),
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x),
    "prelu": lambda x: F.prelu(x, x[:, 0].mean()[None]),
    "attention": lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
}
WIDENED: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": lambda x: x.half().exp(),
    "pow": lambda x: x.half() ** 2,
    "softmax": lambda x: x.half().softmax(-1),
    "log_softmax": lambda x: x.half().log_softmax(-1),
    "layer_norm": lambda x: F.layer_norm(x.half(), (4,)),
    "sum": lambda x: x.half().sum(),
    "norm": lambda x: x.half().norm(),
    "mse_loss": lambda x: F.mse_loss(x.half(), x.half()),
    "cat": lambda x: torch.cat([x.half(), x]),
    "addcmul": lambda x: torch.addcmul(x, x.half(), x.half()),
}
UNTOUCHED: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: x.half().relu(),
    "add": lambda x: x.half() + x.half(),
    "batch_norm": lambda x: F.batch_norm(x.half(), None, None, training=True),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", [*LOWERED, *WIDENED, *UNTOUCHED])
def test_autocast_casts_as_documented(name: str, dtype: torch.dtype) -> None:
    run = {**LOWERED, **WIDENED, **UNTOUCHED}[name]
    expected = dtype if name in LOWERED else torch.float32 if name in WIDENED else torch.float16
    with followed(), torch.autocast("cuda", dtype):
        assert run(numbers(4, 4)).dtype is expected


def test_doubles_are_left_alone_and_a_disabled_block_casts_nothing() -> None:
    with followed(), torch.autocast("cuda", torch.bfloat16):
        wide = numbers(4, 4, dtype=torch.float64)
        assert (wide @ wide).dtype is torch.float64
        with torch.autocast("cuda", enabled=False):
            assert (numbers(4, 4) @ numbers(4, 4)).dtype is torch.float32


def test_every_operation_of_the_header_has_its_kernel() -> None:
    policy = autocast_policy.read_policy()
    assert {"linear", "conv2d", "scaled_dot_product_attention"} <= {name for name, _ in policy["LOWER_PRECISION_FP"]}
    assert ("softmax", "int") in policy["FP32_SET_OPT_DTYPE"] and ("addcmul", "default") in policy["PROMOTE"]
    known = [entry for entries in policy.values() for entry in entries if hasattr(torch.ops.aten, entry[0])]
    made = {str(operation) for operation, _ in autocast_policy.kernels(autocast_policy.CastCache())}
    assert {f"aten.{name}.{overload}" for name, overload in known} <= made


@pytest.mark.parametrize(("cached", "casts"), [(True, 1), (False, 2)])
def test_a_weight_is_cast_once_until_the_block_ends(cached: bool, casts: int) -> None:
    with followed() as recorder:
        weight, rows = numbers(4, 4), numbers(3, 4, dtype=torch.bfloat16)
        for _ in range(2):
            with torch.autocast("cuda", torch.bfloat16, cache_enabled=cached):
                F.linear(F.linear(rows, weight), weight)
    assert names(recorder).count("aten._to_copy.default") == 2 * casts


def test_a_planted_wrong_policy_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autocast_policy, "read_policy", lambda: {"FP32": (("linear", "default"),)})
    with followed(), torch.autocast("cuda", torch.bfloat16):
        assert F.linear(numbers(4, 4), numbers(4, 4)).dtype is torch.float32
    cuda_trial.why_not.cache_clear()
    assert "linear is torch.float32" in cuda_trial.why_not()
    cuda_trial.why_not.cache_clear()


# Kernels.


def attended(dtype: torch.dtype, head: int = 64, **options: Any) -> list[str]:
    with followed() as recorder:
        query = numbers(2, 3, 16, head, dtype=dtype)
        made = F.scaled_dot_product_attention(query, query, query, **options)
        assert made.shape == query.shape
        made.sum().backward()
    return [name for name in names(recorder) if "attention" in name or "bmm" in name]


def test_attention_takes_the_kernel_that_cuda_takes() -> None:
    flash = ["aten._scaled_dot_product_flash_attention.default"]
    flash.append(flash[0].replace("attention.default", "attention_backward.default"))
    assert attended(torch.bfloat16, is_causal=True) == flash
    assert attended(torch.float16, head=36) == flash
    efficient = [name.replace("flash", "efficient") for name in flash]
    assert attended(torch.float32) == efficient
    with followed():
        mask = torch.ones(16, 16, dtype=torch.bool, device="cuda")
    assert attended(torch.bfloat16, attn_mask=mask) == efficient
    assert "aten.bmm.default" in attended(torch.float64)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert "aten.bmm.default" in attended(torch.bfloat16)


def test_flash_backward_takes_float32_sums_for_itself() -> None:
    with followed() as recorder:
        query = numbers(2, 3, 100, 40, dtype=torch.bfloat16)
        F.scaled_dot_product_attention(query, query, query).sum().backward()
    at = names(recorder).index("aten._scaled_dot_product_flash_attention_backward.default")
    scratch = [e for e in recorder.events() if e.operation == at and e.change_bytes < 0]
    assert scratch[0].change_bytes == -(2 * 3 * 128 * (64 + 1) * 4)
    assert fused_attention.backward_scratch_bytes((None, torch.empty(2, 3, 100, 40))) == -scratch[0].change_bytes


def test_recomputation_in_backward_takes_the_same_kernels() -> None:
    def attend(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(F.dropout(x, 0.1), x, x)

    with followed() as recorder:
        with torch.autocast("cuda", torch.bfloat16):
            made = checkpoint(attend, numbers(2, 3, 16, 32), use_reentrant=False)
        made.sum().backward()
    found = names(recorder)
    for name in ("aten._scaled_dot_product_flash_attention.default", "aten.native_dropout.default"):
        assert found.count(name) == 2


@pytest.mark.parametrize(
    ("run", "expected", "not_expected"),
    [
        (lambda x: F.dropout(x, 0.3), "aten.native_dropout.default", "aten.bernoulli_.float"),
        (lambda x: x.half().softmax(-1, dtype=torch.float32), "aten._softmax.default", ""),
        (lambda x: F.rms_norm(x, (8,), x[0]), "aten._fused_rms_norm.default", "aten.rsqrt.default"),
        (F.silu, "aten.silu_backward.default", "aten.sigmoid.default"),
        (F.mish, "aten.mish_backward.default", "aten.tanh.default"),
    ],
    ids=["dropout", "softmax", "RMS norm", "SiLU", "Mish"],
)
def test_what_cuda_fuses_is_one_operation(run: Any, expected: str, not_expected: str) -> None:
    with followed() as recorder:
        x = numbers(4, 8)
        made = run(x)
        made.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape
    found = names(recorder)
    assert found.count(expected) == 1 and not_expected not in found
    # Halves are written as floats by the kernel itself; only the test's own cast copies.
    assert found.count("aten._to_copy.default") == 2 * (expected == "aten._softmax.default")


class Recurrent(nn.Module):
    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.layers = kind(6, 8, 2, **options)
        self.head = nn.Linear(self.layers.hidden_size * (1 + self.layers.bidirectional), 5)

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(self.layers(x)[0][:, -1])
        return made


@pytest.mark.parametrize("options", [{"batch_first": True}, {"bidirectional": True, "dropout": 0.2}], ids=str)
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN], ids=lambda kind: kind.__name__)
def test_recurrent_layers_are_one_kernel_with_a_reserve(kind: Any, options: dict[str, Any]) -> None:
    model = Recurrent(kind, **options)
    batch = torch.zeros(9, 4, 6), torch.zeros(9, dtype=torch.int64)
    declared = declare(model, cross_entropy, optimizer=torch.optim.SGD(model.parameters(), 0.1))
    before = [id(weight) for weight in model.layers._flat_weights]
    trace = trace_step(declared, batch)
    assert [id(weight) for weight in model.layers._flat_weights] == before
    at = [i for i, operation in enumerate(trace.operations) if "_cudnn_rnn.default" in operation.name]
    assert len(at) == 2 and trace.operations[at[0]].module == "layers"
    steps, rows = (4, 9) if options.get("batch_first") else (9, 4)
    shape = Recurrence(
        steps=steps, rows=rows, inputs=6, hidden=8, layers=2, gates={"LSTM": 4, "GRU": 3, "RNN": 1}[kind.__name__],
        directions=1 + model.layers.bidirectional, drops=bool(model.layers.dropout),
        batch_first=model.layers.batch_first,
    )  # fmt: skip
    assert [operation.shape for operation in trace.operations if "_cudnn_rnn" in operation.name] == [shape] * 4
    assert reserve_bytes(shape, 4) in [event.change_bytes for event in trace.events if event.operation == at[0]]
    real = model.layers(batch[0])[0]
    made = [e.change_bytes for e in trace.events if e.operation == at[0]]
    assert real.nbytes in made


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN], ids=lambda kind: kind.__name__)
def test_recurrent_layers_on_the_cpu_are_traced_to_the_byte_or_a_note_says_so(kind: Any, dtype: torch.dtype) -> None:
    model, batch = Recurrent(kind).to(dtype), (torch.zeros(9, 4, 6, dtype=dtype), torch.zeros(9, dtype=torch.int64))
    declared = declare(model, cross_entropy)
    trace = trace_step(declared, batch, device="cpu")
    same = counted_peaks(declared, batch, plainly())[1] == trace_reading.peak_bytes(trace)
    assert same or "oneDNN" in trace.notes["aten.mkldnn_rnn_layer.default"]


def test_a_lost_reserve_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = Recurrent(nn.LSTM), (torch.zeros(9, 4, 6), torch.zeros(9, dtype=torch.int64))
    declared = declare(model, cross_entropy)
    before = trace_reading.peak_bytes(trace_step(declared, batch))
    monkeypatch.setattr(recurrent_kernels, "reserve_bytes", lambda *_: 0)
    assert trace_reading.peak_bytes(trace_step(declared, batch)) < before


def test_autocast_lays_recurrent_weights_out_in_one_piece() -> None:
    model, batch = Recurrent(nn.LSTM), (torch.zeros(9, 4, 6), torch.zeros(9, dtype=torch.int64))

    def forward(network: nn.Module, rows: Any) -> Any:
        with torch.autocast("cuda", torch.bfloat16):
            return network(rows[0])

    trace = trace_step(declare(model, cross_entropy, forward=forward), batch)
    weights = sum(weight.numel() for weight in model.layers.parameters())
    taken = [event.change_bytes for event in trace.events if event.operation >= 0 and event.change_bytes > 0]
    # The copy in each step's forward, its gradient in the backward.
    assert taken.count(weights * 2) == 4
    gradients = [event for event in trace.events if event.category is Category.GRADIENTS and event.change_bytes > 0]
    assert sum(event.change_bytes for event in gradients) == 2 * sum(p.nbytes for p in model.parameters())


def test_recurrent_weights_that_a_chunk_sees_stand_a_second_time() -> None:
    model = Recurrent(nn.LSTM)
    weights_bytes = sum(weight.nbytes for weight in model.layers.parameters())
    with followed() as recorder:
        layers = nn.LSTM(6, 8, 2, device="cuda")
        before = len(recorder.operations)
        aliases = {name: weight.detach() for name, weight in layers.named_parameters()}
        torch.func.functional_call(layers, aliases, (numbers(9, 4, 6),))
    taken = [e.change_bytes for e in recorder.events() if e.operation >= before and e.change_bytes > 0]
    assert taken.count(weights_bytes) == 1


def test_recurrent_weights_come_in_pieces_and_are_laid_out_as_one() -> None:
    model, batch = Recurrent(nn.LSTM), (torch.zeros(9, 4, 6), torch.zeros(9, dtype=torch.int64))
    declared = declare(model, cross_entropy)
    trace = trace_step(declared, batch)
    [(flat, pieces)] = trace.pieces.items()
    weights = list(model.layers.parameters())
    assert pieces == tuple(weight.nbytes for weight in weights)
    assert [e.change_bytes for e in trace.events if e.storage == flat] == [sum(pieces)]
    assert trace_step(declared, batch, device="cpu").pieces == {}


def test_autocast_casts_from_the_last_argument_to_the_first() -> None:
    layer = nn.Linear(6, 5)
    batch = torch.zeros(9, 6), torch.zeros(9, dtype=torch.int64)

    def forward(network: nn.Module, rows: Any) -> Any:
        with torch.autocast("cuda", torch.bfloat16):
            return network(rows[0])

    trace = trace_step(declare(layer, cross_entropy, forward=forward), batch)
    casts = [k for k, o in enumerate(trace.operations) if o.name == "aten._to_copy.default" and not o.step]
    sizes = [event.change_bytes for k in casts for event in trace.events if event.operation == k]
    # Behind the batch, which comes from the host.
    assert sizes[2:5] == [5 * 2, 5 * 6 * 2, 9 * 6 * 2]


def optimizer_operations(**options: Any) -> set[str]:
    model = Words()
    declared = declare(model, cross_entropy, optimizer=torch.optim.AdamW(model.parameters(), **options))
    trace: Trace = trace_step(declared, words(3))
    return {o.name for o in trace.operations if o.phase is Phase.OPTIMIZER and o.kernels}


def test_optimizers_take_the_kernels_that_they_take_on_cuda() -> None:
    assert "aten._foreach_addcdiv_.ScalarList" in optimizer_operations()
    assert optimizer_operations(fused=True) >= {"aten._fused_adamw_.default"}
    assert "aten.addcdiv_.default" in optimizer_operations(foreach=False)


# Around it.


def test_everything_in_torch_is_as_before_also_after_an_error() -> None:
    before = dict(vars(FakeTensor)), torch.clear_autocast_cache, vars(torch.backends.cudnn).copy()
    assert not torch.cuda.is_available() or torch.ones(1, device="cuda").is_cuda
    with pytest.raises(ZeroDivisionError), followed():
        _ = 1 / 0
    assert (dict(vars(FakeTensor)), torch.clear_autocast_cache, vars(torch.backends.cudnn).copy()) == before
    with FakeTensorMode():
        x = torch.ones(3, requires_grad=True)
        assert x.device.type == "cpu" and not x.is_cuda


def test_the_self_test_passes_and_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda_trial.why_not.cache_clear()
    assert cuda_trial.why_not() == ""
    monkeypatch.setattr(cuda_trial, "_tried", lambda: "tried again")
    assert cuda_trial.why_not() == ""


@pytest.mark.parametrize("lost", ["_fake_device", "in_kernel_invocation"])
def test_where_torch_has_changed_the_cpu_is_followed_and_a_note_says_so(
    lost: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> str:
        raise AttributeError(f"torch has no {lost}")

    monkeypatch.setattr(cuda_trial, "_tried", broken)
    cuda_trial.why_not.cache_clear()
    try:
        model = Words()
        trace = trace_step(declare(model, cross_entropy), words(3))
        assert trace.device == "cpu" and lost in trace.notes["cuda"] and torch.__version__ in trace.notes["cuda"]
    finally:
        cuda_trial.why_not.cache_clear()
