"""transformers architectures, built small from their configs: language, vision, speech, experts, state spaces."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from samegrad.errors import CannotTrace
from samegrad.measure.trace import trace_step

from ..crossed import crossed
from . import suite
from .suite import ROWS, Batch, Case

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = suite.imported("transformers")

WORDS, LENGTH, CLASSES = 37, 9, 3
TEXT = {"vocab_size": WORDS, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
        "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}  # fmt: skip
GROUPED = {**TEXT, "num_attention_heads": 4, "num_key_value_heads": 2}
PICTURES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 16, "patch_size": 4}  # fmt: skip
SPEECH = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
          "conv_dim": (8, 8), "conv_stride": (4, 4), "conv_kernel": (8, 4), "num_feat_extract_layers": 2,
          "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 8}  # fmt: skip


def built(model: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**options))


def seeded(rows: int) -> torch.Generator:
    return torch.Generator().manual_seed(rows)


def tokens(rows: int, length: int = LENGTH) -> Tensor:
    """(rows, length) words, none of them a special one."""
    return torch.randint(3, WORDS, (rows, length), generator=seeded(rows))


def sentences(rows: int) -> Batch:
    return {"input_ids": tokens(rows), "labels": tokens(rows)}


def padded(rows: int) -> Batch:
    """The second row ends early."""
    mask = torch.ones(rows, LENGTH, dtype=torch.int64)
    mask[1:2, -3:] = 0
    return sentences(rows) | {"attention_mask": mask}


def translated(rows: int) -> Batch:
    return {"input_ids": tokens(rows), "decoder_input_ids": tokens(rows, 7), "labels": tokens(rows, 7)}


def pictures(rows: int, size: int = 16) -> Batch:
    return {"pixel_values": torch.randn(rows, 3, size, size, generator=seeded(rows)), "labels": classes(rows)}


def captioned(rows: int) -> Batch:
    return {"pixel_values": pictures(rows)["pixel_values"], "input_ids": tokens(rows)}


def transcribed(rows: int) -> Batch:
    spoken = torch.randn(rows, 8, 20, generator=seeded(rows))
    return {"input_features": spoken, "decoder_input_ids": tokens(rows, 7), "labels": tokens(rows, 7)}


def spoken(rows: int) -> Batch:
    return {"input_values": torch.randn(rows, 400, generator=seeded(rows)), "labels": classes(rows)}


def classes(rows: int) -> Tensor:
    # More of one than of the others, or the gradient of a bias is nothing but rounding.
    return torch.arange(rows) % CLASSES


def next_token(outputs: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def same_token(outputs: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(outputs.logits.flatten(0, 1), batch["labels"].flatten())


def classified(outputs: Any, batch: Batch) -> Tensor:
    return F.cross_entropy(outputs.logits, batch["labels"])


def contrasted(outputs: Any, batch: Batch) -> Tensor:
    """CLIP's loss from the embeddings: every row against all others."""
    scores = 10 * outputs.text_embeds @ outputs.image_embeds.t()
    own = torch.arange(len(scores), device=scores.device)
    return F.cross_entropy(scores, own) + F.cross_entropy(scores.t(), own)


