"""Images in every mode and orientation become upright RGB."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.support import media
from univitar_ds import image_ops
from univitar_ds.image_ops import resize_rgb, rgb_pixels, to_rgb

WHITE, RED, BLACK = (255, 255, 255), (255, 0, 0), (0, 0, 0)


def reopened(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return Image.open(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LAB", "RGBX"])
def test_an_opaque_white_image_is_white_in_any_mode(mode):
    rgb = to_rgb(Image.new("RGB", (4, 3), WHITE).convert(mode))
    assert (rgb.mode, rgb.size) == ("RGB", (4, 3))
    assert np.asarray(rgb).min() >= 254


@pytest.mark.parametrize("mode", ["LA", "La", "PA", "RGBA", "RGBa"])
def test_what_is_transparent_becomes_white(mode):
    plain = {"La": "LA", "RGBa": "RGBA"}.get(mode, mode)
    clear = Image.new("RGBA", (2, 2), (0, 0, 0, 0)).convert(plain).convert(mode)
    assert (np.asarray(to_rgb(clear)) == 255).all()


def test_half_transparent_red_is_halfway_to_white():
    assert to_rgb(Image.new("RGBA", (1, 1), (*RED, 128))).getpixel((0, 0)) == (255, 127, 127)


@pytest.mark.parametrize(("mode", "key", "left"), [("RGB", RED, RED), ("L", 9, 9), ("P", 1, 1)])
def test_a_colour_key_is_transparency_too(mode, key, left):
    image = Image.new(mode, (2, 1), 0)
    if mode == "P":
        image.putpalette([*BLACK, *RED])
    image.putpixel((0, 0), left)
    rgb = to_rgb(reopened(image, "PNG", transparency=key))
    assert rgb.getpixel((0, 0)) == WHITE
    assert rgb.getpixel((1, 0)) == BLACK


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        (np.array([[0, 32896, 65535]], np.uint16), [0, 128, 255]),
        (np.array([[0, 100, 255]], np.uint16), [0, 100, 255]),
        (np.array([[0, 257 * 9, 65535]], np.int32), [0, 9, 255]),
        (np.array([[-1000, 0, 1000]], np.int32), [0, 128, 255]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 7.2, 255]], np.float32), [0, 7, 255]),
        (np.array([[-1, np.nan, 1]], np.float32), [0, 128, 255]),
    ],
    ids=["16 bit", "8 bit in 16", "16 bit in 32", "beyond 16 bit", "unit", "bytes", "signed with nan"],
)
def test_deep_greys_are_scaled_and_not_cut_off(values, wanted):
    rgb = np.asarray(to_rgb(Image.fromarray(values)))
    assert rgb[0, :, 0].tolist() == wanted
    assert (rgb == rgb[..., :1]).all()


def test_a_16_bit_png_keeps_its_shades():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None]
    assert len(np.unique(np.asarray(to_rgb(reopened(Image.fromarray(ramp), "PNG"))))) == 256


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_comes_out_upright(kind, orientation):
    upright = Image.new("RGB", (32, 16), WHITE)
    upright.paste(RED, (0, 0, 16, 8))
    stored = upright.transpose(media.HELD[orientation]) if orientation in media.HELD else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    rgb = to_rgb(reopened(stored, kind, exif=exif))
    assert rgb.size == (32, 16)
    red = np.asarray(rgb)[..., 1] < 128
    assert red[2:6, 2:14].all()
    assert not red[10:].any()
    assert not red[:, 18:].any()


KEYED = {"RGB": (9, 8, 7), "L": 9, "P": bytes(range(256))}
NOISE = np.random.default_rng(0).integers(0, 256, (23, 37, 4), np.uint8)
FLOATS = np.random.default_rng(1).standard_normal((23, 37)).astype(np.float32)


def noisy(kind):
    """37 x 23 pixels in a Pillow mode; `+key`: with a colour or palette entries that are transparent."""
    mode, _, key = kind.partition("+")
    values = {
        "I;16": NOISE[..., 0].astype(np.uint16) * 257,
        "I": NOISE[..., 0].astype(np.int32) * 700 - 9000,
        "F": np.where(NOISE[..., 0] == 9, np.nan, FLOATS),
        "F, unit": np.abs(FLOATS) / np.abs(FLOATS).max(),
    }
    if mode in values:
        return Image.fromarray(values[mode])
    if mode in ("L", "P", "LAB", "HSV", "YCbCr"):
        image = Image.frombytes(mode, (37, 23), NOISE[..., : len(Image.new(mode, (1, 1)).getbands())].tobytes())
    else:
        plain = {"La": "LA", "RGBa": "RGBA"}.get(mode, mode)
        image = Image.fromarray(NOISE).convert(plain).convert(mode)
    if mode == "P":
        image.putpalette(NOISE.tobytes()[:768])
    if key:
        image.info["transparency"] = KEYED[mode]
        image.putpixel((30, 20), 9 if mode == "P" else KEYED[mode])
    return image


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "kind",
    ["1", "L", "L+key", "LA", "La", "P", "P+key", "PA", "RGB", "RGB+key", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr",
     "HSV", "LAB", "I;16", "I", "F", "F, unit"],
)  # fmt: skip
def test_an_image_converted_in_blocks_equals_one_converted_whole_and_turned_after(kind, orientation, monkeypatch):
    image = noisy(kind)
    whole = Image.fromarray(rgb_pixels(image))
    exif = image.getexif()
    exif[0x0112] = orientation
    turned = whole if orientation == 1 else whole.transpose(image_ops.ORIENTATIONS[orientation].transpose)
    monkeypatch.setattr(image_ops, "BLOCK", 10)
    pixels = rgb_pixels(image)
    assert pixels.flags.c_contiguous
    assert np.array_equal(pixels, np.asarray(turned))
    assert np.array_equal(np.asarray(to_rgb(image)), pixels)
    assert pixels.std() > 20, "an empty image shows nothing"


def test_a_fraction_in_the_last_block_alone_scales_all(monkeypatch):
    monkeypatch.setattr(image_ops, "BLOCK", 2)
    values = np.array([[0, 1, 0, 1, 0, 0.5]], np.float32)
    assert rgb_pixels(Image.fromarray(values))[0, :, 0].tolist() == [0, 255, 0, 255, 0, 128]


def test_a_plain_image_is_not_copied():
    image = Image.new("RGB", (4, 3))
    assert to_rgb(image) is image


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_metadata_does_not_hide_the_pixels():
    image = reopened(Image.new("RGB", (4, 4), RED), "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert to_rgb(image).getpixel((0, 0)) == RED


def test_resizing_takes_height_first_and_rings_like_bicubic():
    edge = Image.fromarray(np.repeat(np.array([[0, 0, 200, 200]], np.uint8), 4, axis=0)).convert("RGB")
    pixels = resize_rgb(edge, 6, 16)
    assert pixels.shape == (6, 16, 3)
    assert pixels.max() > 200
