"""The whole model: unit vectors for items, the bits of its initial weights, weights to start from."""

import dataclasses
import math

import pytest
import torch

from tests.support.closeness import assert_sums_close, encoder_terms, transformer_terms
from univitar_ds.config.model import ModelConfig, TextConfig
from univitar_ds.errors import ConfigError
from univitar_ds.geometry import token_count
from univitar_ds.model import contrastive
from univitar_ds.model.blocks.attention import attention
from univitar_ds.model.blocks.dropping import DropConfig, DropPlan
from univitar_ds.model.build import build_contrastive
from univitar_ds.model.config import PRESETS
from univitar_ds.model.contrastive import AttentionPool

TEXT = TextConfig(hidden_size=32, layers=1, heads=2, intermediate_size=64, context_length=12)
CONFIG = ModelConfig(text=TEXT, embed_dim=16, pool_heads=2, layer_scale_init=0.2)
VOCAB = {"vocab_size": 50, "eos_id": 2, "pad_id": 0}
GRIDS = torch.tensor([[1, 4, 6], [2, 2, 4], [1, 2, 2]])
FRAMES = torch.tensor([1, 4, 1])
CAPTIONS = torch.tensor([[1, 7, 9, 2, 0], [1, 30, 31, 32, 2], [1, 2, 0, 0, 0]])
LENGTHS = torch.tensor([4, 5, 2])
SHAPE = dataclasses.replace(
    PRESETS["tiny"], hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=96
)
TERMS = encoder_terms(SHAPE, 24) + transformer_terms(width=64, inner=0, head=32, layers=1, longest=24) + 16
"""Of an item's vector: the encoder, the pooling, the projection and its norm."""


def sizes(frames, grids):
    return [count * h * w * 588 for count, (_, h, w) in zip(frames.tolist(), grids.tolist(), strict=True)]


def drawn_pixels():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (sum(sizes(FRAMES, GRIDS)),), dtype=torch.uint8, generator=generator)


@pytest.fixture(autouse=True)
def small_tiny(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", SHAPE)


@pytest.mark.numeric
def test_both_towers_return_unit_vectors_and_the_logits_have_their_initial_scale_and_bias():
    vision, text, scale, bias, distilled = build_contrastive(CONFIG, **VOCAB, seed=0)(
        drawn_pixels(), FRAMES, GRIDS, CAPTIONS, LENGTHS
    )
    assert distilled is None
    for embedded in (vision, text):
        assert embedded.shape == (3, 16)
        assert_sums_close(embedded.norm(dim=-1), torch.ones(3), 2 * 16)
    assert_sums_close(scale, [10.0], terms=2)  # log and exp
    assert bias.tolist() == [-10.0]


@pytest.mark.numeric
def test_scale_and_bias_are_new_tensors_with_the_right_gradients():
    model = build_contrastive(CONFIG, **VOCAB, seed=0)
    _, _, scale, bias, _ = model(drawn_pixels(), FRAMES, GRIDS, CAPTIONS, LENGTHS)
    assert bias.data_ptr() != model.logit_bias.data_ptr()
    (3 * scale + 5 * bias).sum().backward()
    assert_sums_close(model.logit_scale.grad, [30.0], terms=2)
    assert model.logit_bias.grad.tolist() == [5.0]
    assert_sums_close(model.logit_scale, [math.log(10.0)], terms=1)


@pytest.mark.numeric
def test_an_item_is_embedded_the_same_alone_and_in_a_pack():
    model = build_contrastive(CONFIG, **VOCAB, seed=0)
    pixels = drawn_pixels()
    together = model.encode_vision(pixels, FRAMES, GRIDS)
    for index, part in enumerate(pixels.split(sizes(FRAMES, GRIDS))):
        one = slice(index, index + 1)
        alone = model.encode_vision(part, FRAMES[one], GRIDS[one])
        assert_sums_close(together[one], alone, TERMS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 3])
