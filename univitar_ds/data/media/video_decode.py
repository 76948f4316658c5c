"""Videos to frames. Whatever is wrong with the bytes is a SampleError; nothing is half read in silence.

Only what the wanted frames need is decoded. Where the container says when each frame is shown, the frames are known
before decoding: it begins at the last packet that needs none before it, leaves out frames that no other refers to, and
ends with the last wanted frame. Where it does not say so, or is wrong, all frames are decoded and counted.
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
from univitar_ds.data.media.frame_sampling import UNIFORM, Sampling, by_count, by_time, places
from univitar_ds.data.media.types import DecodeLimits, check_area, check_duration, check_size, reason
from univitar_ds.data.media.video_probe import open_video, probe_video
from univitar_ds.errors import SampleError
from univitar_ds.image_ops import orientation_of_matrix, upright

Fit = Callable[[np.ndarray], np.ndarray]

# They keep times of decoding, or none at all; FFmpeg's guess at times of display is wrong with reordered frames.
_WITHOUT_TIMES = frozenset({"avi", "asf", "mpegvideo"})


def decode_video(
    data: bytes,
    *,
    frames: int,
    limits: DecodeLimits,
    sampling: Sampling = UNIFORM,
    draw: int = 0,
    size: tuple[int, int] | None = None,
    fit: Fit | None = None,
) -> np.ndarray:
    """Frames of a video in order of display, turned upright: one from each of `frames` equal parts.

    Uniform sampling takes parts of equally many frames (without jitter, of n frames those at
    floor((i + 0.5) * n / frames)), fps sampling parts of equal time. A video with fewer frames repeats some. n is the
    number of frames in the packets or, where a wanted one does not come, what can be decoded; never what the header
    claims.

    Args: frames, how many to return; draw, the number of the item, from which jitter follows; size, (height, width)
        that the video must have; fit, applied to each (H, W, 3) uint8 frame as soon as it is decoded, so that only one
        is held at its own size.
    Returns: (frames, H, W, 3) uint8, or (frames, ...) of what `fit` makes.
    Raises: SampleError, also for damage in whatever has to be decoded.
    """
    assert frames >= 1
    where = places(sampling, frames, draw)
    deadline = time.thread_time() + limits.timeout_s
    reel = _FrameCollector(frames, limits.max_image_px, fit)
    if size is not None:
        reel.before_first = partial(_check_size, data, size)
    container, stream = open_video(data)
    with container:
        check_area(stream.codec_context.height, stream.codec_context.width, limits.max_image_px)
        packets = _packets(container, stream, deadline)
        shown = _in_order_of_display(container.format.name, stream.codec_context.name, packets)
        if shown:
            times = [packets[i].pts for i in shown]
            end = times[-1] + (packets[shown[-1]].duration or (times[-1] - times[0]) // max(len(times) - 1, 1))
            check_duration(float((end - times[0]) * (stream.time_base or Fraction(0))), limits.max_video_s)
            indices = by_count(where, len(shown)) if sampling.kind == "uniform" else by_time(where, times, end)
            if _take_at(stream, packets, [shown[i] for i in indices], reel, deadline):
                return reel.pixels
    del packets  # they hold the file once more
    container, stream = open_video(data, thorough=True)
    with container:
        _take_counted(container, stream, where, reel, deadline, stop_early=not shown)
    return reel.pixels


class _FrameCollector:
    """The frames that are wanted, converted as they come; `pixels` is complete once each place was put."""

    def __init__(self, frames: int, max_px: int, fit: Fit | None) -> None:
        self.pixels = np.empty(0, np.uint8)
        self.before_first: Callable[[np.ndarray], None] = lambda pixels: None
        self._frames = frames
        self._max_px = max_px
        self._fit = fit
        self._size: tuple[int, int] | None = None
        self._reformatter = VideoReformatter()

    def put(self, frame: av.VideoFrame, at: Sequence[int]) -> None:
        """Raises: SampleError for a frame above the limit."""
        check_area(frame.height, frame.width, self._max_px)
        first, self._size = self._size is None, self._size or (frame.width, frame.height)  # it may change midway
        rgb = self._reformatter.reformat(frame, *self._size, format="rgb24", threads=1).to_ndarray()
        pixels = _turned(rgb, _matrix(frame))
        if first:
            self.before_first(pixels)
        if self._fit is not None:
            pixels = self._fit(pixels)
        if self.pixels.shape[1:] != pixels.shape:
            self.pixels = np.empty((self._frames, *pixels.shape), pixels.dtype)
        for place in at:
            self.pixels[place] = pixels


def _check_size(data: bytes, size: tuple[int, int], pixels: np.ndarray) -> None:
    """Raises: SampleError for a first frame of another size, unless the header has the size that metadata has.

    A rotation may come with the frames only, so `data pack` writes what the frames have if it decodes them.
    """
    if pixels.shape[:2] != size:
        found = probe_video(data, video_demuxer(data) or "")
        if (found.height, found.width) != size:
            check_size(size, pixels.shape[:2])


def _packets(container: av.container.InputContainer, stream: VideoStream, deadline: float) -> list[av.Packet]:
    """All packets of the stream that hold something."""
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


def _in_order_of_display(container: str, codec: str, packets: Sequence[av.Packet]) -> list[int]:
    """Indices of the packets that are shown, as they are shown; empty where their times are unknown."""
    shown = [i for i, packet in enumerate(packets) if keyframes.is_shown(codec, packet)]
    times = {packets[i].pts for i in shown}
    if container in _WITHOUT_TIMES or None in times or len(times) < len(shown):
        return []
    return sorted(shown, key=lambda i: packets[i].pts)


def _take_at(
    stream: VideoStream, packets: Sequence[av.Packet], wanted: Sequence[int], reel: _FrameCollector, deadline: float
) -> bool:
    """Put the frames of the packets `wanted` on the reel. False if some do not come or times prove wrong."""
    at: dict[int, list[int]] = {}
    for place, index in enumerate(wanted):
        at.setdefault(packets[index].pts, []).append(place)
    context = stream.codec_context
    context.thread_count = 1  # the processes around this one have the other cores
    starts = keyframes.restarts(context.name, context.extradata, packets)
    drops = keyframes.drops_exactly(context.name)
    for start, stop in _runs([packet.pts for packet in packets], sorted(set(wanted)), starts):
        before: int | None = None
        for frame in _run(stream, packets[start:stop], at if drops else None, deadline):
            if frame.pts is None or (before is not None and frame.pts <= before):
                return False
            before = frame.pts
            if before in at:
                reel.put(frame, at.pop(before))
    return not at


def _runs(times: Sequence[int | None], wanted: Sequence[int], starts: Sequence[int]) -> list[tuple[int, int]]:
    """[start, stop) of the packets to decode for the wanted ones, given where decoding may start."""
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
    """The frames of consecutive packets; given what is wanted, the others only where something refers to them."""
    context = stream.codec_context
    context.flush_buffers()
    for packet in packets:
        if wanted is not None:
            context.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        yield from _decoded(stream, packet, deadline)
    yield from _decoded(stream, None, deadline)


def _take_counted(
    container: av.container.InputContainer,
    stream: VideoStream,
    where: Sequence[int],
    reel: _FrameCollector,
    deadline: float,
    stop_early: bool,
) -> None:
    """Put the frames at these places of the video on the reel, all frames taken as equally long."""
    packets = _packets(container, stream, deadline)
    # One packet is one frame for nearly all files; where the header says so too, the tail need not be decoded.
    total = sum(keyframes.is_shown(stream.codec_context.name, packet) for packet in packets)
    stop_early = stop_early and stream.frames == total
    stream.codec_context.thread_count = 1
    seen = _take_numbers(stream, packets, by_count(where, total), stop_early, reel, deadline)
    if seen is not None and 2 * seen < total:  # two fields may make one frame
        raise SampleError("corrupt", f"the video is damaged: {total} packets give {seen} frames")
    if seen is not None and seen != total:
        stream.codec_context.flush_buffers()
        _take_numbers(stream, packets, by_count(where, seen), False, reel, deadline)


def _take_numbers(
    stream: VideoStream,
    packets: Sequence[av.Packet],
    wanted: Sequence[int],
    stop_early: bool,
    reel: _FrameCollector,
    deadline: float,
) -> int | None:
    """Put the frames with these numbers, ascending, on the reel. Returns how many there are (None: stopped early)."""
    at: dict[int, list[int]] = {}
    for place, number in enumerate(wanted):
        at.setdefault(number, []).append(place)
    number = -1
    frames = (frame for packet in [*packets, None] for frame in _decoded(stream, packet, deadline))
    for number, frame in enumerate(frames):
        if number in at:
            reel.put(frame, at[number])
        if stop_early and number == wanted[-1]:
            return None
    if number < 0:
        raise SampleError("corrupt", "the video has no frame that can be decoded")
    return number + 1


def _decoded(stream: VideoStream, packet: av.Packet | None, deadline: float) -> list[av.VideoFrame]:
    """The frames that come out after a packet; None drains the decoder."""
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


def _turned(rgb: np.ndarray, matrix: Matrix) -> np.ndarray:
    """(H, W, 3) after a display matrix, to the nearest quarter turn, mirrors included; contiguous."""
    whole = rgb.view("V3")[..., 0]  # a pixel moves as one element: half the time of a copy byte by byte
    turned = np.ascontiguousarray(upright(whole, orientation_of_matrix(matrix)))
    return turned.view(np.uint8).reshape(*turned.shape, 3)
