"""The parts in plain PyTorch: the document's model, Euler steps that arrive, losses by their definitions, latents."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.recipes.flow_style import crops, data, latent_files
from samegrad.recipes.flow_style.codec import fit_codec, load_codec
from samegrad.recipes.flow_style.data import Drawing, Latents, StyleBatch
from samegrad.recipes.flow_style.losses import Energy, self_similarity_distance, sliced_wasserstein, take_patches
from samegrad.recipes.flow_style.model import EulerStep, LGTUNet, StyleBlock, StyleFlow, make_flow
from samegrad.recipes.flow_style.sampling import Sampler


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The model.


def test_the_network_has_the_documents_parameters() -> None:
    assert sum(p.numel() for p in LGTUNet(2, 128).parameters()) == pytest.approx(20.34e6, rel=1e-3)


def test_the_flow_begins_as_the_identity_and_draws_nothing_global() -> None:
    before = torch.get_rng_state()
    flow = make_flow(2, base_channels=4, ode_steps=2, seed=0, dtype=torch.float64)
    assert torch.equal(before, torch.get_rng_state())
    x, time = drawn(3, 4, 8, 8), torch.tensor([0.0, 0.3, 0.9], dtype=torch.float64)
    styled = flow(x, time, torch.tensor([0, 1, 1]))
    assert torch.equal(styled.latents, x) and not styled.velocity_energy.any()


def test_style_kernels_begin_as_deltas() -> None:
    block, x = StyleBlock(8, 6).double(), drawn(3, 8, 4, 4)
    plain = nn.functional.silu(x + block.mix(nn.functional.silu(block.norm(x))))
    torch.testing.assert_close(block(x, drawn(3, 6)), plain)


def test_style_kernels_are_a_rows_own_depthwise_convolution() -> None:
    block, x, condition = StyleBlock(8, 6).double(), drawn(3, 8, 5, 4), drawn(3, 6)
    nn.init.normal_(block.kernels.weight, generator=torch.Generator().manual_seed(1))
    kernels = block.kernels(condition).view(3, 8, 1, 3, 3)
    by_row = torch.cat([nn.functional.conv2d(x[i : i + 1], kernels[i], padding=1, groups=8) for i in range(3)])
    expected = nn.functional.silu(x + block.mix(nn.functional.silu(block.norm(by_row))))
    torch.testing.assert_close(block(x, condition), expected, rtol=1e-12, atol=1e-12)


class Clock(nn.Module):
    """A velocity of 1 that writes down when it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, time: Tensor, style: Tensor) -> Tensor:
        self.seen.append(time)
        return torch.ones_like(x)


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_euler_steps_of_one_size_arrive_at_time_one(steps: int) -> None:
    flow = StyleFlow(2, base_channels=4, ode_steps=steps).double()
    clock, start = Clock(), torch.tensor([0.0, 0.25], dtype=torch.float64)
    styled = flow(torch.zeros(2, 4, 4, 4, dtype=torch.float64), start, torch.tensor([0, 1]), network=clock)
    # Under a velocity of 1 a row has gone as far as its time has.
    torch.testing.assert_close(styled.latents[:, 0, 0, 0], 1 - start)
    expected = torch.stack([start + k * (1 - start) / steps for k in range(steps)])
    torch.testing.assert_close(torch.stack(clock.seen), expected)
    torch.testing.assert_close(styled.velocity_energy, torch.ones_like(start))


def test_the_documents_shrinking_steps_would_not_arrive() -> None:
    time = 0.0
    for _ in range(10):
        time += (1 - time) / 10
    assert time == pytest.approx(0.651, abs=5e-4)


def test_dropped_rows_get_the_mean_of_all_styles() -> None:
    condition = LGTUNet(3, 4).double().condition
    styles = condition.style_of(torch.tensor([2, 0]), torch.tensor([False, True]))
    torch.testing.assert_close(styles, torch.stack([condition.style.weight[2], condition.style.weight.mean(0)]))


# The losses.


