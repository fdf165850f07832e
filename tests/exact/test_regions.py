"""Stretches of a forward that run again: the plain step's bits, nothing kept but what enters, nothing left behind."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from samegrad.errors import CannotSplit
from samegrad.exact import regions
from samegrad.exact.recomputed import Blocks, as_runs, recomputed_blocks
from samegrad.measure.counting import ByteCounter

from . import recompute_zoo as zoo

D = torch.float64
Within = Callable[[nn.Module], AbstractContextManager[Any]]


def left_by(model: nn.Module, x: Tensor, within: Within = lambda _: nullcontext()) -> dict[str, Any]:
    """Loss, gradients, buffers, plain attributes and the generator's state after a step on a copy of ``model``."""
    twin, x = copy.deepcopy(model), x.clone().requires_grad_()
    torch.manual_seed(5)
    with within(twin):
        loss = zoo.row_loss(twin(x))
        loss.backward()
    found = {"loss": loss.detach(), "gradient of x": x.grad, "generator": torch.get_rng_state()}
    if x.is_cuda:
        found["device's generator"] = torch.cuda.get_rng_state(x.device)
    found |= {f"gradient of {n}": p.grad for n, p in twin.named_parameters()}
    found |= {f"buffer {n}": b for n, b in twin.named_buffers()}
    for name, part in twin.named_modules():
        found |= {f"{name}.{key}": getattr(part, key) for key in zoo.ATTRIBUTES if hasattr(part, key)}
    assert all("forward" not in vars(part) for part in twin.modules())
    return found


def same(ours: dict[str, Any], plain: dict[str, Any]) -> bool:
    assert ours.keys() == plain.keys()
    return all(torch.equal(a, b) if isinstance(b := plain[k], Tensor) else a == b for k, a in ours.items())


def recomputing(blocks: Blocks) -> Within:
    return lambda twin: recomputed_blocks(twin, blocks)


@pytest.mark.parametrize("form", ["one by one", "in runs"])
@pytest.mark.parametrize("name", zoo.MODELS)
def test_the_step_is_the_plain_one_bit_for_bit(name: str, form: str) -> None:
    model, x = zoo.made(name)
    blocks = zoo.MODELS[name][2 if form == "one by one" else 3]
    assert same(left_by(model, x, recomputing(blocks)), left_by(model, x))


@pytest.mark.parametrize("name", ["resnet", "gpt", "unet"])
def test_the_step_is_the_plain_one_in_bfloat16_autocast_and_channels_last(name: str) -> None:
    model, x = zoo.made(name)
    model, x = model.float(), x.float()
    if x.dim() == 4:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    forward = type(model).forward
    for narrow in (True, False):
        # The block is left before backward, as users do: what runs again must enter it again.
        def called(self: nn.Module, rows: Tensor, narrow: bool = narrow) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
                return forward(self, rows).float()

        model.__class__ = type("Called", (type(model),), {"forward": called})
        found = [left_by(model, x, recomputing(zoo.MODELS[name][i])) for i in (2, 3)]
        plain = left_by(model, x)
        assert all(same(ours, plain) for ours in found)


def kept_bytes(model: nn.Module, x: Tensor, blocks: Blocks) -> int:
    """Live bytes between forward and backward, without the parameters."""
    counter = ByteCounter(x.device)
    with (recomputed_blocks(model, blocks) if blocks else nullcontext()), counter:
        outputs = model(x)
        gc.collect()
        live = counter.live_bytes
        outputs.sum().backward()
    return live


class Deep(nn.Sequential):
    """Six blocks of which each is handed 16 numbers a row and keeps many more."""

    def __init__(self) -> None:
        make = lambda: nn.Sequential(nn.Linear(16, 256), nn.Tanh(), nn.Linear(256, 16), nn.Tanh())
        super().__init__(*(make() for _ in range(6)))


@pytest.mark.parametrize(
    ("blocks", "handed"),
    [
        (["0", "1", "2", "3", "4", "5"], 5),
        ([["0", "1"], ["2", "3"], ["4", "5"]], 2),
        ([["0", "1", "2", "3", "4", "5"]], 0),
    ],
    ids=["each", "pairs", "all as one"],
)
def test_nothing_is_kept_beyond_what_enters_the_blocks(blocks: Blocks, handed: int) -> None:
    torch.manual_seed(0)
    model, x = Deep(), torch.randn(50, 16)
    row = x.nbytes
    # The output itself, and what enters every region but the first, which the caller holds anyway.
    assert kept_bytes(model, x, blocks) == row * (handed + 1)
    assert kept_bytes(model, x, []) > 30 * row


