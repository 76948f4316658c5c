"""Small models with random weights as formats store them: an encoder, and two towers of both families."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedConfig, SiglipTextConfig, SiglipTextModel

from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.config.model import ModelConfig
from univitar_ds.formats.stored_model import JointConfig, StoredModel, Tensors
from univitar_ds.model.contrastive import ContrastiveModel
from univitar_ds.model.encoder import UniViTAR
from univitar_ds.model.towers import CausalTextTower, PaddedTextTower
from univitar_ds.tokenization import special_ids, train_tokenizer

CONTEXT = 12
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
CAPTIONS = ["a red square", "a blue circle on a green field", "", "[EOS] is spelled and so is [PAD]", "long " * 40]
TOKENIZER = train_tokenizer([*CAPTIONS, "a photo of a square", "this is a photo of a circle"] * 3, 320)


class Made(NamedTuple):
    """A model of the package and the same model as formats store it."""

    net: ContrastiveModel
    stored: StoredModel


def small_encoder_config(**changes: Any) -> EncoderConfig:
    return EncoderConfig(**{**SHAPE, "min_tokens": 4, "max_tokens": 48, "resize_factor": 1, **changes})


def make_model(
    family: Literal["clip", "siglip"] = "clip",
    objective: Literal["sigmoid", "softmax"] = "sigmoid",
    seed: int = 0,
    teacher_width: int | None = None,
    **encoder: Any,
) -> Made:
    """Returns two towers. `encoder`: changes of the encoder's configuration."""
    config = small_encoder_config(**encoder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text = _text_tower(family)
        settings = ModelConfig(pool_heads=2, embed_dim=24)
        net = ContrastiveModel(UniViTAR(config), text, settings, teacher_width).eval()
        with torch.no_grad():
            for parameter in net.parameters():  # values that differ from the initial ones
                parameter.add_(torch.randn_like(parameter) * 0.05)
    joint = JointConfig(24, 2, objective, as_json(text.model.config), CONTEXT, TOKENIZER.to_str())
    return Made(net, StoredModel(Path("made"), "run", config, Tensors.of(net.state_dict()), joint))


def as_json(config: PreTrainedConfig) -> dict[str, Any]:
    """Returns the content of its config.json."""
    return json.loads(config.to_json_string())


def _text_tower(family: str) -> torch.nn.Module:
    ids = special_ids(TOKENIZER)
    shape = {**SHAPE, "vocab_size": ids.vocab_size, "bos_token_id": None, "eos_token_id": ids.eos_id}
    if family == "clip":
        # The configurations of OpenAI's models have 2, although their tokenizers have another id.
        config = CLIPTextConfig(**{**shape, "eos_token_id": 2}, pad_token_id=ids.pad_id, max_position_embeddings=14)
        return CausalTextTower(CLIPTextModel(config))
    config = SiglipTextConfig(**shape, pad_token_id=1, max_position_embeddings=CONTEXT, projection_size=40)
    return PaddedTextTower(SiglipTextModel(config))


def textured(height: int, width: int, seed: int = 0) -> Image.Image:
    """A smooth random RGB image."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
