"""JPEG headers: the fast path and the general one give the same result."""

import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.support import media
from univitar_ds.data.media import jpeg_header
from univitar_ds.errors import SampleError


def outcome(read, data):
    try:
        return read(data)
    except SampleError as error:
        return error.kind, str(error)


def segment(marker, body):
    return bytes([0xFF, marker]) + struct.pack(">H", 2 + len(body)) + body


def frame(height=30, width=40, channels=3, marker=0xC0, precision=8):
    return segment(marker, struct.pack(">BHHB", precision, height, width, channels) + bytes(3 * channels))


def xmp(orientation):
    return segment(0xE1, b'http://ns.adobe.com/xap/1.0/\0<x tiff:Orientation="%d"/>' % orientation)


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_the_header_of_a_real_file_is_the_same_as_with_pillow(mode, progressive):
    data = media.encoded(media.noise(67, 101).convert(mode), quality=90, progressive=progressive)
    header = jpeg_header.read_header(data)
    with Image.open(io.BytesIO(data)) as image:
        assert (header.width, header.height) == image.size
        assert header.channels == len(image.getbands())
    assert (header.precision, header.orientation) == (8, 1)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_swaps_the_sides_of_the_display_size(orientation):
    data = media.encoded(media.noise(30, 50), exif=media.exif(orientation))
    assert jpeg_header.read_header(data).orientation == orientation
    assert jpeg_header.read_header(data).display_size == ((50, 30) if orientation >= 5 else (30, 50))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_ordinary_files_take_the_fast_path(mode, monkeypatch):
    monkeypatch.setattr(jpeg_header, "_read_slowly", None)
    for progressive in (False, True):
        data = media.encoded(media.noise(67, 101).convert(mode), quality=90, progressive=progressive)
        assert jpeg_header.read_header(data).display_size == Image.open(io.BytesIO(data)).size[::-1]


def test_a_frame_header_after_large_segments_is_found_and_that_of_a_thumbnail_is_not_used():
    thumbnail = b"\xff\xd8" + frame(1, 2)
    before = [segment(0xE2, thumbnail + bytes(60000)) for _ in range(4)]
    data = b"\xff\xd8" + b"".join(before) + frame()
    assert jpeg_header.read_header(data) == jpeg_header.JpegHeader(30, 40, 3, 8, 1)
    data = b"\xff\xd8" + xmp(6) + b"".join(before) + frame()
    assert jpeg_header.read_header(data) == jpeg_header.JpegHeader(30, 40, 3, 8, 6)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff\xd8\xff", "ends after 3 bytes"),
        (b"\xff\xd8" + segment(0xE0, b"x" * 30)[:-3], "ends after"),
        (b"\xff\xd8" + frame()[:9], "ends inside its frame header"),
        (b"\xff\xd8" + frame(height=0), "has 40 x 0 pixels"),
        (b"\xff\xd8" + segment(0xDA, b"") + frame(), "no frame header before byte 2"),
        (b"\xff\xd8" + segment(0xC0, b"\x08\x00") + frame(), "ends inside its frame header"),
    ],
)
def test_an_invalid_header_is_a_bad_sample(data, message):
    with pytest.raises(SampleError, match=message):
        jpeg_header.read_header(data)


PIECES = st.one_of(
    st.builds(
        segment,
        st.sampled_from([0xE0, 0xE1, 0xE2, 0xED, 0xFE, 0xDB, 0xC4, 0xDD, 0xCC, 0xC8]),
        st.binary(max_size=40),
    ),
    st.builds(xmp, st.integers(1, 8)),
    st.builds(
        frame,
        st.integers(0, 9),
        st.integers(0, 9),
        st.integers(0, 4),
        st.sampled_from([0xC0, 0xC1, 0xC2, 0xC3, 0xC9, 0xDA, 0xD9]),
    ),
    st.sampled_from([b"\xff", b"\xff\xff", b"\x00", b"\xff\x01", b"\xff\xd0", b"\xff\xe0\0\0", b"\xff\xdb\0\x01"]),
    st.binary(max_size=4),
)


@given(st.lists(PIECES, max_size=6), st.integers(0, 60))
def test_the_fast_path_and_the_general_one_give_the_same_result(pieces, cut):
    data = b"\xff\xd8" + b"".join(pieces)
    for given_data in (data, data[: max(2, len(data) - cut)]):
        assert outcome(jpeg_header.read_header, given_data) == outcome(jpeg_header._read_slowly, given_data)
