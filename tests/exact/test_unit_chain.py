"""Units of models that nobody wrote for it: found by structure and one watched forward, reasons named by module."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from samegrad.declared import DeclaredStep, declare
from samegrad.exact.recomputed import recomputed_blocks
from samegrad.exact.unit_chain import UnitChain, find_units

from . import recompute_zoo as zoo
from .test_regions import left_by, same


def declared(model: nn.Module, forward: Callable[[nn.Module, Any], Any] | None = None) -> DeclaredStep:
    return declare(model, lambda outputs, batch: zoo.row_loss(outputs), forward=forward or (lambda m, b: m(b)))


def chain_of(model: nn.Module, x: Any, forward: Any = None) -> UnitChain:
    return find_units(declared(model, forward), x)


def named(chain: UnitChain) -> list[list[str]]:
    return [[unit.name for unit in run] for run in chain.runs()]


BLOCKS = [f"h.{i}" for i in range(3)]
RUNS = {
    "resnet": [
        ["conv1", "bn1 to relu", "maxpool", "layer1.0", "layer1.1", "layer2.0", "layer2.1"],
        ["fc"],
    ],
    "gpt": [["wte", "drop", *BLOCKS, "ln_f"], ["lm_head"]],
    "hugging face": [["wte", "drop", *BLOCKS, "ln_f"], ["lm_head"]],
    "unet": [["e1"], ["e2"], ["mid", "up2"], ["d2", "up1"], ["d1", "out"]],
    "lstm": [["layers.0", "layers.1", "layers.2"], ["head"]],
    "mixer": [["stem", "blocks.0", "blocks.1", "blocks.2"], ["head"]],
    "encoder": [["stem", *(f"encoder.layers.{i}" for i in range(3))], ["head"]],
    "spectral norm": [["blocks.0", "blocks.1", "head"]],
}


@pytest.mark.parametrize("name", RUNS)
def test_the_outermost_blocks_and_what_stands_beside_them(name: str) -> None:
    model, x = zoo.made(name)
    chain = chain_of(model, x)
    assert named(chain) == RUNS[name] and not chain.left_out and chain.reason == ""


@pytest.mark.parametrize("name", RUNS)
def test_every_run_of_units_gives_the_plain_step(name: str) -> None:
    model, x = zoo.made(name)
    runs = [[path for unit in run for path in unit.paths] for run in chain_of(model, x).runs()]
    assert same(left_by(model, x, lambda twin: recomputed_blocks(twin, runs)), left_by(model, x))


@pytest.mark.parametrize("name", RUNS)
def test_looking_changes_nothing(name: str) -> None:
    model, x = zoo.made(name)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    chain_of(model, x)
    assert torch.equal(torch.get_rng_state(), state) and list(before) == list(model.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    for part in model.modules():
        assert not part._forward_hooks and "forward" not in vars(part)


def test_looking_leaves_no_hook_where_the_forward_raises() -> None:
    model = zoo.GPT().to(zoo.D)
    model.h[1].mlp.forward = lambda _: 1 / 0
    with pytest.raises(ZeroDivisionError):
        chain_of(model, torch.zeros(2, 6, dtype=zoo.D))
    assert all(not part._forward_hooks and not part._forward_pre_hooks for part in model.modules())


def test_a_block_that_is_a_sequential_has_finer_units() -> None:
    model, x = zoo.made("unet")
    units = {unit.name: unit for unit in chain_of(model, x).units}
    finer = [unit.name for unit in units["e1"].inner]
    assert finer == ["e1.net.0", "e1.net.1 to e1.net.2", "e1.net.3", "e1.net.4 to e1.net.5"]
    assert all(unit.follows for unit in units["e1"].inner[1:])
    runs = [["e1.net.0", "e1.net.1", "e1.net.2"], ["e1.net.3", "e1.net.4", "e1.net.5"]]
    assert same(left_by(model, x, lambda twin: recomputed_blocks(twin, runs)), left_by(model, x))


def test_an_encoder_with_a_decoder_that_looks_at_it() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(8, 2, 2, 2, 16, batch_first=True)
    batch = {"src": torch.randn(4, 5, 8), "tgt": torch.randn(4, 6, 8)}
    chain = chain_of(model, batch, lambda m, b: m(**b))
    assert [unit.name for unit in chain.units] == [
        *(f"encoder.{part}" for part in ("layers.0", "layers.1", "norm")),
        *(f"decoder.{part}" for part in ("layers.0", "layers.1", "norm")),
    ]


class Towers(nn.Module):
    """Two stacks of one class, of which one looks at the other, as in T5."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Stack(), Stack()

    def forward(self, x: Tensor) -> Tensor:
        z = x.reshape(len(x), 3, 2).repeat(1, 1, 6)
        return self.decoder(z, self.encoder(z, z)).mean(1)


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleList(Layered() for _ in range(2))

    def forward(self, z: Tensor, beside: Tensor) -> Tensor:
        for block in self.block:
            z = block(z, beside)
        return z


