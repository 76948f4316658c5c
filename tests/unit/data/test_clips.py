import io

import av
import numpy as np
import pytest
from PIL import Image

from tests.support import media
from univitar_ds.data import clips
from univitar_ds.data.clips import decode_clip
from univitar_ds.errors import SampleError

ROOM = 10**8


def clip_of(data: bytes, frames: int, **limits) -> np.ndarray:
    return decode_clip(data, frames=frames, **{"max_px": ROOM, "timeout_s": 60.0, **limits})


def kind_of_error(call, *arguments, **options) -> str:
    with pytest.raises(SampleError) as caught:
        call(*arguments, **options)
    return caught.value.kind


def evenly(count: int, frames: int) -> list[int]:
    return [int((i + 0.5) * count / frames) for i in range(frames)]


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
    truth = clips._frames

    def lossy(packets, deadline):  # the last packets show nothing
        return (frame for index, frame in enumerate(truth(packets, deadline)) if index < shown)

    monkeypatch.setattr(clips, "_frames", lossy)
    assert media.frame_numbers(clip_of(data, 4), 24) == evenly(shown, 4)


def test_decoding_stops_after_the_last_frame_needed_and_converts_no_other(monkeypatch):
    data = media.clip(media.grey_frames(20))
    decoded, converted = [], []
    truth = clips._frames

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

    monkeypatch.setattr(clips, "_frames", watched)
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
    monkeypatch.setattr(clips, "_frames", None)
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
