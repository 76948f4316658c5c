import contextlib
import io
import os
import random
import time

import av
import numpy as np
import pytest
from PIL import Image

from tests.support import media
from univitar_ds.data.media import video_decode
from univitar_ds.data.media.frame_sampling import Sampling
from univitar_ds.data.media.types import DecodeLimits
from univitar_ds.data.media.video_decode import decode_video
from univitar_ds.errors import SampleError

ROOM = {"max_image_px": 10**8, "timeout_s": 60.0}


def video_of(data: bytes, frames: int, **limits) -> np.ndarray:
    given = {name: limits.pop(name) for name in ("sampling", "draw", "fit") if name in limits}
    return decode_video(data, frames=frames, limits=DecodeLimits(**{**ROOM, **limits}), **given)


def kind_of_error(call, *arguments, **options) -> str:
    with pytest.raises(SampleError) as caught:
        call(*arguments, **options)
    return caught.value.kind


def packets_of(data: bytes) -> list[av.Packet]:
    with av.open(io.BytesIO(data)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def evenly(count: int, frames: int) -> list[int]:
    return [int((i + 0.5) * count / frames) for i in range(frames)]


@pytest.mark.parametrize(
    ("form", "codec"),
    [("mp4", "mpeg4"), ("mov", "mjpeg"), ("avi", "mpeg4"), ("webm", "libvpx-vp9"), ("matroska", "mpeg4")],
)
@pytest.mark.parametrize("frames", [1, 2, 8])
def test_frames_are_sampled_from_the_middle_of_equal_parts(form, codec, frames):
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    pixels = video_of(media.video(media.grey_frames(23), form, codec, pix_fmt), frames)
    assert pixels.shape == (frames, 48, 64, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert media.frame_numbers(pixels, 23) == evenly(23, frames)


@pytest.mark.parametrize("count", [1, 3, 7])
def test_a_short_video_repeats_frames(count):
    assert media.frame_numbers(video_of(media.video(media.grey_frames(count)), 8), count) == evenly(count, 8)


def test_reordered_frames_are_returned_in_display_order():
    pixels = video_of(media.video(media.grey_frames(30), codec="libx264", rate=25), 10)
    assert media.frame_numbers(pixels, 30) == evenly(30, 10)


def test_uniform_sampling_of_a_variable_frame_rate_counts_frames_not_seconds():
    pts = [0, 1, 2, 3, 50, 51, 52, 90, 91, 92, 200, 300]
    assert media.frame_numbers(video_of(media.video(media.grey_frames(12), pts=pts), 4), 12) == evenly(12, 4)


def test_a_frame_count_in_the_header_above_that_of_the_file_is_not_used():
    data = media.video(media.grey_frames(20), "avi")
    at = data.index(b"strh") + 8 + 32  # dwLength of the stream
    assert int.from_bytes(data[at : at + 4], "little") == 20
    lying = data[:at] + (200).to_bytes(4, "little") + data[at + 4 :]
    assert media.frame_numbers(video_of(lying, 4), 20) == evenly(20, 4)


def test_if_a_wanted_frame_is_not_decoded_only_decoded_frames_are_counted(monkeypatch):
    data = media.video(media.grey_frames(24))
    assert [packet.pts for packet in packets_of(data)] == [1024 * i for i in range(24)]
    kept = [i for i in range(24) if i % 4 or i == 0]
    truth = video_decode._decoded

    def lossy(stream, packet, deadline):
        return [frame for frame in truth(stream, packet, deadline) if frame.pts // 1024 in kept]

    monkeypatch.setattr(video_decode, "_decoded", lossy)
    for frames in (1, 3, 5):
        assert not set(evenly(24, frames)) <= set(kept)
        assert media.frame_numbers(video_of(data, frames), 24) == [kept[i] for i in evenly(len(kept), frames)]
    assert media.frame_numbers(video_of(data, 4), 24) == evenly(24, 4), "all wanted frames are decoded"


def test_only_wanted_frames_are_converted_and_only_once(monkeypatch):
    converted = []

    class Spy:
        def reformat(self, frame, *arguments, **options):
            converted.append(frame.pts)
            return frame.reformat(*arguments, **options)

    monkeypatch.setattr(video_decode, "VideoReformatter", Spy)
    video_of(media.video(media.grey_frames(20)), 2)
    assert [pts // 1024 for pts in converted] == [5, 15]
    converted.clear()
    video_of(media.video(media.grey_frames(3)), 8)
    assert len(converted) == 3


X264 = "keyint=12:min-keyint=12:scenecut=0:bframes=3:b-pyramid=normal"
X265 = "keyint=12:min-keyint=12:bframes=3:log-level=none"
CODED = {
    "closed groups": ("mp4", "libx264", {"x264-params": X264}, 9),
    "open groups": ("mp4", "libx264", {"x264-params": X264 + ":open-gop=1"}, 33),
    "intra refresh": ("mp4", "libx264", {"x264-params": X264 + ":intra-refresh=1"}, 33),
    "interlaced": ("matroska", "libx264", {"x264-params": X264 + ":tff=1"}, 9),
    "sets in band": ("mpegts", "libx264", {"x264-params": X264}, 9),
    "flv": ("flv", "libx264", {"x264-params": X264}, 9),
    "avi": ("avi", "libx264", {"x264-params": X264}, 40),
    "hevc": ("mp4", "libx265", {"x265-params": X265 + ":open-gop=0"}, 9),
    "hevc, open groups": ("mp4", "libx265", {"x265-params": X265 + ":open-gop=1"}, 33),
    "hevc, sets in band": ("mpegts", "libx265", {"x265-params": X265 + ":open-gop=0"}, 9),
    "vp8": ("webm", "libvpx", {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "12", "cpu-used": "8"}, 8),
    "vp9": ("webm", "libvpx-vp9", {"auto-alt-ref": "1", "lag-in-frames": "16", "g": "12", "cpu-used": "8"}, 8),
    "mpeg2": ("mpegts", "mpeg2video", {"bf": "2", "g": "9"}, 8),
    "mpeg2, few time stamps": ("mpeg", "mpeg2video", {"bf": "2", "g": "9"}, 65),
    "mpeg1": ("mpeg", "mpeg1video", {"bf": "2", "g": "9"}, 8),
    "mpeg4": ("mp4", "mpeg4", {"bf": "2", "g": "9"}, 33),
    "mjpeg": ("mov", "mjpeg", {}, 2),
    "av1": ("matroska", "libsvtav1", {"g": "12", "preset": "12"}, 33),
}
"""Container, encoder, its settings, and maximum calls of the decoder for the middle one of 60 frames."""


@pytest.mark.parametrize("name", CODED)
def test_skipping_packets_changes_no_frame(monkeypatch, name):
    form, codec, settings, most = CODED[name]
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    data = media.video(media.moving_frames(60, 96, 128), form, codec, pix_fmt, rate=25, settings=settings)
    with av.open(io.BytesIO(data)) as container:
        container.streams.video[0].thread_count = 1
        truth = [frame.to_ndarray(format="rgb24", threads=1) for frame in container.decode(video=0)]
    assert len(truth) == 60
    for frames in (2, 3, 7, 20):
        assert np.array_equal(video_of(data, frames), np.stack([truth[i] for i in evenly(60, frames)])), frames
    calls = []
    once = video_decode._decoded
    monkeypatch.setattr(video_decode, "_decoded", lambda *given: calls.append(given) or once(*given))
    assert np.array_equal(video_of(data, 1)[0], truth[30])
    assert len(calls) <= most


def test_decoding_begins_at_the_last_usable_packet_before_each_wanted_frame():
    times = [0, 30, 10, 20, 60, 40, 50, 90, 70, 80]  # key frames at 0, 60 and 90; 40 and 50 also need frames before 60
    starts = [4, 7]
    assert video_decode._runs(times, [3], starts) == [(0, 4)]
    assert video_decode._runs(times, [4], starts) == [(4, 5)]
    assert video_decode._runs(times, [5], starts) == [(0, 6)]
    assert video_decode._runs(times, [2, 7], starts) == [(0, 3), (7, 8)]
    assert video_decode._runs(times, [4, 8], starts) == [(4, 9)], "70 needs 60"
    assert video_decode._runs(times, [3, 4], starts) == [(0, 5)], "the ranges touch"
    assert video_decode._runs(times, [1, 4, 7], []) == [(0, 8)]


def test_frames_to_which_no_other_frame_refers_are_not_decoded():
    data = media.video(
        media.moving_frames(40), codec="libx264", rate=25, settings={"x264-params": "keyint=99:bframes=3"}
    )
    decoded = []
    truth = video_decode._decoded

    def watched(stream, packet, deadline):
        frames = truth(stream, packet, deadline)
        decoded.extend(frame.pts for frame in frames)
        return frames

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video_decode, "_decoded", watched)
        video_of(data, 1)
    wanted_and_before = sum(packet.pts <= 20 * 512 for packet in packets_of(data))
    assert 20 * 512 in decoded
    assert len(decoded) < 0.7 * wanted_and_before


def test_times_that_contradict_the_order_of_frames_are_not_used():
    moving = media.moving_frames(40)
    straight = media.video(moving, codec="libx264", rate=25, settings={"x264-params": "bframes=3:b-pyramid=normal"})
    lying = media.retimed_mp4(straight)
    assert [packet.pts for packet in packets_of(straight)] != sorted(packet.pts for packet in packets_of(straight))
    assert [packet.pts for packet in packets_of(lying)] == sorted(packet.pts for packet in packets_of(lying))
    assert np.array_equal(video_of(straight, 9), video_of(lying, 9))


FPS = Sampling("fps", 2.0)


def test_fps_sampling_of_a_variable_frame_rate_uses_times():
    pts = [0, 1, 2, 3, 50, 51, 52, 90, 91, 92, 200, 300]  # tenths of a second; the last frame has the mean duration
    data = media.video(media.grey_frames(12), pts=pts)
    seen = media.frame_numbers(video_of(data, 6, sampling=FPS), 12)
    end = 300 + (packets_of(data)[-1].duration or 300 * 1024 // 11) // 1024
    assert seen == [max(k for k in range(12) if pts[k] <= (i + 0.5) * end / 6) for i in range(6)]
    assert seen != evenly(12, 6)


@pytest.mark.parametrize("kind", ["uniform", "fps"])
def test_jitter_takes_each_frame_from_its_own_part_depending_on_the_draw(kind):
    data = media.video(media.grey_frames(32))
    rule = Sampling(kind, 2.0, jitter=True)
    seen = [tuple(media.frame_numbers(video_of(data, 8, sampling=rule, draw=draw), 32)) for draw in range(6)]
    assert all(4 * part <= number < 4 * part + 4 for numbers in seen for part, number in enumerate(numbers))
    assert len(set(seen)) == 6
    assert seen[3] == tuple(media.frame_numbers(video_of(data, 8, sampling=rule, draw=3), 32))


def test_each_frame_is_fitted_once_at_its_original_size():
    shapes = []

    def corner(frame):
        shapes.append(frame.shape)
        return frame[:2, :3]

    pixels = video_of(media.video(media.grey_frames(3)), 6, fit=corner)
    assert pixels.shape == (6, 2, 3, 3)
    assert shapes == [(48, 64, 3)] * 3
    assert media.frame_numbers(pixels, 3) == evenly(3, 6)


def test_the_display_matrix_of_a_video_is_applied():
    stored = [np.asarray(media.quarters(48, 64))] * 3
    data = media.video(stored, codec="mjpeg", pix_fmt="yuvj444p", form="mov")
    expected = {
        (1, 0, 0, 1): ["red", "green", "blue", "yellow"],
        (0, 1, -1, 0): ["blue", "red", "yellow", "green"],  # 90 degrees clockwise
        (0, -1, 1, 0): ["green", "yellow", "red", "blue"],
        (-1, 0, 0, -1): ["yellow", "blue", "green", "red"],
        (-1, 0, 0, 1): ["green", "red", "yellow", "blue"],
        (1, 0, 0, -1): ["blue", "yellow", "red", "green"],
        (0, 1, 1, 0): ["red", "blue", "green", "yellow"],
    }
    for matrix, colours in expected.items():
        pixels = video_of(media.turned_mp4(data, matrix), 2)
        assert pixels.shape == ((2, 64, 48, 3) if matrix[0] == 0 else (2, 48, 64, 3))
        assert pixels.flags.c_contiguous
        assert media.corners(pixels[1]) == colours, matrix


def test_ten_bit_videos_are_converted_to_eight_bits():
    pixels = video_of(media.video(media.grey_frames(6), codec="libx264", pix_fmt="yuv420p10le", rate=25), 3)
    assert media.frame_numbers(pixels, 6) == evenly(6, 3)


def test_colours_are_kept_by_the_conversion_through_yuv():
    frames = [np.asarray(media.quarters(48, 64))] * 2
    assert media.corners(video_of(media.video(frames), 1)[0]) == ["red", "green", "blue", "yellow"]


def test_an_animated_gif_can_be_decoded_as_a_video():
    frames = [Image.fromarray(frame) for frame in media.grey_frames(6, 40, 64)]
    data = media.encoded(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100)
    assert media.frame_numbers(video_of(data, 3), 6) == evenly(6, 3)


def test_a_file_that_is_no_video_is_a_bad_sample_with_a_kind():
    whole = media.video(media.grey_frames(12), codec="libx264", rate=25)
    assert kind_of_error(video_of, media.sound(), 4) == "no_video"
    assert kind_of_error(video_of, b"", 4) == "unreadable"
    assert kind_of_error(video_of, media.encoded(media.quarters()), 4) == "unreadable"
    assert kind_of_error(video_of, whole[: len(whole) // 3], 4) == "corrupt"


def test_a_video_whose_decoder_conceals_damage_is_rejected():
    data = media.video(media.moving_frames(6, 96, 128), codec="libx264", rate=25)
    whole = bytes(packets_of(data)[0])
    silent = []
    for cut in range(len(whole) // 2, len(whole), 50):
        damaged = data.replace(whole, whole[:cut] + bytes(len(whole) - cut))
        with av.open(io.BytesIO(damaged)) as container, contextlib.suppress(av.FFmpegError):
            marks = [frame.is_corrupt for frame in container.decode(video=0)]
            silent += [damaged] if any(marks) else []
    assert silent, "FFmpeg raises no error and marks the frame as corrupt"
    assert {kind_of_error(video_of, damaged, 6) for damaged in silent} == {"corrupt"}


def test_a_video_with_damaged_frames_is_rejected():
    frames = [np.asarray(media.noise(96, 128, seed)) for seed in range(6)]
    data = bytearray(media.video(frames, codec="libx264", rate=25))
    begin = data.index(b"mdat") + 4
    length = int.from_bytes(data[begin - 8 : begin - 4], "big") - 8
    for at in range(begin + length // 4, begin + length // 2):
        data[at] ^= 0xFF
    assert kind_of_error(video_of, bytes(data), 6) == "corrupt"


def test_a_video_above_the_pixel_limit_is_rejected_by_its_header(monkeypatch):
    data = media.video(media.grey_frames(4, 48, 64))
    monkeypatch.setattr(video_decode, "_decoded", None)
    assert kind_of_error(video_of, data, 2, max_image_px=48 * 64 - 1) == "too_large"


def test_a_video_above_the_duration_limit_is_rejected_before_decoding(monkeypatch):
    data = media.video(media.grey_frames(30))
    assert video_of(data, 2, max_video_s=3.0).shape[0] == 2
    monkeypatch.setattr(video_decode, "_decoded", None)
    assert kind_of_error(video_of, data, 2, max_video_s=2.9) == "too_large"


@pytest.mark.parametrize("form", ["mp4", "avi"])
def test_decoding_that_takes_too_long_ends_with_a_timeout(form):
    assert kind_of_error(video_of, media.video(media.grey_frames(4), form), 2, timeout_s=0.0) == "timeout"


def test_only_cpu_time_counts_for_the_timeout(monkeypatch):
    """The load of the machine must not affect which samples are good."""
    data = media.video(media.grey_frames(4))
    truth = video_decode._decoded

    def waiting(stream, packet, deadline):
        time.sleep(0.3)
        return truth(stream, packet, deadline)

    monkeypatch.setattr(video_decode, "_decoded", waiting)
    assert video_of(data, 1, timeout_s=0.5).shape[0] == 1


def test_cover_art_of_an_audio_file_is_not_decoded_as_a_video():
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
    assert kind_of_error(video_of, data, 2) == "no_video"


MUTATED = [("mp4", "libx264"), ("webm", "libvpx-vp9"), ("mpegts", "mpeg2video"), ("avi", "mpeg4"), ("flv", "libx264")]


@pytest.mark.parametrize(("form", "codec"), MUTATED)
def test_a_mutated_video_is_decoded_or_rejected_with_the_same_result_each_time(form, codec):
    whole = media.video(media.moving_frames(12), form, codec, rate=25)
    chance = random.Random(0)

    def outcome(data: bytes):
        try:
            return video_of(data, 4, max_image_px=10**6, sampling=FPS).tobytes()
        except SampleError as error:
            return error.kind, str(error)

    outcomes = []
    for _ in range(40):
        data = bytearray(whole)
        for _ in range(chance.choice((1, 3, 20))):
            at, count = chance.randrange(len(data)), chance.randrange(1, 30)
            data[at : at + count] = chance.choice((bytes(count), b"", chance.randbytes(1)))
        outcomes.append(outcome(bytes(data)))
        assert outcomes[-1] == outcome(bytes(data))
    assert {type(found) for found in outcomes} == {bytes, tuple}, "some are decoded, some rejected"


@pytest.mark.parametrize(("silent_from", "accepted"), [(12, True), (11, False)])
def test_a_video_with_frames_for_less_than_half_of_its_packets_is_damaged(silent_from, accepted, monkeypatch):
    """A decoder without a key frame returns no frames. Half is enough, since two packets may be fields of one frame."""
    data = media.video(media.moving_frames(24), "avi")
    real, calls = video_decode._decoded, []

    def waiting(stream, packet, deadline):
        calls.append(packet)
        frames = real(stream, packet, deadline)
        return frames if (len(calls) - 1) % 25 < silent_from else []

    monkeypatch.setattr(video_decode, "_decoded", waiting)
    if accepted:
        assert video_of(data, 4).shape == (4, 48, 64, 3)
    else:
        with pytest.raises(SampleError, match="24 packets give 11 frames"):
            video_of(data, 4)


def test_encoding_a_video_does_not_change_the_scheduling_of_this_process():
    form, codec, settings, _ = CODED["av1"]
    before = os.sched_getscheduler(0), os.sched_getparam(0).sched_priority
    media.video(media.moving_frames(4, 96, 128), form, codec, rate=25, settings=settings)
    assert (os.sched_getscheduler(0), os.sched_getparam(0).sched_priority) == before
