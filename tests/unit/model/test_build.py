"""Building the model of a run with initial weights, or with the encoder or all weights of another model."""

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.support.finished import run_config, write_run
from univitar_ds import UniViTAR
from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.config.model import EncoderShape, ModelConfig, TextConfig
from univitar_ds.convert.conversion import convert
from univitar_ds.errors import CheckpointError, ConfigError
from univitar_ds.formats.recognise import open_stored
from univitar_ds.formats.stored_model import Tensors
from univitar_ds.model.build import build_contrastive
from univitar_ds.model.config import encoder_config

VOCAB = {"vocab_size": 300, "eos_id": 2, "pad_id": 0}
SHAPE = EncoderShape(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=96)
TEXT = TextConfig(hidden_size=32, layers=1, heads=2, intermediate_size=64, context_length=8)
CONFIG = ModelConfig(encoder=SHAPE, text=TEXT, embed_dim=16)


@pytest.fixture
def encoder(tmp_path: Path) -> tuple[Path, UniViTAR]:
    model = UniViTAR(dataclasses.replace(encoder_config(CONFIG), min_tokens=7))
    model.save_pretrained(tmp_path / "encoder")
    return tmp_path / "encoder", model


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tried"
    write_run(folder, run_config())
    return folder


def starting(**changes) -> ModelConfig:
    return CONFIG.model_copy(update={"init_from": "somewhere", **changes})


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def test_an_encoder_may_have_any_shape():
    model = build_contrastive(CONFIG, **VOCAB, seed=0)
    assert (model.vision.config.hidden_size, len(model.vision.encoder["layers"])) == (64, 2)
    assert encoder_config(ModelConfig()) == encoder_config(ModelConfig(encoder="tiny"))


def test_a_width_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="hidden_size 65 is not divisible by num_attention_heads 2"):
        EncoderShape(hidden_size=65, num_hidden_layers=2, num_attention_heads=2, intermediate_size=96)


@pytest.mark.parametrize("named", [SHAPE, None], ids=["shape", "absent"])
def test_training_starts_from_an_encoder(encoder, named):
    folder, saved = encoder
    model = build_contrastive(starting(encoder=named), **VOCAB, seed=0, start=open_stored(folder))
    assert model.vision.config.min_tokens == 7
    assert same(model.vision.state_dict(), saved.state_dict())
    plain = build_contrastive(CONFIG, **VOCAB, seed=0)
    assert same(model.text.state_dict(), plain.text.state_dict())


@pytest.mark.parametrize("to", ["release", "hf", "run"])
def test_the_encoder_is_loaded_from_a_run_and_from_its_conversions(run, tmp_path, to):
    folder = run
    if to != "run":
        folder = tmp_path / "converted"
        convert(run, folder, to)
    model = build_contrastive(ModelConfig(init_from=str(folder), text=TEXT), **VOCAB, seed=0, start=open_stored(folder))
    wanted = open_stored(run).encoder_only().tensors
    assert all(torch.equal(value, wanted[f"vision.{name}"]) for name, value in model.vision.state_dict().items())


def test_the_error_for_an_encoder_of_another_shape_lists_the_differences(encoder, tmp_path):
    other = SHAPE.model_copy(update={"num_hidden_layers": 3, "intermediate_size": 192})
    with pytest.raises(CheckpointError, match="num_hidden_layers is 2 instead of 3; intermediate_size is 96 instead"):
        build_contrastive(starting(encoder=other), **VOCAB, seed=0, start=open_stored(encoder[0]))


def test_the_whole_model_starts_with_the_weights_of_another(run):
    stored = open_stored(run)
    config = ModelConfig(init_from="somewhere", init_part="model", embed_dim=16)
    model = build_contrastive(config, **VOCAB, seed=1, teacher_width=24, start=stored)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("distill.")}
    assert same(state, {name: stored.tensors[name] for name in state})
    assert set(stored.tensors) <= set(model.state_dict())


def test_a_joint_embedding_of_another_width_is_refused(run):
    config = ModelConfig(init_from="somewhere", init_part="model", embed_dim=24)
    with pytest.raises(ConfigError, match=r"model\.embed_dim is 24, that of .* is 16; leave model\.embed_dim out"):
        build_contrastive(config, **VOCAB, seed=0, start=open_stored(run))


def test_an_encoder_alone_cannot_be_the_whole_model(encoder):
    config = ModelConfig(init_from="somewhere", init_part="model")
    with pytest.raises(CheckpointError, match=r"holds an encoder alone, but model\.init_part is model"):
        build_contrastive(config, **VOCAB, seed=0, start=open_stored(encoder[0]))


def test_a_missing_tensor_is_named(encoder):
    stored = open_stored(encoder[0])
    cut = dataclasses.replace(stored, tensors=stored.tensors.renamed(lambda name: None if "qkv" in name else name))
    with pytest.raises(CheckpointError, match=r"missing: vision\.encoder\.layers\.0\.attn\.qkv\.weight"):
        build_contrastive(starting(), **VOCAB, seed=0, start=cut)


def test_half_precision_becomes_float32(encoder):
    stored = open_stored(encoder[0]).converted(torch.bfloat16)
    model = build_contrastive(starting(), **VOCAB, seed=0, start=stored)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    name = "vision.encoder.layers.0.attn.qkv.weight"
    assert torch.equal(
        model.state_dict()[name], encoder[1].state_dict()[name.removeprefix("vision.")].bfloat16().float()
    )


def test_the_description_decides_the_shape_of_a_run_that_is_resumed(encoder):
    first = build_contrastive(starting(encoder=None), **VOCAB, seed=0, start=open_stored(encoder[0]))
    again = build_contrastive(starting(encoder=None), **VOCAB, seed=0, description=first.description())
    assert again.vision.config == first.vision.config == EncoderConfig.from_dict(first.description()["encoder"])
    assert isinstance(open_stored(encoder[0]).tensors, Tensors)
