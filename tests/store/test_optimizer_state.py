"""A resumed optimizer is the saved one bit for bit, and takes the very steps that the unbroken run takes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from samegrad.errors import BadInput, UsageError
from samegrad.store import (
    load_checkpoint,
    model_into,
    optimizer_to_tensors,
    save_checkpoint,
    tensors_into_optimizer,
)

Make = Callable[[list[dict[str, Any]]], Optimizer]
MAKERS: dict[str, Make] = {
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.1),
    "adam_amsgrad": lambda groups: torch.optim.Adam(groups, lr=0.1, amsgrad=True, weight_decay=0.1),
    "adam_fused": lambda groups: torch.optim.Adam(groups, lr=0.1, fused=True),
    "adam_tensor_lr": lambda groups: torch.optim.Adam(groups, lr=torch.tensor(0.1), foreach=False),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.95)),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.1),
    "sgd_momentum": lambda groups: torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "radam": lambda groups: torch.optim.RAdam(groups, lr=0.1),
    "nadam": lambda groups: torch.optim.NAdam(groups, lr=0.1),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.1, initial_accumulator_value=0.3),
    "adadelta": lambda groups: torch.optim.Adadelta(groups, lr=0.1),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.1, centered=True, momentum=0.5),
    "rprop": lambda groups: torch.optim.Rprop(groups, lr=0.1),
    "asgd": lambda groups: torch.optim.ASGD(groups, lr=0.1),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=0.1),
}


def model() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3)).to(memory_format=torch.channels_last)


def groups_of(net: nn.Sequential) -> list[dict[str, Any]]:
    return [{"params": list(net[0].parameters())}, {"params": list(net[2].parameters()), "lr": 0.01}]


def train(net: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(5, 2, 4, 4, generator=torch.Generator().manual_seed(step))

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss = net(x).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


def bits(value: Any) -> Any:
    """A state with its tensors as bytes, dtypes, shapes and strides, and the types of everything else."""
    if isinstance(value, Tensor):
        content = value.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
        return content, value.dtype, tuple(value.shape), value.stride()
    if isinstance(value, dict):
        return [(key, bits(part)) for key, part in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [bits(part) for part in value]
    return type(value), repr(value)


def through_the_disk(folder: Path, net: nn.Module, optimizer: Optimizer) -> tuple[dict[str, Tensor], Any, Any]:
    tensors, state = optimizer_to_tensors(optimizer)
    entries = {"model": net.state_dict(), "optimizer": tensors}
    save_checkpoint(folder, step=1, tensors=entries, state={"optimizer": json.loads(json.dumps(state))})
    loaded = load_checkpoint(folder)
    return dict(loaded.tensors["optimizer"]), loaded.state["optimizer"], loaded.tensors["model"]


@pytest.mark.parametrize("name", MAKERS)
def test_a_resumed_optimizer_is_the_saved_one_and_its_next_steps_are_the_unbroken_runs(folder: Path, name: str) -> None:
    net = model()
    optimizer = MAKERS[name](groups_of(net))
    train(net, optimizer, range(3))
    optimizer.param_groups[0]["lr"] *= 0.5
    tensors, state, weights = through_the_disk(folder, net, optimizer)

    again = model()
    model_into(again, weights)
    resumed = MAKERS[name](groups_of(again))
    tensors_into_optimizer(resumed, tensors, state)
    assert bits(resumed.state_dict()) == bits(optimizer.state_dict())

    train(net, optimizer, range(3, 6))
    train(again, resumed, range(3, 6))
    assert bits(again.state_dict()) == bits(net.state_dict())
    assert bits(resumed.state_dict()) == bits(optimizer.state_dict())


def test_a_fresh_optimizer_would_not_take_the_same_steps() -> None:
    net = model()
    optimizer = MAKERS["adam"](groups_of(net))
    train(net, optimizer, range(3))
    again = copy.deepcopy(net)
    train(net, optimizer, range(3, 4))
    train(again, MAKERS["adam"](groups_of(again)), range(3, 4))
    assert bits(again.state_dict()) != bits(net.state_dict())


def test_lbfgs_with_its_lists_of_tensors_goes_on_bit_for_bit(folder: Path) -> None:
    def make(net: nn.Module) -> Optimizer:
        return torch.optim.LBFGS(net.parameters(), lr=0.1, max_iter=4, history_size=3, line_search_fn="strong_wolfe")

    # LBFGS itself wants contiguous gradients.
    net = model().to(memory_format=torch.contiguous_format)
    optimizer = make(net)
    train(net, optimizer, range(3))
    tensors, state, weights = through_the_disk(folder, net, optimizer)
    again = model().to(memory_format=torch.contiguous_format)
    model_into(again, weights)
    resumed = make(again)
    tensors_into_optimizer(resumed, tensors, state)
    assert bits(resumed.state_dict()) == bits(optimizer.state_dict())
    train(net, optimizer, range(3, 6))
    train(again, resumed, range(3, 6))
    assert bits(again.state_dict()) == bits(net.state_dict())


def test_a_step_of_the_resumed_optimizer_leaves_the_loaded_tensors_alone(folder: Path) -> None:
    net = model()
    optimizer = MAKERS["adam"](groups_of(net))
    train(net, optimizer, range(2))
    tensors, state, _ = through_the_disk(folder, net, optimizer)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    resumed = MAKERS["adam"](groups_of(net))
    tensors_into_optimizer(resumed, tensors, state)
    train(net, resumed, range(2, 4))
    assert bits(tensors) == bits(before)


class WideStates(Optimizer):
    """Keeps fp32 sums of bf16 parameters, in a nested state; torch's own loading would narrow them."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"window": (1, None, True, 0.5)})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                entry = self.state[p]
                entry.setdefault("nested", {"sum": torch.zeros_like(p, dtype=torch.float32), "seen": 0})
                entry.setdefault("flag", False)
                entry["nested"]["sum"] += p.grad.float() / 3
                entry["nested"]["seen"] += 1
                entry.setdefault("history", []).append(entry["nested"]["sum"].mean())