def test_a_region_is_gone_with_its_graph() -> None:
    """What was computed from a region's own output enters it again: kept with its graph, it would live for ever."""
    gc.disable()
    try:
        model = nn.Sequential(nn.Linear(6, 6), Doubling(), nn.Tanh(), nn.Linear(6, 6))
        found: list[weakref.ref[Any]] = []
        plain = regions.Region.__init__

        def noting(self: Any) -> None:
            plain(self)
            found.append(weakref.ref(self))

        with pytest.MonkeyPatch.context() as patch, recomputed_blocks(model, [["0", "2", "3"]]):
            patch.setattr(regions.Region, "__init__", noting)
            loss = model(torch.randn(4, 6)).sum()
            assert len(found) == 1 and found[0]() is not None
            loss.backward()
            assert found[0]() is None
            model(torch.randn(4, 6))
            assert found[1]() is None
    finally:
        gc.enable()


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Between(nn.Module):
    """The model's own code between two blocks of a run."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Sequential(nn.Linear(6, 5), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "first calls first":
            one, other = self.a(x), self.a(x.flip(0))
            return self.b(one) + self.b(other)
        if self.how == "backwards":
            return self.b(x) + self.b(self.a(x))
        z = self.a(x)
        if self.how == "drawn":
            z = z * torch.rand_like(z)
        if self.how == "used again":
            return self.b(z) * z[:, :5]
        return self.b(z)


@pytest.mark.parametrize("how", ["direct", "drawn", "used again", "first calls first", "backwards"])
def test_code_between_the_blocks_may_do_what_it_likes(how: str) -> None:
    torch.manual_seed(0)
    model, x = Between(how).to(D), zoo.made("gpt")[1]
    assert same(left_by(model, x, recomputing([["a", "b"]])), left_by(model, x))


class Shifted(nn.Module):
    """A block's output changed in place before the next block, which then sees another content of the same tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 5), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        z += torch.arange(6, dtype=z.dtype)
        return self.b(z)


def test_an_output_changed_in_place_between_two_blocks_is_kept_as_it_then_was() -> None:
    torch.manual_seed(0)
    model, x = Shifted().to(D), zoo.made("gpt")[1]
    assert same(left_by(model, x, recomputing([["a", "b"]])), left_by(model, x))


def test_a_graph_that_is_kept_is_used_twice_and_differentiated_twice() -> None:
    model, x = zoo.made("gpt")
    model = zoo.GPT(drop=0.0).to(D)

    def penalised(twin: nn.Module) -> list[Tensor]:
        rows = x.clone().requires_grad_()
        loss = zoo.row_loss(twin(rows))
        [slope] = torch.autograd.grad(loss, rows, create_graph=True)
        return list(torch.autograd.grad(loss + slope.square().sum(), [*twin.parameters()]))

    plain = penalised(model)
    for blocks in zoo.MODELS["gpt"][2:]:
        with recomputed_blocks(model, blocks):
            assert all(torch.equal(a, b) for a, b in zip(penalised(model), plain))


def test_a_checkpoint_of_the_models_own_inside_a_block_stays_one() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.out = nn.Sequential(nn.Linear(6, 6), nn.Tanh()), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(checkpoint(self.inner, x.sin(), use_reentrant=False))

    torch.manual_seed(0)
    model, x = nn.Sequential(Own(), Own(), nn.Linear(6, 5)).to(D), zoo.made("gpt")[1]
    assert same(left_by(model, x, recomputing([["0", "1"]])), left_by(model, x))


def test_blocks_inside_a_checkpoint_of_the_models_own_run_again_with_it() -> None:
    class Outside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            make = lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 6))
            self.stage, self.head = nn.Sequential(make(), nn.Tanh(), make(), make()), nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.stage, x.sin(), use_reentrant=False))

    torch.manual_seed(0)
    model, x = Outside().to(D), zoo.made("gpt")[1]
    assert same(left_by(model, x, recomputing(["stage.0", ["stage.2", "stage.3"]])), left_by(model, x))


def test_hooks_that_move_saved_tensors_see_what_enters_a_region() -> None:
    torch.manual_seed(0)
    model, x = Deep(), torch.randn(50, 16)
    moved: list[torch.Size] = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: moved.append(t.shape) or t.clone(), lambda t: t),
        recomputed_blocks(model, [["0", "1", "2"], ["3", "4", "5"]]),
    ):
        model(x).sum().backward()
    assert moved.count(x.shape) == 2 and len(moved) == 2