@pytest.mark.parametrize("size", [1, 3, 5])
def test_patches_are_those_of_unfold(size: int) -> None:
    latents = drawn(3, 4, 6, 8)
    places = torch.randperm(3 * 48, generator=torch.Generator().manual_seed(0))[:50]
    unfolded = nn.functional.unfold(latents, size, padding=size // 2).mT.reshape(3 * 48, 4, size * size)
    expected = unfolded[places].mT.flatten(1)
    assert torch.equal(take_patches(latents, places, size), expected)


def test_the_distance_is_that_of_sorted_projections() -> None:
    first, second, directions = drawn(40, 9), drawn(40, 9, seed=1), drawn(9, 5, seed=2)
    by_hand = np.mean(
        [
            (np.sort(first.numpy() @ way) - np.sort(second.numpy() @ way)) ** 2
            for way in directions.numpy().T
        ]
    )
    assert float(sliced_wasserstein(first, second, directions)) == pytest.approx(by_hand, rel=1e-12)


def test_the_distance_has_the_closed_forms_gradient() -> None:
    first, second, directions = drawn(20, 3).requires_grad_(), drawn(20, 3, seed=1), drawn(3, 4, seed=2)
    sliced_wasserstein(first, second, directions).backward()
    expected = torch.zeros(20, 3, dtype=torch.float64)
    for way in directions.mT:
        projected = first.detach() @ way
        ranks = projected.argsort().argsort()
        expected += 2 / (20 * 4) * (projected - (second @ way).sort().values[ranks])[:, None] * way
    torch.testing.assert_close(first.grad, expected, rtol=1e-12, atol=1e-14)


def test_groups_are_compared_among_themselves() -> None:
    first, second, directions = drawn(30, 3), drawn(30, 3, seed=1), drawn(3, 4, seed=2)
    groups = torch.arange(30) % 3 % 2
    parts = [sliced_wasserstein(first[groups == g], second[groups == g], directions) for g in (0, 1)]
    expected = parts[0] * 2 / 3 + parts[1] / 3
    torch.testing.assert_close(sliced_wasserstein(first, second, directions, groups), expected, rtol=1e-12, atol=0)


def test_self_similarity_by_small_matrices_is_that_of_all_pairs() -> None:
    styled, source = drawn(3, 4, 5, 6), drawn(3, 4, 5, 6, seed=1)
    mine, theirs = (nn.functional.normalize(x.flatten(2), dim=1) for x in (styled, source))
    expected = ((mine.mT @ mine - theirs.mT @ theirs) ** 2).mean(dim=(1, 2))
    torch.testing.assert_close(self_similarity_distance(styled, source), expected, rtol=1e-12, atol=0)
    near = source + 1e-9 * styled
    moved = self_similarity_distance(near, source)
    # Nothing cancels: a change of 1e-9 is seen as its square.
    assert ((moved > 1e-20) & (moved < 1e-16)).all()


def test_in_one_pool_of_all_styles_the_identity_is_as_good_as_it_gets() -> None:
    """The document's targets are the batch's own styles in another order: why patches are compared within a style."""
    noise = drawn(64, 4, 8, 8)
    ids = torch.arange(64) % 2
    latents = Latents(noise + 3 * ids[:, None, None, None], ids, ("dark", "light"))
    batch = data.draw_batch(latents, Drawing(rows=32, max_samples=None), earliest=0.0, seed=(0,))
    pooled, _ = Energy(by_style=False).parts(batch.source, batch)
    by_style, _ = Energy().parts(batch.source, batch)
    assert float(pooled) < 0.02 * float(by_style)


# Latents and batches.


def latent_folders(root: Path, counts: dict[str, int], side: int = 8, scale: float = 1.0) -> Path:
    for number, (name, count) in enumerate(counts.items()):
        (root / name).mkdir(parents=True)
        for i in range(count):
            torch.save(scale * drawn(4, side, side, seed=100 * number + i).float(), root / name / f"{i}.pt")
    return root


def test_latents_are_read_by_style_in_the_order_of_names(tmp_path: Path) -> None:
    latents = latent_files.read_latents(latent_folders(tmp_path, {"photo": 3, "monet": 2}))
    assert latents.names == ("monet", "photo") and latents.style_ids.tolist() == [0, 0, 1, 1, 1]
    assert torch.equal(latents.latents[0], drawn(4, 8, 8, seed=100).float())


def test_a_latent_with_a_batch_axis_or_scaled_twice_is_put_right(tmp_path: Path) -> None:
    plain = drawn(4, 8, 8).float()
    torch.save(plain[None], tmp_path / "batch.pt")
    torch.save(plain * data.SCALING_FACTOR, tmp_path / "twice.pt")
    assert torch.equal(latent_files.read_latent(tmp_path / "batch.pt"), plain)
    torch.testing.assert_close(latent_files.read_latent(tmp_path / "twice.pt"), plain)


class Canary:
    def __reduce__(self) -> Any:
        return (Path("canary").touch, ())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (Canary(), "[Ww]eights"),
        (torch.zeros(3, 8, 8), r"not \(4, height, width\)"),
        (torch.zeros(4, 6, 8), "multiples of 4"),
        (torch.full((4, 8, 8), math.nan), "not finite"),
        ({"latent": 1}, "dict"),
    ],
    ids=["runs code", "channels", "side", "not a number", "no tensor"],
)
def test_a_file_that_is_no_latent_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "one.pt")
    with pytest.raises(sg.BadInput, match=says) as refused:
        latent_files.read_latent(tmp_path / "one.pt")
    assert refused.value.file == str(tmp_path / "one.pt") and not Path("canary").exists()


