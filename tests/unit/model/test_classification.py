"""The classifier: a linear head on the pooled features, the bits of its initial weights, heads for a teacher."""

import dataclasses

import pytest
import torch

from tests.support.closeness import assert_sums_close
from tests.unit.model.test_contrastive import FRAMES, GRIDS, SHAPE, drawn_pixels
from univitar_ds.config.model import ModelConfig
from univitar_ds.errors import ConfigError
from univitar_ds.model.blocks.dropping import DropConfig
from univitar_ds.model.build import build_contrastive
from univitar_ds.model.classification import ClassificationModel, build_classifier, class_logits
from univitar_ds.model.config import PRESETS

CONFIG = ModelConfig(pool_heads=2, layer_scale_init=0.2)


@pytest.fixture(autouse=True)
def small_tiny(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", SHAPE)


@pytest.fixture
def model() -> ClassificationModel:
    return build_classifier(CONFIG, classes=5, seed=0)


@pytest.mark.numeric
def test_the_logits_are_a_linear_map_of_the_pooled_tokens(model):
    tokens = model.vision(drawn_pixels(), GRIDS, frames=FRAMES)
    pooled = model.pool(tokens, [24, 16, 4])
    found = model(drawn_pixels(), FRAMES, GRIDS)
    assert found.distilled is None
    assert_sums_close(found.logits, pooled @ model.head.weight.T + model.head.bias, terms=64)
    logits = class_logits(model, drawn_pixels(), FRAMES, GRIDS)
    assert torch.equal(logits, found.logits)
    assert not logits.requires_grad


def test_the_encoder_and_the_random_state_are_those_of_a_contrastive_run(model):
    before = torch.get_rng_state()
    other = build_contrastive(ModelConfig(**CONFIG.model_dump()), vocab_size=50, eos_id=2, pad_id=0, seed=0)
    again = build_classifier(CONFIG, classes=5, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.vision.parameters(), other.vision.parameters(), strict=True))
    changed = build_classifier(CONFIG, classes=5, seed=1)
    assert not torch.equal(changed.head.weight, model.head.weight)


def test_dropped_tokens_leave_a_logit_for_each_item(model):
    drops = DropConfig(patches=0.5, depth=0.5, blocks=2).of_pack(GRIDS.tolist(), 0)
    found = model(drawn_pixels(), FRAMES, GRIDS, False, drops).logits
    assert found.shape == (3, 5)
    assert not torch.equal(found, model(drawn_pixels(), FRAMES, GRIDS).logits)


def test_an_empty_pack_gives_every_parameter_a_gradient_of_zero(model):
    none = torch.empty(0, dtype=torch.int64)
    logits = model(torch.empty(0, dtype=torch.uint8), none, none.view(0, 3)).logits
    assert logits.shape == (0, 5)
    logits.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_heads_for_a_teacher_are_given_on_request_and_left_aside_afterwards(model):
    taught = build_classifier(CONFIG, classes=5, seed=0, teacher_width=7)
    distilled = taught(drawn_pixels(), FRAMES, GRIDS, True).distilled
    assert (distilled.patches.shape, distilled.pooled.shape) == ((44, 7), (3, 7))
    assert torch.equal(taught.head.weight, model.head.weight)
    model.load_state_dict(taught.state_dict())


def test_pool_heads_must_divide_the_width():
    with pytest.raises(ConfigError, match="pool_heads 3 does not divide"):
        build_classifier(CONFIG.model_copy(update={"pool_heads": 3}), classes=5, seed=0)


def test_the_description_names_encoder_and_classes(model):
    assert model.description() == {
        "encoder": dataclasses.replace(SHAPE, initializer_factor=0.2).to_dict(), "classes": 5,
    }  # fmt: skip
