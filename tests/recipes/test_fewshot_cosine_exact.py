"""However an episode is cut, its step is the plain one: loss, gradients, buffers; and what cuts it wrongly is seen."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.exact.batchnorm import Moments
from samegrad.exact.out_of_memory import OutOfMemory
from samegrad.recipes.fewshot_cosine.backbones import ResNetBackbone, make_backbone
from samegrad.recipes.fewshot_cosine.model import EpisodeShape, FewShotTransformer, Head, Method
from samegrad.recipes.fewshot_cosine.objective import EpisodeLoss, covariance_penalty, variance_hinge
from samegrad.recipes.fewshot_cosine.options import FewShotOptions
from samegrad.recipes.fewshot_cosine.stepping import StreamedEpisodeLoss, block_names, layers_in, make_step

from ..execute.failing_memory import FailsAt

PIXELS = 16
SHAPE = EpisodeShape(n_way=3, k_shot=2, n_query=3)
TOLERANCE = 1e-11
WEIGHTS = (1.0, 0.5, 0.1)


def made(
    backbone: Any = "Conv4", method: Method = "FSCT_cosine", shape: EpisodeShape = SHAPE
) -> tuple[FewShotTransformer, Tensor]:
    torch.manual_seed(0)
    if backbone == "small ResNet":
        network, width = ResNetBackbone((1, 2, 1, 1), channels=1, width=8), 64
    else:
        network, width = make_backbone(backbone, channels=1), 64 if backbone.startswith("Conv") else 512
    model = FewShotTransformer(network, Head(shape, width, method=method), shape)
    images = torch.randn(shape.images, 1, PIXELS, PIXELS, dtype=torch.float64)
    return model.double(), images


State = dict[str, Tensor]


def state_of(model: nn.Module) -> State:
    """Gradients and buffers by name."""
    found = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {name: buffer.double() for name, buffer in model.named_buffers() if buffer is not None}


def plain(model: FewShotTransformer, images: Tensor, weights: tuple[float, float, float] = WEIGHTS) -> State:
    twin = copy.deepcopy(model)
    loss = EpisodeLoss(twin.head, twin.shape, weights=weights)(twin.backbone(images), images)
    loss.backward()
    return state_of(twin) | {"loss": loss.detach()}


def planned(model: FewShotTransformer, images: Tensor, loss: nn.Module | None = None, **given: Any) -> State:
    twin = copy.deepcopy(model)
    loss_fn = EpisodeLoss(twin.head, twin.shape, weights=WEIGHTS) if loss is None else copy.deepcopy(loss)
    if loss is not None:
        loss_fn.head = twin.head  # type: ignore[assignment]
    value = sg.Step(twin.backbone, loss_fn, **given).backward(images)
    return state_of(twin) | {"loss": value}


def largest_difference(one: State, other: State) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def plan_of(exactness: sg.Exactness = sg.Exactness.SAME_SUM, **levers: dict[str, Any]) -> dict[str, Any]:
    return {"plan": sg.Plan(levers=levers, exactness=exactness, batch_rows=SHAPE.images)}


CUTS = {
    "2 chunks": {"rows": [8, 7]},
    "ragged": {"rows": [4, 1, 7, 3]},
    "one image at a time": {"rows": 1},
    "every fourth boundary": plan_of(exact_batchnorm={"rows": [8, 7], "keep_every": 4}),
    "chunks that meet": plan_of(exact_batchnorm={"rows": [4, 4, 4, 3], "scheme_name": "rendezvous"}),
}


@pytest.mark.parametrize("cut", CUTS)
def test_conv4_in_chunks_is_the_plain_step(cut: str) -> None:
    model, images = made()
    assert largest_difference(planned(model, images, **CUTS[cut]), plain(model, images)) <= TOLERANCE


@pytest.mark.parametrize("method", ["FSCT_cosine", "FSCT_softmax"])
def test_residual_blocks_in_ragged_chunks_are_the_plain_step(method: Method) -> None:
    model, images = made("small ResNet", method)
    assert largest_difference(planned(model, images, rows=[4, 1, 7, 3]), plain(model, images)) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["Conv6", "ResNet18", "ResNet34"])
def test_every_backbone_in_ragged_chunks_is_the_plain_step(backbone: str) -> None:
    model, images = made(backbone)
    assert largest_difference(planned(model, images, rows=[4, 1, 7, 3]), plain(model, images)) <= TOLERANCE


def test_blocks_that_run_again_leave_the_statistics_updated_once() -> None:
    model, images = made("small ResNet")
    blocks = block_names(model.backbone)
    assert blocks == ["layer1.0", "layer2.0", "layer2.1", "layer3.0", "layer4.0"]
    again = planned(model, images, **plan_of(sg.Exactness.SAME_BITS, recompute={"blocks": blocks}))
    assert largest_difference(again, plain(model, images)) == 0.0
    assert int(again["backbone.bn1.num_batches_tracked"]) == 1


@pytest.mark.parametrize("query_rows", [1, 4, 9, 20])
def test_queries_streamed_given_the_prototypes_change_nothing(query_rows: int) -> None:
    model, images = made()
    streamed = StreamedEpisodeLoss(EpisodeLoss(model.head, SHAPE, weights=WEIGHTS), query_rows)
    found = planned(model, images, streamed, rows=[4, 4, 4, 3])
    assert largest_difference(found, plain(model, images)) <= TOLERANCE


def test_one_shot_in_chunks_is_the_plain_step() -> None:
    model, images = made(shape=EpisodeShape(n_way=3, k_shot=1, n_query=2))
    assert largest_difference(planned(model, images, rows=[5, 4]), plain(model, images)) <= TOLERANCE


GIVEN: list[Any] = [
    {"query_rows": 4}, {"use_gradient_checkpointing": True}, pytest.param({}, marks=pytest.mark.slow)
]  # fmt: skip


@pytest.mark.parametrize("given", GIVEN)
def test_the_recipes_own_step_is_verified(given: dict[str, Any]) -> None:
    model, images = made()
    options = FewShotOptions(n_way=3, k_shot=2, n_query=3, dtype="float64", lambda_V=0.5, lambda_C=0.1, **given)
    step = make_step(options, model, torch.optim.AdamW(model.parameters()), images)
    assert sg.verify_step(step, images, reference="device").same


def test_amp_is_verified_against_the_plain_step_under_the_same_autocast_and_says_how_far_float32_is() -> None:
    model, images = made()
    model, images = model.float(), images.float()
    options = FewShotOptions(n_way=3, k_shot=2, n_query=3, precision="backbone.layer2=float32")
    verdict = sg.verify_step(make_step(options, model, torch.optim.AdamW(model.parameters()), images), images)
    assert verdict.same and "autocast in bfloat16 but for layer2.0" in verdict.reference
    assert verdict.departure is not None and 0 < verdict.departure.gradient_norm_fraction < 1


@pytest.mark.parametrize("steps", [0, 9], ids=["chosen by the budget", "asked for"])
def test_a_budgets_plan_is_left_where_memory_runs_out_and_what_was_asked_for_is_not(steps: int) -> None:
    model, images = made()
    model, images = model.float(), images.float()
    given = {"n_way": 3, "k_shot": 2, "n_query": 3, "budget": "64MiB", "gradient_accumulation_steps": steps}
    step = make_step(FewShotOptions(**given), model, torch.optim.AdamW(model.parameters()), images)
    before = step.plan
    assert before is not None and "autocast" in before.levers
    # The first step examines what it was given.
    step.backward(images)
    with pytest.raises(OutOfMemory, match="is a pin") if steps else contextlib.nullcontext(), FailsAt(200):
        step.backward(images)
    if not steps:
        assert step.recoveries and step.plan is not None and step.plan != before
        assert step.plan.levers["autocast"] == before.levers["autocast"]
        assert sg.verify_step(step, images).same


def test_precision_reaches_every_convolution_of_a_part() -> None:
    model, _ = made("small ResNet")
    assert layers_in(model.backbone, ["layer4.0", "conv1"]) == [
        "layer4.0.conv1", "layer4.0.conv2", "layer4.0.shortcut.0", "conv1"
    ]  # fmt: skip
    with pytest.raises(sg.UsageError, match="no such part"):
        layers_in(model.backbone, ["layer9"])


# What the document, and code like it, gets wrong: each must be seen by the comparison above.


def backward_of(model: FewShotTransformer, backward: Callable[[FewShotTransformer], Tensor]) -> State:
    twin = copy.deepcopy(model)
    loss = backward(twin).detach()
    return state_of(twin) | {"loss": loss}


def statistics_per_chunk(model: FewShotTransformer, images: Tensor) -> Tensor:
    embeddings = torch.cat([model.backbone(part) for part in images.split([8, 7])])
    loss = EpisodeLoss(model.head, SHAPE, weights=WEIGHTS)(embeddings, images)
    loss.backward()
    return loss


def second_forward_updates_statistics_again(model: FewShotTransformer, images: Tensor) -> Tensor:
    with torch.no_grad():
        model.backbone(images)
    loss = EpisodeLoss(model.head, SHAPE, weights=WEIGHTS)(model.backbone(images), images)
    loss.backward()
    return loss


def covariance_of_chunks(model: FewShotTransformer, images: Tensor) -> Tensor:
    loss = EpisodeLoss(model.head, SHAPE, weights=(1.0, 0.0, 0.0))
    embeddings = model.backbone(images)
    support, _ = loss.told_apart(embeddings)
    parts = support.flatten(0, 1).split(3)
    covariance = torch.stack([covariance_penalty(part) for part in parts]).mean()
    value = loss(embeddings, images) + 0.5 * variance_hinge(support) + 0.1 * covariance
    value.backward()
    return value


def prototypes_once_per_chunk_of_queries(model: FewShotTransformer, images: Tensor) -> Tensor:
    """Each chunk of queries makes the prototypes again and takes the mean of its own: their gradients add up."""
    loss = EpisodeLoss(model.head, SHAPE, weights=WEIGHTS)
    support, queries = loss.told_apart(model.backbone(images))
    parts = list(zip(queries.split(3), loss.labels.split(3)))
    terms = [
        nn.functional.cross_entropy(model.head(model.head.prototypes(support), part), truth) for part, truth in parts
    ]
    value = torch.stack(terms).sum() + 0.5 * variance_hinge(support) + 0.1 * covariance_penalty(support.flatten(0, 1))
    value.backward()
    return value


@pytest.mark.parametrize(
    "fault",
    [
        statistics_per_chunk, second_forward_updates_statistics_again, covariance_of_chunks,
        prototypes_once_per_chunk_of_queries,
    ],
)  # fmt: skip
def test_a_planted_fault_is_seen(fault: Callable[[FewShotTransformer, Tensor], Tensor]) -> None:
    model, images = made()
    wrong = backward_of(model, lambda twin: fault(twin, images))
    assert largest_difference(wrong, plain(model, images)) > 1e-4


def test_the_verdict_sees_a_loss_that_looks_at_a_chunk_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = made()
    loss = EpisodeLoss(model.head, SHAPE, weights=WEIGHTS)
    step = sg.Step(model.backbone, loss, rows=[8, 7])
    step.split_for(images, step.declared.layout(images))
    # As if chunks normalised by themselves: what is merged is the first chunk's alone.
    monkeypatch.setattr(Moments, "merged", lambda self, other: self)
    assert not sg.verify_step(step, images).same


# Several episodes a step.


def weights_after(model: FewShotTransformer, episodes: list[Tensor], divisor: int | None) -> State:
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    loss = EpisodeLoss(twin.head, SHAPE, weights=WEIGHTS)
    for group in (episodes[:2], episodes[2:]):
        for episode in group:
            (loss(twin.backbone(episode), episode) / (divisor or len(group))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(twin.state_dict())


def test_a_step_of_several_episodes_is_on_their_mean_also_when_the_last_is_short() -> None:
    model, _ = made()
    episodes = [torch.randn(SHAPE.images, 1, PIXELS, PIXELS, dtype=torch.float64) for _ in range(3)]
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    loss = EpisodeLoss(twin.head, SHAPE, weights=WEIGHTS)
    step = sg.Step(twin.backbone, loss, rows=[8, 7], optimizer=optimizer)
    assert len(list(sg.train(step, episodes, batches_per_step=2))) == 2
    found = dict(twin.state_dict())
    assert largest_difference(found, weights_after(model, episodes, None)) <= TOLERANCE
    for mis_scaled in (1, 2):
        # The sum instead of the mean; the short last step divided by what it should have had.
        assert largest_difference(found, weights_after(model, episodes, mis_scaled)) > 1e-6