class Layered(nn.Module):
    """A block that is itself a list of layers with parts."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList(zoo.Block(drop=0.0) for _ in range(2))

    def forward(self, z: Tensor, beside: Tensor) -> Tensor:
        for layer in self.layer:
            z = layer(z, scale=beside)
        return z


def test_two_stacks_of_one_class_are_no_blocks_but_hold_some() -> None:
    model, x = Towers().to(zoo.D), zoo.made("gpt")[1]
    found = named(chain_of(model, x))
    assert [name for run in found for name in run] == [f"{s}.block.{i}" for s in ("encoder", "decoder") for i in (0, 1)]


class Cache:
    """What a model may hand from block to block and write into."""


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = zoo.Mixer()

    def forward(self, x: Tensor) -> Tensor:
        z = x.reshape(len(x), 3, 2).repeat(1, 1, 2)
        return self.block(self.block(z)).mean(1)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.relu = nn.Linear(6, 5), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.linear(x) * 2)


class Looped(nn.Module):
    """Blocks in a Sequential that nobody calls: the model's own code loops over them."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.Sequential(*(Stage() for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = stage(x)
        return x


class Stage(Looped):
    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.stages = nn.Sequential(nn.Linear(6, 6), nn.Tanh())


def test_a_sequential_that_is_looped_over_is_a_list() -> None:
    chain = chain_of(Looped().to(zoo.D), torch.randn(4, 6, dtype=zoo.D))
    assert named(chain) == [["stages.0", "stages.1"]] and all(unit.has_parts for unit in chain.units)


def test_what_is_no_unit_is_left_out_with_its_reason() -> None:
    x = torch.randn(4, 6, dtype=zoo.D)
    chain = chain_of(zoo.HuggingFaceLike(cache=Cache()).to(zoo.D), x)
    assert chain.left_out == dict.fromkeys(BLOCKS, "is handed or returns a Cache, which it may write")
    assert [unit.name for unit in chain.units] == ["wte", "drop", "ln_f", "lm_head"]
    assert chain.reason == "" and chain.why_single_layers.startswith("no blocks, only single layers")
    assert "h.0 is handed or returns a Cache" in chain.why_single_layers
    chain = chain_of(InPlace().to(zoo.D), x)
    assert named(chain) == [["linear"]] and "changes in place" in chain.left_out["relu"]
    chain = chain_of(Tied().to(zoo.D), x)
    assert not chain.units and "block is called 2 times in a forward" in chain.reason
    frozen = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5)).requires_grad_(False).to(zoo.D)
    assert "0 returns nothing that is differentiated; 1 returns" in chain_of(frozen, x).reason
    assert "no submodule" in chain_of(nn.Linear(6, 5).to(zoo.D), x).reason


class Kept(nn.Module):
    """A block's result is added to what another block is handed, so that one needs more than the other returns."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3))
        self.d = nn.Bilinear(6, 6, 5)

    def forward(self, x: Tensor) -> Tensor:
        first = self.a(x)
        return self.d(self.c(self.b(first + x)), first * 2)


def test_a_unit_follows_only_on_what_the_one_before_returned() -> None:
    chain = chain_of(Kept().to(zoo.D), torch.randn(4, 6, dtype=zoo.D))
    # b works on a new tensor; d also on one that would have to be kept.
    assert named(chain) == [["a"], ["b", "c"], ["d"]]


class HandedStep(nn.Module):
    """A step without weights: the network is handed to it."""

    def forward(self, network: nn.Module, x: Tensor) -> Tensor:
        return x + 0.1 * network(x)


class Integration(nn.Module):
    """One network called by every step."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6))
        self.steps = nn.ModuleList(HandedStep() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(self.network, x)
        return x


def test_steps_that_are_handed_their_network_are_blocks() -> None:
    model, x = Integration(), torch.randn(5, 6)
    chain = chain_of(model, x)
    assert named(chain) == [["steps.0", "steps.1", "steps.2"]]
    # What each runs is not below it, and is its inside all the same.
    assert all(unit.has_parts for unit in chain.units)
    assert same(left_by(model, x, lambda twin: recomputed_blocks(twin, ["steps.0", "steps.1"])), left_by(model, x))
