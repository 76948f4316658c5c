import io
import pickle

import numpy as np
import pytest
from PIL import Image

from tests.support import media
from univitar_ds.data.media import image_decode
from univitar_ds.data.media.image_decode import decode_image, decode_near
from univitar_ds.data.media.resize import fit_image
from univitar_ds.errors import DataError, SampleError

ROOM = 10**8


def kind_of_error(call, *arguments, **options) -> str:
    with pytest.raises(SampleError) as caught:
        call(*arguments, **options)
    return caught.value.kind


def test_a_sample_error_keeps_its_kind_when_pickled():
    error = pickle.loads(pickle.dumps(SampleError("corrupt", "half of it is gone")))
    assert (error.kind, str(error)) == ("corrupt", "half of it is gone")
    assert isinstance(error, DataError)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_image_stored_in_any_orientation_is_decoded_upright(form, orientation):
    taken = media.quarters(40, 64)
    stored = taken if orientation == 1 else taken.transpose(media.HELD[orientation])
    pixels = decode_image(media.encoded(stored, form, exif=media.exif(orientation), quality=95), max_px=ROOM)
    assert pixels.shape == (40, 64, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert media.corners(pixels) == ["red", "green", "blue", "yellow"]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I", "F", "CMYK"])
def test_every_mode_is_converted_to_rgb(mode):
    form = {"CMYK": "JPEG", "F": "TIFF", "I": "TIFF"}.get(mode, "PNG")
    grey = Image.linear_gradient("L").resize((64, 40))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    elif mode in ("I", "F"):
        image = Image.fromarray(np.asarray(grey).astype(np.int32 if mode == "I" else np.float32))
    else:
        image = grey.convert("RGB").convert(mode)
    pixels = decode_image(media.encoded(image, form), max_px=ROOM)
    assert pixels.shape == (40, 64, 3)
    top, bottom = pixels[0].mean(), pixels[-1].mean()
    assert top < 60
    assert bottom > 195


def test_transparent_pixels_are_composited_on_white():
    image = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    assert (decode_image(media.encoded(image, "PNG"), max_px=ROOM) == 255).all()


def test_grey_and_colour_jpegs_are_decoded_as_by_pillow():
    for image in (media.noise(101, 67), media.noise(101, 67).convert("L")):
        data = media.encoded(image, quality=90)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert (decode_image(data, max_px=ROOM) == expected).all()


def test_the_first_frame_of_an_animated_image_is_taken():
    frames = [Image.fromarray(frame) for frame in media.grey_frames(3, 40, 64)]
    for form in ("GIF", "WEBP", "PNG"):
        data = media.encoded(frames[0], form, save_all=True, append_images=frames[1:], duration=100)
        pixels = decode_image(data, max_px=ROOM)
        assert media.frame_numbers(pixels[None], 3) == [0]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
def test_a_truncated_image_is_rejected_and_not_filled_with_grey(form, kept):
    data = media.encoded(media.noise(300, 200), form)
    assert kind_of_error(decode_image, data[: int(len(data) * kept)], max_px=ROOM) in ("corrupt", "unreadable")


def test_a_jpeg_with_a_damaged_scan_is_rejected():
    data = media.encoded(media.noise(300, 200), quality=95)
    for seed in range(20):
        at = np.random.default_rng(seed).integers(1000, len(data) - 300)
        damaged = data[:at] + bytes([0xFF, 0xD9]) + data[at + 2 :]  # a false end
        assert kind_of_error(decode_image, damaged, max_px=ROOM) == "corrupt"


def test_a_jpeg_with_too_many_scans_is_rejected_before_decoding(monkeypatch):
    data = media.encoded(media.noise(100, 60), progressive=True)
    assert decode_image(data, max_px=ROOM).shape == (100, 60, 3)
    monkeypatch.setattr(image_decode, "MOST_SCANS", data.count(b"\xff\xda") - 1)
    assert kind_of_error(decode_image, data, max_px=ROOM) == "too_large"
    baseline = media.encoded(media.noise(100, 60)) + b"\xff\xda" * 20
    assert decode_image(baseline, max_px=ROOM).shape == (100, 60, 3)


def test_bytes_after_the_end_of_a_jpeg_are_ignored():
    data = media.encoded(media.noise(100, 60))
    assert (decode_image(data + b"x" * 20000, max_px=ROOM) == decode_image(data, max_px=ROOM)).all()


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_an_image_above_the_pixel_limit_is_rejected_by_its_header(form, monkeypatch):
    data = media.encoded(media.noise(100, 60), form)
    monkeypatch.setattr(image_decode.simplejpeg, "decode_jpeg", None)
    monkeypatch.setattr(image_decode, "rgb_pixels", None)
    assert kind_of_error(decode_image, data, max_px=5999) == "too_large"
    with pytest.raises(SampleError, match=r"60 x 100 is 6000 pixels, above data.max_image_px = 5999"):
        decode_image(data, max_px=5999)


@pytest.mark.parametrize(("height", "width"), [(800, 1200), (801, 1201), (805, 1207)])
def test_a_jpeg_is_decoded_at_a_smaller_scale_for_a_much_smaller_target_with_nearly_the_same_result(height, width):
    image = media.noise(height, width)
    for orientation, target in ((1, (98, 154)), (6, (154, 98))):
        data = media.encoded(image, quality=95, exif=media.exif(orientation))
        whole = decode_image(data, max_px=ROOM)
        reduced, extent = decode_near(data, max_px=ROOM, target=target)
        if orientation > 1 and height % 8:  # rotation would move the last, partial pixel to the first row or column
            assert reduced.shape == whole.shape
            continue
        assert reduced.shape[0] * 2 <= whole.shape[0]
        assert all(side >= 2 * wanted for side, wanted in zip(reduced.shape, target, strict=False))
        assert [side - part < 1 for side, part in zip(reduced.shape, extent, strict=False)] == [True, True]
        grid = (1, target[0] // 14, target[1] // 14)
        near = fit_image(reduced, grid, extent=extent).astype(int)
        assert np.abs(fit_image(whole, grid) - near).mean() < 1
        corner = np.abs(fit_image(whole, grid)[-14:, -14:] - near[-14:, -14:])
        assert corner.mean() < 1.5
    whole, extent = decode_near(data, max_px=ROOM, target=(601, 401))
    assert whole.shape[:2] == extent == (width, height)
