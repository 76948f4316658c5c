"""Reads samples of a shard before decoding: media member, captions, label, and size in tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any, BinaryIO, NamedTuple

from univitar_ds.data.media.augment import Augmentation
from univitar_ds.data.media.frame_sampling import UNIFORM, Sampling, frames_of
from univitar_ds.data.media.prober import MediaAddress, Prober, probe_each
from univitar_ds.data.media.types import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, MediaSize, check_area, check_duration
from univitar_ds.data.shards import captions, tar_index
from univitar_ds.data.shards.listing import Shard
from univitar_ds.data.storage.parallel import at_once
from univitar_ds.errors import SampleError
from univitar_ds.expressions import NAMES, Condition, LacksField, Undecided
from univitar_ds.geometry import PATCH, Modality, Resolution, smart_resize, token_count

_EXTENSIONS = {"image": IMAGE_EXTENSIONS, "video": VIDEO_EXTENSIONS}
FILTERED = "filtered"
"""The kind of the SampleError of a sample that a condition leaves out. Such a sample is not a bad sample."""
_NEAR_BYTES = 1 << 16
"""Maximum length of a range with several text members that is read at once."""


@dataclass(frozen=True)
class SizeRule:
    """Rule for the size at which an item of one modality enters the encoder.

    `frames`: maximum number of frames of a video, 1 for images; `most_tokens`: maximum number of tokens of an item in a
    pack. The `max_` fields are limits of the data section. `needs_text`: whether a sample needs a caption or a label.
    """

    modality: Modality
    resolution: Resolution
    frames: int
    most_tokens: int
    max_image_px: int
    sampling: Sampling = UNIFORM
    max_video_s: float = 3600.0
    max_sample_mb: int = 1024
    needs_text: bool = True
    original = False
    """Whether frames are decoded at their own size. `grid` then only bounds their bytes."""

    def frames_of(self, size: MediaSize) -> int:
        """Returns the number of decoded frames: 1 for an image, the number of sampled frames for a video."""
        return frames_of(self.sampling, self.frames, size.duration_s) if size.kind == "video" else 1

    def grid(self, height: int, width: int, frames: int) -> tuple[int, int, int]:
        """Returns the tokens along time, height and width of an item, at most `most_tokens` in total.

        If min_tokens is close to max_tokens, rounding up to multiples of `divisor_px` can exceed max_tokens. An item
        with more than `most_tokens` is then resized again, starting from that size.
        Raises: SampleError if one `divisor_px` square per tubelet exceeds `most_tokens`.
        """
        steps, h, w = self.resolution.grid(height, width, frames)
        if steps * h * w <= self.most_tokens:
            return steps, h, w
        divisor = self.resolution.divisor_px
        least = steps * (divisor // PATCH) ** 2
        if least > self.most_tokens:
            raise SampleError(
                "too_large",
                f"{frames} frames of {divisor} x {divisor} px are {least} tokens, above token_budget "
                f"{self.most_tokens}; raise token_budget or lower divisor_px",
            )
        room = self.most_tokens // steps * PATCH * PATCH
        height, width = smart_resize(h * PATCH, w * PATCH, divisor, divisor * divisor, room)
        return steps, height // PATCH, width // PATCH

    def shrinks(self, height: int, width: int, grid: tuple[int, int, int]) -> bool:
        """Whether an item at its original size, rounded to `divisor_px`, exceeds the maximum of the rule or a pack."""
        divisor = self.resolution.divisor_px
        own = grid[0] * max(round(height / divisor), 1) * max(round(width / divisor), 1) * (divisor // PATCH) ** 2
        fixed = self.resolution.fixed_px is not None
        return own > min(token_count(grid) if fixed else self.resolution.max_tokens, self.most_tokens)


class SampleAddress(NamedTuple):
    """Location of a sample: index of its `shard`, its bytes, and its number in the shard (`ordinal`). `since` is the
    number of packs of its stream when it was read."""

    shard: int
    offset: int
    length: int
    ordinal: int
    epoch: int = 0
    since: int = 0


_NOWHERE = SampleAddress(0, 0, 0, 0)


@dataclass
class Sample:
    """A readable sample before decoding: location, texts and size. The stream that reads the sample sets `address` and
    `draw`, and `augmentation` with the `grid` of its crop; all other fields are constant.

    `media_offset` and `media_length` are in bytes of the shard. `captions` is empty only if there is a label. `size`
    comes from the metadata, or from the media header if `probed`. `frames` is the number of decoded frames, 1 for an
    image. `downscaled`: see `SizeRule.shrinks`; `ignored`, `several_lines`, `json`: see `captions.Texts`. `draw` is a
    64-bit random number of this sample in this epoch. `other_captions`: further correct captions in an evaluation.
    """

    shard: Shard
    key: str
    media_offset: int
    media_length: int
    extension: str
    captions: tuple[str, ...]
    label: str | None
    set: str | None
    crc32: int | None
    size: MediaSize
    probed: bool
    grid: tuple[int, int, int]
    frames: int
    downscaled: bool = False
    ignored: tuple[captions.Ignored, ...] = ()
    several_lines: bool = False
    address: SampleAddress = _NOWHERE
    draw: int = 0
    augmentation: Augmentation | None = None
    json: Mapping[str, Any] | None = None
    other_captions: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.shard.name}/{self.key}"

    @property
    def tokens(self) -> int:
        return token_count(self.grid)

    @property
    def caption(self) -> str:
        """The caption of this epoch; "" if there is only a label."""
        return self.captions[(self.draw >> 32) % len(self.captions)] if self.captions else ""


def condition_fields(found: Sample | captions.Texts) -> dict[str, Any]:
    """Returns the fields for a condition that are known without the size and the name of the label."""
    return {"caption_length": len(found.captions[0]) if found.captions else None, "json": found.json or {}}


def check_condition(where: Condition, fields: Mapping[str, Any], *, partly: bool = False) -> None:
    """Raises SampleError of the kind FILTERED, with the rule as message, if the condition leaves the sample out.

    Args: partly: whether `fields` may lack some of `NAMES`. A condition that needs one of these does not raise.
    """
    try:
        if where.holds(fields):
            return
        reason = where.text
    except LacksField as error:
        if partly and str(error) in NAMES:
            return
        reason = f"{where.text}: no {error}"
    except Undecided as error:
        reason = f"{where.text}: {error}"
    raise SampleError(FILTERED, f"by where of {where.source} ({reason})")


def modality_of(group: tar_index.Group) -> Modality | None:
    """Returns the modality by extensions: "video" if a member is a video, else "image"; None without media."""
    extensions = {member.extension for member in group.members}
    if extensions & VIDEO_EXTENSIONS:
        return "video"
    return "image" if extensions & IMAGE_EXTENSIONS else None


def media_member(group: tar_index.Group, modality: Modality) -> tar_index.Member | None:
    """Returns the first member with an extension of the modality, None if there is none."""
    known = _EXTENSIONS[modality]
    return next((member for member in group.members if member.extension in known), None)


def belongs(group: tar_index.Group, shard: Shard, modality: Modality) -> bool:
    """Whether streams of this modality read the sample; each sample belongs to exactly one modality.

    All samples of a shard with a known modality belong to this modality, so a video among images is a bad sample and
    not silently skipped. Otherwise the extensions decide; samples without media belong to images.
    """
    return (shard.modality or modality_of(group) or "image") == modality


def is_read(stream: BinaryIO, shard: Shard, group: tar_index.Group) -> bool:
    """Whether a sample is in the part of its source that is read. Args: stream: of the shard."""
    part = shard.hold_out
    return part is None or part.reads(stream, shard.path, group, packed=shard.modality is not None)


class _Entry(NamedTuple):
    """A sample whose texts have been read and whose size may still be unknown."""

    shard: Shard
    key: str
    media: MediaAddress
    texts: captions.Texts


def read_samples(
    groups: Sequence[tuple[Shard, tar_index.Group]], rule: SizeRule, probe: Prober = probe_each
) -> list[Sample | SampleError]:
    """Reads and checks samples without decoding pixels. Returns a SampleError for each sample to leave out.

    The size of a sample of `data pack` is in the metadata, so only texts are read, and decoding compares the size with
    the file. Other sizes come from `probe`.
    Raises: DataError if a shard cannot be read.
    """
    return _sized([_read_texts(shard, group, rule) for shard, group in groups], rule, probe)


def read_samples_again(
    ranges: Sequence[tuple[Shard, int, int]], rule: SizeRule, probe: Prober = probe_each
) -> list[Sample | SampleError | None]:
    """Reads samples at addresses of a cursor: shard, first byte and length.

    Returns None for bytes that no longer are a single sample, and a SampleError for a sample that is not allowed, for
    example because another stage with other limits read it.
    """
    entries = at_once(lambda where: _read_texts_again(*where, rule), ranges, [shard.storage for shard, _, _ in ranges])
    return _sized(list(entries), rule, probe)


def _read_texts(shard: Shard, group: tar_index.Group, rule: SizeRule) -> _Entry | SampleError:
    def contents_of(members: Sequence[tar_index.Member]) -> list[bytes]:
        small = [member.content for member in members if member.content is not None]
        if len(small) == len(members):
            return small
        read = partial(shard.storage.read_range, shard.path)
        first, end = members[0].offset, members[-1].offset + members[-1].length
        if end - first > _NEAR_BYTES:
            return [read(member.offset, member.length) for member in members]
        data = read(first, end - first)
        return [data[member.offset - first : member.offset - first + member.length] for member in members]

    try:
        _check_length(group.length, rule)
        return _entry(shard, group, contents_of, 0, rule)
    except SampleError as error:
        return error


def _read_texts_again(shard: Shard, offset: int, length: int, rule: SizeRule) -> _Entry | SampleError | None:
    """Reads all bytes of the sample at once, which is one request for a remote shard."""

    def contents_of(members: Sequence[tar_index.Member]) -> list[bytes]:
        return [data[member.offset : member.offset + member.length] for member in members]

    try:
        _check_length(length, rule)
        data = shard.storage.read_range(shard.path, offset, length)
        group = tar_index.group_of_range(BytesIO(data), shard.name, length, offset)
        return None if group is None else _entry(shard, group, contents_of, offset, rule)
    except SampleError as error:
        return error


def _check_length(length: int, rule: SizeRule) -> None:
    if length > rule.max_sample_mb << 20:
        raise SampleError(
            "too_large", f"the sample has {length} bytes, above data.max_sample_mb = {rule.max_sample_mb} (MiB)"
        )


def _hint(members: Sequence[tar_index.Member], wanted: Collection[str]) -> str:
    """Returns a likely cause of a missing member, for messages: a name with several dots, or an unsorted tar."""
    dotted = next((m.extension for m in members if "." in m.extension and m.extension.split(".")[-1] in wanted), None)
    if dotted is not None:
        return (
            f"; a key ends at the first dot of a name (WebDataset's rule), so {dotted!r} is read as an extension: "
            "rename the files so that the extension has the only dot"
        )
    return f"; {tar_index.SORT_HINT}" if len(members) == 1 else ""


def _entry(
    shard: Shard,
    group: tar_index.Group,
    contents_of: Callable[[Sequence[tar_index.Member]], list[bytes]],
    origin: int,
    rule: SizeRule,
) -> _Entry:
    """Reads the texts of a sample, whose members' offsets count from byte `origin`. Raises: SampleError."""
    members = group.members
    if len({member.extension for member in members}) < len(members):
        raise SampleError("duplicate", "two members have the same name")
    if linked := [member.extension for member in members if member.link]:
        remedy = "pack with tar --dereference --hard-dereference"
        raise SampleError("link", f"its .{linked[0]} is a link, which has no content here; {remedy}")
    media = media_member(group, rule.modality)
    if media is None:
        names = ", ".join(member.extension or "one without an extension" for member in members)
        hint = _hint(members, _EXTENSIONS[rule.modality])
        raise SampleError("no_media", f"no {rule.modality} among its members ({names}){hint}")
    named = [member for member in members if member.extension in captions.EXTENSIONS]
    texts = contents_of(named) if named else []
    contents = {member.extension: content for member, content in zip(named, texts, strict=True)}
    try:
        packed = shard.modality is not None
        about = {"lines": shard.caption_lines, "packed": packed, "required": rule.needs_text}
        said = captions.read_texts(contents, **about, keep=shard.where.json_names if shard.where else ())
    except SampleError as error:
        hint = _hint(members, captions.EXTENSIONS) if error.kind == "no_caption" else ""
        raise SampleError(error.kind, f"{error}{hint}") from error
    if shard.where is not None and said.size is None:
        check_condition(shard.where, condition_fields(said), partly=True)  # a sample that it leaves out is not probed
    address = MediaAddress(shard.storage, shard.path, origin + media.offset, media.length, media.extension)
    return _Entry(shard, group.key, address, said)


