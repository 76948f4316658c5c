"""Clips to frames. Whatever is wrong with the bytes is a SampleError; nothing is half read in silence."""

from __future__ import annotations

import time
from collections.abc import Iterator

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.stream import VideoStream

from univitar_ds.data.containers import Matrix, swaps_sides
from univitar_ds.data.probe import check_area, open_video, reason
from univitar_ds.errors import SampleError


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
        check_area(stream.codec_context.height, stream.codec_context.width, max_px)
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
            check_area(frame.height, frame.width, max_px)
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