def test_states_wider_than_their_parameters_stay_wide(folder: Path) -> None:
    weight = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = WideStates([weight])
    for _ in range(2):
        weight.grad = torch.full_like(weight, 0.3)
        optimizer.step()
    tensors, state = optimizer_to_tensors(optimizer)
    resumed = WideStates([weight])
    tensors_into_optimizer(resumed, tensors, json.loads(json.dumps(state)))
    assert bits(resumed.state_dict()) == bits(optimizer.state_dict())
    narrowed = WideStates([weight])
    narrowed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert bits(narrowed.state_dict()) != bits(optimizer.state_dict()), "torch no longer narrows; drop the rule"


def test_one_tensor_shared_by_two_states_comes_back_shared() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    shared = torch.zeros(2)
    optimizer.state[weight] = {"a": shared, "b": shared}
    tensors, state = optimizer_to_tensors(optimizer)
    resumed = torch.optim.SGD([weight], lr=0.1)
    tensors_into_optimizer(resumed, tensors, state)
    assert resumed.state[weight]["a"] is resumed.state[weight]["b"]


def test_states_whose_places_read_alike_stay_apart() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.state[weight] = {"a": {"b": torch.ones(1)}, "a.b": torch.zeros(1)}
    tensors, state = optimizer_to_tensors(optimizer)
    resumed = torch.optim.SGD([weight], lr=0.1)
    tensors_into_optimizer(resumed, tensors, state)
    assert bits(resumed.state_dict()) == bits(optimizer.state_dict())


