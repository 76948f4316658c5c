"""What a JPEG 2000 will take is read from wherever its headers say it."""

import struct

import pytest
from PIL import Image

from tests.support import media
from univitar_ds.data.media.jpeg2000 import bytes_needed
from univitar_ds.errors import SampleError

TILE = {1: 8700 + 1100, 3: 8700 + 3 * 1100}
"""The accounts of a tile by its components, in bytes."""


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">HH", 0xFF00 | marker, len(body) + 2) + body


def size(width=100, height=60, tile=(100, 60), components=1, bits=8) -> bytes:
    sides = struct.pack(">8I", width, height, 0, 0, *tile, 0, 0)
    return segment(0x51, b"\0\0" + sides + struct.pack(">H", components) + bytes([bits - 1, 1, 1]) * components)


def style(block=(64, 64), precincts=()) -> bytes:
    """Levels, a block's sides, two bytes, and the log2 of the precincts' sides."""
    sides = [side.bit_length() - 3 for side in block]
    return bytes([max(len(precincts) - 1, 0), *sides, 0, 0, *(high << 4 | wide for wide, high in precincts)])


def default(block=(64, 64), precincts=()) -> bytes:
    return segment(0x52, bytes([bool(precincts), 0, 0, 1, 0]) + style(block, precincts))


def part(header: bytes, body: bytes = bytes(50)) -> bytes:
    return segment(0x90, struct.pack(">HIBB", 0, 14 + len(header) + len(body), 0, 1)) + header + b"\xff\x93" + body


def stream(*segments: bytes) -> bytes:
    return b"\xff\x4f" + b"".join(segments) + b"\xff\xd9"


def needed(a_block: float, pixels_of_block: int) -> float:
    """Of one grey tile of 100 x 60 with 8 bit."""
    return pytest.approx(6000 + TILE[1] + 6000 * (4 + 1 + a_block / pixels_of_block))


@pytest.mark.parametrize("options", [{}, {"no_jp2": True}], ids=["in boxes", "bare"])
@pytest.mark.parametrize(
    ("mode", "more", "wanted"),
    [
        ("L", {}, 6000 + TILE[1] + 6000 * (5 + 450 / 4096)),
        ("RGB", {}, 6000 * 4 + TILE[3] + 6000 * 3 * (5 + 450 / 4096)),
        ("RGB", {"tile_size": (30, 20)}, 6000 * 4 + 12 * TILE[3] + 600 * 3 * (5 + 450 / 4096)),
        ("L", {"tile_size": (200, 50)}, 6000 + 2 * TILE[1] + 5000 * (5 + 450 / 4096)),
        ("L", {"codeblock_size": (4, 8)}, 6000 + TILE[1] + 6000 * (5 + 450 / 32)),
        ("I;16", {}, 6000 * 2 + TILE[1] + 6000 * (6 + 450 / 4096)),
    ],
    ids=["grey", "colour", "tiles", "a tile wider than the image", "small blocks", "deep"],
)
def test_the_headers_of_a_file_tell_its_tiles_and_blocks(options, mode, more, wanted):
    image = Image.new(mode, (100, 60))
    data = media.encoded(image, "JPEG2000", **options, **more)
    assert bytes_needed(data, {"L": 1, "I;16": 2, "RGB": 4}[mode]) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (stream(size(), default()), needed(450, 4096)),
        (stream(size(), default(), segment(0x53, b"\0\0" + style((8, 4)))), needed(450, 32)),
        (stream(size(), default(), part(b""), part(segment(0x52, bytes(5) + style((4, 4))))), needed(450, 16)),
        (stream(size(), default(), part(segment(0x64, b"said")), part(default((16, 8)))), needed(450, 128)),
        (stream(size(), default(precincts=[(15, 15), (15, 15)])), needed(450, 4096)),
        (stream(size(), default(precincts=[(15, 15), (3, 2)])), needed(1000, 8)),
        (stream(size(), default(precincts=[(2, 0), (15, 15)])), needed(1000, 4)),
        (stream(size(), default(), segment(0x30, b"unknown")), needed(1000, 1)),
        (stream(size(), default(), b"\xff\x93"), needed(1000, 1)),
    ],
    ids=["plain", "a component's", "a tile's", "a later tile's", "wide precincts", "a precinct's half", "first level",
         "unknown marker", "no tile"],
)  # fmt: skip
def test_the_smallest_blocks_of_any_header_count(data, wanted):
    assert bytes_needed(data, 1) == wanted


def test_a_stream_inside_a_box_before_the_image_is_not_taken_for_it():
    box = struct.pack(">I4s", 8 + len(stream(size(1, 1))), b"free") + stream(size(1, 1))
    long = struct.pack(">I4sQ", 1, b"jp2c", 0) + stream(size(), default())
    assert bytes_needed(box + long, 1) == needed(450, 4096)


def test_many_components_and_tiles_are_counted_before_they_are_believed():
    data = stream(size(60000, 60000, (300, 300), components=100), default())
    assert bytes_needed(data, 1) > 40000 * 100 * 1100


@pytest.mark.parametrize(
    "data",
    [b"", bytes(100), struct.pack(">I4s", 8, b"free") * 10_000, stream(size(tile=(0, 60))), stream(size())[:40]],
    ids=["empty", "zeros", "boxes without end", "tiles of no width", "cut"],
)  # fmt: skip
def test_a_file_without_a_codestream_is_a_bad_sample(data):
    with pytest.raises(SampleError) as caught:
        bytes_needed(data, 1)
    assert caught.value.kind == "corrupt"