def _sized(entries: Sequence[_Entry | SampleError | None], rule: SizeRule, probe: Prober) -> list[Any]:
    """Replaces each `_Entry` by its sample, or by an error if the size is not allowed. Keeps other elements."""
    unknown = [entry.media for entry in entries if isinstance(entry, _Entry) and entry.texts.size is None]
    probed = iter(probe(unknown) if unknown else ())
    found: list[Sample | SampleError | None] = []
    for entry in entries:
        if not isinstance(entry, _Entry):
            found.append(entry)
            continue
        size = entry.texts.size or next(probed)
        try:
            found.append(size if isinstance(size, SampleError) else _sample(entry, size, rule))
        except SampleError as error:
            found.append(error)
    return found


def _sample(entry: _Entry, size: MediaSize, rule: SizeRule) -> Sample:
    """Returns the sample of an entry with this size. Raises: SampleError for a size that the rule does not allow."""
    media = entry.media
    if size.kind != rule.modality:
        holder = f"its .{media.extension} holds" if entry.texts.size is None else "its metadata describes"
        raise SampleError("wrong_kind", f"{holder} {size.kind} data, but it is read as {rule.modality}")
    check_area(size.height, size.width, rule.max_image_px)
    check_duration(size.duration_s, rule.max_video_s)
    frames = rule.frames_of(size)
    grid = rule.grid(size.height, size.width, frames)
    texts = entry.texts
    return Sample(
        shard=entry.shard,
        key=entry.key,
        media_offset=media.offset,
        media_length=media.length,
        extension=media.extension,
        captions=texts.captions,
        label=texts.label,
        set=texts.set,
        crc32=texts.crc32,
        size=size,
        probed=entry.texts.size is None,
        grid=grid,
        frames=frames,
        downscaled=rule.shrinks(size.height, size.width, grid),
        ignored=texts.ignored,
        several_lines=texts.several_lines,
        json=texts.json,
    )
