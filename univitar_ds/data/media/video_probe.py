"""Videos as containers: opened, and their size without decoding. What only reads images never imports this."""

from __future__ import annotations

import io
from fractions import Fraction

import av
from av.video.stream import VideoStream

from univitar_ds.data.media.containers import (
    Matrix,
    matroska_matrix,
    missing_bytes,
    mp4_matrices,
    video_demuxer,
)
from univitar_ds.data.media.types import MediaSize, reason
from univitar_ds.errors import SampleError
from univitar_ds.image_ops import display_size, orientation_of_matrix


def open_video(data: bytes, thorough: bool = False) -> tuple[av.container.InputContainer, VideoStream]:
    """An opened container and its main video stream; cover art of audio files is no video stream.

    FFmpeg decodes up to 20 frames to learn what a header may not say: the pixel format and how many frames arrive out
    of order. That takes 20 to 200 ms for large frames and is done only if `thorough`, or if the size is not found
    without. Who wants every frame in order needs it; sizes, durations and packets are the same without.

    FFmpeg believes a header before it has read a frame: 72 bytes for each frame that an MP4 claims. Who opens what may
    be hostile calls `memory_limits.confine` before.

    Raises: SampleError, or MemoryError where the header takes more than there is.
    """
    demuxer = video_demuxer(data)
    if demuxer is None:
        raise SampleError("unreadable", "the bytes are no video container we read")
    if missing := missing_bytes(data, demuxer):
        raise SampleError("corrupt", f"the video is cut off: {missing} bytes are missing at its end")
    options = {} if thorough else {"skip_frame": "all"}
    try:
        container = av.open(io.BytesIO(data), format=demuxer, metadata_errors="ignore", options=options)
    except MemoryError:
        raise
    except (av.FFmpegError, ValueError, EOFError) as error:
        raise SampleError("corrupt", f"the {demuxer} container cannot be opened: {reason(error)}") from error
    images = av.stream.Disposition.attached_pic
    streams = [stream for stream in container.streams.video if not stream.disposition & images]
    if not streams:
        container.close()
        raise SampleError("no_video", f"the {demuxer} container has no video stream")
    stream = streams[0]
    if stream.codec_context is None or not stream.codec_context.width or not stream.codec_context.height:
        container.close()
        if not thorough:
            return open_video(data, thorough=True)
        raise SampleError("corrupt", f"the {demuxer} container does not say the size of its video")
    return container, stream


def probe_video(data: bytes, demuxer: str) -> MediaSize:
    """What `probe.probe` returns for a video. Raises: see `open_video`."""
    container, stream = open_video(data)
    with container:
        turned = orientation_of_matrix(_matrix(data, demuxer, stream.id))
        height, width = display_size(stream.codec_context.height, stream.codec_context.width, turned)
        seconds = Fraction(0)
        if stream.duration is not None and stream.time_base is not None:
            seconds = stream.duration * stream.time_base
        elif container.duration is not None:
            seconds = Fraction(container.duration, av.time_base)
        seconds = max(seconds, Fraction(0))
        frames = stream.frames or round(seconds * (stream.average_rate or 0))
        return MediaSize("video", height, width, max(frames, 1), float(seconds))


def _matrix(data: bytes, demuxer: str, track: int) -> Matrix:
    """How the frames are turned when they are shown; FFmpeg gives it with the frames only."""
    if demuxer == "matroska":
        return matroska_matrix(data)
    return mp4_matrices(data).get(track, (1, 0, 0, 1)) if demuxer == "mov" else (1, 0, 0, 1)
