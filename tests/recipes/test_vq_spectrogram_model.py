"""The model in float64: a clip at a time is all clips at once, statistics, codebook and dropout included."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import samegrad as sg
from samegrad.recipes.vq_spectrogram.data import BANDS
from samegrad.recipes.vq_spectrogram.declared import make_model, make_objective, make_optimizer, make_step
from samegrad.recipes.vq_spectrogram.model import Codebook, Objective, VQSpectrogram
from samegrad.recipes.vq_spectrogram.options import VQSpectrogramOptions

D = torch.float64
CLIPS, PATCHES, FRAMES, MACHINES = 8, 3, 16, 3
TOLERANCE = 1e-11
SMALL = VQSpectrogramOptions(
    channels=(3, 4, 5), latent_dim=4, num_codes=6, patch_len=FRAMES, dtype="float64", device="cpu", batch_size=CLIPS
)

Left = dict[str, Tensor]


def drawn_batch() -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(3)
    patches = torch.randn(CLIPS, PATCHES, 1, BANDS, FRAMES, generator=draws, dtype=D)
    # A level that differs from clip to clip, so that statistics of one are not those of all.
    patches += torch.linspace(-2, 2, CLIPS, dtype=D).reshape(-1, 1, 1, 1, 1)
    return {
        "patches": patches,
        "machine": torch.randint(MACHINES, (CLIPS,), generator=draws),
        "transform": torch.randint(6, (CLIPS,), generator=draws),
    }


def made(options: VQSpectrogramOptions = SMALL, *, dropout: bool = False) -> VQSpectrogram:
    model = make_model(options, MACHINES)
    for part in model.modules():
        if isinstance(part, nn.Dropout) and not dropout:
            part.p = 0.0
    return model


def left_by(model: VQSpectrogram, run: Callable[[VQSpectrogram, Objective, dict[str, Tensor]], object]) -> Left:
    """Gradients and buffers after ``run`` on a copy of ``model``."""
    twin = copy.deepcopy(model)
    run(twin, make_objective(SMALL), drawn_batch())
    gradients = {f"gradient of {n}": p.grad for n, p in twin.named_parameters() if p.grad is not None}
    return gradients | {f"buffer {n}": b.to(D) for n, b in twin.named_buffers()}


def distance(one: Left, other: Left) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def plain(model: VQSpectrogram, objective: Objective, batch: dict[str, Tensor]) -> None:
    objective(model(batch["patches"]), batch).backward()


def by_step(options: VQSpectrogramOptions, **declared: Any) -> Callable[..., None]:
    """One backward of the recipe's own step."""

    def run(model: VQSpectrogram, objective: Objective, batch: dict[str, Tensor]) -> None:
        torch.manual_seed(7)
        if declared:
            step = sg.Step(model, objective, **declared)
        else:
            step = make_step(options, model, objective, make_optimizer(options, model), batch)
        step.backward(batch)

    return run


def changed(**values: Any) -> VQSpectrogramOptions:
    return dataclasses.replace(SMALL, **values)


ONE_BY_ONE = changed(batch_size=1, gradient_accumulation_steps=CLIPS)


@pytest.mark.parametrize(
    "options",
    [
        ONE_BY_ONE,
        changed(batch_size=3, gradient_accumulation_steps=3),
        changed(batch_size=1, gradient_accumulation_steps=CLIPS, use_gradient_checkpointing=True),
        changed(use_gradient_checkpointing=True),
        changed(batch_size=1, gradient_accumulation_steps=CLIPS, norm="group"),
        changed(batch_size=1, gradient_accumulation_steps=CLIPS, transform_head_per_patch=True),
    ],
    ids=["1 x 8", "3 x 3, ragged", "1 x 8 checkpointed", "checkpointed", "1 x 8 GroupNorm", "1 x 8, head per patch"],
)
def test_what_the_options_pin_leaves_what_one_plain_step_leaves(options: VQSpectrogramOptions) -> None:
    model = made(options)
    assert distance(left_by(model, by_step(options)), left_by(model, plain)) <= TOLERANCE


@pytest.mark.parametrize("together", [3, 5, 99])
def test_layers_taken_together_leave_what_one_plain_step_leaves(together: int) -> None:
    model = made()
    plan = sg.Plan(
        levers={"exact_batchnorm": {"rows": 3, "together": together}}, exactness=sg.Exactness.SAME_SUM,
        batch_rows=CLIPS,
    )  # fmt: skip
    assert distance(left_by(model, by_step(SMALL, plan=plan)), left_by(model, plain)) <= TOLERANCE


