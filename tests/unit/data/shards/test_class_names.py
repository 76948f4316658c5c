"""Labels that are numbers get their class names wherever samples are read."""

import logging
import re

import pytest

from tests.support.shards import image, write_tar
from univitar_ds.config.data import DataConfig, SourceConfig
from univitar_ds.data.caption_texts import iterate_captions
from univitar_ds.data.loader import eval_packs
from univitar_ds.data.shards.class_names import named, read_class_names
from univitar_ds.data.shards.sources import find_shards, fingerprint
from univitar_ds.data.storage.base import LOCAL
from univitar_ds.data.tools.verify import verify
from univitar_ds.errors import DataError, SampleError
from univitar_ds.geometry import Resolution


def labelled(folder, labels, names="cat\r\ntabby dog\n", **options) -> SourceConfig:
    """A source whose samples have only a label, with a file of class names next to it."""
    (folder / "classes.txt").write_bytes(names.encode())
    samples = [(f"k{n}", {"png": image(28, 28, form="PNG"), "cls": label.encode()}) for n, label in enumerate(labels)]
    path = write_tar(folder / "a.tar", samples)
    return SourceConfig(
        path=str(path), templates=["a {}", "the {}"], class_names=str(folder / "classes.txt"), **options
    )


def test_a_number_becomes_its_class_name_and_a_name_is_kept():
    names = ("cat", "dog", "7")
    assert [named(label, names) for label in ("0", "1", "02", "dog", None)] == ["cat", "dog", "7", "dog", None]
    assert named("12", ()) == "12"
    for label in ("3", "-1", "bird", "1.0", "²", "9" * 5000):
        with pytest.raises(SampleError, match="is none of the 3 of its source's class_names") as refused:
            named(label, names)
        assert refused.value.kind == "bad_label"


@pytest.mark.parametrize(
    "content",
    [
        b"0\tcat\n1\ttabby dog\n2\t7-eleven\n",
        b"2 7-eleven\n0 cat\n1 tabby dog",
        b"0,cat\r\n1,tabby dog\r\n2,7-eleven\r\n\r\n",
        b"0: cat\n1: tabby dog\n2: 7-eleven",
        b"\xef\xbb\xbfcat\r\ntabby dog \r\n7-eleven\n\n\n",
        b'["cat", "tabby dog", "7-eleven"]',
        b'{"1": "tabby dog", "0": "cat", "2": "7-eleven"}',
        b'{"cat": 0, "7-eleven": 2, "tabby dog": 1}',
    ],
)
def test_class_names_are_read_in_all_supported_formats(tmp_path, content):
    (tmp_path / "names").write_bytes(content)
    assert read_class_names(str(tmp_path / "names"), LOCAL) == ("cat", "tabby dog", "7-eleven")


def test_names_that_look_like_numbers_or_json_are_kept(tmp_path):
    for names in (("0", "1", "2"), ("3 d printer", "cat"), ("[MASK]", "cat")):
        (tmp_path / "names").write_text("\n".join(names))
        assert read_class_names(str(tmp_path / "names"), LOCAL) == names


def test_a_name_of_two_classes_causes_one_warning(tmp_path, caplog):
    source = labelled(tmp_path, ["1"], names="crane\ndog\ncrane\n")
    with caplog.at_level(logging.WARNING):
        find_shards([source])
        find_shards([source])
    assert caplog.text.count("classes 0 and 2 have the same name, 'crane', and count as one") == 1


def test_labels_of_packs_and_captions_use_the_class_names(tmp_path):
    source = labelled(tmp_path, ["1", "0", "9", "cat"])
    resolution = Resolution(min_tokens=1, max_tokens=64, divisor_px=14)
    packs = list(
        eval_packs(
            [source],
            modality="image",
            resolution=resolution,
            video_frames=2,
            token_budget=64,
            tokenizer=None,
            context_length=8,
            data=DataConfig(sources=[source], workers=0),
        )
    )
    assert [label for pack in packs for label in pack.labels] == ["tabby dog", "cat", "cat"]
    assert [caption for pack in packs for caption in pack.captions] == [
        "",
        "",
        "",
    ]  # templates are used in training only
    assert packs[0].bad == {"bad_label": 1}
    expected = ["a tabby dog", "the tabby dog", "a cat", "the cat", "a cat", "the cat"]
    assert list(iterate_captions([source], limit=100)) == expected
    report = verify([source], progress=False)
    assert [(fault["kind"], fault["key"]) for fault in report["shards"][0]["faults"]] == [("bad_label", "k2")]


def test_the_fingerprint_depends_on_the_class_names(tmp_path):
    source = labelled(tmp_path, ["1"])
    before = fingerprint(find_shards([source]))
    (tmp_path / "moved.txt").write_text("cat\ntabby dog")
    assert fingerprint(find_shards([source.model_copy(update={"class_names": str(tmp_path / "moved.txt")})])) == before
    (tmp_path / "classes.txt").write_text("tabby dog\ncat")
    assert fingerprint(find_shards([source])) != before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        (b"", "line 1 is empty"),
        (b"cat\n\ndog", "line 2 is empty; line 1 names class 0"),
        (b"caf\xe9", "byte 3 is not UTF-8 text"),
        (b"1\tcat\n2\tdog", r"its 2 lines are numbered, but not from 0 to 1 \(there is no 0\)"),
        (b"0 cat\n2 dog\n3 bird", r"not from 0 to 2 \(there is no 1\)"),
        (b"0\tcat\n0\tdog", "index 0 is given 2 times"),
        (b"n01440764\ttench\nn01443537\tgoldfish", "line 1 is 'n01440764.+tench', more than a name"),
        (b"n01440764 tench\nn01443537 goldfish", "line 1 is 'n01440764 tench', more than a name"),
        (b"0\tcat\ndog", "line 1 is '0.+cat', more than a name"),
        (b'["cat", 3]', r"class 1 is '3' \(int\), not a name"),
        (b'{"0": "cat", "2": "dog"}', r"not from 0 to 1 \(there is no 1\)"),
        (b'{"0": ["n01440764", "tench"]}', r"class 0 is .* \(list\), not a name"),
        (b'{"a": "b"}', "is JSON without an index for each name"),
        (b"{}", "names no class"),
    ],
)
def test_an_unusable_file_of_class_names_is_an_error(tmp_path, content, message):
    path = tmp_path / "names.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=rf"names\.txt: .*{message}"):
        read_class_names(str(path), LOCAL)
    source = SourceConfig(path=str(write_tar(tmp_path / "a.tar", [])), class_names=str(path))
    assert re.search(message, verify([source], progress=False)["sources"][0]["error"])
