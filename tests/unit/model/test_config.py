"""The sizes of the family, and invalid configurations."""

import dataclasses
import json

import pytest
import torch

from tests.support.golden import golden
from univitar_ds.config.encoder import EncoderConfig, read_encoder_config
from univitar_ds.errors import CheckpointError
from univitar_ds.model.config import PRESETS
from univitar_ds.model.encoder import UniViTAR


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("0.3b", 309_885_952), ("0.6b", 636_554_496), ("1b", 1_418_820_480), ("tiny", 3_344_064)],
)
def test_every_size_has_the_stated_number_of_parameters(size, parameters):
    with torch.device("meta"):
        model = UniViTAR(PRESETS[size])
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert PRESETS[size].parameter_count() == parameters


def test_the_feed_forward_width_of_every_size_is_a_multiple_of_128():
    assert [config.inner_width % 128 for config in PRESETS.values()] == [0] * 4


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("qk_normalization", [True, False])
@pytest.mark.parametrize("patch_embedding_bias", [True, False])
def test_optional_parameters_are_counted(qkv_bias, qk_normalization, patch_embedding_bias):
    config = EncoderConfig(64, 2, 2, 96, qkv_bias, qk_normalization, patch_embedding_bias)
    assert sum(parameter.numel() for parameter in UniViTAR(config).parameters()) == config.parameter_count()


def test_an_empty_config_is_the_released_03b():
    assert EncoderConfig.from_dict({}) == PRESETS["0.3b"]


def test_a_config_survives_writing_and_reading():
    config = dataclasses.replace(PRESETS["1b"], min_tokens=16, image_mean=(0.5, 0.5, 0.5))
    assert EncoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_fields_of_other_libraries_are_left_out_and_nested_configs_are_found():
    values = {"hidden_size": 64, "num_attention_heads": 4, "use_flash_attn": True, "torch_dtype": "bfloat16"}
    assert EncoderConfig.from_dict({"vision_config": values}) == EncoderConfig(hidden_size=64, num_attention_heads=4)


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"num_attention_heads": 12}, "hidden_size 1024 is not divisible by num_attention_heads 12"),
        ({"hidden_size": 96, "num_attention_heads": 16}, "head width 6 is not divisible by 4"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'.*'SwiGLU'"),
        ({"pe_type": "ape"}, "pe_type 'ape'.*'rope2d'"),
        ({"use_pre_norm": True}, "use_pre_norm True"),
        ({"patch_size": 16}, "patch_size 16.*14"),
        ({"hidden_size": "1024"}, "hidden_size must be a whole number, got '1024'"),
        ({"num_hidden_layers": 24.0}, "num_hidden_layers must be a whole number, got 24.0"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a whole number, got True"),
        ({"qkv_bias": 1}, "qkv_bias must be true or false, got 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be above 0, got 0"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps must be a finite number"),
        ({"image_mean": [0.5, 0.5]}, r"image_mean must be three finite numbers, got \(0.5, 0.5\)"),
        ({"image_std": [0.5, 0, 0.5]}, "image_std must be above 0"),
        ({"min_tokens": 99999}, "min_tokens 99999 exceeds max_tokens 16384"),
        ({"resolution_mode": "225"}, "resolution_mode must be native or pixels divisible by 14, got '225'"),
        ({"intermediate_size": 1}, "intermediate_size 1 must be at least 2"),
        ({"vision_config": 3}, "vision_config must be an object"),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_an_impossible_config_is_refused_with_name_and_value(values, complaint):
    with pytest.raises(CheckpointError, match=complaint):
        EncoderConfig.from_dict(values)


def test_all_errors_are_reported_at_once():
    with pytest.raises(CheckpointError, match=r"hidden_size.*qkv_bias"):
        EncoderConfig(hidden_size=None, qkv_bias="no")


@pytest.mark.parametrize(("text", "complaint"), [("{", "not JSON"), ("[1]", "must hold a JSON object, got list")])
def test_a_file_that_is_no_config_is_named(tmp_path, text, complaint):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"config\.json .*{complaint}"):
        read_encoder_config(tmp_path)


def test_the_size_rule_comes_from_the_config():
    rule = read_encoder_config(golden("merge2").folder).resolution
    assert (rule.min_tokens, rule.max_tokens, rule.divisor_px, rule.fixed_px) == (8, 80, 28, None)
