import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from univitar_ds import tokenization
from univitar_ds.errors import ConfigError, DataError

CAPTIONS = [f"a photo of a {colour} {thing}" for colour in ("red", "blue", "green") for thing in ("cat", "dog", "car")]


@pytest.fixture(scope="module")
def tokenizer():
    return tokenization.train_tokenizer(CAPTIONS, 400)


def ids_of(tokenizer, caption):
    return tokenization.encode(tokenizer, [caption], 32)[0].tolist()


def test_special_tokens_have_the_first_ids(tokenizer):
    assert [tokenizer.id_to_token(i) for i in range(4)] == ["[PAD]", "[BOS]", "[EOS]", "[UNK]"]
    assert tokenization.special_ids(tokenizer) == tokenization.SpecialIds(0, 1, 2, tokenizer.get_vocab_size())


def test_training_depends_only_on_the_captions(tokenizer):
    again = tokenization.train_tokenizer(iter(CAPTIONS[::-1]), 400)
    assert again.to_str() == tokenizer.to_str()
    assert tokenization.train_tokenizer([*CAPTIONS, "zebra zebra zebra"], 400).to_str() != tokenizer.to_str()


def test_the_vocabulary_keeps_its_limit():
    captions = [f"word{i} number{i * 7919}" for i in range(500)] * 2
    assert tokenization.train_tokenizer(captions, 300).get_vocab_size() <= 300


def test_a_vocabulary_too_small_for_all_bytes_is_refused():
    with pytest.raises(ConfigError, match=r"259 .* at least 260"):
        tokenization.train_tokenizer(CAPTIONS, 259)


def test_no_captions_are_an_error():
    with pytest.raises(DataError, match="no captions"):
        tokenization.train_tokenizer([], 400)


def test_rows_begin_and_end_and_are_padded_to_the_longest(tokenizer):
    ids, lengths = tokenization.encode(tokenizer, ["a photo of a red cat", "dog", ""], 32)
    assert ids.dtype == lengths.dtype == torch.int64
    assert ids.shape == (3, lengths.max())
    assert lengths[2] == 2
    for row, length in zip(ids.tolist(), lengths.tolist(), strict=True):
        assert (row[0], row[length - 1]) == (1, 2)
        assert row[length:] == [0] * (len(row) - length)
        assert 0 not in row[:length]
        assert row.count(2) == 1


def test_a_long_caption_loses_words_but_not_its_end(tokenizer):
    ids, lengths = tokenization.encode(tokenizer, ["a photo of a red cat " * 20], 8)
    whole, _ = tokenization.encode(tokenizer, ["a photo of a red cat " * 20], 1000)
    assert (ids.shape, lengths.tolist()) == ((1, 8), [8])
    assert ids[0, :7].tolist() == whole[0, :7].tolist()
    assert ids[0, 7] == 2


def test_no_captions_encode_to_an_empty_column(tokenizer):
    ids, lengths = tokenization.encode(tokenizer, [], 16)
    assert (ids.shape, lengths.shape) == ((0, 1), (0,))
    assert ids.dtype == torch.int64


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.characters(), max_size=40))
def test_any_caption_has_a_code_that_reads_back(tokenizer, caption):
    ids, lengths = tokenization.encode(tokenizer, [caption], 1000)
    assert 3 not in ids[0, : lengths[0]].tolist()
    read = tokenizer.decode(ids[0].tolist(), skip_special_tokens=True)
    again, _ = tokenization.encode(tokenizer, [read], 1000)
    assert again.tolist() == ids.tolist()


def test_case_and_blanks_do_not_change_the_code_nor_the_identity(tokenizer):
    one, other = "A Photo of  a\nRED cat ", "a photo of a red cat"
    assert ids_of(tokenizer, one) == ids_of(tokenizer, other)
    assert tokenization.caption_id(one) == tokenization.caption_id(other)
    assert tokenization.caption_id(one) != tokenization.caption_id("a photo of a red car")


def test_caption_ids_are_stable_63_bit_numbers():
    assert tokenization.caption_id("a photo of a leopard") == 3516780505654775659
    assert all(0 <= tokenization.caption_id(str(i)) < 1 << 63 for i in range(1000))


