"""Few-shot classification with a cosine transformer: exact BatchNorm of whole episodes in chunks (document 004).

One optimizer step an episode, on n_way · (k_shot + n_query) images. The backbone may run a few images at a time, with
the BatchNorm statistics of all of them; judged by the accuracy of 600 episodes of classes that were never trained on.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import samegrad as sg
from samegrad.recipes._recipe import LongTable, Program, Recipe, needed_for_pictures
from samegrad.recipes._recipe.tensor_files import read_tensors
from samegrad.recipes._recipe.written import save_picture, save_weights

from . import data, stepping
from .backbones import make_backbone
from .courses import Course, document_step, follow_course, plain_step
from .judging import accuracies, arranged, judged_episodes
from .layouts import Splits, check_episodes, open_splits
from .model import EpisodeShape, FewShotTransformer, Head
from .options import FewShotOptions
from .tables import measured_table, predicted_table

# Kinds of episodes, so that no two kinds share a seed.
_TRAIN, _VALIDATION, _TEST, _AUGMENTATION = range(4)


@dataclasses.dataclass(kw_only=True)
class FewShotProgram(Program):
    """Training on episodes of ``splits.base``: an epoch is ``options.episodes`` episodes.

    ``validations``: the accuracy on validation classes after each epoch.
    """

    model: FewShotTransformer
    options: FewShotOptions
    splits: Splits
    amp: str | None
    validations: list[float] = dataclasses.field(default_factory=list)

    def batches(self, epoch: int) -> Iterator[Tensor]:
        episodes = self._episodes("base", _TRAIN, epoch)
        for number in range(self.options.episodes):
            yield self._rows(episodes.draw(number)[0], (epoch, number))

    def validate(self) -> float:
        self.validations.append(self._metrics("val", _VALIDATION, self.options.episodes)["accuracy"])
        return 1 - self.validations[-1]

    def validation_parts(self) -> Mapping[str, float]:
        # Smaller is better for whoever stops early; a person asks how many were right.
        return {"accuracy": self.validations[-1]} if self.validations else {}

    def evaluate(self) -> dict[str, float]:
        return self.test_metrics

    @functools.cached_property
    def test_metrics(self) -> dict[str, float]:
        """The accuracies on ``--split``, with the weights the model has when they are first asked for."""
        return self._metrics(self.options.split, _TEST, self.options.test_iter)

    def write(self, folder: Path) -> list[Path]:
        written = save_weights(self.model, folder, "fewshot_cosine")
        with needed_for_pictures():
            from . import pictures
        [shown] = self._judged(self.options.split, _TEST, 1)
        ways, split = self.options.n_way, self.options.split
        figures = {
            "episode": pictures.draw_episode(shown, self.options.k_shot, split=split),
            "accuracy": pictures.draw_accuracy(self.validations, metrics=self.test_metrics, ways=ways, split=split),
            "memory_before_and_after": pictures.draw_courses(self.courses()),
        }
        return [*written, *(save_picture(figure, folder / f"{name}.png") for name, figure in figures.items())]

    def courses(self) -> list[Course]:
        """The memory of one step: as the document writes it, without a lever, and as planned. Nothing is changed."""
        episode = next(iter(self.batches(0)))
        loss = stepping.make_loss(dataclasses.replace(self.options, query_rows=0), self.model)
        loss = loss.to(self.step.declared.device)
        steps = {
            "as the document writes it": document_step(self.model, loss, self.optimizer),
            "one forward, Gram covariance": plain_step(self.model, loss, self.optimizer),
            "as planned": self.step,
        }
        return [follow_course(label, step, self.model, episode) for label, step in steps.items()]

    def describe(self) -> list[str]:
        options = self.options
        backbone, head = (sum(p.numel() for p in part.parameters()) for part in (self.model.backbone, self.model.head))
        plan = self.step.plan
        return [
            f"images: {self.splits.described}; {options.image_side} x {options.image_side} pixels",
            f"model: {options.method} on {options.backbone}, {backbone:,} + {head:,} parameters",
            f"objective: {options.lambda_I:g} cross-entropy + {options.lambda_V:g} variance hinge + "
            f"{options.lambda_C:g} covariance; {options.n_way}-way {options.k_shot}-shot, {options.n_query} queries a "
            f"class; AMP {self.amp or 'off'}",
            f"optimizer: {options.optimization}, learning rate {options.learning_rate:g}, one step every "
            f"{options.episodes_per_step} episode(s) of {options.episode_images} images",
            *([] if plan is None else [f"{lever}: {reason}" for lever, reason in plan.reasons.items() if reason]),
        ]

    def state(self) -> dict[str, Any]:
        return {**super().state(), "validations": self.validations}

    def load_state(self, state: Mapping[str, Any], best_weights: dict[str, Tensor]) -> None:
        super().load_state(state, best_weights)
        self.validations = list(state["validations"])

    def _rows(self, images: Tensor, place: tuple[int, int]) -> Tensor:
        """An episode as the step takes it, on the host."""
        rows = arranged(images, self.model.shape).to(next(self.model.parameters()).dtype)
        if not self.options.train_aug:
            return rows
        seed = (self.options.random_seed, _AUGMENTATION, *place)
        return data.augmented(rows, seed=seed, flips=self.options.channels == 3)

    def _episodes(self, split: str, kind: int, *more: int) -> data.Episodes:
        return _episodes_of(self.splits, split, self.options, kind, *more)

    def _judged(self, split: str, kind: int, count: int) -> Iterator[Any]:
        return judged_episodes(
            self.model,
            self._episodes(split, kind),
            count,
            rows_at_a_time=self.rows_at_a_time,
            amp=None if self.amp is None else getattr(torch, self.amp),
        )

    def _metrics(self, split: str, kind: int, count: int) -> dict[str, float]:
        return accuracies(self._judged(split, kind, count))

    @property
    def rows_at_a_time(self) -> int:
        """Images of the largest chunk of a training step; what fits with gradients fits without."""
        levers = {} if self.step.plan is None else self.step.plan.levers
        rows = next((knobs["rows"] for knobs in levers.values() if "rows" in knobs), self.options.episode_images)
        return int(rows if isinstance(rows, int) else max(rows))


def _episodes_of(splits: Splits, split: str, options: FewShotOptions, kind: int, *more: int) -> data.Episodes:
    return data.Episodes(
        classes=splits.named(split),
        n_way=options.n_way,
        per_class=options.k_shot + options.n_query,
        seed=(options.random_seed, kind, *more),
    )


def build(options: FewShotOptions) -> FewShotProgram:
    """The program that ``options`` describe; data are opened, nothing is trained. Raises what is wrong with them."""
    splits = open_splits(options)
    check_episodes(splits, options)
    device = sg.find_device(options.device)
    model = make_model(options).to(device)
    optimizer = _make_optimizer(options, model)
    amp = stepping.amp_dtype(options, device)
    # What is planned for is an episode's shape alone.
    shape = (options.episode_images, options.channels, options.image_side, options.image_side)
    example = torch.randn(
        shape, generator=torch.Generator().manual_seed(0), dtype=next(model.parameters()).dtype
    )  # fmt: skip
    return FewShotProgram(
        step=stepping.make_step(options, model, optimizer, example),
        model=model,
        optimizer=optimizer,
        best=sg.BestWeights(model, patience=None),
        epochs=options.epochs,
        scaler=torch.amp.GradScaler(device.type) if amp == "float16" else None,
        batches_per_step=options.episodes_per_step,
        empty_cache=options.empty_cache,
        options=options,
        splits=splits,
        amp=amp,
    )


def make_model(options: FewShotOptions) -> FewShotTransformer:
    """Backbone and head with the weights of ``--random_seed``; torch's default generator is left where it was."""
    shape = EpisodeShape(n_way=options.n_way, k_shot=options.k_shot, n_query=options.n_query)
    side = options.image_side
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.random_seed)
        backbone = make_backbone(options.backbone, channels=options.channels)
        width = _embedding_width(backbone, options.channels, side)
        head = Head(shape, width, method=options.method, across=options.normalise_across)
    if options.FETI is not None:
        _load_backbone(backbone, options.FETI)
    if options.amp_asked:
        head.full_precision = tuple(options.full_precision[1])
    model = FewShotTransformer(backbone, head, shape)
    return model.double() if options.dtype == "float64" else model


