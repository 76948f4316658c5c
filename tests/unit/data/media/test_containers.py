"""Display matrices and missing bytes of containers, read without FFmpeg."""

import io

import av
import pytest

from tests.support import media
from univitar_ds.data.media.containers import matroska_matrix, missing_bytes, video_demuxer
from univitar_ds.data.media.probe import probe
from univitar_ds.data.media.types import DecodeLimits
from univitar_ds.data.media.video_decode import decode_video
from univitar_ds.errors import SampleError
from univitar_ds.image_ops import orientation_of_matrix


def remuxed(data: bytes, form: str) -> bytes:
    """The packets of a video in another container, with the same display matrix."""
    stream = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(stream, "w", format=form) as container:
        track = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = track
                container.mux(packet)
    return stream.getvalue()


@pytest.mark.parametrize(("matrix", "rotated"), [((1, 0, 0, 1), 0), ((0, 1, -1, 0), 1), ((-1, 0, 0, -1), 0)])
def test_a_video_copied_into_matroska_keeps_its_rotation(matrix, rotated):
    data = remuxed(media.turned_mp4(media.video(media.moving_frames(6)), matrix), "matroska")
    size = probe(data, "mkv")
    assert (orientation_of_matrix(matroska_matrix(data)) >= 5) == bool(rotated)
    assert (size.height, size.width) == ((64, 48) if rotated else (48, 64))
    assert decode_video(data, frames=2, limits=DecodeLimits(10**6, 60.0)).shape[1:3] == (size.height, size.width)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("mp4", {}),
        ("mp4", {"movflags": "frag_keyframe+empty_moov"}),
        ("mov", {}),
        ("matroska", {}),
        ("webm", {}),
    ],
)
def test_a_cut_off_video_is_reported_with_the_number_of_missing_bytes(form, options):
    codec = {"webm": "libvpx-vp9"}.get(form, "mpeg4")
    data = media.video(media.moving_frames(8), form, codec, options=options)
    demuxer = video_demuxer(data)
    assert missing_bytes(data, demuxer) == 0
    assert missing_bytes(data + b"tail of a broken copy", demuxer) == 0
    for kept in (len(data) // 2, len(data) * 9 // 10, len(data) - 9):
        missing = missing_bytes(data[:kept], demuxer)
        assert missing > 0 or b"mfra" in data  # the fragment index has several boxes
        if missing:
            with pytest.raises(SampleError, match=f"the video is cut off: {missing} bytes are missing"):
                probe(data[:kept], form)


@pytest.mark.parametrize("data", [b"", b"\x1a\x45\xdf\xa3", b"\x1a\x45\xdf\xa3" + b"\xff" * 40, b"\0\0\0\x08ftyp" * 3])
def test_bytes_that_are_no_container_have_no_missing_bytes(data):
    assert missing_bytes(data, "matroska") == missing_bytes(data, "mov") == missing_bytes(data, "avi") == 0
    assert matroska_matrix(data) == (1, 0, 0, 1)


def test_a_live_matroska_recording_without_a_length_is_not_cut_off():
    data = media.video(media.moving_frames(8), "matroska", options={"live": "1"})
    assert missing_bytes(data, "matroska") == missing_bytes(data[:-50], "matroska") == 0
