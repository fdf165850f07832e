"""What can be asked of the few-shot cosine transformer. No torch here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal, Self

from samegrad.recipes._recipe import CommonOptions

OFFLINE = ("glyphs", "digits")
DTYPES = ("auto", "float32", "float64", "bfloat16", "float16")
HEAD_PARTS = ("attention", "feed_forward", "classifier")
# Chunks of an episode as the document has them.
DOCUMENT_STEPS = {"ResNet": 4, "Conv": 2}
# Pixels a side for convolutional backbones and for residual ones: the published ones, and what the offline sets have.
SIDES = {"miniImagenet": (84, 224), "CUB": (84, 224), "CIFAR": (64, 112), "Omniglot": (28, 28)}
OFFLINE_SIDE = 28
_REAL_EPOCHS, _REAL_EPISODES, _OFFLINE_EPOCHS, _OFFLINE_EPISODES = 50, 200, 6, 60


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewShotOptions(CommonOptions):
    """The options the document and its program name, with their values, and those of the data."""

    changes_on_resume = CommonOptions.changes_on_resume | {"num_epoch", "test_iter"}

    method: Literal["FSCT_cosine", "FSCT_softmax"] = "FSCT_cosine"
    """Attention of prototypes over queries: by cosine, or by softmax (the published ablation)."""
    dataset: Literal["glyphs", "digits", "miniImagenet", "CIFAR", "CUB", "Omniglot"] = "glyphs"
    """Images: glyphs or digits, which packages ship, or a real data set under --data_root."""
    data_root: Path | None = None
    """Folder of the real data set, with its split files (base.json … or train.txt …)."""
    backbone: Literal["Conv4", "Conv6", "ResNet18", "ResNet34"] = "Conv4"
    """What turns images into embeddings."""
    FETI: Path | None = None
    """Weights to start the backbone from (.safetensors or .pt), trained without the test classes."""
    image_size: int | None = None
    """Pixels a side. Unset: what was published for the data set and the backbone (84 or 224, 64 or 112, 28)."""
    n_way: int = 5
    """Classes of an episode."""
    k_shot: int = 5
    """Images of a class to learn from."""
    n_query: int = 16
    """Images of a class to judge."""
    train_aug: bool = False
    """Move, turn, scale and (photographs) mirror the training images."""
    n_episode: int | None = None
    """Episodes an epoch, for training and for validation. Unset: 200, and 60 for what packages ship."""
    num_epoch: int | None = None
    """Epochs. Unset: 50, and 6 for what packages ship."""
    test_iter: int = 600
    """Episodes that the accuracy is judged by."""
    split: Literal["base", "val", "novel"] = "novel"
    """Classes that the accuracy is judged on."""
    learning_rate: float = 1e-3
    """Step size of the optimizer."""
    weight_decay: float = 1e-5
    """Weight decay of the optimizer."""
    momentum: float = 0.9
    """Momentum of SGD."""
    optimization: Literal["AdamW", "Adam", "SGD"] = "AdamW"
    """Optimizer."""
    lambda_I: float = 1.0
    """Weight of the cross-entropy of the queries."""
    lambda_V: float = 0.0
    """Weight of the variance hinge of the support embeddings (the document: 0.5)."""
    lambda_C: float = 0.0
    """Weight of the covariance penalty of the support embeddings (the document: 0.1)."""
    normalise_across: Literal["ways", "features"] = "ways"
    """What the cosine classifier normalises across: the classes, as published, or the features."""
    gradient_accumulation_steps: int = 0
    """Chunks of one episode; pins the plan. 0: the budget decides, or without one the memory that is free now."""
    dynamic_accumulation: bool = True
    """Where no other option says it, the fastest plan that fits what is free. Off: the document's chunks, 4 or 2."""
    episodes_per_step: int = 1
    """Episodes whose mean loss makes one optimizer step. More is another training, with fewer updates."""
    query_rows: int = 0
    """Queries that the head takes at a time, given the prototypes; 0: all at once. Same gradients."""
    use_amp: bool = True
    """Automatic mixed precision: products and convolutions in bfloat16 (float16 on cards that have no bfloat16)."""
    precision: str | None = None
    """Parts that AMP leaves alone, such as backbone.layer4=float32,head.attention=float32."""
    use_gradient_checkpointing: bool = False
    """Blocks of the backbone run again in backward, on the whole episode, with its BatchNorm statistics."""
    dtype: str = "auto"
    """auto: AMP. float32 or float64: no AMP. bfloat16 or float16: AMP in that format."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(1, "k_shot", "n_query", "test_iter", "episodes_per_step", "n_episode", "num_epoch", "image_size")
        self._at_least(2, "n_way", do="give 2 or more")
        self._at_least(0, "gradient_accumulation_steps", "query_rows", do="give 0 or more")
        self._not_negative("weight_decay", "lambda_I", "lambda_V", "lambda_C", "momentum", do="give for example 0.1")
        self._positive("learning_rate", do="give for example 1e-3")
        self._known_dtype(DTYPES)
        if not self.lambda_I and not self.lambda_V and not self.lambda_C:
            self._refuse("lambda_I", "all three weights are 0, so there is nothing to train", "give one of them")
        if self.gradient_accumulation_steps > self.episode_images:
            self._refuse(
                "gradient_accumulation_steps", f"an episode has {self.episode_images} images",
                f"ask for at most {self.episode_images}",
            )  # fmt: skip
        if self.use_gradient_checkpointing and self.gradient_accumulation_steps > 1:
            self._refuse(
                "gradient_accumulation_steps",
                "--use_gradient_checkpointing runs blocks on the whole episode, and chunks lie across them",
                "give one of the two; both keep the statistics of the episode",
            )
        _ = self.full_precision

    @property
    def episode_images(self) -> int:
        """Images of one episode."""
        return self.n_way * (self.k_shot + self.n_query)

    @property
    def epochs(self) -> int:
        return self.num_epoch or (_OFFLINE_EPOCHS if self.dataset in OFFLINE else _REAL_EPOCHS)

    @property
    def episodes(self) -> int:
        """Episodes an epoch."""
        return self.n_episode or (_OFFLINE_EPISODES if self.dataset in OFFLINE else _REAL_EPISODES)

    @property
    def image_side(self) -> int:
        """Pixels a side."""
        if self.image_size is not None:
            return self.image_size
        if self.dataset in OFFLINE:
            return OFFLINE_SIDE
        return SIDES[self.dataset][self.backbone.startswith("ResNet")]

    @property
    def channels(self) -> int:
        """Colours of an image: signs on paper have one."""
        return 1 if self.dataset in (*OFFLINE, "Omniglot") else 3

    def for_card_elsewhere(self) -> Self:
        # What is free here would be measured, and is not the card's.
        return dataclasses.replace(super().for_card_elsewhere(), dynamic_accumulation=False)

    @property
    def plan_is_chosen(self) -> bool:
        """Whether what runs is chosen from measurements; else it is what the options name."""
        named = self.gradient_accumulation_steps or self.use_gradient_checkpointing or not self.dynamic_accumulation
        return self.budget is not None or not named

    @property
    def steps(self) -> int:
        """Chunks of an episode where no plan is chosen."""
        if self.gradient_accumulation_steps:
            return self.gradient_accumulation_steps
        auto = next(steps for name, steps in DOCUMENT_STEPS.items() if self.backbone.startswith(name))
        return 1 if self.use_gradient_checkpointing else min(auto, self.episode_images)

    @property
    def amp_asked(self) -> bool:
        return self.use_amp and self.dtype not in ("float32", "float64")

    @property
    def full_precision(self) -> tuple[list[str], list[str]]:
        """Parts of the backbone, and of the head, that AMP leaves in float32. Raises UsageError for others."""
        backbone, head = [], []
        for entry in filter(None, (self.precision or "").split(",")):
            part, _, dtype = entry.strip().partition("=")
            whole, _, name = part.partition(".")
            if dtype != "float32":
                self._refuse(
                    "precision", f"{entry!r} asks for {dtype or 'nothing'}: the rest is in AMP's format",
                    "name parts to be left in float32, as in backbone.layer4=float32",
                )  # fmt: skip
            if whole == "backbone" and name:
                backbone.append(name)
            elif whole == "head" and name in HEAD_PARTS:
                head.append(name)
            else:
                self._refuse(
                    "precision", f"there is no part {part!r}",
                    f"use backbone.layer1 and so on, or one of {', '.join(f'head.{p}' for p in HEAD_PARTS)}",
                )  # fmt: skip
        return backbone, head


Options = FewShotOptions
