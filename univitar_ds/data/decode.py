"""Media bytes to raw pixels. Whatever is wrong with the bytes is a SampleError; nothing is half read in silence."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator

import av
import numpy as np
import simplejpeg
from av.sidedata.sidedata import Type as SideData
from av.video.stream import VideoStream

from univitar_ds.data import jpeg
from univitar_ds.data.containers import Matrix, swaps_sides
from univitar_ds.data.probe import open_picture, open_video, reason
from univitar_ds.errors import SampleError
from univitar_ds.pictures import to_rgb

# Found by the turbo decoder in the picture's own data: Pillow would go on and fill in grey or garbage.
_DAMAGED_SCAN = re.compile("bad Huffman code|bad arithmetic|premature end of data|resync|RST", re.IGNORECASE)

_SPARE = 2
"""A reduced decode keeps this many times the target's sides. After resizing it then differs from a full decode by
1 level of 255 on average; decoded straight to the target by 2 to 4, most in print and fine texture."""


def decode_image(data: bytes, *, max_px: int, target: tuple[int, int] | None = None) -> np.ndarray:
    """A picture, the first frame of an animated one, as it is meant to be seen.

    EXIF orientation is applied and transparency laid on white.

    Args: max_px, most pixels allowed; target, the (height, width) it will be resized to: a much larger JPEG
        is decoded at a smaller scale, never below twice the target.
    Returns: (H, W, 3) uint8.
    Raises: SampleError.
    """
    if jpeg.is_jpeg(data):
        header = jpeg.read_header(data)
        _check_area(header.height, header.width, max_px)
        if header.channels in (1, 3) and header.precision == 8:
            pixels = _turbo(data, header, target)
            if pixels is not None:
                return pixels
    return _pillow(data, max_px)


def decode_clip(data: bytes, *, frames: int, max_px: int, timeout_s: float) -> np.ndarray:
    """Evenly spaced frames of a clip: of its n frames those at floor((i + 0.5) * n / frames), turned upright.

    A clip with fewer frames repeats some. n is what can be decoded, whatever the header claims.

    Args: frames, how many to return; max_px, most pixels of one frame; timeout_s, seconds of decoding allowed.
    Returns: (frames, H, W, 3) uint8.
    Raises: SampleError, also for damage anywhere up to the last frame needed.
    """
    assert frames >= 1
    deadline = time.monotonic() + timeout_s
    container, stream = open_video(data)
    with container:
        _check_area(stream.codec_context.height, stream.codec_context.width, max_px)
        packets = _packets(container, stream)
        # One packet is one frame for nearly all files; where the header says so too, the tail need not be decoded.
        total = sum(1 for packet in packets if packet.size and not packet.is_discard)
        stop_early = stream.frames == total
        stream.codec_context.thread_count = 1  # the processes around this one have the other cores
        kept, seen = _decode_at(packets, _evenly(total, frames), stop_early, max_px, deadline)
        if seen is not None and seen != total:
            total = seen
            stream.codec_context.flush_buffers()
            kept, _ = _decode_at(packets, _evenly(total, frames), False, max_px, deadline)
    return np.stack([kept[index] for index in _evenly(total, frames)])


def _evenly(total: int, frames: int) -> list[int]:
    return [(2 * i + 1) * total // (2 * frames) for i in range(frames)]


def _check_area(height: int, width: int, max_px: int) -> None:
    if height * width > max_px:
        raise SampleError(
            "too_large", f"{width} x {height} is {height * width} pixels, above data.max_image_px = {max_px}"
        )


def _turbo(data: bytes, header: jpeg.JpegHeader, target: tuple[int, int] | None) -> np.ndarray | None:
    """The picture through libjpeg-turbo; None if Pillow should have a look at it."""
    scale = {}
    if target is not None:
        height, width = target[::-1] if header.orientation >= 5 else target
        height, width = _SPARE * height, _SPARE * width
        if 2 * height <= header.height and 2 * width <= header.width:
            scale = {"min_height": height, "min_width": width, "min_factor": 2}
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", strict=True, **scale)
    except ValueError as error:
        if _DAMAGED_SCAN.search(str(error)):
            raise SampleError("corrupt", f"the JPEG is damaged: {error}") from error
        return None
    return np.ascontiguousarray(_upright(pixels, header.orientation))


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """EXIF orientation 1 to 8 undone on (H, W, C)."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    rows = -1 if orientation in (3, 4, 7, 8) else 1
    columns = -1 if orientation in (2, 3, 6, 7) else 1
    return pixels[::rows, ::columns]


def _pillow(data: bytes, max_px: int) -> np.ndarray:
    with open_picture(data) as image:
        _check_area(image.height, image.width, max_px)
        try:
            return np.asarray(to_rgb(image))
        except Exception as error:  # Pillow's decoders raise whatever damaged data runs them into
            raise SampleError("corrupt", f"the {image.format} picture cannot be decoded: {reason(error)}") from error


def _packets(container: av.container.InputContainer, stream: VideoStream) -> list[av.Packet]:
    """All packets of the stream and the empty one that flushes the decoder."""
    try:
        return list(container.demux(stream))
    except av.FFmpegError as error:
        raise SampleError("corrupt", f"the clip's packets cannot be read: {reason(error)}") from error


def _decode_at(
    packets: list[av.Packet], wanted: list[int], stop_early: bool, max_px: int, deadline: float
) -> tuple[dict[int, np.ndarray], int | None]:
    """The frames at the `wanted` indices that exist, and how many frames there are (None: stopped early)."""
    indices = set(wanted)
    kept: dict[int, np.ndarray] = {}
    size: tuple[int, int] | None = None
    index = -1
    for index, frame in enumerate(_frames(packets, deadline)):
        if index in indices:
            _check_area(frame.height, frame.width, max_px)
            size = size or (frame.width, frame.height)  # a stream may change its size midway
            rgb = frame.reformat(*size, format="rgb24").to_ndarray()
            kept[index] = np.ascontiguousarray(_turned(rgb, _matrix(frame)))
        if stop_early and index == wanted[-1]:
            return kept, None
    if index < 0:
        raise SampleError("corrupt", "the clip has no frame that can be decoded")
    return kept, index + 1


def _frames(packets: list[av.Packet], deadline: float) -> Iterator[av.VideoFrame]:
    """Every frame in order of display."""
    try:
        for packet in packets:
            if time.monotonic() > deadline:
                raise SampleError("timeout", "the clip takes longer to decode than data.decode_timeout_s allows")
            yield from packet.decode()
    except (av.FFmpegError, ValueError) as error:
        raise SampleError("corrupt", f"the clip is damaged: {reason(error)}") from error


def _matrix(frame: av.VideoFrame) -> Matrix:
    side = frame.side_data.get(SideData.DISPLAYMATRIX)
    if side is None:
        return (1, 0, 0, 1)
    a, b, _, c, d = np.frombuffer(side, np.int32)[:5].tolist()
    return a, b, c, d


def _turned(rgb: np.ndarray, matrix: Matrix) -> np.ndarray:
    """(H, W, 3) after a display matrix, to the nearest quarter turn, mirrors included."""
    a, b, c, d = matrix
    if swaps_sides(matrix):
        rgb, (a, d) = rgb.swapaxes(0, 1), (c, b)
    return rgb[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
