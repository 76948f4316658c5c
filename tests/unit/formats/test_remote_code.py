"""transformers runs the code of a folder: same preprocessing bit for bit, same features, same probabilities."""

import io
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    dynamic_module_utils,
    pipeline,
)
from transformers.utils import logging

from tests.support import media
from tests.support.closeness import assert_sums_close, encoder_terms, transformer_terms
from tests.support.stored_models import CAPTIONS, CONTEXT, TOKENIZER, make_model, small_encoder_config, textured
from univitar_ds import Preprocessor
from univitar_ds.errors import UserError
from univitar_ds.formats import hf
from univitar_ds.tokenization import encode

IMAGES = [textured(60, 100), textured(31, 9, seed=1), [textured(70, 40, seed=i) for i in range(4)]]
FEATURE_TERMS = 2 * (1176 + transformer_terms(width=32, inner=64, head=16, layers=3, longest=48))
"""Of a feature: the encoder or text tower, pooling and projection."""
NEAR = 1e-5
"""Bound of a unit vector's error."""


@pytest.fixture(scope="module", autouse=True)
def module_cache(tmp_path_factory):
    """Copies of the code go to a temporary folder, and nothing is looked up elsewhere."""
    cache = str(tmp_path_factory.mktemp("home") / "modules")
    logging.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", cache)
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr(sys, "path", list(sys.path))
        yield
    logging.enable_progress_bar()
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(model, folder) by family; CLIP's is of a sigmoid run, SigLIP's of a softmax run."""
    found = {}
    for family, objective in (("clip", "sigmoid"), ("siglip", "softmax")):
        folder = tmp_path_factory.mktemp("models") / family
        made = make_model(family, objective)
        hf.write(made.stored, folder)
        found[family] = made, folder
    return found


def load(kind, folder, **options):
    return kind.from_pretrained(folder, trust_remote_code=True, **options)


def written(folder, config):
    """Returns the image processor of a folder with an encoder of this configuration."""
    hf.write(replace(make_model().stored.encoder_only(), encoder=config), folder)
    return load(AutoImageProcessor, folder)


@pytest.mark.numeric
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_features_and_logits_are_those_of_the_package(folders, family):
    made, folder = folders[family]
    net, prep = made.net, Preprocessor(made.stored.encoder)
    model, inputs = load(AutoModel, folder), load(AutoProcessor, folder)(images=IMAGES, text=CAPTIONS)
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    pixels, frames, grids = prep.pixels(IMAGES)
    ids, lengths = encode(TOKENIZER, CAPTIONS, CONTEXT)
    with torch.no_grad():
        images = net.encode_vision(pixels, torch.tensor(frames), torch.tensor(grids))
        texts = net.encode_text(ids, lengths)
        result = model(**inputs)
    for got, wanted in ((result.image_embeds, images), (result.text_embeds, texts)):
        assert_sums_close(got, wanted, FEATURE_TERMS)
        assert (got - wanted).abs().max() < NEAR
    logits = net.logit_scale.exp() * images @ texts.T + net.logit_bias
    assert_sums_close(result.logits_per_image, logits, FEATURE_TERMS)
    assert torch.equal(result.logits_per_text, result.logits_per_image.T)


@pytest.mark.numeric
@pytest.mark.parametrize("changes", [{}, {"spatial_merge_size": 2, "qkv_bias": True, "qk_normalization": False}])
def test_the_encoder_alone_gives_its_tokens_and_all_hidden_states(tmp_path, changes):
    made = make_model(**changes)
    hf.write(made.stored.encoder_only(), tmp_path)
    model, inputs = load(AutoModel, tmp_path), load(AutoImageProcessor, tmp_path)(IMAGES)
    with torch.no_grad():
        tokens, states = made.net.vision(inputs["pixel_values"], inputs["grid_thw"], output_hidden_states=True)
        result = model(**inputs, output_hidden_states=True)
        assert model(**inputs).hidden_states is None
    terms = encoder_terms(made.stored.encoder, longest=48)
    assert_sums_close(result.last_hidden_state, tokens, terms)
    assert len(result.hidden_states) == len(states) == 3
    for got, wanted in zip(result.hidden_states, states, strict=True):
        assert_sums_close(got, wanted, terms)
    with pytest.raises(ValueError, match="patches, the grids take"):
        model(inputs["pixel_values"][1:], inputs["grid_thw"])
    with pytest.raises(ValueError, match="at least one item"):
        model(inputs["pixel_values"][:0], inputs["grid_thw"][:0])


def test_hidden_states_of_both_towers(folders):
    for made, folder in folders.values():
        model, inputs = load(AutoModel, folder), load(AutoProcessor, folder)(images=IMAGES, text=CAPTIONS)
        with torch.no_grad():
            image = model.get_image_features(inputs["pixel_values"], inputs["grid_thw"], output_hidden_states=True)
            text = model.get_text_features(inputs["input_ids"], inputs["attention_mask"], output_hidden_states=True)
        layers = made.stored.encoder.num_hidden_layers
        assert (len(image.hidden_states), len(text.hidden_states)) == (layers + 1, 3)


@pytest.mark.numeric
def test_eager_attention_gives_the_same(folders):
    _, folder = folders["clip"]
    model, inputs = load(AutoModel, folder), load(AutoProcessor, folder)(images=IMAGES, text=CAPTIONS)
    with torch.no_grad():
        wanted = model(**inputs).logits_per_image
        model.set_attn_implementation("eager")
        assert model.vision_model.config._attn_implementation == "eager"
        assert_sums_close(model(**inputs).logits_per_image, wanted, FEATURE_TERMS)


def test_a_load_in_bfloat16_keeps_scale_and_bias(folders):
    made, folder = folders["siglip"]
    model, inputs = load(AutoModel, folder, dtype=torch.bfloat16), load(AutoProcessor, folder)(IMAGES, CAPTIONS)
    assert model.dtype == model.text_model.dtype == torch.bfloat16
    assert torch.equal(model.logit_scale, made.net.logit_scale)
    with torch.no_grad():
        result = model(**inputs)
        wanted = load(AutoModel, folder)(**inputs)
    assert result.image_embeds.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(result.image_embeds, wanted.image_embeds).min() > 0.98
    assert torch.nn.functional.cosine_similarity(result.text_embeds, wanted.text_embeds).min() > 0.98


@pytest.mark.parametrize("noted", [None, "float32"])
def test_a_folder_in_bfloat16_loads_in_bfloat16(tmp_path, noted):
    """Whatever type the text tower's own configuration notes."""
    stored = make_model().stored.converted(torch.bfloat16)
    joint = replace(stored.joint, text={**stored.joint.text, "dtype": noted})
    hf.write(replace(stored, joint=joint), tmp_path)
    model = load(AutoModel, tmp_path)
    others = {value.dtype for name, value in model.named_parameters() if not name.startswith("logit_")}
    assert others == {torch.bfloat16}
    assert hf.read(tmp_path).joint == joint