def test_folders_that_do_not_match_are_refused(tmp_path: Path) -> None:
    with pytest.raises(sg.BadInput, match="no such folder"):
        latent_files.read_latents(tmp_path / "none")
    with pytest.raises(sg.BadInput, match="two or more"):
        latent_files.read_latents(latent_folders(tmp_path / "one", {"photo": 2}))
    latent_folders(tmp_path / "two", {"photo": 2, "monet": 2})
    torch.save(torch.randn(4, 4, 4), tmp_path / "two" / "photo" / "9.pt")
    with pytest.raises(sg.BadInput, match=r"shape \(4, 4, 4\)"):
        latent_files.read_latents(tmp_path / "two")


def test_held_out_latents_are_others_and_of_every_style() -> None:
    latents = Latents(drawn(13, 4, 4, 4), torch.tensor([0] * 3 + [1] * 10), ("a", "b"))
    training, held_out = data.split_latents(latents, 0.2, seed=0)
    assert torch.bincount(training.style_ids).tolist() == [2, 8]
    assert torch.bincount(held_out.style_ids).tolist() == [1, 2]
    both = torch.cat([training.latents, held_out.latents])
    assert len(torch.unique(both.flatten(1), dim=0)) == 13


def batch_of(**changed: Any) -> StyleBatch:
    latents = Latents(drawn(20, 4, 4, 4), torch.tensor([0] * 15 + [1] * 5), ("a", "b"))
    drawing = Drawing(rows=400, max_samples=50, label_drop_probability=0.25, max_positions=7)
    return data.draw_batch(latents, drawing, **{"earliest": 0.2, "seed": (3, 1)} | changed)


def test_a_batch_is_a_function_of_its_seed() -> None:
    first, again, other = batch_of(), batch_of(), batch_of(seed=(3, 2))
    assert torch.equal(first.noised, again.noised) and torch.equal(first.places[0], again.places[0])
    assert not torch.equal(first.noised, other.noised)


def test_styles_are_balanced_targets_permuted_references_of_the_target() -> None:
    latents = Latents(drawn(20, 4, 4, 4), torch.tensor([0] * 15 + [1] * 5), ("a", "b"))
    batch = batch_of()
    known = {tuple(latent.flatten().tolist()): int(style) for latent, style in zip(latents.latents, latents.style_ids)}
    sources = [known[tuple(row.flatten().tolist())] for row in batch.source]
    # Not three to one, as the files are.
    assert 0.4 < sum(sources) / 400 < 0.6
    assert sorted(batch.target_style.tolist()) == sorted(sources)
    assert [known[tuple(row.flatten().tolist())] for row in batch.reference] == batch.target_style.tolist()
    assert float(batch.start.min()) >= 0.2 and float(batch.start.max()) <= 1
    assert 0.15 < float(batch.dropped.double().mean()) < 0.35
    assert len(set(batch.places[0].tolist())) == 50 and len(set(batch.positions.tolist())) == 7
    torch.testing.assert_close(batch.directions[0].norm(dim=0), torch.ones(64, dtype=torch.float64))