def test_dropout_is_the_same_mask_however_many_clips_run_at_a_time() -> None:
    model = made(dropout=True)
    whole = left_by(model, by_step(SMALL, rows=CLIPS))
    assert distance(left_by(model, by_step(ONE_BY_ONE)), whole) <= TOLERANCE
    assert distance(left_by(model, by_step(changed(use_gradient_checkpointing=True))), whole) <= TOLERANCE


def clip_by_clip(model: VQSpectrogram, objective: Objective, batch: dict[str, Tensor]) -> None:
    """The document's accumulation: a forward, with its statistics and its codebook update, a clip."""
    for start in range(CLIPS):
        part = {name: tensor[start : start + 1] for name, tensor in batch.items()}
        (objective(model(part["patches"]), part) / CLIPS).backward()


def codebook_every_clip(model: VQSpectrogram, objective: Objective, batch: dict[str, Tensor]) -> None:
    """Statistics of all clips, but the codebook moves on after each."""
    update = model.codebook._update

    def by_clips(flat: Tensor, numbers: Tensor) -> None:
        for some, theirs in zip(flat.chunk(CLIPS), numbers.chunk(CLIPS)):
            update(some, theirs)

    model.codebook._update = by_clips
    plain(model, objective, batch)
    del model.codebook._update


def checkpointed_by_torch(model: VQSpectrogram, objective: Objective, batch: dict[str, Tensor]) -> None:
    """torch.utils.checkpoint runs blocks in training mode twice, and they update their statistics twice."""
    for name in ("0", "1", "2"):
        block = model.encoder.get_submodule(name)
        block.forward = lambda x, forward=block.forward: checkpoint(forward, x, use_reentrant=False)
    plain(model, objective, batch)


@pytest.mark.parametrize(
    ("fault", "names"),
    [
        (clip_by_clip, "gradient"), (clip_by_clip, "running"), (codebook_every_clip, "codebook"),
        (checkpointed_by_torch, "encoder.1.norm.running"),
    ],
    ids=["BatchNorm by clip", "its running statistics", "codebook update by clip", "statistics updated twice"],
)  # fmt: skip
def test_a_planted_fault_would_be_seen(fault: Callable[..., None], names: str) -> None:
    model = made()
    right, wrong = left_by(model, plain), left_by(model, fault)
    right, wrong = ({n: t for n, t in left.items() if names in n} for left in (right, wrong))
    assert distance(wrong, right) > 1e-6


def test_a_dropout_mask_that_is_drawn_again_would_be_seen() -> None:
    model = made(dropout=True)

    def redrawn(model: VQSpectrogram, objective: Objective, batch: dict[str, Tensor]) -> None:
        step = sg.Step(model, objective, rows=CLIPS)
        torch.manual_seed(8)
        step.backward(batch)

    whole = left_by(model, by_step(SMALL, rows=CLIPS))
    assert distance(left_by(model, redrawn), whole) > 1e-6


@pytest.mark.slow
def test_planning_leaves_nothing_of_its_trials_behind() -> None:
    model = made()
    step = sg.Step(model, make_objective(SMALL), budget="1GiB", optimizer=make_optimizer(SMALL, model))
    with sg.count_bytes(step) as counter:
        step.prepare(drawn_batch())
        left_bytes = counter.live_bytes
    assert left_bytes < 1e6, "a batch of rows, and no graph: one alone is ten times that"


def test_the_default_model_has_the_documents_size() -> None:
    model = VQSpectrogram(4)
    sizes = {
        name: sum(p.numel() for p in getattr(model, name).parameters())
        for name in ("encoder", "decoder", "machine_head", "transform_head")
    }
    assert sizes["encoder"] == 26_112 and sizes["decoder"] == 230_241
    assert sizes["machine_head"] + sizes["transform_head"] == 17_930
    assert sum(sizes.values()) + model.codebook.sums.numel() == 282_475