def test_gradient_checkpointing_gives_the_same_gradients(folders):
    _, folder = folders["clip"]
    model, inputs = load(AutoModel, folder).train(), load(AutoProcessor, folder)(images=IMAGES, text=CAPTIONS)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                model.gradient_checkpointing_enable()
            assert model.vision_model.encoder["layers"][0].gradient_checkpointing
        model.zero_grad()
        model(**inputs).logits_per_image.square().sum().backward()
        gradients.append(
            {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys() >= {"vision_model.encoder.layers.0.ls1", "pool.query"}
    for name, value in gradients[0].items():
        assert torch.equal(gradients[1][name], value), name


@pytest.mark.numeric
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_text_is_cut_and_ends_where_the_package_does_it(folders, family):
    made, folder = folders[family]
    model, tokenizer = load(AutoModel, folder), load(AutoTokenizer, folder)
    ids, lengths = encode(TOKENIZER, CAPTIONS, CONTEXT)
    whole = tokenizer(CAPTIONS, return_tensors="pt", padding=True)
    assert whole["input_ids"].shape[1] > CONTEXT
    with torch.no_grad():
        wanted = made.net.encode_text(ids, lengths)
        for got in (
            model.get_text_features(**whole),
            model.get_text_features(whole["input_ids"]),
            model.get_text_features(**tokenizer(CAPTIONS, return_tensors="pt", padding="max_length", max_length=64)),
            model.get_text_features(**tokenizer(CAPTIONS, return_tensors="pt", padding=True, truncation=True)),
        ):
            assert_sums_close(got.pooler_output, wanted, FEATURE_TERMS)


def test_texts_have_the_ids_of_the_package(folders):
    processor = load(AutoProcessor, folders["clip"][1])
    odd = [*CAPTIONS, "half a pair \ud800", " " * 256 * CONTEXT + "not read", "İ Ünïcode\n\tblanks"]
    ids, lengths = encode(TOKENIZER, odd, CONTEXT)
    got = processor(text=odd)
    assert torch.equal(got["input_ids"], ids)
    assert torch.equal(got["attention_mask"].sum(1), lengths)
    assert processor(text="one")["input_ids"].shape[0] == 1
    with pytest.raises(ValueError, match="at least one text, image or video"):
        processor()


def test_images_and_videos_are_one_pack(folders):
    made, folder = folders["clip"]
    processor = load(AutoProcessor, folder)
    wanted = Preprocessor(made.stored.encoder)
    for inputs, items in (
        ({"images": IMAGES[0]}, IMAGES[:1]),
        ({"videos": [IMAGES[2]]}, IMAGES[2:]),
        ({"images": IMAGES[:2], "videos": [IMAGES[2]]}, IMAGES),
    ):
        got = processor(**inputs)
        values, grids = wanted(items)
        assert torch.equal(got["pixel_values"], values)
        assert torch.equal(got["grid_thw"], grids)


def stored_as(image, kind, **options):
    return Image.open(io.BytesIO(media.encoded(image, kind, **options)))


def odd_images():
    """Images in all modes and orientations, transparent ones and greys of more than 8 bit."""
    base, ramp = textured(37, 61), np.linspace(0, 1, 40 * 50).reshape(40, 50)
    alpha = base.copy()
    alpha.putalpha(Image.fromarray((ramp * 255).astype(np.uint8)).resize(base.size))
    modes = [base.convert(mode) for mode in ("1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LAB", "RGBX")]
    clear = [alpha, alpha.convert("LA"), alpha.convert("LA").convert("La"), alpha.convert("RGBa"), alpha.convert("PA")]
    keyed = [stored_as(base.convert(mode), "PNG", transparency=key) for mode, key in (("L", 90), ("P", 3))]
    keyed.append(stored_as(base, "PNG", transparency=base.getpixel((0, 0))))
    turned = [stored_as(base, "JPEG", exif=media.exif(number)) for number in range(10)]
    turned += [stored_as(alpha, "PNG", exif=media.exif(6)), stored_as(base, "TIFF", exif=media.exif(8))]
    deep = [
        Image.fromarray((ramp * scale + shift).astype(kind))
        for scale, shift, kind in (
            (65535, 0, np.uint16), (200, 0, np.uint16), (65535, 0, np.int32), (9000, -4000, np.int32),
            (1, 0, np.float32), (255, 0, np.float32), (3, -1, np.float32), (1e9, 0, np.float32),
        )
    ]  # fmt: skip
    broken = np.where(ramp > 0.5, np.nan, ramp).astype(np.float32)
    deep += [
        Image.fromarray(broken),
        stored_as(deep[0], "PNG"),
        deep[0].convert("I"),
        Image.new("I;16B", (30, 40), 700),
    ]
    deep.append(stored_as(deep[0], "TIFF", exif=media.exif(7)))
    deep.append(Image.fromarray((ramp > 0.5).astype(np.float32)))  # whole numbers, so no fractions of white
    return [*modes, *clear, *keyed, *turned, *deep, textured(700, 600)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"resolution_mode": "56"},
        {"relarge_ratio": 1.7, "max_tokens": 30},
        {"spatial_merge_size": 2, "resize_factor": 2, "min_tokens": 20, "max_tokens": 100},
        {"image_mean": (0.5, 0.1, 0.9), "image_std": (0.5, 1.0, 0.01)},
    ],
    ids=lambda changes: "-".join(changes) or "native",
)
def test_preprocessing_is_that_of_the_package_bit_for_bit(tmp_path, changes):
    config = small_encoder_config(**changes)
    items = [*odd_images(), textured(3, 300), textured(300, 3), *IMAGES, [textured(20, 20)]]
    got = written(tmp_path, config)(items)
    values, grids = Preprocessor(config)(items)
    assert torch.equal(got["grid_thw"], grids)
    assert got["pixel_values"].dtype == values.dtype
    assert torch.equal(got["pixel_values"], values)


