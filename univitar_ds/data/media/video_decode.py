"""Decodes frames of videos. Raises SampleError for every fault of the data; never returns a partly decoded frame.

If the container has the presentation time of every frame, the wanted frames are known before decoding, and only the
packets that they need are decoded. Decoding begins at the last suitable packet before a wanted frame and ends with that
frame. If the codec allows it, unwanted frames to which no other frame refers are skipped. If times are missing or
wrong, frames are decoded from the first packet on and counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from functools import partial

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from univitar_ds.data.media import keyframes
from univitar_ds.data.media.containers import Matrix, video_demuxer
from univitar_ds.data.media.frame_sampling import UNIFORM, Sampling, by_count, by_time, sample_positions
from univitar_ds.data.media.types import DecodeLimits, check_area, check_duration, check_length, check_size, reason
from univitar_ds.data.media.video_probe import duration_of, open_video, probe_video
from univitar_ds.errors import SampleError
from univitar_ds.image_ops import orientation_of_matrix, upright

Fit = Callable[[np.ndarray], np.ndarray]

# These containers have only decoding times or no times. FFmpeg derives presentation times, which are wrong for
# reordered frames.
_WITHOUT_TIMES = frozenset({"avi", "asf", "mpegvideo"})


def decode_video(
    data: bytes,
    *,
    frames: int,
    limits: DecodeLimits,
    sampling: Sampling = UNIFORM,
    draw: int = 0,
    size: tuple[int, int, float] | None = None,
    fit: Fit | None = None,
) -> np.ndarray:
    """Decodes upright frames of a video in display order: one from each of `frames` equal parts.

    Uniform sampling uses parts with the same number of frames, fps sampling uses parts of the same duration. Without
    jitter, uniform sampling of n frames returns those with the indices floor((i + 0.5) * n / frames). n is counted from
    the packets, not read from the header. If a wanted frame is not decoded or times are wrong, all frames are decoded
    and n is their number. If the video has fewer frames than `frames`, some are repeated.

    Args: frames: number of frames to return. draw: the item's random number, which determines the jitter. size: the
        (height, width, seconds) in the item's metadata, against which the video is checked. fit: a function applied to
        each (H, W, 3) uint8 frame as soon as it is decoded, so that only one frame at its original size is in memory.
    Returns: (frames, H, W, 3) uint8, or (frames, ...) of the results of `fit`.
    Raises: SampleError, also for damage in packets that have to be decoded.
    """
    assert frames >= 1
    positions = sample_positions(sampling, frames, draw)
    deadline = time.thread_time() + limits.timeout_s
    collector = _FrameCollector(frames, limits.max_image_px, fit)
    if size is not None:
        collector.before_first = partial(_check_size, data, size[:2])
    container, stream = open_video(data)
    with container:
        check_area(stream.codec_context.height, stream.codec_context.width, limits.max_image_px)
        if size is not None:
            check_length(size[2], float(duration_of(container, stream)))
        packets = _packets(container, stream, deadline)
        shown = _display_order(container.format.name, stream.codec_context.name, packets)
        if shown:
            times = [packets[i].pts for i in shown]
            end = times[-1] + (packets[shown[-1]].duration or (times[-1] - times[0]) // max(len(times) - 1, 1))
            check_duration(float((end - times[0]) * (stream.time_base or Fraction(0))), limits.max_video_s)
            indices = by_count(positions, len(shown)) if sampling.kind == "uniform" else by_time(positions, times, end)
            if _collect_packets(stream, packets, [shown[i] for i in indices], collector, deadline):
                return collector.pixels
    del packets  # they are a copy of the file
    container, stream = open_video(data, thorough=True)
    with container:
        _collect_by_count(container, stream, positions, collector, deadline, stop_early=not shown)
    return collector.pixels


class _FrameCollector:
    """Converts the wanted frames as they are decoded. `pixels` is complete once every index has been set."""

    def __init__(self, frames: int, max_px: int, fit: Fit | None) -> None:
        self.pixels = np.empty(0, np.uint8)
        self.before_first: Callable[[np.ndarray], None] = lambda pixels: None
        self._frames = frames
        self._max_px = max_px
        self._fit = fit
        self._size: tuple[int, int] | None = None
        self._reformatter = VideoReformatter()

    def put(self, frame: av.VideoFrame, at: Sequence[int]) -> None:
        """Converts a frame and stores it at these indices. Raises: SampleError for a frame above the pixel limit."""
        check_area(frame.height, frame.width, self._max_px)
        # The frame size may change within a video.
        first, self._size = self._size is None, self._size or (frame.width, frame.height)
        rgb = self._reformatter.reformat(frame, *self._size, format="rgb24", threads=1).to_ndarray()
        pixels = _oriented(rgb, _matrix(frame))
        if first:
            self.before_first(pixels)
        if self._fit is not None:
            pixels = self._fit(pixels)
        if self.pixels.shape[1:] != pixels.shape:
            self.pixels = np.empty((self._frames, *pixels.shape), pixels.dtype)
        for place in at:
            self.pixels[place] = pixels


def _check_size(data: bytes, size: tuple[int, int], pixels: np.ndarray) -> None:
    """Raises SampleError if the size in the metadata is neither that of the first frame nor that in the header.

    Some videos store a rotation only with their frames; `data pack` writes the size of the frames if it decodes them.
    """
    if pixels.shape[:2] != size:
        found = probe_video(data, video_demuxer(data) or "")
        if (found.height, found.width) != size:
            check_size(size, pixels.shape[:2])


def _packets(container: av.container.InputContainer, stream: VideoStream, deadline: float) -> list[av.Packet]:
    """Returns all packets of the stream that are not empty."""
    packets = []
    try:
        for packet in container.demux(stream):
            _check_time(deadline)
            if packet.size:
                packets.append(packet)
    except MemoryError:
        raise
    except av.FFmpegError as error:
        raise SampleError("corrupt", f"the video's packets cannot be read: {reason(error)}") from error
    return packets


def _display_order(container: str, codec: str, packets: Sequence[av.Packet]) -> list[int]:
    """Returns the indices of the displayed packets in display order; empty if their times are unknown."""
    shown = [i for i, packet in enumerate(packets) if keyframes.is_shown(codec, packet)]
    times = {packets[i].pts for i in shown}
    if container in _WITHOUT_TIMES or None in times or len(times) < len(shown):
        return []
    return sorted(shown, key=lambda i: packets[i].pts)


def _collect_packets(
    stream: VideoStream,
    packets: Sequence[av.Packet],
    wanted: Sequence[int],
    collector: _FrameCollector,
    deadline: float,
) -> bool:
    """Collects the frames of the packets `wanted`. Returns False if some are not decoded or times are wrong."""
    at: dict[int, list[int]] = {}
    for place, index in enumerate(wanted):
        at.setdefault(packets[index].pts, []).append(place)
    context = stream.codec_context
    context.thread_count = 1  # other decoding processes use the other cores
    starts = keyframes.restarts(context.name, context.extradata, packets)
    drops = keyframes.drops_exactly(context.name)
    for start, stop in _runs([packet.pts for packet in packets], sorted(set(wanted)), starts):
        before: int | None = None
        for frame in _run(stream, packets[start:stop], at if drops else None, deadline):
            if frame.pts is None or (before is not None and frame.pts <= before):
                return False
            before = frame.pts
            if before in at:
                collector.put(frame, at.pop(before))
    return not at


def _runs(times: Sequence[int | None], wanted: Sequence[int], starts: Sequence[int]) -> list[tuple[int, int]]:
    """Returns the ranges [start, stop) of packets to decode. `starts`: packets at which decoding may begin."""
    needs = []
    for index in wanted:
        usable = (i for i in reversed(starts) if i <= index and times[i] is not None and times[i] <= times[index])
        needs.append((next(usable, 0), index + 1))
    runs: list[tuple[int, int]] = []
    for start, stop in sorted(needs):
        if runs and start <= runs[-1][1]:
            start, stop = runs[-1][0], max(runs.pop()[1], stop)
        runs.append((start, stop))
    return runs


def _run(
    stream: VideoStream, packets: Sequence[av.Packet], wanted: dict[int, list[int]] | None, deadline: float
) -> Iterator[av.VideoFrame]:
    """Yields the frames of consecutive packets. `wanted`: skip frames that are neither wanted nor referenced."""
    context = stream.codec_context
    context.flush_buffers()
    for packet in packets:
        if wanted is not None:
            context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        yield from _decoded(stream, packet, deadline)
    yield from _decoded(stream, None, deadline)


def _collect_by_count(
    container: av.container.InputContainer,
    stream: VideoStream,
    positions: Sequence[int],
    collector: _FrameCollector,
    deadline: float,
    stop_early: bool,
) -> None:
    """Collects the frames at these positions of the video, as if all frames had the same duration."""
    packets = _packets(container, stream, deadline)
    # In nearly all files, a packet is one frame. If the header gives as many frames as there are packets, decoding may
    # stop after the last wanted frame.
    total = sum(keyframes.is_shown(stream.codec_context.name, packet) for packet in packets)
    stop_early = stop_early and stream.frames == total
    stream.codec_context.thread_count = 1
    seen = _collect_numbers(stream, packets, by_count(positions, total), stop_early, collector, deadline)
    if seen is not None and 2 * seen < total:  # two packets may be the fields of one frame
        raise SampleError("corrupt", f"the video is damaged: {total} packets give {seen} frames")
    if seen is not None and seen != total:
        stream.codec_context.flush_buffers()
        _collect_numbers(stream, packets, by_count(positions, seen), False, collector, deadline)


def _collect_numbers(
    stream: VideoStream,
    packets: Sequence[av.Packet],
    wanted: Sequence[int],
    stop_early: bool,
    collector: _FrameCollector,
    deadline: float,
) -> int | None:
    """Collects the frames with these ascending numbers. Returns the number of all frames, None if stopped early."""
    at: dict[int, list[int]] = {}
    for place, number in enumerate(wanted):
        at.setdefault(number, []).append(place)
    number = -1
    frames = (frame for packet in [*packets, None] for frame in _decoded(stream, packet, deadline))
    for number, frame in enumerate(frames):
        if number in at:
            collector.put(frame, at[number])
        if stop_early and number == wanted[-1]:
            return None
    if number < 0:
        raise SampleError("corrupt", "the video has no frame that can be decoded")
    return number + 1


def _decoded(stream: VideoStream, packet: av.Packet | None, deadline: float) -> list[av.VideoFrame]:
    """Returns the frames of the decoder for a packet; None flushes the decoder."""
    _check_time(deadline)
    try:
        frames = stream.codec_context.decode(packet)
    except MemoryError:
        raise
    except (av.FFmpegError, ValueError) as error:
        raise SampleError("corrupt", f"the video is damaged: {reason(error)}") from error
    if any(frame.is_corrupt for frame in frames):
        raise SampleError("corrupt", "the video is damaged: a frame is incomplete")
    return frames


def _check_time(deadline: float) -> None:
    if time.thread_time() > deadline:
        raise SampleError("timeout", "the video takes longer to decode than data.decode_timeout_s allows")


def _matrix(frame: av.VideoFrame) -> Matrix:
    side = frame.side_data.get(SideData.DISPLAYMATRIX)
    if side is None:
        return (1, 0, 0, 1)
    a, b, _, c, d = np.frombuffer(side, np.int32)[:5].tolist()
    return a, b, c, d


def _oriented(rgb: np.ndarray, matrix: Matrix) -> np.ndarray:
    """Applies a display matrix, rounded to 90 degrees, with reflections. Returns (H, W, 3), contiguous."""
    pixels = rgb.view("V3")[..., 0]  # copies each pixel as one element, in half the time of copying bytes
    oriented = np.ascontiguousarray(upright(pixels, orientation_of_matrix(matrix)))
    return oriented.view(np.uint8).reshape(*oriented.shape, 3)
