"""File extensions of images and videos, their sizes before decoding, and limits of decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from univitar_ds.errors import SampleError

# fmt: off
IMAGE_EXTENSIONS = frozenset(
    ["jpg", "jpeg", "jpe", "jfif", "mpo", "png", "apng", "gif", "webp", "bmp", "tif", "tiff", "ico", "psd",
     "jp2", "j2k", "jpx", "avif", "avifs", "ppm", "pgm", "pbm", "pnm", "qoi"]
)
VIDEO_EXTENSIONS = frozenset(
    ["mp4", "m4v", "mov", "webm", "mkv", "avi", "mpg", "mpeg", "ts", "m2ts", "mts", "flv", "ogv", "wmv", "asf",
     "3gp", "3g2", "gifv"]
)
# fmt: on


@dataclass(frozen=True)
class DecodeLimits:
    """Limits of decoding: pixels of a frame; for a video, CPU seconds of decoding, and duration in seconds.

    The CPU time is that of the thread, so that the load of the machine does not affect which samples are good.
    """

    max_image_px: int
    timeout_s: float
    max_video_s: float = float("inf")


_LENGTH_SLACK_S, _LENGTH_SLACK = 0.5, 0.05
MAX_SIDE_PX = 1 << 20
"""Maximum side of an image. Decoders allocate tables for each row, and the resizing kernel weights for each row and
column: 3 GB for a side of 100 million."""


@dataclass(frozen=True)
class MediaSize:
    """Height and width in pixels after EXIF orientation or display matrix.

    `frames` is 1 for an image. For a video, it is the number in the header or, if there is none, duration times frame
    rate, and at least 1. It is used for planning only and may differ from the number of decoded frames. `duration_s` is
    0 for an image, and if the header has no duration.
    """

    kind: Literal["image", "video"]
    height: int
    width: int
    frames: int
    duration_s: float = 0.0


def check_area(height: int, width: int, max_px: int) -> None:
    """Raises SampleError for a frame of more than `max_px` pixels, or with a side above `MAX_SIDE_PX`."""
    if max(height, width) > MAX_SIDE_PX:
        raise SampleError("too_large", f"{width} x {height} has a side of more than {MAX_SIDE_PX} pixels")
    if height * width > max_px:
        raise SampleError(
            "too_large", f"{width} x {height} is {height * width} pixels, above data.max_image_px = {max_px}"
        )


def check_duration(seconds: float, max_video_s: float) -> None:
    """Raises SampleError for a video of more than `max_video_s` seconds."""
    if seconds > max_video_s:
        raise SampleError("too_large", f"the video lasts {seconds:.6g} s, above data.max_video_s = {max_video_s:g}")


def check_size(expected: tuple[int, int] | None, found: tuple[int, ...]) -> None:
    """Raises SampleError if the size of a file differs from its metadata.

    Args: expected: (height, width) in the metadata, None if it has no size; found: (height, width) of the file.
    """
    if expected is not None and expected != tuple(found):
        (height, width), (own_height, own_width) = expected, found
        detail = f"its metadata says {width} x {height} px, the file has {own_width} x {own_height}"
        raise SampleError("wrong_size", f"{detail}; pack the folder again")


def check_length(expected_s: float, found_s: float) -> None:
    """Raises SampleError if the duration of a video differs from its metadata.

    The tolerance is for versions of FFmpeg, which estimate the duration differently if the container lacks it.

    Args: expected_s: seconds in the metadata; found_s: seconds in the header.
    """
    if abs(expected_s - found_s) > max(_LENGTH_SLACK_S, _LENGTH_SLACK * found_s):
        detail = f"its metadata says {expected_s:.6g} s, the file lasts {found_s:.6g} s"
        raise SampleError("wrong_size", f"{detail}; pack the folder again")


def reason(error: Exception) -> str:
    """Returns the error of a library as one line that is the same on every machine."""
    text = getattr(error, "strerror", None) or str(error)
    return f"{type(error).__name__}: {text.strip().splitlines()[0]}" if text.strip() else type(error).__name__
