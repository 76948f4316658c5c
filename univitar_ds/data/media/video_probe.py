"""Opens video containers and reads their size without decoding. Code that reads only images never imports this."""

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
    """Opens a container. Returns it with its first video stream; cover art of audio files does not count.

    With `thorough`, FFmpeg decodes up to 20 frames to find the pixel format and the number of reordered frames, which
    the header may not have; this takes 20 to 200 ms for large frames. It is needed to decode all frames in order, and
    also happens if the size is not found otherwise. Sizes, durations and packets do not depend on it.

    FFmpeg allocates memory by the header before it reads a frame: 72 bytes for each frame that an MP4 claims to have.
    Call `memory_limits.confine` before opening untrusted files.

    Raises: SampleError, or MemoryError if the header takes too much memory.
    """
    demuxer = video_demuxer(data)
    if demuxer is None:
        raise SampleError("unreadable", "the bytes are not a video container that can be read")
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
        raise SampleError("corrupt", f"the {demuxer} container does not give the height and width of its video")
    return container, stream


def probe_video(data: bytes, demuxer: str) -> MediaSize:
    """Returns the size of a video for `probe.probe`. Raises: see `open_video`."""
    container, stream = open_video(data)
    with container:
        orientation = orientation_of_matrix(_matrix(data, demuxer, stream.id))
        height, width = display_size(stream.codec_context.height, stream.codec_context.width, orientation)
        seconds = duration_of(container, stream)
        frames = stream.frames or round(seconds * (stream.average_rate or 0))
        return MediaSize("video", height, width, max(frames, 1), float(seconds))


def duration_of(container: av.container.InputContainer, stream: VideoStream) -> Fraction:
    """Returns the duration of a video in seconds according to its header, 0 if it has none."""
    if stream.duration is not None and stream.time_base is not None:
        return max(stream.duration * stream.time_base, Fraction(0))
    return max(Fraction(container.duration or 0, av.time_base), Fraction(0))


def _matrix(data: bytes, demuxer: str, track: int) -> Matrix:
    """Returns the display matrix, which FFmpeg returns only with decoded frames."""
    if demuxer == "matroska":
        return matroska_matrix(data)
    return mp4_matrices(data).get(track, (1, 0, 0, 1)) if demuxer == "mov" else (1, 0, 0, 1)