def test_outputs_have_the_shapes_that_are_written_down() -> None:
    outputs = made()(drawn_batch()["patches"])
    places = (BANDS // 8, FRAMES // 8)
    assert outputs.reconstructed.shape == (CLIPS, PATCHES, 1, BANDS, FRAMES)
    assert outputs.latents.shape == outputs.quantised.shape == (CLIPS, PATCHES, 4, *places)
    assert outputs.codes.shape == (CLIPS, PATCHES, *places) and outputs.codes.dtype == torch.int64
    assert outputs.machine_logits.shape == (CLIPS, MACHINES) and outputs.transform_logits.shape == (CLIPS, 6)
    assert made(changed(transform_head_per_patch=True))(drawn_batch()["patches"]).transform_logits.shape == (
        CLIPS, PATCHES, 6,
    )  # fmt: skip


def test_the_encoder_receives_the_reconstructions_gradient_straight_through() -> None:
    model, batch = made(), drawn_batch()
    F.mse_loss(model(batch["patches"]).reconstructed, batch["patches"]).backward()
    assert all(float(p.grad.abs().max()) > 0 for n, p in model.encoder.named_parameters() if "weight" in n)


def test_the_codebook_is_the_moving_mean_of_what_was_nearest_to_each_code() -> None:
    codebook = Codebook(3, 2).to(D)
    codebook.begin_at(torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]]))
    latents = torch.tensor([[1.0, 0.0], [5.0, 1.0], [3.0, 1.0], [0.5, 0.5]], dtype=D).reshape(4, 2, 1, 1)
    straight, quantised, numbers = codebook(latents)
    assert numbers.flatten().tolist() == [0, 1, 1, 0]
    torch.testing.assert_close(straight, quantised)
    torch.testing.assert_close(codebook.counts, torch.tensor([0.99 + 0.02, 0.99 + 0.02, 0.99], dtype=D))
    sums = torch.tensor([[0.015, 0.005], [3.96 + 0.08, 0.02], [0.0, 3.96]], dtype=D)
    torch.testing.assert_close(codebook.sums, sums)
    expected = sums / (torch.tensor([1.01, 1.01, 1.0], dtype=D) + 1e-5)[:, None]
    torch.testing.assert_close(codebook.codes(), expected)
    before = codebook.sums.clone()
    codebook.eval()(latents)
    assert torch.equal(codebook.sums, before)


def test_the_nearest_code_is_that_of_the_full_distances() -> None:
    codebook = Codebook(17, 5, generator=torch.Generator().manual_seed(0)).to(D)
    latents = torch.randn(6, 5, 3, 2, dtype=D, generator=torch.Generator().manual_seed(1))
    flat = latents.movedim(1, -1).reshape(-1, 5)
    expected = torch.cdist(flat, codebook.codes()).argmin(1)
    assert torch.equal(codebook(latents)[2].flatten(), expected)


def test_the_objective_is_the_sum_of_its_terms() -> None:
    model, batch, objective = made(), drawn_batch(), Objective(2.0, 3.0, 0.5, 0.25)
    objective.vq_scale = 0.5
    outputs = model(batch["patches"])
    batch["original"] = batch["patches"] + 1
    commitment = 0.25 * ((outputs.latents - outputs.quantised) ** 2).mean()
    logs = [F.log_softmax(logits, 1) for logits in (outputs.machine_logits, outputs.transform_logits)]
    smoothed = [
        -(0.9 * log.gather(1, labels[:, None]).squeeze(1) + 0.1 * log.mean(1)).mean()
        for log, labels in zip(logs, (batch["machine"], batch["transform"]))
    ]
    reconstruction = ((outputs.reconstructed - batch["original"]) ** 2).mean()
    expected = 2 * reconstruction + 1.5 * commitment + 0.5 * smoothed[0] + 0.25 * smoothed[1]
    torch.testing.assert_close(objective(outputs, batch), expected, rtol=1e-12, atol=0)


def test_a_stage_without_the_heads_leaves_them_gradients_of_zero() -> None:
    model, batch, objective = made(), drawn_batch(), make_objective(SMALL)
    objective.heads_scale = 0.0
    objective(model(batch["patches"]), batch).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.machine_head.parameters())


def test_making_a_model_moves_no_generator_and_depends_on_its_own_alone() -> None:
    before = torch.get_rng_state()
    one = made()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), made().parameters()))
    assert not torch.equal(next(one.parameters()), next(made(changed(random_seed=1)).parameters()))


def test_the_gradients_norm_is_clipped_once_a_step() -> None:
    options = changed(grad_clip=0.01)
    model, batch = made(options), drawn_batch()
    optimizer = make_optimizer(options, model)
    (100 * make_objective(options)(model(batch["patches"]), batch)).backward()
    optimizer.step()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    assert float(norm) == pytest.approx(0.01, rel=1e-4)