def test_a_caption_that_spells_a_special_token_is_text(tokenizer):
    ids, lengths = tokenization.encode(tokenizer, ["[EOS] [PAD]"], 64)
    assert ids[0].tolist().count(2) == 1
    assert 0 not in ids[0, : lengths[0]].tolist()


def test_half_a_surrogate_pair_is_replaced(tokenizer):
    caption = json.loads('"cat \\ud83d dog"')
    assert ids_of(tokenizer, caption) == ids_of(tokenizer, "cat ? dog")
    assert tokenization.caption_id(caption) == tokenization.caption_id("cat ? dog")
    assert tokenization.train_tokenizer([caption], 300)


def test_a_saved_tokenizer_encodes_alike(tokenizer, tmp_path):
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenization.load_tokenizer(tmp_path / "tokenizer.json")
    captions = [*CAPTIONS, "[EOS]", "été 日本"]
    read, kept = (tokenization.encode(of, captions, 24) for of in (loaded, tokenizer))
    for one, other in zip(read, kept, strict=True):
        assert one.tolist() == other.tolist()


def foreign(tokens: list[str], tmp_path):
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=tokens[-1]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_only_the_beginning_of_a_very_long_text_is_encoded(tokenizer):
    book = "a red cat " * 100_000
    seen = []

    class Recording:
        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def encode_batch(self, texts, **options):
            seen.extend(map(len, texts))
            return tokenizer.encode_batch(texts, **options)

    ids, lengths = tokenization.encode(Recording(), [book], 32)
    assert seen == [32 * 256]
    assert torch.equal(ids, tokenization.encode(tokenizer, [book[:300]], 32)[0])
    assert lengths.tolist() == [32]


def test_a_foreign_tokenizer_keeps_its_special_ids(tmp_path):
    loaded = tokenization.load_tokenizer(foreign(["a", "cat", "<|startoftext|>", "<|endoftext|>", "?"], tmp_path))
    assert tokenization.special_ids(loaded) == tokenization.SpecialIds(3, 2, 3, 5)
    ids, lengths = tokenization.encode(loaded, ["a cat a cat", "cat"], 16)
    assert ids.tolist() == [[2, 0, 1, 0, 1, 3], [2, 1, 3, 3, 3, 3]]
    assert lengths.tolist() == [6, 3]


def test_a_tokenizer_without_a_begin_token_begins_with_the_text(tmp_path):
    loaded = tokenization.load_tokenizer(foreign(["<pad>", "</s>", "cat", "?"], tmp_path))
    assert tokenization.encode(loaded, ["cat cat cat"], 3)[0].tolist() == [[2, 2, 1]]


def test_a_tokenizer_that_cannot_be_used_is_refused_with_its_name(tmp_path):
    with pytest.raises(ConfigError, match=r"no tokenizer at .*missing\.json"):
        tokenization.load_tokenizer(tmp_path / "missing.json")
    (tmp_path / "broken.json").write_text('{"version": 1')
    with pytest.raises(ConfigError, match=r"broken\.json is not a tokenizer\.json"):
        tokenization.load_tokenizer(tmp_path / "broken.json")
    with pytest.raises(ConfigError, match=r"tokenizer\.json has none of the end-of-text tokens"):
        tokenization.load_tokenizer(foreign(["a", "cat", "?"], tmp_path))


@pytest.mark.parametrize(("template", "begins"), [("$A [EOS]", False), ("[BOS] $A [EOS]", True), (None, True)])
def test_a_begin_token_that_the_tokenizer_itself_does_not_add_is_left_out(template, begins):
    tokenizer = tokenization.train_tokenizer(["a red square"], 300)
    if template is not None:
        tokens = [("[BOS]", tokenizer.token_to_id("[BOS]")), ("[EOS]", tokenizer.token_to_id("[EOS]"))]
        tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=tokens)
    ids, lengths = tokenization.encode(tokenizer, ["a red square"], 16)
    assert (ids[0, 0] == tokenizer.token_to_id("[BOS]")) == begins
    assert ids[0, lengths[0] - 1] == tokenizer.token_to_id("[EOS]")
    assert (tokenization.special_ids(tokenizer).bos_id is not None) == begins
