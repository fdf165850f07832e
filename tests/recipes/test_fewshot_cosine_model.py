"""The model is the spec's: embedding widths, attention, head, and a loss whose covariance is never made."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samegrad.recipes.fewshot_cosine.backbones import make_backbone
from samegrad.recipes.fewshot_cosine.document import DocumentLoss, called_twice, whole_covariance_penalty
from samegrad.recipes.fewshot_cosine.judging import arranged, unarranged
from samegrad.recipes.fewshot_cosine.model import (
    EpisodeShape,
    FewShotTransformer,
    Head,
    Method,
    PrototypeAttention,
    SupportAndQueries,
)
from samegrad.recipes.fewshot_cosine.objective import EpisodeLoss, covariance_penalty, variance_hinge

SHAPE = EpisodeShape(n_way=3, k_shot=2, n_query=4)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def head_of(width: int, method: Method = "FSCT_cosine", shape: EpisodeShape = SHAPE) -> Head:
    return Head(shape, width, method=method).double()


@pytest.mark.parametrize(
    ("name", "channels", "pixels", "width"),
    [("Conv4", 3, 84, 1600), ("Conv6", 3, 84, 1600), ("Conv4", 3, 64, 1024), ("Conv4", 1, 28, 64),
     ("ResNet18", 3, 112, 8192), ("ResNet34", 3, 224, 25088)],
)  # fmt: skip
def test_embeddings_are_as_wide_as_published(name: str, channels: int, pixels: int, width: int) -> None:
    backbone = make_backbone(name, channels=channels).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        assert backbone(torch.zeros(1, channels, pixels, pixels)).shape == (1, width)


def test_parameters_are_as_many_as_published() -> None:
    backbone = make_backbone("ResNet34")
    head = Head(EpisodeShape(n_way=5, k_shot=5, n_query=16), 25088, method="FSCT_cosine")
    assert sum(p.numel() for p in backbone.parameters()) == 21_284_672
    assert sum(p.numel() for p in head.parameters()) == pytest.approx(53.2e6, rel=5e-3)
    assert sum(isinstance(part, nn.BatchNorm2d) for part in backbone.modules()) == 36


@pytest.mark.parametrize(("rows", "width"), [(10, 300), (25, 26), (25, 25), (25, 24), (25, 3), (2, 7)])
def test_the_covariance_penalty_is_that_of_the_whole_matrix(rows: int, width: int) -> None:
    embedded = (5 + drawn(rows, width)).requires_grad_()
    covariance = torch.cov(embedded.t())
    expected = (covariance.square().sum() - covariance.diagonal().square().sum()) / (width * (width - 1))
    found = covariance_penalty(embedded)
    assert float((found - expected).detach().abs()) <= 1e-12 * float(expected.detach())
    torch.testing.assert_close(whole_covariance_penalty(embedded), expected, rtol=1e-12, atol=0)
    wanted, ours = (torch.autograd.grad(value, embedded, retain_graph=True)[0] for value in (expected, found))
    torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12 * float(wanted.abs().max()))


def test_the_covariance_matrix_is_never_made() -> None:
    rows = torch.randn(25, 5000, requires_grad=True)
    largest = [0]

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                largest.append(result.numel())
            return result

    with Sizes():
        covariance_penalty(rows).backward()
    assert max(largest) <= rows.numel()


def test_the_hinge_falls_with_the_deviation_within_classes() -> None:
    support = drawn(3, 4, 6)
    deviations = (support.var(dim=1, correction=1) + 1e-4).sqrt()
    torch.testing.assert_close(variance_hinge(support), (1 - deviations).clamp_min(0).mean(), rtol=1e-13, atol=0)


def test_one_shot_has_a_hinge_and_a_gradient_without_a_nan() -> None:
    support = drawn(3, 1, 6).requires_grad_()
    hinge = variance_hinge(support)
    assert float(hinge.detach()) == pytest.approx(1 - math.sqrt(1e-4))
    (gradient,) = torch.autograd.grad(hinge, support)
    assert gradient.abs().max() == 0
    equal = torch.ones(2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.isfinite(torch.autograd.grad(variance_hinge(equal), equal)[0]).all()


def attention_by_hand(attention: PrototypeAttention, prototypes: Tensor, queries: Tensor) -> Tensor:
    """One query, one prototype and one head at a time."""
    width = attention.enter.out_features // attention.heads
    rows = []
    for query in queries:
        for prototype in prototypes:
            asked, key = (attention.enter(attention.norm(x)) for x in (prototype, query))
            parts = []
            for one, other in zip(asked.split(width), key.split(width)):
                weight = F.cosine_similarity(one, other, dim=0) if attention.cosine else 1.0
                parts.append(weight * other)
            rows.append(attention.leave(torch.cat(parts)))
    return torch.stack(rows).view(len(queries), len(prototypes), -1)


@pytest.mark.parametrize("cosine", [True, False])
def test_attention_weighs_each_query_by_its_likeness_to_the_prototype(cosine: bool) -> None:
    attention = PrototypeAttention(10, cosine=cosine, heads=2, head_width=3).double()
    prototypes, queries = drawn(3, 10), drawn(4, 10)
    found = attention(prototypes, queries)
    torch.testing.assert_close(found, attention_by_hand(attention, prototypes, queries), rtol=1e-12, atol=1e-13)


def test_prototypes_are_means_until_their_weights_are_learnt() -> None:
    head, support = head_of(6), drawn(3, 2, 6)
    torch.testing.assert_close(head.prototypes(support), support.mean(dim=1), rtol=1e-13, atol=0)
    with torch.no_grad():
        head.prototype_weights[0, 1] = 50.0
    torch.testing.assert_close(head.prototypes(support)[0], support[0, 1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["FSCT_cosine", "FSCT_softmax"])
def test_each_query_is_judged_by_itself(method: Method) -> None:
    head, prototypes, queries = head_of(6, method), drawn(3, 6), drawn(5, 6)
    whole = head(prototypes, queries)
    alone = torch.cat([head(prototypes, query.unsqueeze(0)) for query in queries])
    assert whole.shape == (5, 3)
    torch.testing.assert_close(whole, alone, rtol=1e-12, atol=1e-13)


def test_norms_cosines_and_covariances_stay_in_float32_under_autocast() -> None:
    head = Head(SHAPE, 32, method="FSCT_cosine")
    loss = EpisodeLoss(head, SHAPE, weights=(0.0, 1.0, 1.0))
    embeddings = torch.randn(SHAPE.images, 32).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = loss(embeddings, embeddings)
        logits = head(head.prototypes(torch.randn(3, 2, 32)), torch.randn(5, 32))
    assert under.dtype is torch.float32 and logits.dtype is torch.float32
    support = loss.told_apart(embeddings)[0].float()
    expected = variance_hinge(support) + covariance_penalty(support.flatten(0, 1))
    torch.testing.assert_close(under, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("part", ["attention", "feed_forward", "classifier"])
def test_a_part_in_full_precision_is_that_part_without_autocast(part: str) -> None:
    head, prototypes, queries = Head(SHAPE, 32, method="FSCT_cosine"), torch.randn(3, 32), torch.randn(5, 32)
    seen: list[torch.dtype] = []
    linear = next(layer for layer in getattr(head, part).modules() if isinstance(layer, nn.Linear))
    linear.register_forward_hook(lambda module, given, result: seen.append(result.dtype))
    for head.full_precision in ((), (part,)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            head(prototypes, queries)
    assert seen[0] is torch.bfloat16 and seen[-1] is torch.float32


SHAPES = [SHAPE, EpisodeShape(n_way=5, k_shot=5, n_query=16), EpisodeShape(n_way=2, k_shot=1, n_query=1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_images_come_back_to_their_classes_from_the_order_of_a_step(shape: EpisodeShape) -> None:
    images = torch.arange(shape.images).view(shape.n_way, shape.per_class, 1)
    rows = arranged(images, shape)
    assert torch.equal(unarranged(rows, shape), images)
    support, queries = SupportAndQueries(shape)(rows)
    assert torch.equal(support, images[:, : shape.k_shot])
    # Of queries the class changes fastest, as in the labels.
    assert torch.equal(queries.view(shape.n_query, shape.n_way, 1).transpose(0, 1), images[:, shape.k_shot :])


@pytest.mark.parametrize("rows", [1, 2, 5, 8])
def test_the_first_images_of_an_episode_are_an_episode_too(rows: int) -> None:
    head = head_of(6)
    embeddings = drawn(SHAPE.images, 6).requires_grad_()
    loss = EpisodeLoss(head, SHAPE, weights=(1.0, 0.5, 0.1))(embeddings[:rows], embeddings)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(embeddings.grad).all()  # type: ignore[arg-type]


def test_the_loss_is_the_three_terms_with_their_weights() -> None:
    backbone, head = make_backbone("Conv4", channels=1).double(), head_of(64)
    images = drawn(SHAPE.images, 1, 16, 16)
    model = FewShotTransformer(backbone, head, SHAPE)
    embeddings = backbone(images)
    support, _ = SupportAndQueries(SHAPE)(embeddings)
    truth = torch.tensor([0, 1, 2] * SHAPE.n_query)
    expected = (
        2.0 * F.cross_entropy(model(images), truth)
        + 0.5 * variance_hinge(support)
        + 0.1 * covariance_penalty(support.flatten(0, 1))
    )
    found = EpisodeLoss(head, SHAPE, weights=(2.0, 0.5, 0.1))(embeddings, images)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_the_documents_formulation_is_the_same_loss_and_updates_statistics_twice() -> None:
    backbone, head = make_backbone("Conv4", channels=1).double(), head_of(64)
    images = drawn(SHAPE.images, 1, 16, 16)
    other = copy.deepcopy((backbone, head))
    weights = (1.0, 0.5, 0.1)
    ours = EpisodeLoss(head, SHAPE, weights=weights)(backbone(images), images)
    theirs = DocumentLoss(EpisodeLoss(other[1], SHAPE, weights=weights))(called_twice(other[0], images), images)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)
    ours.backward()
    theirs.backward()
    for mine, its in zip(backbone.parameters(), other[0].parameters()):
        torch.testing.assert_close(mine.grad, its.grad, rtol=0, atol=1e-12)
    assert (backbone.layer1[1].num_batches_tracked, other[0].layer1[1].num_batches_tracked) == (1, 2)
