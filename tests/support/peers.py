"""Small models of transformers with random weights, saved with image processor and tokenizer as a release is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors

SIDE, PATCH = 32, 8
_VISION = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40}
_SIZED = {**_VISION, "patch_size": PATCH, "image_size": SIDE}
WORDS = (
    "<pad>",
    "<unk>",
    "</s>",
    "<s>",
    "a",
    "photo",
    "of",
    "the",
    "cat",
    "dog",
    "horse",
    "red",
    "small",
    "2",
    "1",
    "0",
)
_TEXT = {"max_position_embeddings": 12, "vocab_size": len(WORDS)} | _VISION
_TEXT |= {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 3}
_SIGLIP_SIZE = {"height": SIDE, "width": SIDE}
WHOLE = ("clip", "siglip", "siglip2")
ALONE = ("dinov2", "dinov2_with_registers", "dinov3_vit", "clip_vision_model")


def _made(kind: str) -> Any:
    import transformers as t

    siglip_text = {**_TEXT, "projection_size": 24}
    naflex = {**_VISION, "patch_size": PATCH, "num_patches": 16}
    configs = {
        "clip": lambda: t.CLIPModel(t.CLIPConfig(text_config=_TEXT, vision_config=_SIZED, projection_dim=20)),
        "clip_vision_model": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**_SIZED)),
        "siglip": lambda: t.SiglipModel(t.SiglipConfig(text_config=siglip_text, vision_config=_SIZED)),
        "siglip2": lambda: t.Siglip2Model(t.Siglip2Config(text_config=siglip_text, vision_config=naflex)),
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**_SIZED)),
        "dinov2_with_registers": lambda: t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**_SIZED)),
        "dinov3_vit": lambda: t.DINOv3ViTModel(t.DINOv3ViTConfig(**_SIZED, num_register_tokens=2)),
    }
    return configs[kind]()


def _images(kind: str) -> dict[str, Any]:
    """The content of preprocessor_config.json as in the releases, at a small size."""
    if kind.startswith("clip"):
        crop = {"crop_size": _SIGLIP_SIZE, "size": {"shortest_edge": SIDE}, "resample": 3}
        return {"image_processor_type": "CLIPImageProcessor", **crop}
    if kind == "siglip":
        return {"image_processor_type": "SiglipImageProcessor", "size": _SIGLIP_SIZE, "resample": 3}
    if kind == "siglip2":
        return {"image_processor_type": "Siglip2ImageProcessorFast", "patch_size": PATCH, "max_num_patches": 16}
    if kind == "dinov3_vit":
        return {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": _SIGLIP_SIZE, "resample": 2}
    crop = {"crop_size": _SIGLIP_SIZE, "size": {"shortest_edge": SIDE + 4}, "resample": 3}
    return {"image_processor_type": "BitImageProcessor", **crop}


def save_peer(kind: str, folder: Path) -> Path:
    """Saves a model of a family to a folder. Its weights are so large that every part of an input has an effect."""
    from transformers import PreTrainedTokenizerFast

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = _made(kind).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(_images(kind)), encoding="utf-8")
    if kind in WHOLE:
        tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.post_processor = processors.TemplateProcessing(
            "<s> $A </s>", special_tokens=[("<s>", 3), ("</s>", 2)]
        )
        ends = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends, model_input_names=["input_ids"])
        fast.save_pretrained(folder)
    return folder