@torch.no_grad()
def _embedding_width(backbone: nn.Module, channels: int, side: int) -> int:
    """Numbers of an embedding; the running statistics are left alone."""
    backbone.eval()
    try:
        return int(backbone(torch.zeros(1, channels, side, side)).shape[1])
    except RuntimeError as error:
        raise sg.UsageError(
            asked=f"--image_size {side}", found=f"images of that size do not pass the backbone: {error}",
            do="ask for larger images", option="image_size",
        ) from None  # fmt: skip
    finally:
        backbone.train()


def _load_backbone(backbone: nn.Module, path: Path) -> None:
    weights = read_tensors(path, what="the backbone of --FETI")
    try:
        backbone.load_state_dict(weights)
    except RuntimeError as error:
        raise sg.BadInput(
            asked=f"--FETI {path}",
            found=f"weights of another backbone ({' '.join(str(error).split())[:200]})",
            do="give this backbone's state dict as .safetensors or .pt, with the names of backbone.state_dict()",
            file=str(path),
        ) from None


def _make_optimizer(options: FewShotOptions, model: nn.Module) -> torch.optim.Optimizer:
    shared: dict[str, Any] = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
    # On CUDA as one kernel, which takes no temporaries: the others take a parameter size.
    shared["fused"] = next(model.parameters()).device.type == "cuda"
    match options.optimization:
        case "AdamW":
            return torch.optim.AdamW(model.parameters(), **shared)
        case "Adam":
            return torch.optim.Adam(model.parameters(), **shared)
        case "SGD":
            return torch.optim.SGD(model.parameters(), momentum=options.momentum, **shared)


