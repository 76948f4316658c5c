"""One sample: its media, caption, label and size; everything that can be wrong with it has a kind."""

import json
from dataclasses import replace

import pytest

from tests.support.memory import shards_of
from tests.support.shards import clip, picture
from univitar_ds.data import samples
from univitar_ds.data.captions import read_texts
from univitar_ds.data.lanes import shard_samples
from univitar_ds.data.samples import SizeRule, belongs, read_sample, read_sample_again
from univitar_ds.errors import SampleError
from univitar_ds.geometry import Resolution

IMAGE = SizeRule("image", Resolution(1, 100, 14), 1, 100, 10**6)
VIDEO = SizeRule("video", Resolution(1, 100, 14), 4, 100, 10**6)
PNG = picture(28, 42, form="PNG")


def shard_and_group(members, modality="image"):
    (shard,) = shards_of([[("before", {"png": picture(14, 14), "txt": b"other"}), ("k", members)]], modality)
    return shard, list(shard_samples(shard, modality or "image"))[-1]


def kind_of(members, rule=IMAGE):
    with pytest.raises(SampleError) as caught:
        read_sample(*shard_and_group(members, rule.modality), rule)
    return caught.value.kind


def test_a_picture_with_its_caption_label_address_and_grid():
    shard, group = shard_and_group({"png": PNG, "json": b'{"captions": [" one ", "two"], "label": "cat"}'})
    found = read_sample(shard, group, IMAGE)
    assert (found.name, found.captions, found.label, found.grid, found.tokens) == (
        "m0/k",
        ("one", "two"),
        "cat",
        (1, 2, 3),
        6,
    )
    assert shard.storage.read_range("m0", found.media_offset, found.media_length) == PNG


def test_a_clip_takes_the_frames_of_the_rule_whatever_it_has():
    shard, group = shard_and_group({"mp4": clip(28, 56, frames=9), "txt": b"moves", "cls": b"left\n"}, "video")
    found = read_sample(shard, group, VIDEO)
    assert (found.captions, found.label, found.grid) == (("moves",), "left", (2, 2, 4))


def test_reading_again_by_address_gives_the_same_sample():
    shard, group = shard_and_group({"png": PNG, "txt": b"t"})
    assert read_sample_again(shard, group.offset, group.length, IMAGE) == read_sample(shard, group, IMAGE)
    assert read_sample_again(shard, group.offset + 512, group.length, IMAGE) is None
    with pytest.raises(SampleError):
        read_sample_again(shard, group.offset, group.length, VIDEO)


def test_each_fault_of_a_sample_has_its_kind(monkeypatch):
    assert kind_of({"txt": b"alone"}) == "no_media"
    assert kind_of({"png": PNG}) == "no_caption"
    assert kind_of({"png": PNG, "json": b"{}"}) == "no_caption"
    assert kind_of({"png": PNG, "json": b'{"captions": []}'}) == "no_caption"
    assert kind_of({"png": b"", "txt": b"t"}) == "unreadable"
    assert kind_of({"mp4": picture(20, 20), "txt": b"t"}, VIDEO) == "wrong_kind"
    assert kind_of({"png": PNG, "txt": b"t"}, replace(IMAGE, max_image_px=28 * 42 - 1)) == "too_large"
    assert kind_of({"png": PNG, "txt": b"t"}, replace(IMAGE, most_tokens=5)) == "too_large"
    monkeypatch.setattr(samples, "SAMPLE_BYTES_LIMIT", 1000)
    assert kind_of({"png": PNG + bytes(1000), "txt": b"t"}) == "too_large"


def test_two_members_of_one_name_are_a_fault():
    shard, group = shard_and_group({"png": PNG, "txt": b"t"})
    group.members.append(group.members[0])
    with pytest.raises(SampleError, match="two members have the same name") as caught:
        read_sample(shard, group, IMAGE)
    assert caught.value.kind == "duplicate"


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"json": b'{"caption": "c"}', "txt": b"t"}, (("c",), None, None)),
        ({"json": b'{"label": 7}', "txt": b"t"}, (("t",), "7", None)),
        ({"json": b'{"captions": "c"}', "cls": b"3"}, (("c",), "3", None)),
        ({"txt": "\ufeffgrün\n".encode()}, (("grün",), None, None)),
        ({"json": b'{"caption": "c", "label": "x", "set": "s"}'}, (("c",), "x", "s")),
    ],
)
def test_texts_come_from_json_first_and_then_from_their_own_members(members, expected):
    assert read_texts(members)[:3] == expected


@pytest.mark.parametrize(
    ("members", "kind", "said"),
    [
        ({"json": b'{"captions": ["a", 3]}'}, "bad_caption", "a caption is '3' (int), not text"),
        ({"json": b'{"captions": [null]}'}, "bad_caption", "a caption is 'None' (NoneType), not text"),
        ({"json": b'{"captions": {"a": 1}}'}, "bad_caption", "not a list of texts"),
        ({"json": b'{"caption": " \\n"}'}, "bad_caption", "a caption is empty"),
        ({"txt": b""}, "bad_caption", "a caption is empty"),
        ({"txt": b"a\xff"}, "bad_caption", "its .txt is not UTF-8 text (byte 1)"),
        ({"json": b'{"caption": "c", "set": 1}'}, "bad_label", "set is '1' (int), not text"),
        ({"json": b'{"caption": "c", "label": [1]}'}, "bad_label", "label is '[1]' (list), not text"),
        ({"json": b"{"}, "bad_json", "its .json does not parse"),
        ({"json": b"\xff\xfe\x00"}, "bad_json", "its .json does not parse"),
        ({"json": b"[" * 100_000}, "bad_json", "its .json does not parse"),
        ({"json": json.dumps(["c"]).encode()}, "bad_json", "its .json holds a list, not an object"),
    ],
)
def test_a_text_that_is_none_is_told_in_a_sentence(members, kind, said):
    with pytest.raises(SampleError) as caught:
        read_texts(members)
    assert caught.value.kind == kind
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("members", "modality", "owner"),
    [
        ({"png": b""}, None, "image"),
        ({"mp4": b""}, None, "video"),
        ({"jpg": b"", "mp4": b""}, None, "video"),
        ({"txt": b""}, None, "image"),
        ({"txt": b""}, "video", "video"),
    ],
)
def test_every_sample_has_one_owner(members, modality, owner):
    (shard,) = shards_of([[("k", members)]], modality)
    with shard.storage.open("m0") as stream:
        (group,) = samples.tar.groups(stream, "m0", shard.size)
    owners = [kind for kind in ("image", "video") if belongs(group, shard, kind)]
    assert owners == [owner]
