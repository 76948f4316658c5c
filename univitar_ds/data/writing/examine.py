"""Examines every media file once: its hash, kind and size, and whether it can be decoded.

This always runs in other processes: decoding takes much CPU time, and a hostile file may exhaust the memory or crash
the process.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from univitar_ds.config.data import DataConfig
from univitar_ds.data.decoding.task_pool import Done, Lost, Next, Task, TaskPool
from univitar_ds.data.importing.rows import Part
from univitar_ds.data.media.containers import VIDEO_EXTENSION_OF, video_demuxer
from univitar_ds.data.media.image_decode import decode_image
from univitar_ds.data.media.jpeg_header import is_jpeg
from univitar_ds.data.media.memory_limits import confine
from univitar_ds.data.media.probe import probe
from univitar_ds.data.media.types import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, DecodeLimits, MediaSize
from univitar_ds.data.storage.local import LocalStorage, read_file
from univitar_ds.errors import DataError, SampleError

_BATCH = 4
_PRELOAD = ("univitar_ds.data.media.video_decode",)
MOST_BYTES = 1_000_000_000
"""Maximum size of a media file in bytes."""
_MAX_PX: int = DataConfig.model_fields["max_image_px"].default
_VIDEO_FRAMES = 16
_VIDEO_TIMEOUT_S = 10 * DataConfig.model_fields["decode_timeout_s"].default
_SILENCE_S = 2 * _VIDEO_TIMEOUT_S
"""Wall-clock seconds after which the process of a file counts as hung."""


@dataclass(frozen=True)
class Job:
    """A file to examine.

    `kind`: the kind in its row, None if the row has none; `verify`: whether to decode it; `part`: its bytes, if it is
    in a tar; then only the name of `path` is used.
    """

    path: Path
    kind: str | None
    verify: bool
    part: Part | None = None


@dataclass(frozen=True)
class MediaInfo:
    """The result for a file. A file with a `fault` is left out.

    `extension` is the file's own if it matches the kind, else another one that does. `frames` and `duration_s` are
    those of `probe.probe`. `repeatable` is False if processes ended during the file: a later packing examines it again.
    """

    fault: str | None
    bytes: int = 0
    sha256: str = ""
    extension: str = ""
    kind: str = ""
    height: int = 0
    width: int = 0
    frames: int = 0
    duration_s: float = 0.0
    repeatable: bool = True


class _Examined(NamedTuple):
    """The result for the file with this index in its batch."""

    index: int
    info: MediaInfo


def examine_all(jobs: Sequence[Job], workers: int) -> Iterator[tuple[int, MediaInfo]]:
    """Examines files in `workers` processes. Yields the index of each job with its result, in order of completion.

    A file that crashes its process, makes it hang or exceeds the memory limit of an image has a fault with this reason.

    Raises: DataError if the processes end and no file is the cause.
    """
    batches = (Task(first, jobs[first : first + _BATCH], start=0) for first in range(0, len(jobs), _BATCH))
    with TaskPool(_examine_batch, workers, _SILENCE_S, _PRELOAD) as pool:
        for first, event in pool.run(batches):
            if isinstance(event, Lost):
                crashed = "corrupt: the decoding process crashed on this file"
                fault = crashed if event.kind == "crash" else f"timeout: {event.detail}"
                yield first + event.item, MediaInfo(fault, repeatable=False)
            elif isinstance(event, Done) and event.error is not None:
                raise DataError(
                    f"{jobs[first].path} cannot be examined: {event.error}; free memory or pack with fewer --workers"
                )
            elif isinstance(event, _Examined):
                yield first + event.index, event.info


def _examine_batch(task: Task, report: Callable[[Any], None]) -> None:
    """Examines the files of a batch in order, beginning at `task.start`."""
    for index in range(task.start, len(task.job)):
        report(Next(index, index, index + 1))
        job: Job = task.job[index]
        size = 0
        with suppress(OSError):  # `examine` reports it
            size = min(os.stat(job.path).st_size if job.part is None else job.part.length, MOST_BYTES)
        confine(_MAX_PX, size)
        report(_Examined(index, examine(job)))


def examine(job: Job) -> MediaInfo:
    """Reads, hashes and probes one file, and decodes it if `job.verify`."""
    try:
        data = _content(job)
        extension = job.path.suffix.lower().lstrip(".")
        if job.kind == "video" and video_demuxer(data) == "gif":
            extension = "gifv"
        size = probe(data, extension)
        if job.kind not in (None, size.kind):
            raise SampleError("wrong_kind", f"the file holds {size.kind} data, its row says {job.kind}")
        if size.height * size.width > _MAX_PX:
            raise SampleError("too_large", f"{size.width} x {size.height} pixels, above the limit of {_MAX_PX}")
        height, width = _decoded_size(data, size) if job.verify else (size.height, size.width)
    except SampleError as error:
        return MediaInfo(f"{error.kind}: {error}")
    except MemoryError:
        return MediaInfo(f"too_large: decoding it takes more memory than {_MAX_PX} pixels may; store a smaller file")
    return MediaInfo(
        None,
        len(data),
        hashlib.sha256(data).hexdigest(),
        _matching_extension(data, extension, size.kind),
        size.kind,
        height,
        width,
        size.frames,
        size.duration_s,
    )


def _content(job: Job) -> bytes:
    """Returns the bytes of a file. Raises: SampleError if it is too large or cannot be read."""
    limit = f"; at most {MOST_BYTES} fit into a sample"
    if job.part is None:
        return read_file(job.path, MOST_BYTES, limit)
    if job.part.length > MOST_BYTES:
        raise SampleError("too_large", f"the file has {job.part.length} bytes{limit}")
    try:
        return LocalStorage().read_range(*job.part)
    except DataError as error:
        raise SampleError("unreadable", str(error)) from error


def _decoded_size(data: bytes, size: MediaSize) -> tuple[int, int]:
    """Returns (height, width) of the decoded pixels, because some containers have no rotation in their header."""
    if size.kind == "image":
        return decode_image(data, max_px=_MAX_PX).shape[:2]
    from univitar_ds.data.media.video_decode import decode_video  # trainers import this module, but may need no FFmpeg

    sides = decode_video(data, frames=_VIDEO_FRAMES, limits=DecodeLimits(_MAX_PX, _VIDEO_TIMEOUT_S), fit=_sides)[0]
    return int(sides[0]), int(sides[1])


def _sides(frame: np.ndarray) -> np.ndarray:
    return np.array(frame.shape[:2])


def _matching_extension(data: bytes, extension: str, kind: str) -> str:
    """Returns the file's own extension if it matches the kind, else another one that does."""
    if kind == "image":
        return extension if extension in IMAGE_EXTENSIONS else "jpg" if is_jpeg(data) else "png"
    if extension in VIDEO_EXTENSIONS:
        return extension
    demuxer = video_demuxer(data)
    assert demuxer is not None
    return VIDEO_EXTENSION_OF[demuxer]