class Writing(nn.Module):
    """Blocks that cannot run again."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.linear = how, nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "input in place":
            return self.linear(x.tanh_())
        if self.how == "gradients inside":
            z = x.detach().requires_grad_()
            return self.linear(torch.autograd.grad(self.linear(z).tanh().sum(), z, create_graph=True)[0])
        if self.how == "torch.func":
            return torch.func.vmap(torch.func.grad(lambda row: self.linear(row).tanh().sum()))(x)
        MEMORY.append(x)
        return self.linear(torch.cat(MEMORY).tanh().sum(0) + x)


MEMORY: list[Tensor] = []


@pytest.mark.parametrize(
    ("how", "found"),
    [
        ("input in place", "what entered it was changed in place"),
        ("gradients inside", "gradients inside its own forward"),
        ("torch.func", "a transform of torch.func"),
        ("a list outside", r"tensor \d that it saved was"),
    ],
)
def test_what_cannot_run_again_is_refused_with_the_modules_name(how: str, found: str) -> None:
    MEMORY.clear()
    model = nn.Sequential(nn.Linear(6, 6), Writing(how), nn.Linear(6, 5)).to(D)
    with pytest.raises(CannotSplit, match=f"(?s)run 1 again.*{found}.*leave that part out"):
        left_by(model, zoo.made("gpt")[1], recomputing(["1"]))
    if how == "input in place":
        # With what made the input in one run, it is no input from outside.
        x = zoo.made("gpt")[1]
        assert same(left_by(model, x, recomputing([["0", "1"]])), left_by(model, x))


def test_a_tensor_that_was_saved_and_is_changed_in_place_later_is_refused_as_plain_torch_does() -> None:
    """Made again, it would be changed again, and the gradient be another one."""

    class Scaling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2)

    # Nothing of Scaling is saved, and tanh saves its output.
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), Scaling(), nn.Linear(6, 5)).to(D), zoo.made("gpt")[1]
    with pytest.raises(RuntimeError, match="inplace operation"):
        left_by(model, x)
    with pytest.raises(CannotSplit, match=r"(?s)run 1 to 3 again.*a tensor that its gradient needs is changed"):
        left_by(model, x, recomputing([["1", "2", "3"]]))


def test_what_enters_and_is_changed_in_place_later_is_refused() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 5), nn.Tanh())

        def forward(self, x: Tensor) -> Tensor:
            z = self.a(x) + 0
            y = self.b(z)
            z.mul_(2)
            return y + z[:, :5]

    with pytest.raises(CannotSplit, match=r"(?s)run b again.*changed in place, by it or after it"):
        left_by(Late().to(D), zoo.made("gpt")[1], recomputing(["b"]))


@pytest.fixture
def gpt() -> Iterator[tuple[nn.Module, Tensor, dict[str, Any]]]:
    model, x = zoo.made("gpt")
    yield model, x, left_by(model, x)


def test_planted_draws_made_anew_are_caught(gpt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from samegrad.exact import recomputed

    model, x, plain = gpt
    monkeypatch.setattr(recomputed._Past, "_replayed", lambda self: nullcontext())
    assert not same(left_by(model, x, recomputing(["h.0", "h.1"])), plain)


def test_planted_calls_in_another_order_are_caught(gpt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, plain = gpt
    runs = as_runs([["h.0", "h.1"]])
    before = regions.Region.run_again

    def backwards(self: Any) -> None:
        self._calls[0].call, self._calls[1].call = self._calls[1].call, self._calls[0].call
        before(self)

    monkeypatch.setattr(regions.Region, "run_again", backwards)
    assert not same(left_by(model, x, recomputing(runs)), plain)


def test_planted_state_that_is_not_put_back_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    from samegrad.exact import part_state

    model, x = zoo.made("attributes")
    plain = left_by(model, x)
    monkeypatch.setattr(part_state.PartState, "standing", lambda self: nullcontext())
    assert not same(left_by(model, x, recomputing(["0"])), plain)


def test_an_exception_in_a_block_leaves_everything_as_it_was(gpt: Any) -> None:
    model, x, plain = gpt
    failing = copy.deepcopy(model)
    with recomputed_blocks(failing, [["h.0", "h.1", "h.2"]]):
        handle = failing.h[1].mlp.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            failing(x)
        handle.remove()
        torch.manual_seed(5)
        loss = zoo.row_loss(failing(x))
        # In backward, while a run is made again.
        handle = failing.h[1].mlp.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loss.backward()
        handle.remove()
    assert same(left_by(failing.zero_grad() or failing, x), plain)


def test_hooks_on_a_block_run_once_and_those_inside_run_again_with_it(gpt: Any) -> None:
    model, x, _ = gpt
    model = copy.deepcopy(model)
    counts = {"h.0": 0, "h.0.mlp": 0, "ln_f": 0}
    for name in counts:
        hook = lambda *_, name=name: counts.__setitem__(name, counts[name] + 1)
        model.get_submodule(name).register_forward_hook(hook)
    with recomputed_blocks(model, [["h.0", "h.1"]]):
        zoo.row_loss(model(x)).backward()
    assert counts == {"h.0": 1, "h.0.mlp": 2, "ln_f": 1}


def test_the_last_product_of_a_block_is_not_computed_again() -> None:
    """What autograd still waits for is there before it: a feed-forward block ends in its largest product."""
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)), nn.Linear(6, 5)).to(D)
    products: list[int] = []

    class Counted(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            products.append(func.overloadpacket is torch.ops.aten.addmm)
            return func(*args, **(kwargs or {}))

    with recomputed_blocks(model, ["0"]), Counted():
        zoo.row_loss(model(zoo.made("gpt")[1])).backward()
    assert sum(products) == 3 + 1
