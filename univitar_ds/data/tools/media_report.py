"""Reports how the loader would read single files, by loading each file from a shard of one sample."""

from __future__ import annotations

import tarfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from univitar_ds.config.data import DataConfig
from univitar_ds.config.stage import StageConfig
from univitar_ds.data.collate import decoded
from univitar_ds.data.media.prober import MediaAddress, Prober
from univitar_ds.data.media.types import MediaSize
from univitar_ds.data.sampler.lanes import Plan
from univitar_ds.data.sampler.stream_config import stream_config
from univitar_ds.data.shards.captions import EXTENSIONS
from univitar_ds.data.shards.samples import Sample, SizeRule, modality_of, read_samples
from univitar_ds.data.shards.sources import SourceShard
from univitar_ds.data.shards.tar_index import scan
from univitar_ds.data.storage.address import storage_for
from univitar_ds.data.storage.local import read_file
from univitar_ds.errors import SampleError
from univitar_ds.geometry import Modality

_KEY = "file"
_LONGEST_EXTENSION = 80
"""Limit of names in a tar; all known extensions are shorter."""
_CAPTION = b"a sample needs a caption"


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
        """The report in one line."""
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
    """The result for a file before decoding. Without `sample`, it is left out."""

    path: Path
    size: MediaSize | None
    sample: Sample | None
    error: SampleError | None


def report(paths: Iterable[Path], data: DataConfig, stage: StageConfig) -> Iterator[MediaReport]:
    """Report in order how a run with these settings would read each file.

    As in training, `data.workers` processes, at least one, read headers and pixels. The files are copied to temporary
    shards one after another.
    """
    data = data.model_copy(update={"workers": max(data.workers, 1)})
    # The stage may have only one modality, but files may have either.
    stage = stage.model_copy(update={"video_ratio": 0.5})
    rules = stream_config([], data=data, stage=stage, lanes=1, seed=0)
    sizes = {modality: rule.size for modality, rule in rules.items()}
    waiting: deque[_Header] = deque()
    with TemporaryDirectory(prefix="univitar-probe-") as folder:

        def plans_of(probe: Prober) -> Iterator[Plan]:
            return _plans(paths, Path(folder), sizes, waiting, probe)

        packs = decoded(plans_of, data, sizes, stage.token_budget)
        try:
            for pack in packs:
                while waiting[0].sample is None:
                    yield _result(waiting.popleft(), None)
                header = waiting.popleft()
                assert header.sample is pack.plan.samples[0]
                Path(header.sample.shard.path).unlink()
                failed = next((SampleError(kind, message) for _, kind, message in pack.failures), None)
                yield _result(header, failed)
        finally:
            packs.close()
        for header in waiting:
            yield _result(header, None)


def _plans(
    paths: Iterable[Path],
    folder: Path,
    sizes: Mapping[Modality, SizeRule],
    waiting: deque[_Header],
    probe: Prober,
) -> Iterator[Plan]:
    for number, path in enumerate(paths):
        header = _header(path, folder / f"{number}.tar", sizes, probe)
        waiting.append(header)
        if header.sample is not None:
            yield Plan([header.sample], header.sample.size.kind, 0, number, None, {})


def _header(path: Path, shard: Path, sizes: Mapping[Modality, SizeRule], probe: Prober) -> _Header:
    size: MediaSize | None = None

    def remember_size(media: Sequence[MediaAddress]) -> list[MediaSize | SampleError]:
        """Keep the size for the report even if the rule of the stage rejects the sample."""
        nonlocal size
        (found,) = probe(media)
        size = found if isinstance(found, MediaSize) else None
        return [found]

    try:
        most_mb = max(rule.max_sample_mb for rule in sizes.values())
        content = read_file(path, most_mb << 20, f", above data.max_sample_mb = {most_mb} (MiB)")
        extension = path.suffix.lower().lstrip(".")[:_LONGEST_EXTENSION]
        if not extension or extension in EXTENSIONS:
            raise SampleError(
                "no_media", f"the name {path.name!r} has no extension of an image or video; rename the file"
            )
        _write_shard(shard, extension, content)
        source = SourceShard(_KEY, str(shard), storage_for(str(shard)), shard.stat().st_size)
        with source.storage.open(source.path) as stream:
            (group,) = scan(stream, source.name, source.size)
        (found,) = read_samples([(source, group)], sizes[modality_of(group) or "image"], remember_size)
    except SampleError as error:
        found = error
    if isinstance(found, SampleError):
        shard.unlink(missing_ok=True)
        return _Header(path, size, None, found)
    return _Header(path, size, found, None)


def _write_shard(path: Path, extension: str, content: bytes) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, member in ((f"{_KEY}.{extension}", content), (f"{_KEY}.txt", _CAPTION)):
            info = tarfile.TarInfo(name)
            info.size = len(member)
            tar.addfile(info, BytesIO(member))


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
