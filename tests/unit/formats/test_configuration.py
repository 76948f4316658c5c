"""Sources of the configuration of a checkpoint, and what is inferred about an encoder from shapes."""

import dataclasses
import json

import pytest
import yaml

from tests.unit.formats.made import ENCODER, JOINT, TEXT, tiny_stored
from univitar_ds.config.encoder import CONFIG_FILE
from univitar_ds.config.load import load_config
from univitar_ds.errors import CheckpointError
from univitar_ds.formats.configuration import find_configuration, infer_encoder, name_prefix
from univitar_ds.formats.sidecar import write_sidecar
from univitar_ds.formats.stored_model import Tensors
from univitar_ds.model.config import PRESETS
from univitar_ds.model.encoder import UniViTAR
from univitar_ds.model.towers import build_text_tower
from univitar_ds.tokenization import special_ids, train_tokenizer

INFOS = tiny_stored(optimizer=False).tensors.infos
WEIGHT = "embeddings.patch_embedding.weight"


def infos_of(config):
    return {f"vision.{name}": info for name, info in Tensors.of(UniViTAR(config).state_dict()).infos.items()}


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        ([f"vision.{WEIGHT}", "pool.query"], ("", "")),
        ([f"module.vision.{WEIGHT}"], ("module.", "")),
        ([WEIGHT], ("", "vision.")),
        ([f"module.{WEIGHT}"], ("module.", "vision.")),
    ],
)
def test_prefixes_are_found(names, prefix):
    assert name_prefix(names, "here") == prefix


@pytest.mark.parametrize(("names", "count"), [([], 0), (["weight"], 0), ([WEIGHT, f"ema.{WEIGHT}"], 2)])
def test_no_model_and_two_models_are_refused(names, count):
    with pytest.raises(CheckpointError, match=f"has {count} tensors {WEIGHT}"):
        name_prefix(names, "here")


@pytest.mark.parametrize("size", [24, 25, 26, 27, 48, 1056])
def test_the_shape_is_inferred_for_every_inner_width(size):
    config = dataclasses.replace(ENCODER, intermediate_size=size)
    assert infer_encoder(infos_of(config), 2).inner_width == config.inner_width


@pytest.mark.parametrize(
    "changes", [{}, {"qkv_bias": True}, {"qk_normalization": False}, {"patch_embedding_bias": False}]
)
def test_everything_but_the_heads_is_inferred(changes):
    config = dataclasses.replace(ENCODER, **changes)
    assert infer_encoder(infos_of(config), config.num_attention_heads).architecture() == config.architecture()
    with pytest.raises(CheckpointError, match="no tensor shows how many heads"):
        infer_encoder(infos_of(config), None)


def test_the_heads_of_a_preset_are_known():
    assert infer_encoder(infos_of(PRESETS["tiny"]), None) == PRESETS["tiny"]


def test_the_named_folder_comes_first_and_then_the_files_beside_it(tmp_path):
    other = dataclasses.replace(JOINT, objective="softmax")
    for name, joint in (("beside", JOINT), ("named", other)):
        (tmp_path / name).mkdir()
        write_sidecar(dataclasses.replace(tiny_stored(), joint=joint), tmp_path / name)
    beside = [tmp_path / "none", tmp_path / "beside"]
    assert find_configuration(INFOS, beside, None, None) == (ENCODER, JOINT)
    assert find_configuration(INFOS, beside, tmp_path / "named", None) == (ENCODER, other)
    assert find_configuration(INFOS, beside[:1], None, 2)[1] is None


def test_a_config_json_describes_the_encoder_alone(tmp_path):
    (tmp_path / CONFIG_FILE).write_text(json.dumps(ENCODER.to_dict()))
    assert find_configuration(INFOS, [tmp_path], None, None) == (ENCODER, None)


def test_a_run_describes_the_whole_model(tmp_path, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", ENCODER)
    content = yaml.safe_load(load_config("demo").model_dump_json())
    text = {name: getattr(TEXT, name) for name in TEXT.model_fields_set}
    content["model"] = {"encoder": "tiny", "text": text, "embed_dim": 16, "pool_heads": 2, "layer_scale_init": 0.3}
    content["objective"]["kind"] = "softmax"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(CheckpointError, match=r"has config\.yaml but no tokenizer\.json"):
        find_configuration(INFOS, [], tmp_path, None)
    tokenizer = train_tokenizer(["a red square", "a blue circle"], 300)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    encoder, joint = find_configuration(INFOS, [], tmp_path, None)
    assert encoder == dataclasses.replace(ENCODER, initializer_factor=0.3)
    assert (joint.embed_dim, joint.pool_heads, joint.objective, joint.context_length) == (16, 2, "softmax", 8)
    assert joint.tokenizer == (tmp_path / "tokenizer.json").read_text()
    special = special_ids(tokenizer)
    tower = build_text_tower(TEXT, **special.of_text_model)
    assert joint.text == json.loads(tower.model.config.to_json_string(use_diff=False))


@pytest.mark.parametrize("both", [False, True], ids=["text-alone", "two-towers"])
def test_a_run_with_a_given_text_model_has_that_configuration(tmp_path, both):
    given = {"model_type": "siglip_text_model", "hidden_size": 16}
    (tmp_path / "text").mkdir()
    stored = {"model_type": "siglip", "text_config": {"hidden_size": 16}} if both else given
    (tmp_path / "text" / "config.json").write_text(json.dumps(stored))
    train_tokenizer(["a red square"], 300).save(str(tmp_path / "tokenizer.json"))
    content = yaml.safe_load(load_config("demo").model_dump_json())
    content["model"] = {"encoder": "tiny", "text": {"path": str(tmp_path / "text")}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    infos = infos_of(PRESETS["tiny"])
    encoder, joint = find_configuration(infos, [], tmp_path, None)
    assert encoder == PRESETS["tiny"]
    assert {name: joint.text[name] for name in given} == given
