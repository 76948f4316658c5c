"""Reading one sample: media, caption, label and size; each error has a kind."""

import io
import json
import tarfile
from dataclasses import replace
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.loading import STAGE, only_lane
from tests.support.memory import shards_of
from tests.support.shards import image, video
from univitar_ds.cli.main import main
from univitar_ds.config.data import DataConfig
from univitar_ds.data.media.frame_sampling import Sampling
from univitar_ds.data.media.probe import probe
from univitar_ds.data.media.prober import probe_each
from univitar_ds.data.media.types import MediaSize
from univitar_ds.data.sampler.bad_samples import KINDS
from univitar_ds.data.shards import captions, tar_index
from univitar_ds.data.shards.captions import read_texts
from univitar_ds.data.shards.index_cache import shard_samples
from univitar_ds.data.shards.samples import SizeRule, belongs, read_samples, read_samples_again
from univitar_ds.data.shards.tar_index import SORT_HINT
from univitar_ds.errors import DataError, SampleError
from univitar_ds.geometry import Resolution


def read_sample(shard, group, rule):
    (found,) = read_samples([(shard, group)], rule)
    if isinstance(found, SampleError):
        raise found
    return found


def read_sample_again(shard, offset, length, rule):
    (found,) = read_samples_again([(shard, offset, length)], rule)
    if isinstance(found, SampleError):
        raise found
    return found


IMAGE = SizeRule("image", Resolution(1, 100, 14), 1, 100, 10**6)
VIDEO = SizeRule("video", Resolution(1, 100, 14), 4, 100, 10**6)
PNG = image(28, 42, form="PNG")


def shard_and_group(members, modality="image"):
    (shard,) = shards_of([[("before", {"png": image(14, 14), "txt": b"other"}), ("k", members)]], modality)
    return shard, list(shard_samples(shard, modality or "image"))[-1]


def kind_of(members, rule=IMAGE):
    with pytest.raises(SampleError) as caught:
        read_sample(*shard_and_group(members, rule.modality), rule)
    return caught.value.kind


def test_an_image_has_captions_label_offset_and_grid():
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


def test_a_video_has_the_number_of_frames_of_the_rule():
    shard, group = shard_and_group({"mp4": video(28, 56, frames=9), "txt": b"moves", "cls": b"left\n"}, "video")
    found = read_sample(shard, group, VIDEO)
    assert (found.captions, found.label, found.grid) == (("moves",), "left", (2, 2, 4))


def test_reading_a_sample_again_by_address_returns_the_same_sample():
    shard, group = shard_and_group({"png": PNG, "txt": b"t"})
    assert read_sample_again(shard, group.offset, group.length, IMAGE) == read_sample(shard, group, IMAGE)
    assert read_sample_again(shard, group.offset + 512, group.length, IMAGE) is None
    with pytest.raises(SampleError):
        read_sample_again(shard, group.offset, group.length, VIDEO)