def trained(name: str, width: int = 3) -> tuple[Optimizer, dict[str, Tensor], dict[str, Any]]:
    net = nn.Sequential(nn.Linear(2, width), nn.Linear(width, width), nn.Linear(width, 1), nn.Linear(1, 1))
    optimizer = MAKERS[name]([{"params": list(net.parameters())}])
    net(torch.ones(4, 2)).sum().backward()
    optimizer.step()
    return optimizer, *optimizer_to_tensors(optimizer)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t, s: t.pop("state.0.exp_avg"), "state.0.exp_avg is missing among the tensors"),
        (lambda t, s: t.update(x=torch.ones(1)), "x is (1,) torch.float32 among the tensors, missing in the saved"),
        (lambda t, s: t.update({"state.1.step": torch.ones(2)}), "state.1.step is (2,)"),
        (lambda t, s: t.update({"state.1.step": torch.tensor(1.0).double()}), "state.1.step is () torch.float64"),
        (lambda t, s: s.update(optimizer="torch.optim.sgd.SGD"), "torch.optim.sgd.SGD in the checkpoint"),
        (lambda t, s: s["groups"][0].pop(), "groups hold [8] parameters here, [7] in the checkpoint"),
        (lambda t, s: s.pop("content"), "not what samegrad saves"),
        (lambda t, s: s["content"]["state"]["$pairs"].append([99, {}]), "state.99 belongs to no parameter"),
    ],
)  # fmt: skip
def test_whatever_differs_is_named_and_nothing_changes(change: Callable[[Any, Any], object], text: str) -> None:
    optimizer, tensors, state = trained("adam")
    change(tensors, state)
    before = bits(optimizer.state_dict())
    with pytest.raises(BadInput) as caught:
        tensors_into_optimizer(optimizer, tensors, state)
    assert text in caught.value.found
    assert bits(optimizer.state_dict()) == before


def test_another_optimizer_and_other_shapes_list_five_differences_and_count_the_rest() -> None:
    _, tensors, state = trained("adam", width=4)
    other, *_ = trained("sgd_momentum")
    before = bits(other.state_dict())
    with pytest.raises(BadInput) as caught:
        tensors_into_optimizer(other, tensors, state)
    assert "SGD here" in caught.value.found
    assert "parameter 0 of group 0 is (3, 2) torch.float32 here, (4, 2) torch.float32" in caught.value.found
    # The class, five of eight shapes.
    assert "and 1 more" in caught.value.found
    assert bits(other.state_dict()) == before


def test_parameters_in_another_order_are_found_by_their_names() -> None:
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    tensors, state = optimizer_to_tensors(torch.optim.SGD([("a", a), ("b", b)], lr=0.1))
    with pytest.raises(BadInput, match="group 0 has b here, a in the checkpoint"):
        tensors_into_optimizer(torch.optim.SGD([("b", b), ("a", a)], lr=0.1), tensors, state)


def test_a_function_in_a_group_is_refused_by_place() -> None:
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], "rule": print}], lr=0.1)
    with pytest.raises(UsageError, match=r"param_groups\.0\.rule"):
        optimizer_to_tensors(optimizer)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adam", "adam_fused", "sgd_momentum"])
def test_states_of_cuda_parameters_go_back_to_their_device(folder: Path, name: str) -> None:
    net = model().cuda()
    optimizer = MAKERS[name](groups_of(net))

    def step(net: nn.Module, optimizer: Optimizer) -> None:
        optimizer.zero_grad()
        net(torch.ones(2, 2, 4, 4, device="cuda")).square().mean().backward()
        optimizer.step()

    step(net, optimizer)
    tensors, state, weights = through_the_disk(folder, net, optimizer)
    again = model().cuda()
    model_into(again, weights)
    resumed = MAKERS[name](groups_of(again))
    tensors_into_optimizer(resumed, tensors, state)
    devices = [[v.device for v in e.values() if isinstance(v, Tensor)] for e in optimizer.state.values()]
    assert [[v.device for v in e.values() if isinstance(v, Tensor)] for e in resumed.state.values()] == devices
    assert bits(resumed.state_dict()) == bits(optimizer.state_dict())