def test_the_schedules_of_time_and_rate() -> None:
    assert [data.earliest_time(0.01, epoch, 10) for epoch in (0, 5, 10, 99)] == [0, 0.005, 0.01, 0.01]
    assert data.earliest_time(0.01, 0, 0) == 0.01
    assert data.cosine_rate(1e-3, 1e-6, 0, 8) == pytest.approx(1e-3)
    assert data.cosine_rate(1e-3, 1e-6, 8, 8) == pytest.approx(1e-6)
    assert data.cosine_rate(1.0, 0.0, 4, 8) == pytest.approx(0.5)


# Pictures and the codec.


def test_training_and_held_out_crops_share_no_pixel() -> None:
    marked = np.zeros((40, 80, 3), dtype=np.uint8)
    marked[:, -32:] = 255
    assert not crops._region(marked, 32, held=False).any() and crops._region(marked, 32, held=True).all()


def test_bundled_crops_are_of_both_styles_and_repeatable() -> None:
    first, again = (crops.bundled_crops(2, 1, seed=5, side=64) for _ in range(2))
    assert first.names == ("histology", "photograph")
    assert [part.shape for part in first.training] == [(2, 3, 64, 64)] * 2
    assert all(torch.equal(a, b) for a, b in zip(first.training, again.training))


def test_the_codec_is_the_principal_components_of_blocks(tmp_path: Path) -> None:
    pictures = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    codec = fit_codec(pictures)
    latents = codec.encode(pictures)
    assert latents.shape == (6, 4, 4, 4)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std(dim=(0, 2, 3), correction=0), torch.ones(4), atol=1e-4, rtol=0)
    blocks = nn.functional.pixel_unshuffle(pictures.double(), 8).movedim(1, -1).flatten(0, -2).numpy()
    singular = np.linalg.svd(blocks - blocks.mean(0), compute_uv=False)[:4]
    np.testing.assert_allclose(codec.spread.numpy(), singular / math.sqrt(len(blocks)), rtol=1e-5)
    loaded = load_codec(codec.save(tmp_path / "codec.safetensors"))
    assert torch.equal(loaded.encode(pictures), latents)
    # What lies in the span of the components comes back.
    torch.testing.assert_close(codec.encode(codec.decode(0.1 * latents)), 0.1 * latents, atol=1e-4, rtol=1e-4)


# The sampler.


def test_without_noise_and_guidance_the_sampler_is_the_flow() -> None:
    flow = make_flow(2, base_channels=4, ode_steps=5, seed=0, dtype=torch.float64)
    nn.init.normal_(flow.network.leave[-1].weight, std=0.05, generator=torch.Generator().manual_seed(0))
    source, ids = drawn(2, 4, 8, 8), torch.tensor([1, 0])
    sampler = Sampler(steps=5, start_time=0.4, guidance=1.0, temperature=0.0)
    styled = sampler.style(flow.network, source, ids, torch.Generator().manual_seed(7))
    noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    start = torch.full((2,), 0.4, dtype=torch.float64)
    expected = flow(0.6 * noise + 0.4 * source, start, ids).latents
    torch.testing.assert_close(styled, expected.detach(), rtol=1e-12, atol=1e-12)


def test_carried_back_and_on_in_its_own_style_a_source_returns() -> None:
    flow = make_flow(2, base_channels=4, ode_steps=1, seed=0, dtype=torch.float64)
    nn.init.normal_(flow.network.leave[-1].weight, std=0.02, generator=torch.Generator().manual_seed(0))
    source, ids = drawn(2, 4, 8, 8), torch.tensor([1, 0])
    far, near = (
        float((Sampler(steps=n, guidance=1.0, temperature=0.0).restyle(
            flow.network, source, ids, ids, torch.Generator()) - source).norm())
        for n in (5, 40)
    )  # fmt: skip
    assert near < far / 4


def test_a_step_holds_no_weights() -> None:
    assert not list(EulerStep(0).parameters())
