"""Which frames of a video are seen: pure functions of counts, times and a number that was drawn for the item."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from univitar_ds.geometry import TUBELET
from univitar_ds.randomness import draw as draw_number

_WHOLE = 1 << 64
"""A part of a video in the units of `places`: integers, so that no rounding differs between machines."""


@dataclass(frozen=True)
class Sampling:
    """The rule of a stage; see `config.stage.VideoSampling`."""

    kind: Literal["uniform", "fps"] = "uniform"
    fps: float = 2.0
    jitter: bool = False


UNIFORM = Sampling()


def frames_of(sampling: Sampling, most: int, duration_s: float) -> int:
    """How many frames are taken from a video: whole tubelets, at most `most`, at least one tubelet.

    Uniform sampling takes `most` from every video, fps sampling as many as the duration gives. A video whose header
    has no duration (0) gives `most` too.
    """
    assert most >= TUBELET
    most -= most % TUBELET
    if sampling.kind == "uniform" or duration_s <= 0:
        return most
    return TUBELET * max(1, min(round(duration_s * sampling.fps / TUBELET), most // TUBELET))


def places(sampling: Sampling, frames: int, draw: int) -> list[int]:
    """Where in a video its frames are taken, ascending, as numerators over frames * 2**64.

    The video is cut into `frames` equal parts. Each gives the frame at its middle or, with jitter, at a point of it
    that follows from `draw` and the number of the part.
    """
    if sampling.jitter:
        return [i * _WHOLE + draw_number(draw, "frame", i) for i in range(frames)]
    return [i * _WHOLE + _WHOLE // 2 for i in range(frames)]


def by_count(where: Sequence[int], total: int) -> list[int]:
    """The frames at these places of a video of `total` frames, all shown equally long."""
    return [place * total // (len(where) * _WHOLE) for place in where]


def by_time(where: Sequence[int], times: Sequence[int], end: int) -> list[int]:
    """The frames on show at these places of a video; `times`, strictly ascending, are when each comes, until `end`."""
    length = max(end, times[-1] + 1) - times[0]
    return [bisect_right(times, times[0] + place * length // (len(where) * _WHOLE)) - 1 for place in where]