def test_every_byte_is_normalised_as_in_the_package(tmp_path):
    config = small_encoder_config()
    values = np.arange(56 * 56 * 3).reshape(56, 56, 3) % 256
    image = Image.fromarray(values.astype(np.uint8))
    assert torch.equal(written(tmp_path, config)(image)["pixel_values"], Preprocessor(config)([image])[0])


@pytest.mark.parametrize(
    "items",
    [
        [],
        [[]],
        [[textured(28, 28)] * 3],
        [textured(28, 28), [textured(28, 28), textured(28, 30)]],
        ["cat.png"],
        [[textured(28, 28), 3]],
        [[textured(28, 28)] * 200],
    ],
    ids=["nothing", "no frames", "odd frames", "sizes", "path", "number", "too long"],
)
def test_what_cannot_be_prepared_is_refused_as_in_the_package(tmp_path, items):
    config = small_encoder_config()
    with pytest.raises(UserError) as ours:
        Preprocessor(config)(items)
    with pytest.raises(ValueError) as theirs:
        written(tmp_path, config)(items)
    if items:
        assert str(theirs.value) == str(ours.value)
    else:
        assert "at least one image or video" in str(theirs.value)


@pytest.mark.parametrize("objective", ["sigmoid", "softmax"])
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_the_zero_shot_pipeline_gives_the_probabilities_of_the_objective(tmp_path, family, objective):
    made = make_model(family, objective)
    hf.write(made.stored, tmp_path)
    classify = pipeline("zero-shot-image-classification", model=str(tmp_path), trust_remote_code=True)
    labels = ["square", "circle", "", "very long label " * 10]
    got = classify(IMAGES[:2], candidate_labels=labels, hypothesis_template="a {}", batch_size=2)
    ids, lengths = encode(TOKENIZER, [f"a {label}" for label in labels], CONTEXT)
    pixels, frames, grids = Preprocessor(made.stored.encoder).pixels(IMAGES[:2])
    with torch.no_grad():
        images = made.net.encode_vision(pixels, torch.tensor(frames), torch.tensor(grids))
        logits = made.net.logit_scale.exp() * images @ made.net.encode_text(ids, lengths).T + made.net.logit_bias
    wanted = logits.sigmoid() if objective == "sigmoid" else logits.softmax(-1)
    for row, found in zip(wanted, got, strict=True):
        scores = {entry["label"]: entry["score"] for entry in found}
        # The scale of the logits, 10, multiplies the error of the cosines.
        assert_sums_close([scores[label] for label in labels], row, 100 * FEATURE_TERMS)


