"""Images that would take too much memory are rejected, and others take no more than the estimate."""

import struct
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.support import media
from tests.support.progress import run_watched
from univitar_ds.data.media import image_decode, memory_limits
from univitar_ds.data.media.image_decode import decode_image
from univitar_ds.data.media.memory_limits import check_memory
from univitar_ds.data.media.probe import open_image
from univitar_ds.errors import SampleError

GREY = Image.linear_gradient("L").resize((100, 60))
DEEP = Image.fromarray(np.asarray(GREY).astype(np.int32) * 257)
FLOAT = Image.fromarray(np.asarray(GREY).astype(np.float32))
LZW = {"compression": "tiff_lzw", "tiffinfo": {278: 60}}


def lossless_webp_of(width: int, height: int) -> bytes:
    """A WebP whose header has these sides, of at most 16384 pixels."""
    data = bytearray(media.encoded(GREY.convert("RGB"), "WEBP", lossless=True))
    bits = struct.unpack_from("<I", data, 21)[0]
    struct.pack_into("<I", data, 21, bits >> 28 << 28 | (height - 1) << 14 | (width - 1))
    return bytes(data)


def tiff(*tags: tuple[int, int], body: bytes) -> bytes:
    """A grey TIFF with a body directly after its header and integer tags."""
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted(tags))
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    ("data", "bytes_a_pixel"),
    [
        (media.encoded(GREY.convert("RGB"), "WEBP"), 16.4),
        (media.encoded(GREY.convert("RGB"), "AVIF"), 21),
        (media.encoded(Image.merge("RGBA", [GREY] * 4), "AVIF"), 24),
        (media.encoded(GREY.convert("CMYK"), "JPEG"), 12),
        (media.encoded(DEEP, "PPM"), 13.2),
        (media.encoded(GREY.convert("RGB"), "JPEG2000"), 4 + 3 * 5.2),
        (media.encoded(GREY.convert("RGB"), "JPEG2000", no_jp2=True, tile_size=(30, 20)), 4 + 3 * 5.2 / 10),
        (media.encoded(GREY.convert("I;16"), "JPEG2000"), 2 + 6.2),
        (media.encoded(GREY, "TIFF", **LZW), 2),
        (media.encoded(FLOAT, "TIFF", **LZW), 8),
        (media.encoded(GREY.convert("RGBA"), "TIFF", compression="tiff_lzw", tiffinfo={278: 6}), 4.4),
        (media.encoded(GREY.convert("RGB"), "TIFF", compression="tiff_lzw", tiffinfo={278: 60, 274: 6}), 11),
    ],
    ids=[
        "webp",
        "avif",
        "avif alpha",
        "cmyk",
        "deep ppm",
        "jpeg 2000",
        "tiled jpeg 2000",
        "deep jpeg 2000",
        "tiff",
        "float tiff",
        "strips",
        "rotated tiff",
    ],
)
def test_the_estimate_of_each_format_is_compared_with_the_limit(data, bytes_a_pixel, monkeypatch):
    with open_image(data) as image:
        file = len(data) if image.format in ("WEBP", "AVIF") else 0
        needed = 1.02 * (6000 * bytes_a_pixel + file)
        monkeypatch.setattr(memory_limits, "LEAST_LIMIT", needed + 1)
        check_memory(image, data, 1)
        monkeypatch.setattr(memory_limits, "LEAST_LIMIT", needed - 1)
        with pytest.raises(SampleError, match=r"6000 pixels|100 x 60|60 x 100") as caught:
            check_memory(image, data, 1)
    assert caught.value.kind == "too_large"


@pytest.mark.parametrize("form", ["PNG", "BMP", "GIF", "TIFF", "PPM", "JPEG"])
def test_formats_that_take_little_memory_are_limited_by_pixels_only(form, monkeypatch):
    monkeypatch.setattr(memory_limits, "LEAST_LIMIT", 0)
    assert decode_image(media.encoded(GREY.convert("RGB"), form), max_px=6000).shape == (60, 100, 3)


