"""Text towers: new ones and those of local folders, padding without effect, empty batches."""

import pytest
import torch
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    Siglip2TextConfig,
    Siglip2TextModel,
    SiglipConfig,
    SiglipModel,
)

from tests.support.closeness import assert_sums_close, entry_bound, gradient_terms, transformer_terms
from univitar_ds.config.model import TextConfig
from univitar_ds.errors import CheckpointError, ConfigError
from univitar_ds.model import towers
from univitar_ds.model.towers import build_text_tower, text_model_config, text_shapes, text_tower

VOCAB = {"vocab_size": 50, "eos_id": 49, "pad_id": 0}
SMALL = TextConfig(hidden_size=32, layers=2, heads=2, intermediate_size=64, context_length=12)
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
         "vocab_size": 50, "max_position_embeddings": 12}  # fmt: skip
CAPTIONS = torch.tensor([[1, 7, 9, 49, 0, 0], [1, 30, 31, 32, 33, 49], [1, 49, 0, 0, 0, 0]])
LENGTHS = torch.tensor([4, 6, 2])
TERMS = transformer_terms(width=32, inner=64, head=16, layers=2, longest=12) + 32
"""Of a pooled caption: two blocks, and a projection."""


@pytest.fixture
def siglip(tmp_path):
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**SHAPE, "projection_size": 24, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 49}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    model.save_pretrained(tmp_path)
    return model.eval()


def save_clip(folder, **changes):
    text = {**SHAPE, "bos_token_id": None, "eos_token_id": 49, "pad_token_id": 0, **changes}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision))
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.numeric
def test_padding_has_no_effect_and_the_end_of_text_is_pooled():
    tower = build_text_tower(SMALL, **VOCAB)
    pooled = tower(CAPTIONS, LENGTHS)
    assert pooled.shape == (3, tower.width) == (3, 32)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = tower(CAPTIONS[row : row + 1, :length], LENGTHS[row : row + 1])
        assert_sums_close(pooled[row], alone[0], TERMS)
        states = tower.model(input_ids=CAPTIONS[row : row + 1]).last_hidden_state
        assert_sums_close(pooled[row], states[0, length - 1], TERMS)


@pytest.mark.numeric
@pytest.mark.parametrize("source", ["scratch", "clip"])
def test_packed_texts_have_the_features_and_gradients_of_padded_ones(source, tmp_path):
    if source == "clip":
        save_clip(tmp_path, hidden_act="quick_gelu")
    tower = build_text_tower(SMALL.model_copy(update={"path": str(tmp_path)} if source == "clip" else {}), **VOCAB)
    with torch.no_grad():
        for parameter in tower.parameters():  # the first ones are so small that attention would hardly matter
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    seen: list[int] = []
    tower.model.encoder.register_forward_pre_hook(
        lambda _, inputs, named: seen.append(named["inputs_embeds"].shape[:2].numel()), with_kwargs=True
    )
    upstream = torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
    results = []
    for run in (tower, tower.packed):
        tower.zero_grad()
        pooled = run(CAPTIONS, LENGTHS)
        (pooled * upstream).sum().backward()
        results.append((pooled, {name: one.grad for name, one in tower.named_parameters()}))
    assert seen == [18, 12], "tokens with padding and without"
    (padded, wanted), (pooled, gradients) = results
    assert_sums_close(pooled, padded, TERMS)
    largest = max(one.abs().max().item() for one in wanted.values())
    for name, one in wanted.items():  # the K part of attention's bias has none but rounding
        if name.endswith("k_proj.bias"):
            assert gradients[name].abs().max() <= entry_bound(gradient_terms(TERMS, 18), largest, torch.float32)
        else:
            assert_sums_close(gradients[name], one, gradient_terms(TERMS, 18), name)
    assert torch.equal(tower(CAPTIONS, LENGTHS), padded), "a packed run leaves nothing behind"


def test_texts_are_packed_where_one_call_attends_for_all_and_their_lengths_are_on_the_host(monkeypatch):
    """The device is a stand-in: on a CPU each text would need a call of its own."""
    tower = build_text_tower(SMALL, **VOCAB)
    padded = tower(CAPTIONS, LENGTHS)
    asked: list[tuple] = []
    monkeypatch.setattr(towers, "can_pack", lambda *question: asked.append(question) or True)
    packed = tower(CAPTIONS, LENGTHS)
    assert asked == [(tower.model.config, torch.device("cpu"), torch.float32)]
    assert torch.equal(packed, tower.packed(CAPTIONS, LENGTHS))
    assert_sums_close(packed, padded, TERMS)
    assert tower(CAPTIONS[:0], LENGTHS[:0]).shape == (0, 32)


@pytest.mark.parametrize("shape", [(0, 0), (0, 5)])
def test_no_captions_give_no_rows_and_every_used_parameter_a_gradient_of_zero(shape):
    tower = build_text_tower(SMALL, **VOCAB)
    pooled = tower(torch.empty(shape, dtype=torch.int64), torch.empty(0, dtype=torch.int64))
    assert pooled.shape == (0, 32)
    pooled.sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


def test_a_frozen_tower_has_nothing_to_train():
    tower = build_text_tower(SMALL.model_copy(update={"frozen": True}), **VOCAB)
    assert not any(parameter.requires_grad for parameter in tower.parameters())


