"""Configurations of UniViTAR: of the encoder alone, and of the two towers of a contrastive model."""

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec


class UniViTARVisionConfig(PreTrainedConfig):
    """Architecture and preprocessing of the encoder, with the fields of the release's config.json."""

    model_type = "univitar_vision"
    base_config_key = "vision_config"

    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    intermediate_size: int = 4224
    qkv_bias: bool = False
    qk_normalization: bool = True
    patch_embedding_bias: bool = True
    layer_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    initializer_factor: float = 0.1
    num_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 1
    resize_factor: int = 2
    min_tokens: int = 576
    max_tokens: int = 16384
    relarge_ratio: float = 1.0
    resolution_mode: str = "native"
    image_mean: tuple | list = (0.485, 0.456, 0.406)
    image_std: tuple | list = (0.229, 0.224, 0.225)

    @property
    def inner_size(self):
        """Width of the feed-forward layer."""
        return int(self.intermediate_size * 2 / 3)


class UniViTARConfig(PreTrainedConfig):
    """Both towers, trained with a softmax over the texts.

    `projection_dim` is the width of the joint space. `context_length` is the maximum length of a text in tokens, and
    `text_eos_token_id` the token at its end; the text model's own `eos_token_id` may be another.
    """

    model_type = "univitar"
    sub_configs_defaults = {
        "vision_config": UniViTARVisionConfig,
        "text_config": SubConfigSpec(config_class=AutoConfig, model_type="clip_text_model"),
    }

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projection_dim: int = 256
    pool_heads: int = 4
    objective: str = "softmax"
    context_length: int = 48
    text_eos_token_id: int = 2


class UniViTARSigmoidConfig(UniViTARConfig):
    """Both towers, trained with independent probabilities.

    The zero-shot pipeline of transformers computes sigmoid probabilities only if "siglip" is part of `model_type`.
    """

    model_type = "univitar_siglip"

    objective: str = "sigmoid"