def test_other_pipelines_give_one_row_per_image(folders):
    made, folder = folders["clip"]
    extract = pipeline("image-feature-extraction", model=str(folder), trust_remote_code=True)
    rows = extract(IMAGES[:2] + IMAGES[:1], batch_size=3, return_tensors=True)
    with torch.no_grad():
        pixels, frames, grids = Preprocessor(made.stored.encoder).pixels(IMAGES[:2])
        wanted = made.net.encode_vision(pixels, torch.tensor(frames), torch.tensor(grids))
    assert len(rows) == 3
    for got, index in zip(rows, (0, 1, 0), strict=True):
        assert_sums_close(got.flatten(), wanted[index], FEATURE_TERMS)


def test_sharded_folders_load_and_all_auto_classes_find_theirs(tmp_path):
    made = make_model("siglip")
    hf.write(made.stored, tmp_path, shard_bytes=50_000)
    model, info = load(AutoModelForZeroShotImageClassification, tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(model.text_projection.weight, made.net.text_proj.weight)
    assert type(load(AutoProcessor, tmp_path)).__name__ == "UniViTARProcessor"


def test_a_folder_that_transformers_saved_is_read(folders, tmp_path):
    for family, (made, folder) in folders.items():
        model, processor = load(AutoModel, folder), load(AutoProcessor, folder)
        processor(text=CAPTIONS)  # leaves its padding and truncation in the tokenizer
        model.save_pretrained(tmp_path / family)
        processor.save_pretrained(tmp_path / family)
        assert hf.recognises(tmp_path / family)
        back = hf.read(tmp_path / family)
        assert back.encoder == made.stored.encoder
        assert all(torch.equal(back.tensors[name], value) for name, value in made.stored.tensors.items())
        assert replace(back.joint, text={}, tokenizer="") == replace(made.stored.joint, text={}, tokenizer="")
        hf.write(back, tmp_path / "again" / family)
        ids = load(AutoProcessor, tmp_path / "again" / family)(text=CAPTIONS)["input_ids"]
        assert torch.equal(ids, encode(TOKENIZER, CAPTIONS, CONTEXT)[0])


def test_each_of_two_folders_of_one_name_runs_its_own_code(tmp_path, monkeypatch):
    stored = make_model().stored
    hf.write(stored, tmp_path / "a" / "model")
    code = tmp_path / "code"
    code.mkdir()
    for path in hf.CODE.glob("*.py"):
        text = path.read_text(encoding="utf-8").replace(
            "class UniViTARModel(UniViTARPreTrainedModel):",
            "class UniViTARModel(UniViTARPreTrainedModel):\n    new = 1\n",
        )
        (code / path.name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(hf, "CODE", code)
    hf.write(stored, tmp_path / "b" / "model")
    first, second = (load(AutoModel, tmp_path / name / "model") for name in ("a", "b"))
    assert (hasattr(first, "new"), hasattr(second, "new")) == (False, True)


def test_an_image_processor_can_be_saved_alone(folders, tmp_path):
    made, folder = folders["clip"]
    load(AutoImageProcessor, folder).save_pretrained(tmp_path)
    again = load(AutoImageProcessor, tmp_path)
    assert torch.equal(again(IMAGES)["pixel_values"], Preprocessor(made.stored.encoder)(IMAGES)[0])
    assert "AutoProcessor" not in (tmp_path / "preprocessor_config.json").read_text(encoding="utf-8")


def test_flash_attention_gets_the_boundaries_of_the_items(folders, monkeypatch):
    """A stand-in for its function, which a CPU lacks, that attends within the boundaries."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    _, folder = folders["clip"]
    model, inputs = load(AutoModel, folder), load(AutoImageProcessor, folder)(IMAGES)
    calls = []

    def attend(module, q, k, v, attention_mask, *, scaling, dropout, is_causal, **bounds):
        assert (attention_mask, dropout, is_causal) == (None, 0.0, False)
        ends = {side: bounds[f"cu_seq_lens_{side}"] for side in "qk"}
        assert all(bound.dtype == torch.int32 and bound[0] == 0 for bound in ends.values())
        assert all(bounds[f"max_length_{side}"] == ends[side].diff().max() for side in "qk")
        calls.append((q.shape[2], k.shape[2]))
        parts = zip(*(x.tensor_split(ends[s][1:-1].long(), 2) for x, s in ((q, "q"), (k, "k"), (v, "k"))), strict=True)
        out = [torch.nn.functional.scaled_dot_product_attention(*part, scale=scaling) for part in parts]
        return torch.cat(out, 2).transpose(1, 2), None

    with torch.no_grad():
        wanted = model.get_image_features(**inputs).pooler_output
        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_attention_2", attend)
        model.vision_model.config._attn_implementation_internal = "flash_attention_2"
        got = model.get_image_features(**inputs).pooler_output
    tokens = len(inputs["pixel_values"])
    assert calls == [(tokens, tokens)] * 2 + [(3, tokens)]
    assert torch.equal(got, wanted)
