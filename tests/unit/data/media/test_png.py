"""The pixels of a PNG with a text or colour profile above Pillow's own limits are read."""

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from tests.support import media
from tests.support.shards import write_tar
from univitar_ds import Preprocessor
from univitar_ds.cli.main import main
from univitar_ds.config.data import SourceConfig
from univitar_ds.config.encoder import EncoderConfig
from univitar_ds.data.media.image_decode import decode_image
from univitar_ds.data.media.probe import probe
from univitar_ds.data.media.types import MediaSize
from univitar_ds.data.tools.verify import verify
from univitar_ds.errors import SampleError

PIXELS = np.asarray(media.quarters(48, 64))
PLAIN = media.encoded(media.quarters(48, 64), "PNG")
BODY = PLAIN.index(b"IDAT") - 4
LARGE = zlib.compress(bytes(2 << 20))


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def before_pixels(*chunks: bytes) -> bytes:
    return PLAIN[:BODY] + b"".join(chunks) + PLAIN[BODY:]


def after_pixels(*chunks: bytes) -> bytes:
    end = PLAIN.index(b"IEND") - 4
    return PLAIN[:end] + b"".join(chunks) + PLAIN[end:]


PROFILE = chunk(b"iCCP", b"name\0\0" + LARGE)
ZTXT = chunk(b"zTXt", b"Comment\0\0" + LARGE)
ITXT = chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LARGE)
EXIF = chunk(b"eXIf", media.exif(6).tobytes()[6:])


def icon(png: bytes) -> bytes:
    entry = struct.pack("<BBBBHHII", 64, 48, 0, 0, 1, 32, len(png), 22)
    return struct.pack("<HHH", 0, 1, 1) + entry + png


@pytest.mark.parametrize(
    "data",
    [
        before_pixels(PROFILE),
        before_pixels(ZTXT),
        before_pixels(ITXT, PROFILE, ZTXT),
        after_pixels(ZTXT),
        after_pixels(ITXT, chunk(b"tEXt", b"a\0b")),
        icon(before_pixels(PROFILE)),
        icon(after_pixels(ZTXT)),
    ],
    ids=["profile", "text", "all", "behind", "both behind", "icon", "icon behind"],
)
def test_the_pixels_of_an_image_with_a_large_text_are_read(data):
    assert probe(data, "png") == MediaSize("image", 48, 64, 1)
    assert np.array_equal(decode_image(data, max_px=10**5), PIXELS)


def test_the_orientation_of_an_image_with_large_texts_is_read():
    xmp = chunk(b"iTXt", b'XML:com.adobe.xmp\0\0\0\0\0<x tiff:Orientation="6"/>')
    for orientation in (EXIF, xmp):
        for data in (before_pixels(orientation, PROFILE, ZTXT), before_pixels(ZTXT, orientation)):
            assert probe(data, "png") == MediaSize("image", 64, 48, 1)
            assert np.array_equal(decode_image(data, max_px=10**5), np.rot90(PIXELS, -1))


def test_a_damaged_text_makes_a_bad_sample():
    wrong = bytearray(before_pixels(PROFILE))
    wrong[BODY + len(PROFILE) - 1] ^= 1
    with pytest.raises(SampleError):
        probe(bytes(wrong), "png")
    cut = before_pixels(PROFILE)[: BODY + len(PROFILE) + 60]
    with pytest.raises(SampleError):
        decode_image(cut, max_px=10**5)


def test_probe_verify_and_the_preprocessor_read_images_with_large_texts(tmp_path, capsys, monkeypatch):
    good = {"front.png": before_pixels(PROFILE), "back.png": after_pixels(ZTXT)}
    for name, data in good.items():
        (tmp_path / name).write_bytes(data)
    assert main(["data", "probe", "--json", *(str(tmp_path / name) for name in good)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["ok"], line["width"], line["height"]) for line in lines] == [(True, 64, 48)] * 2
    samples = [(name[:-4], {"png": data, "txt": b"t"}) for name, data in good.items()]
    assert verify([SourceConfig(path=str(write_tar(tmp_path / "a.tar", samples)))], progress=False)["sound"]
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 1 << 20)  # as if only the preprocessor were imported
    prepare = Preprocessor(EncoderConfig(min_tokens=4, max_tokens=64, resize_factor=1))
    late, plain = (prepare([Image.open(io.BytesIO(data))])[0] for data in (good["back.png"], PLAIN))
    assert np.array_equal(late.numpy(), plain.numpy())
