"""Reports how the loader would read single files, by loading each file as a sample."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from univitar_ds.config.data import DataConfig
from univitar_ds.config.stage import StageConfig
from univitar_ds.data.collate import decoded
from univitar_ds.data.media.prober import MediaAddress, Prober
from univitar_ds.data.media.types import MediaSize
from univitar_ds.data.sampler.lanes import Plan
from univitar_ds.data.sampler.stream_config import stream_config
from univitar_ds.data.shards.captions import EXTENSIONS
from univitar_ds.data.shards.listing import Shard
from univitar_ds.data.shards.samples import Sample, SizeRule, modality_of, read_samples
from univitar_ds.data.shards.tar_index import Group, Member
from univitar_ds.data.storage.local import LocalStorage, open_regular
from univitar_ds.errors import DataError, SampleError
from univitar_ds.geometry import Modality

_KEY = "file"


@dataclass(frozen=True)
class MediaReport:
    """The report of one file. Width and height are in pixels after rotation; `frames` is the number in its header.

    `grid` and `tokens` are the size in a pack. Unknown values are None. `downscaled`: whether the original size has
    more tokens than the stage allows. If `ok` is false, the loader would count the file under `error` and log
    `message`.
    """

    file: str
    ok: bool
    kind: str | None = None
    width: int | None = None
    height: int | None = None
    frames: int | None = None
    grid: tuple[int, int, int] | None = None
    tokens: int | None = None
    downscaled: bool | None = None
    error: str | None = None
    message: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def sentence(self) -> str:
        """Returns the report as one line."""
        if not self.ok:
            return f"left out ({self.error}): {self.file}: {self.message}"
        assert self.grid is not None
        of = "" if self.kind == "image" else f" x {self.frames} frames"
        size = " x ".join(map(str, self.grid if self.kind == "video" else self.grid[1:]))
        smaller = ", made smaller" if self.downscaled else ""
        return (
            f"{self.kind}: {self.file}: {self.width} x {self.height} px{of} -> {size} = {self.tokens} tokens{smaller}"
        )


@dataclass(frozen=True)
class _Header:
    """The result for a file before decoding. The file is left out if `sample` is None."""

    path: Path
    size: MediaSize | None
    sample: Sample | None
    error: SampleError | None


def report(paths: Iterable[Path], data: DataConfig, stage: StageConfig) -> Iterator[MediaReport]:
    """Reports in order how a run with these settings would read each file.

    As in training, `data.workers` processes, at least one, read headers and pixels.
    """
    data = data.model_copy(update={"workers": max(data.workers, 1)})
    # The stage may have only one modality, but files may have either.
    stage = stage.model_copy(update={"video_ratio": 0.5})
    rules = stream_config([], data=data, stage=stage, lanes=1, seed=0)
    sizes = {modality: replace(rule.size, needs_text=False) for modality, rule in rules.items()}
    waiting: deque[_Header] = deque()

    def plans_of(probe: Prober) -> Iterator[Plan]:
        for number, path in enumerate(paths):
            header = _header(path, sizes, probe)
            waiting.append(header)
            if header.sample is not None:
                yield Plan([header.sample], header.sample.size.kind, 0, number, None, {}, whole_files=True)

    packs = decoded(plans_of, data, sizes, stage.token_budget)
    try:
        for pack in packs:
            while waiting[0].sample is None:
                yield _result(waiting.popleft(), None)
            header = waiting.popleft()
            assert header.sample is pack.plan.samples[0]
            failed = next((SampleError(kind, message) for _, kind, message in pack.failures), None)
            yield _result(header, failed)
    finally:
        packs.close()
    for header in waiting:
        yield _result(header, None)


def _header(path: Path, sizes: Mapping[Modality, SizeRule], probe: Prober) -> _Header:
    size: MediaSize | None = None

    def remember_size(media: Sequence[MediaAddress]) -> list[MediaSize | SampleError]:
        """Keeps the size for the report even if the rule of the stage rejects the sample."""
        nonlocal size
        (found,) = probe(media)
        size = found if isinstance(found, MediaSize) else None
        return [found]

    try:
        length = _length(path, max(rule.max_sample_mb for rule in sizes.values()))
        extension = path.suffix.lower().lstrip(".")
        if not extension or extension in EXTENSIONS:
            raise SampleError(
                "no_media", f"the name {path.name!r} has no extension of an image or video; rename the file"
            )
        group = Group(_KEY, 0, length, [Member(extension, 0, length)])
        shard = Shard(_KEY, str(path), LocalStorage(), length)
        (found,) = read_samples([(shard, group)], sizes[modality_of(group) or "image"], remember_size)
    except SampleError as error:
        found = error
    except DataError as error:  # the file was removed or truncated in the meantime
        found = SampleError("unreadable", str(error))
    if isinstance(found, SampleError):
        return _Header(path, size, None, found)
    return _Header(path, size, found, None)


def _length(path: Path, most_mb: int) -> int:
    """Returns the bytes of a regular file. Raises: SampleError if it is larger than a sample may be, or unreadable."""
    try:
        with open_regular(path) as stream:
            length = os.fstat(stream.fileno()).st_size
    except OSError as error:
        raise SampleError("unreadable", f"the file cannot be read: {error.strerror}") from error
    if length > most_mb << 20:
        raise SampleError("too_large", f"the file has {length} bytes, above data.max_sample_mb = {most_mb} (MiB)")
    return length


def _result(header: _Header, failed: SampleError | None) -> MediaReport:
    error = header.error or failed
    size, sample = header.size, header.sample
    return MediaReport(
        file=str(header.path),
        ok=error is None,
        kind=None if size is None else size.kind,
        width=None if size is None else size.width,
        height=None if size is None else size.height,
        frames=None if size is None else size.frames,
        grid=None if sample is None else sample.grid,
        tokens=None if sample is None else sample.tokens,
        downscaled=None if sample is None else sample.downscaled,
        error=None if error is None else error.kind,
        message=None if error is None else str(error),
    )
