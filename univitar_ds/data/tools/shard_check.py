"""Checks one shard from its first byte to its last, and every sample as the loader would read it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from univitar_ds.config.data import DataConfig, SourceConfig
from univitar_ds.config.stage import ResolutionConfig, StageConfig, VideoSampling
from univitar_ds.data.decoding.decode_job import DecodeItem, DecodeJob, check_crc32, decode_pack
from univitar_ds.data.decoding.task_pool import Next, Reached, Task
from univitar_ds.data.media.frame_sampling import Sampling
from univitar_ds.data.media.memory_limits import confine
from univitar_ds.data.media.prober import MediaAddress, probe_each
from univitar_ds.data.media.types import DecodeLimits, check_length, check_size
from univitar_ds.data.sampler.reader import with_captions
from univitar_ds.data.shards import captions, tar_index
from univitar_ds.data.shards.samples import Sample, SizeRule, media_member, modality_of, read_samples
from univitar_ds.data.shards.sources import SourceShard
from univitar_ds.data.storage.address import storage_for
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.errors import SampleError
from univitar_ds.geometry import Modality

_STAGE = StageConfig.model_fields
"""The fields of a stage. Their defaults are the limits of a check."""
DEFAULTS = DataConfig(sources=[SourceConfig(path="none")])
_SAMPLING = Sampling(**VideoSampling().model_dump())
_HASHED_AT_ONCE = 8 << 20
_MOST_KEYS = 1 << 20
"""Maximum number of keys of a shard kept to detect samples whose members are not consecutive."""


class Read(NamedTuple):
    """Number of bytes checked since the last event."""

    bytes: int


class Hashed(NamedTuple):
    """The hash of the whole shard."""

    sha256: str


class Address(NamedTuple):
    """The item of `Next`: a sample. Events with its faults follow."""

    key: str
    offset: int


class Bad(NamedTuple):
    """A sample that cannot be used or, with key "", a range of the shard without samples."""

    kind: str
    key: str
    offset: int
    message: str


class IgnoredText(NamedTuple):
    """An ignored text of a sample that can be used."""

    kind: str
    key: str
    offset: int
    message: str


class UnreadMembers(NamedTuple):
    """Extensions of the members of a sample that the loader does not read."""

    extensions: tuple[str, ...]


class SeveralLines(NamedTuple):
    """The .txt of a sample has several lines, which are read as one caption."""


class Scattered(NamedTuple):
    """The members of a sample are not consecutive: more of them are at this byte."""

    key: str
    offset: int


Event = Next | Reached | Read | Hashed | Bad | IgnoredText | UnreadMembers | SeveralLines | Scattered


class StartPosition(NamedTuple):
    """The position at which the check of a shard begins: the byte of a header, and whether the hash is known."""

    offset: int = 0
    hashed: bool = False


@dataclass(frozen=True)
class ShardCheck:
    """A shard (without its storage, which is not pickled), its storage settings, and whether to decode every sample.

    `data` has the limits of a sample. `confined`: whether to limit the memory of the process, which then must
    only check shards.
    """

    shard: SourceShard
    settings: StorageSettings
    decode: bool
    data: DataConfig = DEFAULTS
    confined: bool = False


def check_shard(task: Task, report: Callable[[Event], None]) -> None:
    """Hashes the shard if its manifest has a hash, then checks its samples from the `StartPosition` `task.start`.

    Raises: DataError if the shard cannot be read.
    """
    job: ShardCheck = task.job
    start: StartPosition = task.start
    storage = storage_for(job.shard.path, job.settings)
    shard = replace(
        job.shard, storage=storage, watch=None, where=None
    )  # also checks samples that a condition leaves out
    if shard.sha256 is not None and not start.hashed:
        with storage.open(shard.path) as stream:
            state = hashlib.sha256()
            while part := stream.read(_HASHED_AT_ONCE):
                state.update(part)
                report(Read(len(part)))
        report(Hashed(state.hexdigest()))
        report(Reached(start._replace(hashed=True)))
    position, keys, scattered = start.offset, set[int](), False
    with storage.open(shard.path) as stream:
        for found in tar_index.scan(stream, shard.name, shard.size, start.offset):
            if isinstance(found, tar_index.Damage):
                report(Bad(found.kind, "", found.offset, found.message))
            else:
                here, behind = (StartPosition(byte, hashed=True) for byte in (found.offset, found.end))
                report(Next(Address(found.key, found.offset), here, behind))
                if others := _unread(found):
                    report(UnreadMembers(others))
                known = hash(found.key) in keys
                if len(keys) < _MOST_KEYS:
                    keys.add(hash(found.key))
                try:
                    sample = check_sample(shard, found, job)
                except SampleError as error:
                    report(Bad(error.kind, found.key, found.offset, str(error)))
                    if known and not scattered:
                        report(Scattered(found.key, found.offset))
                        scattered = True
                else:
                    _report_texts(sample, found, report)
            report(Read(found.end - position))
            position = found.end
    report(Read(shard.size - position))


def _unread(group: tar_index.Group) -> tuple[str, ...]:
    """Returns the extensions of the members that are neither the media nor a text, which the loader does not read."""
    media = media_member(group, modality_of(group) or "image")
    others = (member for member in group.members if member is not media)
    return tuple(member.extension for member in others if member.extension not in captions.EXTENSIONS)


def _report_texts(sample: Sample, group: tar_index.Group, report: Callable[[Event], None]) -> None:
    for kind, message in sample.ignored:
        report(IgnoredText(kind, group.key, group.offset, message))
    if sample.several_lines:
        report(SeveralLines())


def check_sample(shard: SourceShard, group: tar_index.Group, job: ShardCheck) -> Sample:
    """Reads a sample as the loader would. Raises: SampleError for a sample that the loader would leave out."""
    kind = modality_of(group) or shard.modality or "image"
    if shard.modality not in (None, kind):
        raise SampleError("wrong_kind", f"is {kind} in a shard of {shard.modality} by its manifest; pack it again")
    if job.confined:
        confine(job.data.max_image_px, group.length)
    (found,) = read_samples([(shard, group)], _rule(kind, job.data))
    if isinstance(found, Sample):
        found = with_captions(shard, found)
    if isinstance(found, SampleError):
        raise found
    sample = found
    if not sample.probed:
        _check_metadata(sample)
    if job.decode:
        _decode(sample, kind, job)
    elif sample.crc32 is not None:
        check_crc32(shard.storage.read_range(shard.path, sample.media_offset, sample.media_length), sample.crc32)
    return sample


def _check_metadata(sample: Sample) -> None:
    """Raises SampleError if the header of the file differs from its metadata. Decoding compares the rest."""
    address = MediaAddress(
        sample.shard.storage, sample.shard.path, sample.media_offset, sample.media_length, sample.extension
    )
    (header,) = probe_each([address])
    if isinstance(header, SampleError):
        raise header
    if header.kind != sample.size.kind:
        raise SampleError("wrong_kind", f"its .{sample.extension} holds {header.kind} data, not {sample.size.kind}")
    check_length(sample.size.duration_s, header.duration_s)
    expected, found = (sample.size.height, sample.size.width), (header.height, header.width)
    # Some videos store a rotation only with their frames, which decoding compares.
    if header.kind == "image" or expected != found[::-1]:
        check_size(expected, found)


def _rule(kind: Modality, data: DataConfig) -> SizeRule:
    return SizeRule(
        kind,
        ResolutionConfig().rule(),
        _STAGE["video_frames"].default if kind == "video" else 1,
        _STAGE["token_budget"].default,
        data.max_image_px,
        _SAMPLING,
        data.max_video_s,
        data.max_sample_mb,
    )


def _decode(sample: Sample, kind: Modality, job: ShardCheck) -> None:
    limits = DecodeLimits(job.data.max_image_px, job.data.decode_timeout_s, job.data.max_video_s)
    work = DecodeJob(kind, _SAMPLING, limits, [DecodeItem.from_sample(sample)])
    for _, error_kind, message in decode_pack(work, np.empty(work.bytes, np.uint8), job.settings):
        raise SampleError(error_kind, message)
