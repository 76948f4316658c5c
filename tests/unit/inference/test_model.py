"""The public model: the trained model's embeddings, for items in any packs, and probabilities of classes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.closeness import assert_sums_close, encoder_terms
from tests.support.finished import run_config, write_run
from tests.support.golden import CASES, golden
from univitar_ds import Preprocessor, UniViTAR, UniViTARModel
from univitar_ds.errors import CheckpointError, UserError
from univitar_ds.evaluation.embed import embed_texts
from univitar_ds.evaluation.zero_shot import class_vectors
from univitar_ds.formats.recognise import open_stored
from univitar_ds.model.contrastive import ContrastiveModel
from univitar_ds.tokenization import load_tokenizer

LONGEST = 64  # tokens of an item in the run's configuration
NAMES = ["red image", "green image", "video"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ContrastiveModel]:
    folder = tmp_path_factory.mktemp("runs") / "tried"
    return folder, write_run(folder, run_config())


@pytest.fixture(scope="module")
def model(trained) -> UniViTARModel:
    return UniViTARModel.from_pretrained(trained[0])


def terms(model: UniViTARModel) -> int:
    """Numbers on the longest path to an embedding."""
    config = model.encoder.config
    return encoder_terms(config, LONGEST) + 4 * config.hidden_size + LONGEST


@pytest.fixture(scope="module")
def items() -> list:
    draw = np.random.default_rng(0)
    images = [
        Image.fromarray(draw.integers(0, 256, size, np.uint8)) for size in ((60, 90, 3), (40, 40, 3), (30, 200, 3))
    ]
    return [images[0], [images[1], images[1].rotate(90)], images[1], images[2]]


def test_embeddings_are_those_of_the_trained_model(trained, model, items):
    pixels, frames, grids = Preprocessor(model.encoder.config).pixels(items)
    with torch.no_grad():
        wanted = trained[1].encode_vision(pixels, torch.tensor(frames), torch.tensor(grids))
    assert torch.equal(model.encode_image(items), wanted)
    assert_sums_close(wanted.norm(dim=-1), torch.ones(4), terms=2 * 16)


def test_texts_are_encoded_as_the_evaluation_does(trained, model):
    texts = ["a red image", "", "A  Red image", "word " * 500]
    tokenizer = load_tokenizer(trained[0] / "tokenizer.json")
    found = model.encode_text(texts)
    assert torch.equal(found, embed_texts(trained[1], tokenizer, texts, run_config().model.text.context_length))
    assert torch.equal(found[0], found[2])  # the tokenizer ignores case and runs of blanks
    assert model.encode_text([]).shape == (0, 16)


@pytest.mark.numeric
def test_the_packs_do_not_matter(model, items):
    one, together = model.features(items, tokens_at_once=1), model.features(items)
    assert one.grid_thw.tolist() == together.grid_thw.tolist()
    assert [len(tokens) for tokens in one.tokens] == together.grid_thw.prod(dim=1).tolist()
    for a, b in zip([*one.tokens, one.pooled], [*together.tokens, together.pooled], strict=True):
        assert_sums_close(a, b, terms(model))
    assert_sums_close(model.encode_image(items, tokens_at_once=1), model.encode_image(items), terms(model))


@pytest.mark.numeric
@pytest.mark.parametrize("tokens_at_once", [1, 16384])
def test_blocks_and_their_attention_are_returned_by_item_with_any_packs(model, items, tokens_at_once):
    pixels, frames, grids = Preprocessor(model.encoder.config).pixels(items)
    with torch.no_grad():
        _, wanted = model.encoder.forward_intermediates(pixels, grids, [-1, 0], frames=frames)
        probabilities = model.encoder.attention_maps(pixels, grids, 0, frames=frames)
    found = model.intermediates(items, [-1, 0], tokens_at_once=tokens_at_once)
    flat = model.intermediates(items, [-1, 0], output_fmt="NLC", tokens_at_once=tokens_at_once)
    maps = model.attention_maps(items, 0, tokens_at_once=tokens_at_once)
    assert [len(found), len(flat), len(maps)] == [2, 2, len(items)]
    for one, other, tokens in zip(found, wanted, flat, strict=True):
        assert [len(item) for item in tokens] == [t * h * w for t, h, w in grids]
        for a, b in zip(one, other, strict=True):
            assert_sums_close(a, b, terms(model))
            assert not a.requires_grad
    for a, b in zip(maps, probabilities, strict=True):
        assert_sums_close(a, b, terms(model))
    for a, b in zip(flat[0], model.features(items).tokens, strict=True):
        assert_sums_close(a, b, terms(model))


def test_similarity_is_the_logit_of_the_objective(model, items):
    images, texts = model.encode_image(items), model.encode_text(NAMES)
    scale, bias = model.module.logit_scale.exp().item(), model.module.logit_bias.item()
    assert_sums_close(model.similarity(images, texts), images @ texts.T * scale + bias, terms=16)


def test_zero_shot_has_the_class_vectors_of_the_evaluation(model, items):
    templates = ["a photo of a {}.", "{} in the rain"]
    found = model.zero_shot(items, NAMES, templates)
    classes = class_vectors(NAMES, templates, model.encode_text)
    scale = model.module.logit_scale.exp()
    assert_sums_close(found, (scale * model.encode_image(items) @ classes.T).softmax(dim=-1), terms=64)
    assert_sums_close(found.sum(dim=1), torch.ones(4), terms=3)


@pytest.mark.parametrize(("arguments", "said"), [
    (("first", NAMES), "put a single one in a list"),
    (("items", []), "at least one name"), (("items", "cat"), "put a single one in a list"),
    (("items", NAMES, ["a photo"]), "needs {}"), (("items", NAMES, []), "needs {}"),
    (("items", NAMES, "a photo of {}"), "got 'a photo of {}'; put a single one in a list"),
])  # fmt: skip
def test_wrong_arguments_are_errors(model, items, arguments, said):
    first, *rest = arguments
    given = {"items": items, "first": items[0]}[first] if isinstance(first, str) else first
    with pytest.raises(UserError, match=said):
        model.zero_shot(given, *rest)


def test_no_items_are_no_rows_and_a_name_given_twice_has_two_columns(model, items):
    assert model.encode_image([]).shape == (0, 16)
    assert model.zero_shot([], NAMES).shape == (0, 3)
    found = model.zero_shot(items, [*NAMES, NAMES[0]])
    assert torch.equal(found[:, 0], found[:, 3])


@pytest.mark.parametrize(
    ("images", "texts", "said"),
    [
        ((2, 8), (3, 16), r"image_embeddings .*\(2, 8\)"),
        ((2, 16), (3, 8), "text_embeddings"),
        ((16,), (3, 16), r"\(16,\)"),
    ],
)
def test_embeddings_of_another_width_are_refused(model, images, texts, said):
    with pytest.raises(UserError, match=rf"{said}.* of width 16"):
        model.similarity(torch.zeros(images), torch.zeros(texts))


@pytest.mark.parametrize("case", CASES)
def test_an_encoder_alone_gives_features(case, items):
    model = UniViTARModel.from_pretrained(golden(case).folder)
    assert not model.training
    encoder = UniViTAR.from_pretrained(golden(case).folder)
    values, grids = Preprocessor.from_pretrained(golden(case).folder)(items[:1])
    found = model.features(items[:1])
    with torch.no_grad():
        assert_sums_close(found.tokens[0], encoder(values, grids), encoder_terms(encoder.config, len(values)))
    assert_sums_close(found.pooled[0], found.tokens[0].mean(dim=0), len(values))
    for method in (model.encode_image, model.encode_text):
        with pytest.raises(UserError, match="an encoder alone"):
            method(items)


def test_a_model_may_be_opened_in_half_precision(trained, items):
    half = UniViTARModel.from_pretrained(trained[0], dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.encode_image(items).dtype == torch.float32


def test_a_stored_model_without_its_pool_is_refused(trained):
    stored = open_stored(trained[0])
    cut = type(stored)(**{**vars(stored), "tensors": stored.tensors.renamed(lambda n: None if "pool" in n else n)})
    with pytest.raises(CheckpointError, match=r"missing: pool\.query"):
        UniViTARModel.of(cut)
