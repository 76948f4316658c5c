"""Looking at every media file once: its hash, kind and size, and whether its pixels can be had.

Runs in processes of its own, because decoders work hard and, on hostile bytes, may take their process with them.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from univitar_ds.config.data import DataConfig
from univitar_ds.data.decoding import children
from univitar_ds.data.media.containers import VIDEO_EXTENSION_OF, video_demuxer
from univitar_ds.data.media.image_decode import decode_image
from univitar_ds.data.media.jpeg_header import is_jpeg
from univitar_ds.data.media.probe import probe
from univitar_ds.data.media.types import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, MediaSize
from univitar_ds.data.storage.local import read_file
from univitar_ds.errors import SampleError

_BATCH = 4
_AHEAD = 64
"""Batches for each process that are handed over ahead: a video that takes minutes holds nobody else up meanwhile."""
_PRELOAD = (__name__, "univitar_ds.data.media.video_decode")
_MOST_BYTES = 1_000_000_000
_MAX_PX: int = DataConfig.model_fields["max_image_px"].default
_VIDEO_FRAMES = 16
_VIDEO_TIMEOUT_S = 10 * DataConfig.model_fields["decode_timeout_s"].default


@dataclass(frozen=True)
class Job:
    """A file to look at. `kind` is what its row says it is, None if the row leaves it to the content."""

    path: Path
    kind: str | None
    verify: bool


@dataclass(frozen=True)
class MediaInfo:
    """What a file is. With a `fault` it is left out; `extension` is one that says its kind to every reader.

    `frames` and `duration_s` are those of `probe.probe`.
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


def examine_all(jobs: Sequence[Job], workers: int) -> Iterator[MediaInfo]:
    """A finding for each job, in order. With one worker everything happens in this process."""
    if workers <= 1:
        yield from map(examine, jobs)
        return
    batches = [jobs[start : start + _BATCH] for start in range(0, len(jobs), _BATCH)]
    done = 0
    while done < len(batches):
        with suppress(BrokenProcessPool), children.pool(workers, _PRELOAD) as pool:
            for findings in _in_order(pool, batches[done:], _AHEAD * workers):
                yield from findings
                done += 1
        if done < len(batches):
            yield from map(_examine_apart, batches[done])
            done += 1


def _in_order(pool: ProcessPoolExecutor, batches: Sequence[Sequence[Job]], ahead: int) -> Iterator[list[MediaInfo]]:
    """Of millions of files only so many batches are handed over at a time, and again after a process has died."""
    coming = iter(batches)
    waiting = deque(pool.submit(_examine_batch, batch) for batch in islice(coming, ahead))
    while waiting:
        yield waiting.popleft().result()
        waiting.extend(pool.submit(_examine_batch, batch) for batch in islice(coming, 1))


def examine(job: Job) -> MediaInfo:
    """Read, hash, probe and, if asked, decode one file."""
    try:
        data = read_file(job.path, _MOST_BYTES, f"; at most {_MOST_BYTES} fit into a sample")
        extension = job.path.suffix.lower().lstrip(".")
        if job.kind == "video" and video_demuxer(data) == "gif":
            extension = "gifv"
        size = probe(data, extension)
        if job.kind not in (None, size.kind):
            raise SampleError("wrong_kind", f"the file holds {size.kind} data, its row says {job.kind}")
        if size.height * size.width > _MAX_PX:
            raise SampleError("too_large", f"{size.width} x {size.height} pixels, above {_MAX_PX} in all")
        height, width = _decoded_size(data, size) if job.verify else (size.height, size.width)
    except SampleError as error:
        return MediaInfo(f"{error.kind}: {error}")
    except MemoryError:
        return MediaInfo("too_large: decoding it takes more memory than there is")
    return MediaInfo(
        None,
        len(data),
        hashlib.sha256(data).hexdigest(),
        _telling_extension(data, extension, size.kind),
        size.kind,
        height,
        width,
        size.frames,
        size.duration_s,
    )


def _decoded_size(data: bytes, size: MediaSize) -> tuple[int, int]:
    """(height, width) of the pixels themselves: some containers do not state a rotation in their header."""
    if size.kind == "image":
        return decode_image(data, max_px=_MAX_PX).shape[:2]
    from univitar_ds.data.media.video_decode import (
        decode_video,  # trainers know this module too, and may read images only
    )

    sides = decode_video(data, frames=_VIDEO_FRAMES, max_px=_MAX_PX, timeout_s=_VIDEO_TIMEOUT_S, fit=_sides)[0]
    return int(sides[0]), int(sides[1])


def _sides(frame: np.ndarray) -> np.ndarray:
    return np.array(frame.shape[:2])


def _telling_extension(data: bytes, extension: str, kind: str) -> str:
    """The file's own extension where it fits the kind, else one that does."""
    if kind == "image":
        return extension if extension in IMAGE_EXTENSIONS else "jpg" if is_jpeg(data) else "png"
    if extension in VIDEO_EXTENSIONS:
        return extension
    demuxer = video_demuxer(data)
    assert demuxer is not None
    return VIDEO_EXTENSION_OF[demuxer]


def _examine_batch(jobs: Sequence[Job]) -> list[MediaInfo]:
    return [examine(job) for job in jobs]


def _examine_apart(job: Job) -> MediaInfo:
    """One file in a process of its own, for a batch that lost its process."""
    with suppress(BrokenProcessPool), children.pool(1, _PRELOAD) as pool:
        return pool.submit(examine, job).result()
    return MediaInfo("corrupt: the decoder's process died of this file")