@pytest.mark.numeric
def test_the_text_part_of_a_clip_folder_gives_its_features_without_a_word(tmp_path, capfd):
    whole = save_clip(tmp_path)
    capfd.readouterr()
    tower = build_text_tower(SMALL.model_copy(update={"path": str(tmp_path)}), **VOCAB)
    assert capfd.readouterr() == ("", "")
    wanted = whole.text_model(input_ids=CAPTIONS).pooler_output
    assert_sums_close(tower(CAPTIONS, LENGTHS), wanted, TERMS)


@pytest.mark.numeric
def test_a_clip_text_folder_works_too(tmp_path):
    torch.manual_seed(0)
    model = CLIPTextModel(CLIPTextConfig(**SHAPE, bos_token_id=None, eos_token_id=49, pad_token_id=0))
    model.save_pretrained(tmp_path)
    tower = build_text_tower(SMALL.model_copy(update={"path": str(tmp_path)}), **VOCAB)
    assert_sums_close(tower(CAPTIONS, LENGTHS), model.eval()(input_ids=CAPTIONS).pooler_output, TERMS)


@pytest.mark.numeric
def test_siglip_sees_rows_padded_to_full_length_with_its_own_padding(siglip, tmp_path):
    tower = build_text_tower(SMALL.model_copy(update={"path": str(tmp_path)}), **VOCAB)
    padded = torch.tensor([[1, 7, 9, 49] + [1] * 8, [1, 30, 31, 32, 33, 49] + [1] * 6, [1, 49] + [1] * 10])
    wanted = siglip.text_model(input_ids=padded).pooler_output
    pooled = tower(CAPTIONS, LENGTHS)
    assert pooled.shape == (3, tower.width) == (3, 24)
    assert_sums_close(pooled, wanted, TERMS)
    alone = siglip.text_model(input_ids=padded[:1, :4]).pooler_output
    assert (alone - wanted[:1]).norm() > 0.1 * wanted[:1].norm(), "tokens attend to padding, so it cannot be left out"
    assert tower(CAPTIONS[:0], LENGTHS[:0]).shape == (0, 24)


@pytest.mark.numeric
def test_siglip_2_is_padded_as_its_tokenizer_pads(tmp_path):
    text = {**SHAPE, "projection_size": 24, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 49}
    torch.manual_seed(0)
    model = Siglip2TextModel(Siglip2TextConfig(**text)).eval()
    model.save_pretrained(tmp_path)
    config = SMALL.model_copy(update={"path": str(tmp_path)})
    tower = build_text_tower(config, **VOCAB)
    padded = torch.tensor([[1, 7, 9, 49] + [0] * 8, [1, 30, 31, 32, 33, 49] + [0] * 6, [1, 49] + [0] * 10])
    wanted = model(input_ids=padded).pooler_output
    assert_sums_close(tower(CAPTIONS, LENGTHS), wanted, TERMS)
    again = text_tower(text_model_config(config, **VOCAB))
    again.load_state_dict(tower.state_dict())
    assert torch.equal(again(CAPTIONS, LENGTHS), tower(CAPTIONS, LENGTHS))


def test_a_missing_folder_is_named_and_never_looked_up_elsewhere(tmp_path):
    config = SMALL.model_copy(update={"path": str(tmp_path / "openai/clip")})
    with pytest.raises(CheckpointError, match=r"openai/clip has no config\.json"):
        build_text_tower(config, **VOCAB)


def test_another_kind_of_model_is_refused_by_name(tmp_path):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds a bert model; supported are: clip, clip_text_model, siglip"):
        build_text_tower(SMALL.model_copy(update={"path": str(tmp_path)}), **VOCAB)


def test_a_folder_without_weights_or_with_some_missing_is_refused(tmp_path):
    save_clip(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    config = SMALL.model_copy(update={"path": str(tmp_path)})
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        build_text_tower(config, **VOCAB)
    torch.manual_seed(0)
    CLIPTextModel(CLIPTextConfig(**{**SHAPE, "num_hidden_layers": 1})).save_pretrained(tmp_path / "short")
    (tmp_path / "short/config.json").write_bytes((tmp_path / "config.json").read_bytes())
    with pytest.raises(CheckpointError, match=r"lacks weights: .*layers\.1"):
        build_text_tower(SMALL.model_copy(update={"path": str(tmp_path / "short")}), **VOCAB)


def test_a_tokenizer_or_context_too_large_for_the_folder_is_refused(tmp_path):
    save_clip(tmp_path)
    config = SMALL.model_copy(update={"path": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"tokenizer has 51 tokens but the text model in .* has 50"):
        build_text_tower(config, **{**VOCAB, "vocab_size": 51})
    with pytest.raises(ConfigError, match="context_length 13 exceeds the 12 positions"):
        build_text_tower(config.model_copy(update={"context_length": 13}), **VOCAB)


@pytest.mark.parametrize("kind", ["clip_text_model", "siglip_text_model", "siglip2_text_model"])
def test_the_tensors_of_a_tower_are_known_without_building_it(kind):
    values = {**SHAPE, "model_type": kind, "hidden_act": "gelu"} | (
        {} if kind.startswith("clip") else {"projection_size": 24}
    )
    tower = text_tower(values)
    built = {name: tuple(value.shape) for name, value in tower.state_dict().items()}
    assert {name: info.shape for name, info in text_shapes(values).items()} == built
    assert tower.width == (32 if kind.startswith("clip") else 24)


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 3},
        {"vocab_size": 0},
        {"num_hidden_layers": "2"},
        {"hidden_act": "no"},
        {"model_type": "bert"},
    ],
)
def test_unusual_values_are_left_to_the_library(change):
    values = {**SHAPE, "model_type": "clip_text_model", "hidden_act": "gelu"}
    assert text_shapes(values) is not None
    assert text_shapes(values | change) is None