def table(options: FewShotOptions) -> LongTable:
    """The document's table, with the document's weights of the loss where none are given.

    Measured on the device; for a card's name as ``--device``, predicted without running anything.
    """
    if not options.lambda_V and not options.lambda_C:
        options = dataclasses.replace(options, lambda_V=0.5, lambda_C=0.1)
    card = _card_of(options)
    program = build(options if card is None else options.for_card_elsewhere())
    model, step = program.model, program.step
    episode = next(iter(program.batches(0)))
    if card is None:
        return measured_table(options, step, model, program.amp, episode)
    loss = stepping.make_loss(dataclasses.replace(options, query_rows=0), model)
    return predicted_table(model, loss, program.amp, episode, card=card, plain=step)


def _card_of(options: FewShotOptions) -> str | None:
    """``--device`` where it is no device of this machine's."""
    try:
        sg.find_device(options.device)
    except (sg.UsageError, sg.EnvironmentProblem):
        return options.device
    return None


RECIPE = Recipe(
    name="fewshot_cosine",
    summary=__doc__.splitlines()[0],
    document="004",
    options=FewShotOptions,
    build=build,
    table=table,
    pins={
        "gradient_accumulation_steps": "exact_batchnorm.rows",
        "use_gradient_checkpointing": "recompute.blocks",
        "dynamic_accumulation": "exact_batchnorm.rows",
    },
    troubleshooting=(
        "Out of memory in backward: the largest part was not the backbone but the covariance of the embeddings, "
        "25,088 x 25,088 numbers (2.35 GiB) several times over. Here it is never made; --table shows what is left.",
        "Automatic mixed precision is on and halves what convolutions keep; norms, cosines, variances and covariances "
        "stay in float32. --no_use_amp or --dtype float32 turns it off, --precision leaves single parts in float32.",
        "--gradient_accumulation_steps N runs the backbone on 1/N of the episode's images at a time, with the "
        "BatchNorm statistics of all of them. Give --budget and the plan chooses N.",
        "--episodes_per_step averages several episodes into one update. It saves no memory and is another training: "
        "fewer updates at the same learning rate.",
        "torch.cuda.empty_cache() after each step costs time and lowers no peak of the step; --empty_cache measures "
        "both.",
        "Still too much: --use_gradient_checkpointing runs blocks of the backbone again in backward, --query_rows N "
        "lets the head see N queries at a time. Both leave the gradients as they are.",
        "1-shot with --lambda_V: the variance of one image is 0, so the hinge is a constant and moves nothing; it is "
        "no number in the document's formulation.",
        "The accuracy stays at chance: give it more episodes (--n_episode, --num_epoch) before another learning rate.",
    ),
)


