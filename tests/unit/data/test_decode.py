import io
import pickle

import av
import numpy as np
import pytest
from PIL import Image

from tests.support import media
from univitar_ds.data import decode
from univitar_ds.data.decode import decode_clip, decode_image
from univitar_ds.data.transforms import fit_image
from univitar_ds.errors import DataError, SampleError

ROOM = 10**8
HELD = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""What the camera did to the picture, by the EXIF orientation it then wrote (its inverse brings it upright)."""


def clip_of(data: bytes, frames: int, **limits) -> np.ndarray:
    return decode_clip(data, frames=frames, **{"max_px": ROOM, "timeout_s": 60.0, **limits})


def kind_of_error(call, *arguments, **options) -> str:
    with pytest.raises(SampleError) as caught:
        call(*arguments, **options)
    return caught.value.kind


def evenly(count: int, frames: int) -> list[int]:
    return [int((i + 0.5) * count / frames) for i in range(frames)]


def test_a_sample_error_keeps_its_kind_when_it_travels_between_processes():
    error = pickle.loads(pickle.dumps(SampleError("corrupt", "half of it is gone")))
    assert (error.kind, str(error)) == ("corrupt", "half of it is gone")
    assert isinstance(error, DataError)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stored_in_any_orientation_comes_out_as_it_was_taken(form, orientation):
    taken = media.quarters(40, 64)
    stored = taken if orientation == 1 else taken.transpose(HELD[orientation])
    pixels = decode_image(media.encoded(stored, form, exif=media.exif(orientation), quality=95), max_px=ROOM)
    assert pixels.shape == (40, 64, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert media.corners(pixels) == ["red", "green", "blue", "yellow"]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I", "F", "CMYK"])
def test_every_mode_becomes_rgb(mode):
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


def test_transparency_lies_on_white():
    image = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    assert (decode_image(media.encoded(image, "PNG"), max_px=ROOM) == 255).all()


def test_a_grey_jpeg_and_a_turbo_decode_equal_what_pillow_sees():
    for image in (media.noise(101, 67), media.noise(101, 67).convert("L")):
        data = media.encoded(image, quality=90)
        expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert (decode_image(data, max_px=ROOM) == expected).all()


def test_the_first_frame_of_an_animated_picture_is_taken():
    frames = [Image.fromarray(frame) for frame in media.grey_frames(3, 40, 64)]
    for form in ("GIF", "WEBP", "PNG"):
        data = media.encoded(frames[0], form, save_all=True, append_images=frames[1:], duration=100)
        pixels = decode_image(data, max_px=ROOM)
        assert media.frame_numbers(pixels[None], 3) == [0]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
@pytest.mark.parametrize("kept", [0.3, 0.6, 0.95])
def test_a_truncated_picture_is_refused_not_filled_with_grey(form, kept):
    data = media.encoded(media.noise(300, 200), form)
    assert kind_of_error(decode_image, data[: int(len(data) * kept)], max_px=ROOM) in ("corrupt", "unreadable")


def test_a_jpeg_with_damage_in_its_scan_is_refused():
    data = media.encoded(media.noise(300, 200), quality=95)
    for seed in range(20):
        at = np.random.default_rng(seed).integers(1000, len(data) - 300)
        damaged = data[:at] + bytes([0xFF, 0xD9]) + data[at + 2 :]  # a false end
        assert kind_of_error(decode_image, damaged, max_px=ROOM) == "corrupt"


def test_garbage_after_the_end_of_a_jpeg_does_no_harm():
    data = media.encoded(media.noise(100, 60))
    assert (decode_image(data + b"x" * 20000, max_px=ROOM) == decode_image(data, max_px=ROOM)).all()


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_a_picture_above_the_pixel_limit_is_refused_from_its_header(form, monkeypatch):
    data = media.encoded(media.noise(100, 60), form)
    monkeypatch.setattr(decode.simplejpeg, "decode_jpeg", None)
    monkeypatch.setattr(decode, "to_rgb", None)
    assert kind_of_error(decode_image, data, max_px=5999) == "too_large"
    with pytest.raises(SampleError, match=r"60 x 100 is 6000 pixels, above data.max_image_px = 5999"):
        decode_image(data, max_px=5999)


def test_a_jpeg_is_decoded_smaller_only_for_a_much_smaller_target_and_looks_the_same():
    image = media.noise(800, 1200)
    for orientation, target in ((1, (98, 154)), (6, (154, 98))):
        data = media.encoded(image, quality=95, exif=media.exif(orientation))
        whole, reduced = decode_image(data, max_px=ROOM), decode_image(data, max_px=ROOM, target=target)
        assert reduced.shape[0] * 2 <= whole.shape[0]
        assert all(side >= 2 * wanted for side, wanted in zip(reduced.shape, target, strict=False))
        grid = (1, target[0] // 14, target[1] // 14)
        assert np.abs(fit_image(whole, grid).astype(int) - fit_image(reduced, grid)).mean() < 1
    assert decode_image(data, max_px=ROOM, target=(601, 401)).shape == whole.shape


@pytest.mark.parametrize(
    ("form", "codec"),
    [("mp4", "mpeg4"), ("mov", "mjpeg"), ("avi", "mpeg4"), ("webm", "libvpx-vp9"), ("matroska", "mpeg4")],
)
@pytest.mark.parametrize("frames", [1, 2, 8])
def test_frames_are_taken_evenly_from_the_middle_of_equal_parts(form, codec, frames):
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    pixels = clip_of(media.clip(media.grey_frames(23), form, codec, pix_fmt), frames)
    assert pixels.shape == (frames, 48, 64, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert media.frame_numbers(pixels, 23) == evenly(23, frames)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_a_short_clip_repeats_frames(count):
    assert media.frame_numbers(clip_of(media.clip(media.grey_frames(count)), 8), count) == evenly(count, 8)


def test_reordered_frames_come_in_order_of_display():
    pixels = clip_of(media.clip(media.grey_frames(30), codec="libx264", rate=25), 10)
    assert media.frame_numbers(pixels, 30) == evenly(30, 10)


def test_a_variable_frame_rate_counts_frames_not_seconds():
    pts = [0, 1, 2, 3, 50, 51, 52, 90, 91, 92, 200, 300]
    assert media.frame_numbers(clip_of(media.clip(media.grey_frames(12), pts=pts), 4), 12) == evenly(12, 4)


def test_frames_that_the_header_promises_and_the_file_lacks_are_not_waited_for():
    data = media.clip(media.grey_frames(20), "avi")
    at = data.index(b"strh") + 8 + 32  # dwLength of the stream
    assert int.from_bytes(data[at : at + 4], "little") == 20
    lying = data[:at] + (200).to_bytes(4, "little") + data[at + 4 :]
    assert media.frame_numbers(clip_of(lying, 4), 20) == evenly(20, 4)


@pytest.mark.parametrize("shown", [16, 22])
def test_a_decoder_that_yields_fewer_frames_than_packets_is_followed(monkeypatch, shown):
    data = media.clip(media.grey_frames(24), "matroska")
    truth = decode._frames

    def lossy(packets, deadline):  # the last packets show nothing
        return (frame for index, frame in enumerate(truth(packets, deadline)) if index < shown)

    monkeypatch.setattr(decode, "_frames", lossy)
    assert media.frame_numbers(clip_of(data, 4), 24) == evenly(shown, 4)


def test_decoding_stops_after_the_last_frame_needed_and_converts_no_other(monkeypatch):
    data = media.clip(media.grey_frames(20))
    decoded, converted = [], []
    truth = decode._frames

    class Spy:
        def __init__(self, frame):
            self._frame = frame

        def __getattr__(self, name):
            return getattr(self._frame, name)

        def reformat(self, *arguments, **options):
            converted.append(len(decoded) - 1)
            return self._frame.reformat(*arguments, **options)

    def watched(packets, deadline):
        for frame in truth(packets, deadline):
            decoded.append(frame)
            yield Spy(frame)

    monkeypatch.setattr(decode, "_frames", watched)
    clip_of(data, 2)
    assert converted == [5, 15]
    assert len(decoded) == 16


def test_a_clip_is_turned_by_its_display_matrix():
    stored = [np.asarray(media.quarters(48, 64))] * 3
    data = media.clip(stored, codec="mjpeg", pix_fmt="yuvj444p", form="mov")
    expected = {
        (1, 0, 0, 1): ["red", "green", "blue", "yellow"],
        (0, 1, -1, 0): ["blue", "red", "yellow", "green"],  # a quarter clockwise
        (0, -1, 1, 0): ["green", "yellow", "red", "blue"],
        (-1, 0, 0, -1): ["yellow", "blue", "green", "red"],
        (-1, 0, 0, 1): ["green", "red", "yellow", "blue"],
        (1, 0, 0, -1): ["blue", "yellow", "red", "green"],
        (0, 1, 1, 0): ["red", "blue", "green", "yellow"],
    }
    for matrix, colours in expected.items():
        pixels = clip_of(media.turned_mp4(data, matrix), 2)
        assert pixels.shape == ((2, 64, 48, 3) if matrix[0] == 0 else (2, 48, 64, 3))
        assert pixels.flags.c_contiguous
        assert media.corners(pixels[1]) == colours, matrix


def test_ten_bits_become_eight():
    pixels = clip_of(media.clip(media.grey_frames(6), codec="libx264", pix_fmt="yuv420p10le", rate=25), 3)
    assert media.frame_numbers(pixels, 6) == evenly(6, 3)


def test_colours_survive_the_way_through_yuv():
    frames = [np.asarray(media.quarters(48, 64))] * 2
    assert media.corners(clip_of(media.clip(frames), 1)[0]) == ["red", "green", "blue", "yellow"]


def test_an_animated_gif_can_be_read_as_a_clip():
    frames = [Image.fromarray(frame) for frame in media.grey_frames(6, 40, 64)]
    data = media.encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100)
    assert media.frame_numbers(clip_of(data, 3), 6) == evenly(6, 3)


def test_what_is_no_clip_is_a_bad_sample_with_a_kind():
    whole = media.clip(media.grey_frames(12), codec="libx264", rate=25)
    assert kind_of_error(clip_of, media.sound(), 4) == "no_video"
    assert kind_of_error(clip_of, b"", 4) == "unreadable"
    assert kind_of_error(clip_of, media.encoded(media.quarters()), 4) == "unreadable"
    assert kind_of_error(clip_of, whole[: len(whole) // 3], 4) == "corrupt"


def test_a_clip_with_damaged_frames_is_refused():
    frames = [np.asarray(media.noise(96, 128, seed)) for seed in range(6)]
    data = bytearray(media.clip(frames, codec="libx264", rate=25))
    begin = data.index(b"mdat") + 4
    length = int.from_bytes(data[begin - 8 : begin - 4], "big") - 8
    for at in range(begin + length // 4, begin + length // 2):
        data[at] ^= 0xFF
    assert kind_of_error(clip_of, bytes(data), 6) == "corrupt"


def test_a_clip_above_the_pixel_limit_is_refused_from_its_header(monkeypatch):
    data = media.clip(media.grey_frames(4, 48, 64))
    monkeypatch.setattr(decode, "_frames", None)
    assert kind_of_error(clip_of, data, 2, max_px=48 * 64 - 1) == "too_large"


def test_a_clip_that_takes_too_long_is_given_up():
    assert kind_of_error(clip_of, media.clip(media.grey_frames(4)), 2, timeout_s=0.0) == "timeout"


def test_cover_art_of_a_sound_file_is_no_clip():
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as container:
        art = container.add_stream("mjpeg", rate=1)
        art.height, art.width, art.pix_fmt = 48, 64, "yuvj420p"
        art.disposition = av.stream.Disposition.attached_pic
        container.mux(art.encode(av.VideoFrame.from_ndarray(media.grey_frames(1)[0], format="rgb24")))
        container.mux(art.encode(None))
    data = stream.getvalue()
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].disposition & av.stream.Disposition.attached_pic
    assert kind_of_error(clip_of, data, 2) == "no_video"
