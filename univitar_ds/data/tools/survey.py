"""Surveys a source of a run: its format, and the numbers, kinds, sizes and texts of its samples.

A survey is short. Lists of files are read completely, as in a run, for at most `LISTING_S` seconds. Decoding processes
read the headers of at most `MEDIA` media files. Tars without a manifest are scanned in part, and the number of their
samples is estimated.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from univitar_ds.config.data import SourceConfig, TableConfig
from univitar_ds.config.paths import written
from univitar_ds.config.schema import RunConfig
from univitar_ds.data.importing.parquet.media import read_cells
from univitar_ds.data.importing.recognise import known_formats, read_source
from univitar_ds.data.importing.rows import Cell, Listing, ReadOptions, Row
from univitar_ds.data.media.types import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, MediaSize
from univitar_ds.data.shards import tar_index
from univitar_ds.data.shards.captions import BYTES_LIMIT, EXTENSIONS, Texts, read_texts
from univitar_ds.data.shards.hold_out import identity, number_of
from univitar_ds.data.shards.listing import place_of
from univitar_ds.data.shards.manifest import MANIFEST, read_manifest
from univitar_ds.data.shards.samples import media_member, modality_of
from univitar_ds.data.shards.sources import SourceShard, find_shards, spread
from univitar_ds.data.storage.base import LOCAL, StorageSettings
from univitar_ds.data.storage.streams import RangeReader
from univitar_ds.data.writing.examine import Job, examine_all
from univitar_ds.data.writing.packed_sources import format_to_pack, reading_options, with_packed_sources
from univitar_ds.errors import DataError, SampleError
from univitar_ds.geometry import Modality
from univitar_ds.screen import end_status, has_terminal, progress_bar, show_status

_log = logging.getLogger(__name__)

MEDIA, MEDIA_S, MEDIA_BYTES = 128, 20.0, 256 << 20
"""Maximum number of media files whose headers are read, seconds for that, and bytes of the files together."""
LISTING_S = 120.0
"""Maximum number of seconds in which the files of a source are listed."""
CELL_RUNS = 8
"""Number of runs of consecutive rows of which media in tables are read; a table is read by row groups."""
TEXTS = 20_000
"""Maximum number of samples of a list of files whose texts are used."""
SHARDS, SHARD_TEXTS, SCANNED = 16, 512, 20_000
"""Maximum numbers of shards that are opened, of samples in each whose texts are read, and of samples scanned in all."""
SCAN_BYTES = 128 << 20
"""Maximum number of bytes that are fetched to scan the shards of a source."""
TRAINING = ("train", "training")
EVALUATION = ("test", "testing", "val", "valid", "validation", "dev", "eval", "evaluation")
"""Names of splits, in the order in which they are preferred."""

Counts = Mapping[str | None, Mapping[Modality, int]]


@dataclass(frozen=True)
class Survey:
    """The contents of a source.

    `path`: of the source; `title`: its format, for comments; `counts`: samples by split (None: it has no splits) and
    modality, `exact` or estimated; `training`: the split to train on; `media`, `texts`: sizes and texts of some samples
    of that split; `labels`: pairs of data set and label of those samples; `packed`: whether it consists of shards;
    `table`: the columns that were given; `numbers`: those of `hold_out.number_of`, by modality, if all samples of
    shards were seen; `hold_out`: the share that a run holds out of data without splits, whose parts are in `counts`;
    `bytes`: about that many of all media files, 0 for shards.
    """

    path: str
    title: str
    counts: Counts
    exact: bool
    training: str | None
    media: tuple[MediaSize, ...]
    texts: tuple[Texts, ...]
    packed: bool
    labels: frozenset[tuple[str | None, str]] = field(default=frozenset())
    table: TableConfig | None = None
    numbers: Mapping[Modality, Sequence[float]] = field(default_factory=dict)
    hold_out: float | None = None
    bytes: int = 0

    @property
    def evaluation(self) -> str | None:
        """The split to evaluate on; None if there is none."""
        return next((name for name in EVALUATION if name in self.counts and name != self.training), None)

    @property
    def only_evaluation(self) -> bool:
        """Whether all splits have names of held-out data."""
        return self.training in EVALUATION


def survey(path: str, settings: StorageSettings = LOCAL, table: TableConfig | None = None) -> Survey:
    """Surveys a source: a path or s3:// address of anything that `data.sources.N.path` may name.

    `table`: columns of a table and the folder of its files; None: usual names are tried.

    Raises: DataError if a run could not read it, or listing its files takes too long; StorageError.
    """
    source = SourceConfig(path=written(path), split=None, table=table)
    form = format_to_pack(source)
    if form is None:
        shards = find_shards([source], settings) if _may_be_shards(source) else []
        if shards and table is not None:
            raise DataError(
                f"{path} is not a table; leave out the options of its columns and of the folder of its files"
            )
        if shards:
            return _of_shards(path, source, shards, settings)
    options = ReadOptions() if form is None else replace(reading_options(source, form), format=None)
    listing = _within(LISTING_S, path, lambda: read_source(path, options))
    found = _of_rows(path, known_formats()[form or "folder"].title, listing, _split_to_see(listing, None))
    return replace(found, table=table)


class Surveys:
    """Surveys of the sources of a run that are packed when it starts. Each source is listed once, also if training and
    evaluation read parts of it, and media files of one split are looked at once."""

    def __init__(self) -> None:
        self._listings: dict[tuple[str, ReadOptions], Listing] = {}
        self._surveys: dict[tuple[str, ReadOptions, str | None], Survey] = {}

    def listing(self, path: str, options: ReadOptions) -> Listing:
        """Returns the listing of a source, as `read_source`.

        Raises: DataError as `read_source`, or if it takes more than `LISTING_S` seconds."""
        wanted = _absolute(path), options
        if wanted not in self._listings:
            self._listings[wanted] = _within(LISTING_S, path, lambda: read_source(path, options))
        return self._listings[wanted]

    def packed_before(self, config: RunConfig) -> RunConfig:
        """Returns the configuration with the packed folders of those sources that were packed before as their paths.

        Raises: as `with_packed_sources`, or DataError as `listing`."""
        return with_packed_sources(config, pack=False, read=self.listing)

    def of_files(self, source: SourceConfig, form: str) -> Survey:
        """Surveys a source. Its split, if it has that, is the one whose media and texts are seen.

        Args: form: `packed_sources.format_to_pack` of the source. Raises: DataError as `survey`."""
        path = source.path if "://" in source.path else place_of(source)
        options = reading_options(source, form)
        listing = self.listing(path, options)
        split = _split_to_see(listing, source.split)
        wanted = _absolute(path), options, split
        if wanted not in self._surveys:
            self._surveys[wanted] = _of_rows(path, known_formats()[form].title, listing, split)
        return self._surveys[wanted]


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)


def training_split(counts: Iterable[str | None]) -> str | None:
    """Returns the split to train on: `train`, else the first whose name is not of held-out data, else the first."""
    names = [name for name in counts if name is not None]
    if not names:
        return None
    others = [name for name in names if name not in EVALUATION]
    return next((name for name in TRAINING if name in names), others[0] if others else names[0])


def _may_be_shards(source: SourceConfig) -> bool:
    """Whether to look for shards. For a folder without tars, the error of `read_source` is clearer."""
    path = place_of(source)
    return not os.path.isdir(path) or any(name.endswith(".tar") or name == MANIFEST for name in os.listdir(path))


def _split_to_see(listing: Listing, wanted: str | None) -> str | None:
    """Returns the split `wanted` if the listing has it, else the one to train on."""
    splits = dict.fromkeys(row.split for row in listing.rows)
    return wanted if wanted in splits else training_split(splits)


def _of_rows(path: str, title: str, listing: Listing, split: str | None) -> Survey:
    rows = [row for row in listing.rows if row.split == split]
    with tempfile.TemporaryDirectory() as scratch:
        media, faults = _sizes(path, _jobs(rows, listing.root, Path(scratch)))
    _check_media(path, len(rows), len(media), faults)
    unnamed: Modality = "video" if media and all(size.kind == "video" for size in media) else "image"
    counts: dict[str | None, Counter[Modality]] = {}
    for row in listing.rows:
        counts.setdefault(row.split, Counter())[_kind_of(row, unnamed)] += 1
    texts = tuple(Texts(row.captions, row.label, row.set) for row in _some(rows, TEXTS))
    labels = frozenset((row.set, row.label) for row in rows if row.label is not None)
    found = Survey(path, title, counts, True, split, media, texts, packed=False, labels=labels)
    return replace(found, bytes=_bytes_of(listing))


def _bytes_of(listing: Listing) -> int:
    """Returns about how many bytes the media of a listing have, from some of them, or of the tables that hold them."""
    if tables := {row.part.file for row in listing.rows if isinstance(row.part, Cell)}:
        return sum(os.path.getsize(table) for table in tables)
    sizes = []
    for row in _some(listing.rows, MEDIA):
        with suppress(OSError):
            sizes.append(os.path.getsize(listing.root / row.file) if row.part is None else row.part.length)
    return round(sum(sizes) * len(listing.rows) / len(sizes)) if sizes else 0


def _jobs(rows: Sequence[Row], root: Path, scratch: Path) -> list[Job]:
    """Returns the jobs that examine some media. Those in tables are copied to `scratch`, from a few row groups."""
    starts = _some(range(len(rows)), CELL_RUNS)
    near = {
        index: rows[index] for start in starts for index in range(start, min(start + MEDIA // CELL_RUNS, len(rows)))
    }
    cells = {row.part: row for row in near.values() if isinstance(row.part, Cell)}
    if not cells:
        return [Job(root / row.file, row.kind, False, row.part) for row in _some(rows, MEDIA)]
    jobs: list[Job] = []
    left, end = MEDIA_BYTES, time.monotonic() + MEDIA_S
    for cell, content in read_cells(cells, root, MEDIA_BYTES):
        if not isinstance(content, SampleError) and (left := left - len(content)) >= 0:
            file = scratch / f"{len(jobs)}{Path(cells[cell].file).suffix}"
            file.write_bytes(content)
            jobs.append(Job(file, None, False))
        if left < 0 or time.monotonic() > end:
            break
    return jobs


def _within(seconds: float, path: str, work: Callable[[], Any]) -> Any:
    """Returns the result of `work`, and shows that the files of a source are listed.

    Raises: what `work` raises; DataError after `seconds`. The thread then continues until the program ends.
    """
    done: list[Any] = []

    def run() -> None:
        try:
            done.extend((work(), None))
        except BaseException as error:  # raised again below
            done.extend((None, error))

    thread = threading.Thread(target=run, daemon=True)
    start = time.monotonic()
    thread.start()
    try:
        while thread.is_alive() and (passed := time.monotonic() - start) < seconds:
            thread.join(0.2)
            if has_terminal() and passed > 0.5:
                show_status(f"{path}: listing its files, {passed:.0f} s")
    finally:
        end_status()
    if not done:
        raise DataError(
            f"{path}: listing its files takes more than {seconds:.0f} s; pack it first (univitar-ds data pack {path} "
            "OUT), and give OUT instead"
        )
    result, error = done
    if error is not None:
        raise error
    return result


def _kind_of(row: Row, unnamed: Modality) -> Modality:
    """Returns the kind of a row, by the name of its file if the row has none; `unnamed` if that is no name of media."""
    if row.kind is not None:
        return "video" if row.kind == "video" else "image"
    extension = row.file.rpartition(".")[2].lower()
    return "image" if extension in IMAGE_EXTENSIONS else "video" if extension in VIDEO_EXTENSIONS else unnamed


def _some(items: Sequence[Any], most: int) -> list[Any]:
    """Returns at most `most` of the items, evenly spaced."""
    count = min(most, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _check_media(path: str, files: int, read: int, faults: Sequence[str]) -> None:
    """Warns of media files that cannot be read. Args: files: number of files; read: of those that can be read.

    Raises: DataError if none of them can be read."""
    if not faults:
        return
    about = f"{path}: {len(faults)} of {read + len(faults)} media files that were looked at cannot be read"
    if len(faults) == files:
        raise DataError(f"{about}, the first: {faults[0]}; put readable files in their place")
    _log.warning("%s, and such files are left out; the first: %s", about, faults[0])


def _sizes(path: str, jobs: Sequence[Job]) -> tuple[tuple[MediaSize, ...], list[str]]:
    """Returns the sizes of the media files that can be read within the limits, and the faults of others."""
    left, small = MEDIA_BYTES, []
    for job in jobs:
        with suppress(OSError):
            length = os.stat(job.path).st_size if job.part is None else job.part.length
            if length <= left:
                left, small = left - length, [*small, job]
    found: list[MediaSize] = []
    faults: list[str] = []
    end = time.monotonic() + MEDIA_S
    bar = progress_bar(desc=f"looking at {path}", unit="file", total=len(small))
    with bar, closing(_examined(small)) as results:
        for index, info in results:
            bar.update()
            if info.fault is None:
                found.append(MediaSize(info.kind, info.height, info.width, info.frames, info.duration_s))
            else:
                faults.append(f"{small[index].path.name}: {info.fault}")
            if time.monotonic() > end:
                break
    return tuple(found), faults


def _examined(jobs: Sequence[Job]) -> Iterator[Any]:
    if jobs:
        yield from examine_all(jobs, 1)


@dataclass
class _Scan:
    """The results of scanning some shards. `covered`: number of bytes of the shards that were scanned."""

    counts: Counter[Modality] = field(default_factory=Counter)
    texts: list[Texts] = field(default_factory=list)
    media: list[MediaSize] = field(default_factory=list)
    covered: int = 0
    whole: bool = True
    numbers: dict[Modality, list[float]] = field(default_factory=dict)


def _of_shards(path: str, source: SourceConfig, shards: Sequence[SourceShard], settings: StorageSettings) -> Survey:
    """Returns the survey of shards. Counts come from the manifest or are estimated from the scanned bytes."""
    packed = all(shard.modality is not None for shard in shards)
    counts: dict[str | None, Counter[Modality]] = {}
    if packed:
        place = place_of(source)
        manifest = read_manifest(place, shards[0].storage)
        for entry in manifest["shards"]:
            counts.setdefault(entry["split"], Counter())[entry["kind"]] += entry["samples"]
        source = source.model_copy(update={"split": training_split(counts)})
        shards = find_shards([source], settings)
    with tempfile.TemporaryDirectory() as scratch:
        scan, jobs = _scanned(path, shards, Path(scratch), packed)
        media = (*scan.media, *_sizes(path, jobs)[0])
    if not packed:
        share = max(1.0, sum(shard.size for shard in shards) / max(scan.covered, 1))
        share = 1.0 if scan.whole else share
        counts = {None: Counter({kind: round(count * share) for kind, count in scan.counts.items()})}
    title = "a packed folder" if packed else "WebDataset tars"
    labels = frozenset((one.set, one.label) for one in scan.texts if one.label is not None)
    texts = tuple(scan.texts)
    numbers = scan.numbers if scan.whole else {}
    found = Survey(path, title, counts, packed or scan.whole, source.split, media, texts, packed=True, labels=labels)
    return replace(found, numbers=numbers)


def _scanned(path: str, shards: Sequence[SourceShard], scratch: Path, packed: bool) -> tuple[_Scan, list[Job]]:
    """Scans a few shards. Copies media files without a size in the metadata to `scratch`, to be examined."""
    scan, jobs = _Scan(), []
    chosen = [*_of_each_kind(shards)]
    scan.whole = len(chosen) == len(shards)
    end = time.monotonic() + MEDIA_S
    share = {"samples": SCANNED // len(chosen), "bytes": SCAN_BYTES // len(chosen), "media": -(-MEDIA // len(chosen))}
    with progress_bar(desc=f"scanning {path}", unit="shard", total=len(chosen)) as bar:
        for shard in chosen:
            ranges = RangeReader(shard.storage, shard.path, shard.size)
            last = copied = 0
            with ranges.buffered() as stream:
                for number, group in enumerate(tar_index.scan(stream, shard.name, shard.size)):
                    if not isinstance(group, tar_index.Group):
                        continue
                    if number >= share["samples"] or ranges.fetched > share["bytes"] or time.monotonic() > end:
                        scan.whole = False
                        break
                    last = group.end
                    kind = modality_of(group)
                    if kind is None:
                        continue
                    scan.counts[kind] += 1
                    drawn = number_of(identity(stream, shard.path, group, packed=packed))
                    scan.numbers.setdefault(kind, []).append(drawn)
                    texts = _texts_of(stream, shard, group, packed) if number < SHARD_TEXTS else None
                    if texts is not None:
                        scan.texts.append(texts)
                    if texts is not None and texts.size is not None:
                        scan.media.append(texts.size)
                    elif copied < share["media"] and not packed:
                        copied += 1
                        jobs += _copied(stream, group, kind, scratch / f"{len(jobs)}")
            scan.covered += last
            bar.update()
    return scan, jobs


def _of_each_kind(shards: Sequence[SourceShard]) -> list[SourceShard]:
    """Returns some evenly spaced shards of each modality."""
    by_kind: dict[Modality | None, list[SourceShard]] = {}
    for shard in shards:
        by_kind.setdefault(shard.modality, []).append(shard)
    return [shard for some in by_kind.values() for shard in spread(some, SHARDS // len(by_kind))]


def _texts_of(stream: Any, shard: SourceShard, group: tar_index.Group, packed: bool) -> Texts | None:
    """Returns the texts of a sample; None if it has no usable text."""
    contents = {}
    for member in group.members:
        if member.extension in EXTENSIONS and member.length <= BYTES_LIMIT:
            stream.seek(member.offset)
            contents[member.extension] = stream.read(member.length)
    with suppress(SampleError):
        return read_texts(contents, lines=shard.caption_lines, packed=packed)
    return None


def _copied(stream: Any, group: tar_index.Group, kind: Modality, file: Path) -> list[Job]:
    """Copies the media file of a sample beside `file`. Returns the job that examines it; none for a large file."""
    member = media_member(group, kind)
    if member is None or member.link or member.length > MEDIA_BYTES // MEDIA * 8:
        return []
    file = file.with_suffix(f".{member.extension}")
    stream.seek(member.offset)
    file.write_bytes(stream.read(member.length))
    return [Job(file, None, False)]