def test_every_parameter_has_a_gradient_for_any_pack(count, dtype):
    model = build_contrastive(CONFIG, **VOCAB, seed=0).to(dtype)
    pixels = drawn_pixels() if count else torch.empty(0, dtype=torch.uint8)
    vision, text, scale, bias, _ = model(pixels, FRAMES[:count], GRIDS[:count], CAPTIONS[:count], LENGTHS[:count])
    assert vision.shape == text.shape == (count, 16)
    assert {vision.dtype, text.dtype, scale.dtype, bias.dtype} == {torch.float32}
    upstream = torch.arange(16.0)
    ((vision * upstream).sum() + (text * upstream).sum() + scale.sum() + bias.sum()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if count == 0 and not name.startswith("logit"):
            assert not parameter.grad.any(), name


@pytest.mark.numeric
def test_pooling_is_a_softmax_over_each_items_own_tokens():
    pool = AttentionPool(8, 2, 1e-6, "auto").double()
    tokens = torch.randn(7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    k, v = pool.kv(pool.norm(tokens)).view(7, 2, 2, 4).unbind(1)
    wanted = []
    for item in (slice(0, 5), slice(5, 7)):
        weights = (torch.einsum("hk,thk->ht", pool.query.view(2, 4), k[item]) / 2).softmax(-1)
        wanted.append(torch.einsum("ht,thk->hk", weights, v[item]).flatten())
    assert_sums_close(pool(tokens, [5, 2]), torch.stack(wanted), 2 * 8 + 4 + 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_item_has_a_query_of_its_own_in_memory_which_changes_no_bit(dtype, monkeypatch):
    pool = AttentionPool(8, 2, 1e-6, "auto").to(dtype)
    tokens = torch.randn(9, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    queries, results = [], []

    def kept(q, *rest):
        queries.append(q)
        return attention(q, *rest)

    def shared(q, *rest):
        return attention(q[:1].expand(len(q), -1, -1), *rest)

    for replacement in (kept, shared):
        monkeypatch.setattr(contrastive, "attention", replacement)
        pooled = pool(tokens, [5, 2, 2])
        pool.zero_grad()
        (pooled * torch.arange(8)).sum().backward()
        results.append([pooled, *(parameter.grad for parameter in pool.parameters())])
    assert queries[0].stride() == (8, 4, 1)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_same_seed_gives_the_same_bits_and_leaves_outside_randomness_alone():
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_contrastive(CONFIG, **VOCAB, seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = build_contrastive(CONFIG, **VOCAB, seed=3).state_dict()
    other = build_contrastive(CONFIG, **VOCAB, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["vision_proj.weight"], other["vision_proj.weight"])
    assert not torch.equal(
        first["vision.encoder.layers.0.attn.qkv.weight"], other["vision.encoder.layers.0.attn.qkv.weight"]
    )
    assert (first["vision.encoder.layers.1.ls2"] == 0.2).all()


def test_another_text_tower_leaves_the_first_values_of_the_encoder_alone():
    wider = CONFIG.model_copy(update={"text": TEXT.model_copy(update={"hidden_size": 64})})
    one, two = (build_contrastive(config, **VOCAB, seed=0).vision.state_dict() for config in (CONFIG, wider))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_a_frozen_text_tower_still_trains_its_projection():
    frozen = CONFIG.model_copy(update={"text": TEXT.model_copy(update={"frozen": True})})
    model = build_contrastive(frozen, **VOCAB, seed=0)
    model.encode_text(CAPTIONS, LENGTHS).square().sum().backward()
    assert model.text_proj.weight.grad is not None
    assert all(parameter.grad is None for parameter in model.text.parameters())


def test_pool_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ConfigError, match="pool_heads 5 does not divide the encoder's width 64"):
        build_contrastive(CONFIG.model_copy(update={"pool_heads": 5}), **VOCAB, seed=0)


def test_heads_for_a_teacher_leave_first_values_and_embeddings_as_they_are():
    plain, taught = (build_contrastive(CONFIG, **VOCAB, seed=0, teacher_width=width) for width in (None, 24))
    assert all(torch.equal(taught.state_dict()[name], tensor) for name, tensor in plain.state_dict().items())
    inputs = drawn_pixels(), FRAMES, GRIDS, CAPTIONS, LENGTHS
    quiet, shown = taught(*inputs), taught(*inputs, True)
    assert quiet.distilled is None
    assert shown.distilled.patches.shape == (24 + 16 + 4, 24)
    assert shown.distilled.pooled.shape == (3, 24)
    assert all(torch.equal(a, b) for a, b in zip(plain(*inputs)[:4], shown[:4], strict=True))


@pytest.mark.numeric
def test_an_image_of_which_a_corner_is_kept_is_embedded_as_the_cropped_corner():
    model = build_contrastive(CONFIG, **VOCAB, seed=0, teacher_width=24)
    pixels = drawn_pixels()
    first, *others = pixels.split(sizes(FRAMES, GRIDS))
    kept = torch.tensor([row * 6 + column for row in range(3) for column in range(2)] + list(range(24, 44)))
    seen = model(pixels, FRAMES, GRIDS, CAPTIONS, LENGTHS, True, DropPlan((6, 16, 4), kept, None))
    cut = first.view(4 * 14, 6 * 14, 3)[: 3 * 14, : 2 * 14].flatten()
    grids = torch.tensor([[1, 3, 2], *GRIDS[1:].tolist()])
    wanted = model(torch.cat([cut, *others]), FRAMES, grids, CAPTIONS, LENGTHS, True)
    for got, cut_out in zip([*seen[:4], *seen.distilled], [*wanted[:4], *wanted.distilled], strict=True):
        assert_sums_close(got, cut_out, TERMS)
    assert (seen.vision[0] - model.encode_vision(pixels, FRAMES, GRIDS)[0]).norm() > 1e-3


def test_a_pack_without_items_drops_nothing():
    model = build_contrastive(CONFIG, **VOCAB, seed=0)
    drops = DropConfig(0.5, 0.5, blocks=2).of_pack([], 0)
    empty = torch.empty(0, dtype=torch.uint8)
    vision, text, *_ = model(empty, FRAMES[:0], GRIDS[:0], CAPTIONS[:0], LENGTHS[:0], False, drops)
    assert vision.shape == text.shape == (0, 16)
    (vision.sum() + text.sum()).backward()
    assert all(parameter.grad is not None for parameter in model.vision.parameters())


@pytest.mark.numeric
def test_what_a_teacher_is_shown_is_linear_in_the_normed_tokens_and_in_the_pooled_feature():
    model = build_contrastive(CONFIG, **VOCAB, seed=0, teacher_width=24)
    tokens = model.vision(drawn_pixels(), GRIDS.tolist(), frames=FRAMES)
    pooled = model.pool(tokens, [token_count(grid) for grid in GRIDS.tolist()])
    shown = model(drawn_pixels(), FRAMES, GRIDS, CAPTIONS, LENGTHS, True).distilled
    heads = model.distill
    assert_sums_close(shown.pooled, pooled @ heads.pooled.weight.T + heads.pooled.bias, 64)
    normed = tokens / (tokens.square().mean(1, keepdim=True) + 1e-6).sqrt()
    assert_sums_close(shown.patches, normed @ heads.patches.weight.T + heads.patches.bias, 2 * 64)


def test_weights_saved_with_heads_for_a_teacher_are_read_without_them_and_other_differences_are_errors():
    taught = build_contrastive(CONFIG, **VOCAB, seed=1, teacher_width=24)
    saved = taught.state_dict()
    plain = build_contrastive(CONFIG, **VOCAB, seed=0)
    plain.load_state_dict(saved)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in plain.state_dict().items())
    assert any(name.startswith("distill.") for name in saved), "the caller's own state must stay whole"
    with pytest.raises(RuntimeError, match="Unexpected key"):
        plain.load_state_dict({**saved, "stranger": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"Missing key.*distill\.norm\.weight"):
        taught.load_state_dict(plain.state_dict())