def balanced(outputs: Any, batch: Batch) -> Tensor:
    """The next token, and what keeps a mixture's experts equally busy over all rows."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    return next_token(outputs, batch) + 0.02 * load_balancing_loss_func(outputs.router_logits, 4, 2)


def own_loss(outputs: Any, batch: Batch) -> Tensor:
    return outputs.loss


def with_labels(model: nn.Module, batch: Batch) -> Any:
    return model(**batch)


def numbered(path: str) -> tuple[str, ...]:
    return tuple(path.format(number) for number in range(2))


GPT2 = {"vocab_size": WORDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "use_cache": False,
        "bos_token_id": 0, "eos_token_id": 2}  # fmt: skip
EXPERTS = {**GROUPED, "num_local_experts": 4, "use_cache": False, "output_router_logits": True}
LAYERS = numbered("model.layers.{}")
in_float32 = functools.partial(Case, computes_in=torch.float32)

CASES: dict[str, Case] = {
    "GPT-2": Case(
        built("GPT2LMHeadModel", "GPT2Config", **GPT2),
        sentences, next_token, numbered("transformer.h.{}"), head="lm_head",
    ),
    "GPT-2 with a cache, as configs have it": Case(
        built("GPT2LMHeadModel", "GPT2Config", **{**GPT2, "use_cache": True}),
        sentences, next_token, (), head="lm_head",
    ),
    "Llama with grouped queries": in_float32(
        built("LlamaForCausalLM", "LlamaConfig", **GROUPED, use_cache=False),
        sentences, next_token, LAYERS, head="lm_head",
    ),
    "Gemma 3 with a sliding window": in_float32(
        built("Gemma3ForCausalLM", "Gemma3TextConfig", **GROUPED, head_dim=8, sliding_window=4, use_cache=False),
        sentences, next_token, LAYERS, head="lm_head",
    ),
    "BERT": Case(
        built("BertForMaskedLM", "BertConfig", **TEXT, num_attention_heads=2, max_position_embeddings=16),
        sentences, same_token, numbered("bert.encoder.layer.{}"), head="cls.predictions.decoder",
    ),
    "T5": in_float32(
        built("T5ForConditionalGeneration", "T5Config", vocab_size=WORDS, d_model=16, d_kv=8, d_ff=24, num_layers=2,
              num_heads=2, decoder_start_token_id=0, use_cache=False),
        translated, same_token, (*numbered("encoder.block.{}"), *numbered("decoder.block.{}")), head="lm_head",
    ),
    "ViT": Case(
        built("ViTForImageClassification", "ViTConfig", **PICTURES, num_labels=CLASSES),
        pictures, classified, numbered("vit.layers.{}"),
    ),
    "CLIP": Case(
        built("CLIPModel", "CLIPConfig", projection_dim=8, vision_config=PICTURES,
              text_config={**TEXT, "num_attention_heads": 2, "max_position_embeddings": 16}),
        captioned, contrasted,
        (*numbered("text_model.encoder.layers.{}"), *numbered("vision_model.encoder.layers.{}")),
    ),
    "Whisper": Case(
        built("WhisperForConditionalGeneration", "WhisperConfig", vocab_size=WORDS, d_model=16, encoder_layers=2,
              decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
              decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=10, max_target_positions=16, pad_token_id=1,
              bos_token_id=0, eos_token_id=2, decoder_start_token_id=0, suppress_tokens=None,
              begin_suppress_tokens=None, use_cache=False),
        transcribed, same_token,
        (*numbered("model.encoder.layers.{}"), *numbered("model.decoder.layers.{}")), head="proj_out",
    ),
    "Mamba": in_float32(
        built("MambaForCausalLM", "MambaConfig", vocab_size=WORDS, hidden_size=16, state_size=4,
              num_hidden_layers=2, conv_kernel=3),
        sentences, next_token, numbered("backbone.layers.{}"), head="lm_head",
    ),
    "Mamba 2": in_float32(
        built("Mamba2ForCausalLM", "Mamba2Config", vocab_size=WORDS, hidden_size=16, state_size=4,
              num_hidden_layers=2, num_heads=4, head_dim=8, n_groups=2, chunk_size=4),
        sentences, next_token, numbered("backbone.layers.{}"), head="lm_head",
    ),
    "Mixtral": in_float32(
        built("MixtralForCausalLM", "MixtralConfig", **{**EXPERTS, "output_router_logits": False},
              experts_implementation="batched_mm"),
        sentences, next_token, LAYERS, head="lm_head",
    ),
    "Mixtral whose experts are balanced over all rows": in_float32(
        built("MixtralForCausalLM", "MixtralConfig", **EXPERTS, experts_implementation="batched_mm"),
        sentences, balanced, LAYERS, head="lm_head", not_split=r"outputs\['aux_loss'\] has shape \(\)",
    ),
    "Mixtral whose experts are looped over": in_float32(
        built("MixtralForCausalLM", "MixtralConfig", **EXPERTS, experts_implementation="eager"),
        sentences, balanced, LAYERS, head="lm_head", not_split=r"outputs\['aux_loss'\] has shape \(\)",
        not_traced=r"(?s)nonzero.*model\.layers\.0\.mlp\.experts \(modeling_mixtral\.py:\d+\).*depends on the values",
    ),
    "a model's own loss": in_float32(
        built("GPT2LMHeadModel", "GPT2Config", **GPT2),
        sentences, own_loss, numbered("transformer.h.{}"), with_labels, head="lm_head",
    ),
    "ResNet with BatchNorm": Case(
        built("ResNetForImageClassification", "ResNetConfig", embedding_size=8, hidden_sizes=[8, 8, 12, 12],
              depths=[1, 1, 1, 1], num_labels=CLASSES),
        pictures, classified, numbered("resnet.encoder.stages.{}"),
    ),
    "SegFormer": Case(
        built("SegformerForImageClassification", "SegformerConfig", hidden_sizes=[8] * 4, depths=[1] * 4,
              num_attention_heads=[1] * 4, num_labels=CLASSES),
        functools.partial(pictures, size=32), classified, numbered("segformer.stages.{}"),
    ),
    "wav2vec 2.0, which masks and drops by numpy's draws": Case(
        built("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", **SPEECH, num_labels=CLASSES),
        spoken, classified, numbered("wav2vec2.encoder.layers.{}"),
        not_traced=r"(?s)_local_scalar_dense.*wav2vec2\.encoder \(modeling_wav2vec2\.py:\d+\) needs the values",
        not_split=r"wav2vec2 \(Wav2Vec2Model\) draws random numbers \(generator: numpy\)",
        not_recomputed=r"a plain tensor of shape \(5, 1, 400\) that requires grad",
    ),
}  # fmt: skip


GRADIENTS = "ragged chunks are the plain step"


@pytest.mark.parametrize("name", CASES)
def test_the_gradients_are_the_plain_steps(name: str) -> None:
    suite.CHECKS[GRADIENTS](CASES[name])


OTHERS = [check for check in suite.CHECKS if check != GRADIENTS]


@pytest.mark.parametrize(("name", "check"), crossed(CASES, OTHERS, every=4))
def test_the_other_promises_hold(name: str, check: str) -> None:
    suite.CHECKS[check](CASES[name])


def test_blocks_that_are_handed_a_cache_are_left_out_with_the_way_to_do_without() -> None:
    chain = CASES["GPT-2 with a cache, as configs have it"].chain()
    assert not any(unit.has_parts for unit in chain.units)
    assert "transformer.h.0 is handed or returns a DynamicCache" in chain.why_single_layers
    assert "use_cache = False" in chain.why_single_layers


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks the card that is there")
def test_experts_that_ask_for_the_card_are_not_followed_and_named() -> None:
    case = Case(built("MixtralForCausalLM", "MixtralConfig", **EXPERTS), sentences, balanced, ())
    with pytest.raises(CannotTrace, match=r"model\.layers\.0\.mlp\.experts"):
        trace_step(case.declared(case.model()), case.batch(ROWS))