def test_an_image_is_rejected_before_decoding_with_the_limit_that_would_allow_it(monkeypatch):
    data = lossless_webp_of(8200, 8000)
    monkeypatch.setattr(image_decode, "rgb_pixels", lambda image, _: pytest.fail("decoded"))
    with pytest.raises(
        SampleError, match=r"WEBP RGB.? may take 1047 MiB .* above the 1024 .* raise it to 102\d+ "
    ) as caught:
        decode_image(data, max_px=10**8)
    assert caught.value.kind == "too_large"
    monkeypatch.setattr(image_decode, "rgb_pixels", lambda image, _: np.zeros((1, 1, 3), np.uint8))
    allowed = int(str(caught.value).partition("raise it to ")[2].split()[0])
    assert decode_image(data, max_px=allowed).shape == (1, 1, 3)
    assert decode_image(lossless_webp_of(8000, 8000), max_px=10**8).shape == (1, 1, 3)


def test_a_low_pixel_limit_does_not_reject_formats_that_take_more_bytes_per_pixel():
    assert decode_image(media.encoded(GREY.convert("RGB"), "WEBP"), max_px=6000).shape == (60, 100, 3)


def test_a_tile_larger_than_its_image_is_not_decoded():
    body = zlib.compress(bytes(1000))
    shape = ((256, 100), (257, 60), (258, 8), (259, 8), (262, 1), (277, 1))
    place = ((324, 8), (325, len(body)))
    data = tiff(*shape, (322, 40000), (323, 30000), *place, body=body)
    with pytest.raises(SampleError, match="100 x 60 pixels of TIFF L may take 1167 MiB"):
        decode_image(data, max_px=10**8)


PEAK = """
import sys
from univitar_ds.data.media.image_decode import decode_image
from tests.support import media
from PIL import Image
def peak():  # unlike ru_maxrss, without the memory of the parent process
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
data = open(sys.argv[1], "rb").read()
decode_image(media.encoded(Image.new("RGB", (64, 64)), sys.argv[2]), max_px=10**8)
before = peak()
height, width, _ = decode_image(data, max_px=10**8).shape
print((peak() - before) / (height * width))
"""


@pytest.mark.parametrize(
    ("form", "image", "options", "estimate"),
    [
        ("PNG", Image.new("RGBA", (4000, 2000)), {"compress_level": 1}, 7),
        ("PNG", Image.new("I;16", (4000, 2000)), {"compress_level": 1}, 5),
        ("TIFF", Image.new("F", (4000, 2000)), {"compression": "tiff_lzw", "tiffinfo": {278: 2000}}, 8),
        ("WEBP", Image.new("RGB", (4000, 2000)), {"method": 0}, 16.4),
        ("JPEG2000", Image.new("RGB", (4000, 2000)), {}, 19.6),
    ],
    ids=["transparent", "deep", "float", "webp", "jpeg 2000"],
)
def test_decoding_takes_as_many_bytes_per_pixel_as_estimated(form, image, options, estimate, tmp_path):
    path = tmp_path / "image"
    path.write_bytes(media.encoded(image, form, **options))
    command = [sys.executable, "-c", PEAK, str(path), form]
    taken = float(run_watched(command, check=True).stdout)
    assert 0.7 * estimate < taken < estimate + 1, "8 MB of tables and allocators are 1 byte per pixel"


CONFINED = """
import numpy as np
from univitar_ds.data.media.memory_limits import confine
for file_bytes in (0, 1 << 28):
    confine(1, file_bytes)
    np.empty((1 << 30) + 2 * file_bytes - (1 << 26), np.uint8)
    try:
        np.empty((1 << 30) + 2 * file_bytes + (1 << 26), np.uint8)
    except MemoryError:
        print("refused")
"""


def test_a_confined_process_can_allocate_the_limit_and_no_more():
    found = run_watched([sys.executable, "-c", CONFINED], check=True)
    assert found.stdout.split() == ["refused", "refused"]
