"""Packets at which decoding may begin, found from the coded data and not from a container's flags."""

import av
import pytest

from univitar_ds.data.media.keyframes import drops_exactly, is_shown, restarts

CODE = b"\0\0\0\1"
H264 = {"slice": b"\x41", "idr": b"\x65", "sps": b"\x67", "pps": b"\x68", "sei": b"\x06", "aud": b"\x09"}
HEVC = {"slice": b"\x02\1", "idr": b"\x28\1", "cra": b"\x2a\1", "vps": b"\x40\1", "sps": b"\x42\1", "pps": b"\x44\1"}


def packet(data: bytes, key: bool = True) -> av.Packet:
    made = av.Packet(data)
    made.is_keyframe = key
    return made


def in_band(units: dict[str, bytes], *names: str) -> bytes:
    return b"".join(CODE + units[name] + b"body" for name in names)


def with_lengths(*names: str, size: int = 4) -> bytes:
    return b"".join((len(H264[name]) + 4).to_bytes(size, "big") + H264[name] + b"body" for name in names)


def starts(codec: str, *contents: bytes, extradata: bytes | None = None, keys: bool = True) -> list[int]:
    return restarts(codec, extradata, [packet(content, keys) for content in contents])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_with_parameter_sets_in_the_extradata_decoding_may_begin_at_every_idr_picture(size):
    header = bytes([1, 0, 0, 0, 0xFC | (size - 1)])
    contents = [with_lengths(*names, size=size) for names in (["sei", "idr"], ["slice"], ["sei", "idr"], ["idr"])]
    assert starts("h264", *contents, extradata=header) == [2, 3]


def test_a_key_frame_flag_alone_is_not_enough():
    recovery_point = with_lengths("sei", "slice")
    assert starts("h264", with_lengths("idr"), recovery_point, extradata=b"\1\0\0\0\xff") == []
    assert starts("h264", with_lengths("idr"), with_lengths("idr"), extradata=b"\1\0\0\0\xff", keys=False) == []


def test_decoding_cannot_begin_at_an_idr_picture_that_needs_parameter_sets_of_other_packets():
    whole = in_band(H264, "aud", "sps", "pps", "idr")
    bare = in_band(H264, "aud", "idr")
    plain = in_band(H264, "aud", "slice")
    changes = in_band(H264, "aud", "pps", "slice")
    assert starts("h264", bare, plain, bare) == [2], "all parameter sets are in the extradata"
    assert starts("h264", whole, plain, bare) == []
    assert starts("h264", whole, plain, whole) == [2]
    assert starts("h264", bare, changes, bare, whole) == [3]


def test_in_hevc_decoding_may_begin_only_at_idr_pictures():
    whole = in_band(HEVC, "vps", "sps", "pps", "idr")
    clean_random_access = in_band(HEVC, "vps", "sps", "pps", "cra")
    assert starts("hevc", whole, clean_random_access, whole, in_band(HEVC, "sps", "pps", "idr")) == [2]


def test_in_vp8_and_vp9_the_first_byte_marks_key_frames():
    assert starts("vp8", b"\x10", b"\x11", b"\x10", b"\x31") == [2]
    key, inter, repeated = b"\x82", b"\x86", b"\x8a"
    assert starts("vp9", key, inter, key, repeated, b"\x00") == [2]


def test_in_mpeg_2_an_intra_picture_needs_its_sequence_header():
    header, intra, predicted = b"\0\0\1\xb3tables", b"\0\0\1\0\0\x08", b"\0\0\1\0\0\x10"
    assert starts("mpeg2video", header + intra, header + predicted, intra, header + intra, header) == [3]


def test_decoding_may_begin_at_every_packet_of_intra_only_codecs_and_at_none_of_unknown_codecs():
    assert starts("mjpeg", b"a", b"b", b"c", keys=False) == [1, 2]
    assert starts("mpeg4", b"a", b"b", b"c") == []


@pytest.mark.parametrize("codec", ["h264", "hevc", "vp8", "vp9", "mpeg2video"])
@pytest.mark.parametrize("junk", [b"\0", b"\0\0\1", b"\0\0\0\1", b"\xff" * 9, b"\0\0\1\0", b"\0" * 40])
def test_random_bytes_raise_no_error(codec, junk):
    for header in (None, b"", b"\1", b"\1" * 30):
        found = starts(codec, junk, junk, extradata=header)
        assert set(found) <= {1}


def test_a_hidden_vp8_frame_is_not_displayed():
    assert is_shown("vp8", packet(b"\x11"))
    assert not is_shown("vp8", packet(b"\x01"))
    assert is_shown("h264", packet(b"\x01"))


def test_frames_are_skipped_only_for_codecs_whose_non_reference_frames_are_never_referenced():
    assert {codec for codec in ("h264", "hevc", "vp8", "vp9", "mpeg2video", "mpeg4") if drops_exactly(codec)} == {
        "h264",
        "mpeg2video",
    }
