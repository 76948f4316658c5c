"""Chooses the frames of a video. The result depends only on counts, times and a random number of the item."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from univitar_ds.geometry import TUBELET
from univitar_ds.randomness import draw as draw_number

_PART = 1 << 64
"""Length of one part of a video in `sample_positions`. Positions are integers, so that all machines round alike."""


@dataclass(frozen=True)
class Sampling:
    """The sampling of frames in a stage; see `config.stage.VideoSampling`."""

    kind: Literal["uniform", "fps"] = "uniform"
    fps: float = 2.0
    jitter: bool = False
    part: int = 0
    """The part of the video that is sampled: one of `parts` equal parts, from 0 on."""
    parts: int = 1


UNIFORM = Sampling()


def frames_of(sampling: Sampling, most: int, duration_s: float) -> int:
    """Returns the number of frames to sample from a video: a multiple of the tubelet size, at least one tubelet, at
    most `most`.

    Uniform sampling takes `most` frames from every video, fps sampling a number proportional to the duration, or `most`
    if the header has no duration (0).
    """
    assert most >= TUBELET
    most -= most % TUBELET
    if sampling.kind == "uniform" or duration_s <= 0:
        return most
    return TUBELET * max(1, min(round(duration_s / sampling.parts * sampling.fps / TUBELET), most // TUBELET))


def sample_positions(sampling: Sampling, frames: int, draw: int) -> list[int]:
    """Returns ascending positions in a video at which frames are sampled, as numerators over frames * 2**64.

    The video, or the part of it that is sampled, is divided into `frames` equal parts. The position is the middle of
    each of them or, with jitter, a point in it that depends on `draw` and the number of the part.
    """
    if sampling.jitter:
        found = [i * _PART + draw_number(draw, "frame", i) for i in range(frames)]
    else:
        found = [i * _PART + _PART // 2 for i in range(frames)]
    # Rounded up: a position at the start of a frame must not fall into the frame before.
    return [-(-(sampling.part * frames * _PART + at) // sampling.parts) for at in found]


def by_count(positions: Sequence[int], total: int) -> list[int]:
    """Returns the indices of the frames at these positions of a video of `total` frames that have the same duration."""
    return [at * total // (len(positions) * _PART) for at in positions]


def by_time(positions: Sequence[int], times: Sequence[int], end: int) -> list[int]:
    """Returns the indices of the frames displayed at these positions of a video.

    `times` are the strictly ascending start times of all frames, `end` is the end of the last one.
    """
    length = max(end, times[-1] + 1) - times[0]
    return [bisect_right(times, times[0] + at * length // (len(positions) * _PART)) - 1 for at in positions]