def test_with_fps_sampling_the_number_of_frames_depends_on_the_duration():
    shard, group = shard_and_group({"mp4": video(28, 56, frames=12), "txt": b"moves"}, "video")  # 8 frames a second
    for rate, most, frames in ((1.0, 16, 2), (3.0, 16, 4), (4.0, 16, 6), (8.0, 16, 12), (30.0, 16, 16), (30.0, 8, 8)):
        found = read_sample(shard, group, replace(VIDEO, frames=most, sampling=Sampling("fps", rate)))
        assert (found.frames, found.grid[0]) == (frames, frames // 2), rate
        assert found.grid[1:] == VIDEO.resolution.grid(28, 56, frames)[1:]


sides = st.integers(1, 4000)


@given(sides, sides, st.integers(1, 32), st.integers(1, 600), st.integers(0, 3000), st.sampled_from([14, 28]))
def test_token_limits_apply_to_the_whole_video(height, width, tubelets, least, more, divisor):
    resolution = Resolution(least, max(least + more, 4 * tubelets), divisor)
    rule = SizeRule("video", resolution, 64, resolution.max_tokens, 10**8)
    steps, h, w = rule.grid(height, width, 2 * tubelets)
    assert steps == tubelets
    assert h % (divisor // 14) == w % (divisor // 14) == 0
    assert 0 < steps * h * w <= resolution.max_tokens


@given(sides, sides, st.integers(4, 3000), st.integers(0, 400), st.sampled_from([14, 28, 112]))
def test_an_item_above_the_tokens_of_a_pack_is_resized_again(height, width, most, below, divisor):
    cell = (divisor // 14) ** 2
    resolution = Resolution(max(most - below, 1), max(most, cell), divisor)
    rule = SizeRule("image", resolution, 1, max(most, cell), 10**8)
    grid, first = rule.grid(height, width, 1), resolution.grid(height, width, 1)
    if first[1] * first[2] <= rule.most_tokens:
        assert grid == first
    else:
        assert cell <= grid[1] * grid[2] <= rule.most_tokens
        assert grid[1] <= first[1] or grid[2] <= first[2]


def test_a_fixed_square_that_is_too_large_for_a_pack_stays_square():
    rule = SizeRule("video", Resolution(1, 1, 14, 112), 8, 4 * 8 * 8 - 1, 10**8)
    assert rule.grid(300, 200, 8) == (4, 7, 7)


def test_items_larger_than_the_rule_allows_are_marked_as_downscaled():
    rule = SizeRule("image", Resolution(4, 24, 14), 1, 100, 10**6)
    marks = [
        (rule.grid(height, width, 1), rule.shrinks(height, width, rule.grid(height, width, 1)))
        for height, width in ((14, 14), (56, 84), (62, 90), (56, 98), (280, 280))
    ]
    assert marks == [
        ((1, 2, 2), False),  # enlarged
        ((1, 4, 6), False),
        ((1, 4, 6), False),  # rounded
        ((1, 3, 6), True),
        ((1, 4, 4), True),
    ]
    shard, group = shard_and_group({"png": image(280, 280, form="PNG"), "txt": b"t"})
    assert read_sample(shard, group, rule).downscaled
    assert not read_sample(shard, group, replace(rule, resolution=Resolution(4, 400, 14), most_tokens=400)).downscaled


def test_downscaling_of_videos_fixed_squares_and_small_packs_is_detected():
    videos = SizeRule("video", Resolution(1, 24, 14), 8, 100, 10**6)
    assert not videos.shrinks(28, 42, videos.grid(28, 42, 8))
    assert videos.shrinks(42, 42, videos.grid(42, 42, 8))
    assert not videos.shrinks(42, 42, videos.grid(42, 42, 4))
    square = SizeRule("image", Resolution(1, 1, 14, 56), 1, 100, 10**6)
    assert square.shrinks(70, 70, square.grid(70, 70, 1))
    assert not square.shrinks(56, 56, square.grid(56, 56, 1))
    small_pack = SizeRule("image", Resolution(1, 50, 14), 1, 20, 10**6)
    assert small_pack.shrinks(70, 70, small_pack.grid(70, 70, 1))


def test_each_error_of_a_sample_has_its_kind():
    assert kind_of({"txt": b"alone"}) == "no_media"
    assert kind_of({"png": PNG}) == "no_caption"
    assert kind_of({"png": PNG, "json": b"{}"}) == "no_caption"
    assert kind_of({"png": PNG, "json": b'{"captions": []}'}) == "no_caption"
    assert kind_of({"png": b"", "txt": b"t"}) == "unreadable"
    assert kind_of({"mp4": image(20, 20), "txt": b"t"}, VIDEO) == "wrong_kind"
    assert kind_of({"png": PNG, "txt": b"t"}, replace(IMAGE, max_image_px=28 * 42 - 1)) == "too_large"
    assert kind_of({"png": PNG, "txt": b"t"}, replace(IMAGE, most_tokens=0)) == "too_large"
    moving = {"mp4": video(28, 56, frames=12), "txt": b"t"}
    assert kind_of(moving, replace(VIDEO, max_video_s=1.4)) == "too_large"
    assert read_sample(*shard_and_group(moving, "video"), replace(VIDEO, max_video_s=1.5)).frames == 4


def test_a_sample_with_too_many_bytes_is_refused_without_reading_it():
    shard, group = shard_and_group({"png": PNG + bytes(1 << 20), "txt": b"t"})
    small = replace(IMAGE, max_sample_mb=1)
    before = shard.storage.ranges_read
    again = partial(read_sample_again, shard, group.offset, group.length)
    for refused in (partial(read_sample, shard, group), again):
        with pytest.raises(SampleError, match=r"above data\.max_sample_mb = 1 ") as caught:
            refused(small)
        assert caught.value.kind == "too_large"
    assert shard.storage.ranges_read == before
    assert read_sample(shard, group, replace(IMAGE, max_sample_mb=2)).grid == (1, 2, 3)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_a_sample_whose_members_are_links_is_a_bad_sample(kind):
    (shard,) = shards_of([[("k", {"png": PNG, "txt": b"t"})]])
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for extension in ("png", "txt"):
            info = tarfile.TarInfo(f"l.{extension}")
            info.type, info.linkname = kind, f"k.{extension}"
            tar.addfile(info)
    shard.storage.files[shard.path] = buffer.getvalue()
    shard = replace(shard, size=len(buffer.getvalue()))
    (group,) = shard_samples(shard, "image")
    with pytest.raises(SampleError, match=r"its \.png is a link.*--hard-dereference") as caught:
        read_sample(shard, group, IMAGE)
    assert caught.value.kind == "link"
    assert caught.value.kind in KINDS


def test_a_text_above_the_limit_is_an_error():
    assert kind_of({"png": PNG, "txt": b"x" * (captions.BYTES_LIMIT + 1)}) == "too_large"
    assert captions.BYTES_LIMIT <= 1 << 20, "the trainer's memory holds the texts of the shuffle buffer"


def test_two_members_of_one_name_are_an_error():
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
def test_texts_of_the_json_take_precedence_over_txt_and_cls(members, expected):
    assert read_texts(members)[:3] == expected


@pytest.mark.parametrize(
    ("members", "kind", "message"),
    [
        ({"json": b'{"captions": [3]}'}, "bad_caption", "a caption is '3' (int), not text"),
        ({"json": b'{"captions": [null]}'}, "bad_caption", "a caption is 'None' (NoneType), not text"),
        ({"json": b'{"captions": {"a": 1}}'}, "bad_caption", "not a text and not a list of texts"),
        ({"json": b'{"caption": NaN}'}, "bad_caption", "caption is 'nan' (float), not a text"),
        ({"json": b'{"caption": " \\n"}'}, "bad_caption", "a caption is empty"),
        ({"txt": b""}, "bad_caption", "a caption is empty"),
        ({"txt": b"a\xff"}, "bad_caption", "its .txt is not UTF-8 text (byte 1)"),
        ({"txt": b"a\0 \0c\0a\0t\0"}, "bad_caption", "its .txt is not UTF-8 text (character 1 is NUL)"),
        ({"json": b'{"label": [1]}'}, "bad_label", "label is '[1]' (list), not text"),
        ({"json": b'{"label": true}'}, "bad_label", "label is 'True' (bool), not text"),
        ({"cls": b"caf\xe9"}, "bad_label", "its .cls is not UTF-8 text (byte 3)"),
        ({"json": b"{"}, "bad_json", "its .json does not parse"),
        ({"json": b"\xff\xfe\x00"}, "bad_json", "its .json does not parse"),
        ({"json": b"[" * 100_000}, "bad_json", "its .json does not parse"),
        ({"json": json.dumps(["c"]).encode()}, "bad_json", "its .json holds a list, not an object"),
    ],
)
def test_the_error_for_an_unusable_text_names_it(members, kind, message):
    with pytest.raises(SampleError) as caught:
        read_texts(members)
    assert caught.value.kind == kind
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("members", "modality", "owner"),
    [
        ({"png": b""}, None, "image"),
        ({"mp4": b""}, None, "video"),
        ({"jpg": b"", "mp4": b""}, None, "video"),
        ({"txt": b""}, None, "image"),
        ({"txt": b""}, "video", "video"),
        ({"mp4": b""}, "image", "image"),
        ({"png": b""}, "video", "video"),
    ],
)
def test_every_sample_belongs_to_exactly_one_modality(members, modality, owner):
    (shard,) = shards_of([[("k", members)]], modality)
    with shard.storage.open("m0") as stream:
        (group,) = tar_index.groups(stream, "m0", shard.size)
    owners = [kind for kind in ("image", "video") if belongs(group, shard, kind)]
    assert owners == [owner]


def apart(folder):
    """A tar that is not sorted: all images, then all captions."""
    with tarfile.open(folder / "apart.tar", "w") as tar:
        for extension, content in (("png", PNG), ("txt", b"t")):
            for number in range(3):
                info = tarfile.TarInfo(f"{number}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return str(folder / "apart.tar")


def test_errors_about_an_unsorted_tar_contain_a_hint(tmp_path, capsys, caplog):
    path = apart(tmp_path)
    assert main(["data", "verify", path, "--report", str(tmp_path / "verify.json")]) == 1
    out = capsys.readouterr().out
    assert "no_caption: apart/0 at byte 0: neither captions" in out
    assert "no_media: apart/0 at byte 3072: no image among its members (txt); the members of a sample must" in out
    assert f"shard apart: more of 0 at byte 3072; {SORT_HINT}" in out
    data = DataConfig(sources=[{"path": path}], lanes=1, workers=0)
    message = r"none of the 1 shards has a readable image.* in shard apart the members of 0"
    with pytest.raises(DataError, match=message), only_lane(data, STAGE, "image") as loader:
        next(loader)
    assert SORT_HINT in caplog.text


def test_errors_about_names_with_several_dots_explain_keys(tmp_path):
    for members, named in (({"v2.png": PNG, "v2.txt": b"t"}, "v2.png"), ({"png": PNG, "en.txt": b"t"}, "en.txt")):
        with pytest.raises(SampleError, match=f"a key ends at the first dot of a name.*'{named}' is read as an ext"):
            read_sample(*shard_and_group(members), IMAGE)
    with pytest.raises(SampleError) as caught:
        read_sample(*shard_and_group({"png": PNG, "npy": b"t"}), IMAGE)
    assert "first dot" not in str(caught.value)
    assert SORT_HINT not in str(caught.value)


OWN = {"captions": ["c"], "label": None, "set": None, "file": "f", "crc32": 7}


def own_sample(media, **size):
    extension = "mp4" if size["kind"] == "video" else "png"
    return {extension: media, "json": json.dumps({**OWN, **size}).encode()}


def read_with(members, modality, *, packed, rule=None):
    """The sample or error, the addresses that were probed, and the shard."""
    (shard,) = shards_of([[("k", members)]], modality if packed else None)
    (group,) = shard_samples(shard, modality)
    probed = []
    (found,) = read_samples([(shard, group)], rule or (VIDEO if modality == "video" else IMAGE), recorded(probed))
    return found, probed, shard


def recorded(probed):
    def probe(media):
        probed.extend(media)
        return probe_each(media)

    return probe


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "size",
    [
        {"kind": "image", "width": 42, "height": 28, "frames": 1},
        {"kind": "video", "width": 42, "height": 28, "frames": 9, "duration_s": 0.36},
    ],
)
def test_only_the_texts_of_a_packed_sample_are_read(packed, size):
    found, asked, shard = read_with(own_sample(b"not read", **size), size["kind"], packed=packed)
    assert (found.size, found.probed) == (MediaSize(**size), False)
    assert found.grid[1:] == (2, 3)
    assert not asked
    assert shard.storage.bytes_read == 0  # the scan has read the small .json with its header


@pytest.mark.parametrize(
    ("changed", "modality"),
    [
        ({"duration_s": None}, "video"),
        ({"duration_s": float("nan")}, "video"),
        ({"duration_s": -1.0}, "video"),
        ({"duration_s": "0.36"}, "video"),
        ({"width": 0}, "image"),
        ({"width": True}, "image"),
        ({"height": 28.0}, "image"),
        ({"height": -28}, "image"),
        ({"frames": "1"}, "image"),
        ({"kind": "clip"}, "image"),
    ],
)
def test_the_header_is_read_if_the_metadata_is_incomplete(changed, modality):
    """Shards of layout 2 have no durations."""
    size = {"kind": modality, "width": 99, "height": 99, "frames": 1}
    size |= {"duration_s": 0.3} if modality == "video" else {}
    media = video(28, 42, 6) if modality == "video" else PNG
    members = own_sample(media, **size)
    members["json"] = json.dumps({**json.loads(members["json"]), **changed}).encode()
    found, asked, shard = read_with(members, modality, packed=True)
    assert (found.size, found.probed) == (probe(media, next(iter(members))), True)
    (address,) = asked
    assert address == (shard.storage, shard.path, found.media_offset, len(media), next(iter(members)))


def test_sizes_in_metadata_of_other_producers_are_not_used():
    """In shards of img2dataset, width and height are those of the image before resizing."""
    about = json.dumps({"caption": "c", "width": 990, "height": 880, "kind": "image", "frames": 1}).encode()
    found, asked, _ = read_with({"png": PNG, "json": about}, "image", packed=False)
    assert (found.size.height, found.size.width, found.probed, len(asked)) == (28, 42, True, 1)


def test_limits_apply_to_sizes_from_metadata():
    long = {"kind": "video", "width": 42, "height": 28, "frames": 9, "duration_s": 3601.0}
    found, asked, _ = read_with(own_sample(b"v", **long), "video", packed=True)
    assert (found.kind, asked) == ("too_large", [])
    wide = {"kind": "image", "width": 10**7, "height": 28, "frames": 1}
    found, asked, _ = read_with(own_sample(b"i", **wide), "image", packed=True)
    assert (found.kind, asked) == ("too_large", [])
    moving = own_sample(PNG, kind="video", width=42, height=28, frames=9, duration_s=1.0)
    found, _, _ = read_with({"png": PNG, "json": moving["json"]}, "image", packed=True)
    assert found.kind == "wrong_kind"
