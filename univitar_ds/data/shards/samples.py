"""One sample of a shard: which member is the media, what its caption and label are, how large it will be."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO

from univitar_ds.data.media.frame_sampling import UNIFORM, Sampling, frames_of
from univitar_ds.data.media.probe import probe
from univitar_ds.data.media.types import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, MediaSize, check_area, check_duration
from univitar_ds.data.shards import captions, tar_index
from univitar_ds.data.shards.listing import Shard
from univitar_ds.errors import SampleError
from univitar_ds.geometry import PATCH, Modality, Resolution, smart_resize, token_count


@dataclass(frozen=True)
class SizeRule:
    """How large an item of one modality enters the encoder. `frames` is the most a video gives, 1 for images.

    `most_tokens` is the largest item that a pack has room for; the `max_` fields are limits of the data section.
    """

    modality: Modality
    resolution: Resolution
    frames: int
    most_tokens: int
    max_image_px: int
    sampling: Sampling = UNIFORM
    max_video_s: float = 3600.0
    max_sample_mb: int = 1024

    def frames_of(self, size: MediaSize) -> int:
        """Frames stored of an item: 1 of an image, of a video what the sampling takes."""
        return frames_of(self.sampling, self.frames, size.duration_s) if size.kind == "video" else 1

    def grid(self, height: int, width: int, frames: int) -> tuple[int, int, int]:
        """Tokens along time, height and width of an item of `frames` frames; never above `most_tokens`.

        Rounding up to whole `divisor_px` can go above max_tokens where min_tokens is close to it. What a pack has no
        room for is then resized again, from the size it was given first.
        Raises: SampleError if not even one `divisor_px` square per tubelet fits.
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
        """Whether an item has more tokens at its own size, in whole `divisor_px`, than the rule and a pack allow."""
        divisor = self.resolution.divisor_px
        own = grid[0] * max(round(height / divisor), 1) * max(round(width / divisor), 1) * (divisor // PATCH) ** 2
        fixed = self.resolution.fixed_px is not None
        return own > min(token_count(grid) if fixed else self.resolution.max_tokens, self.most_tokens)


@dataclass(frozen=True)
class Sample:
    """A readable sample before decoding: addresses, texts and the size that its header promises.

    `media_offset` and `media_length` are bytes of the shard. `captions` may be none only where there is a label.
    `frames` are those stored in its pixels, 1 for an image. `downscaled`: see `SizeRule.shrinks`; `ignored` and
    `several_lines`: see `captions.Texts`.
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
    grid: tuple[int, int, int]
    frames: int
    downscaled: bool = False
    ignored: tuple[captions.Ignored, ...] = ()
    several_lines: bool = False

    @property
    def name(self) -> str:
        return f"{self.shard.name}/{self.key}"

    @cached_property
    def tokens(self) -> int:
        return token_count(self.grid)


def modality_of(group: tar_index.Group) -> Modality | None:
    """What a sample is by its members' names: a video with an image beside it is a video. None without media."""
    extensions = {member.extension for member in group.members}
    if extensions & VIDEO_EXTENSIONS:
        return "video"
    return "image" if extensions & IMAGE_EXTENSIONS else None


def belongs(group: tar_index.Group, shard: Shard, modality: Modality) -> bool:
    """Whether a stream of this modality owns the sample; every sample of a shard has exactly one owner.

    A shard whose manifest says what it holds owns all that is in it: a video among images is a bad sample, not a lost
    one. Else the members decide, and where they say nothing it is an image.
    """
    return (shard.modality or modality_of(group) or "image") == modality


def read_sample(shard: Shard, group: tar_index.Group, rule: SizeRule) -> Sample:
    """Fetch a sample by its address in the shard and check everything but its pixels.

    Raises: SampleError for a sample to leave out; DataError if the shard itself cannot be read.
    """
    _check_length(group.length, rule)
    data = shard.storage.read_range(shard.path, group.offset, group.length)
    return _parse(shard, group.key, group.members, data, group.offset, group.offset, rule)


def read_sample_again(shard: Shard, offset: int, length: int, rule: SizeRule) -> Sample | None:
    """A sample by the address that a cursor kept. None if the address does not hold one sample any more.

    Raises: SampleError if it is not readable under this rule; another stage's may have allowed more.
    """
    _check_length(length, rule)
    data = shard.storage.read_range(shard.path, offset, length)
    group = tar_index.group_of_range(BytesIO(data), shard.name, length, offset)
    return None if group is None else _parse(shard, group.key, group.members, data, offset, 0, rule)


def _check_length(length: int, rule: SizeRule) -> None:
    if length > rule.max_sample_mb << 20:
        raise SampleError(
            "too_large", f"the sample has {length} bytes, above data.max_sample_mb = {rule.max_sample_mb} (MiB)"
        )


def _hint(members: Sequence[tar_index.Member], wanted: Collection[str]) -> str:
    """What may be the cause of a missing member: a name with dots in it, or a tar that is not sorted."""
    dotted = next((m.extension for m in members if "." in m.extension and m.extension.split(".")[-1] in wanted), None)
    if dotted is not None:
        return (
            f"; a key ends at the first dot of a name (WebDataset's rule), so {dotted!r} is read as an extension: "
            "rename the files so that the extension has the only dot"
        )
    return f"; {tar_index.SORT_HINT}" if len(members) == 1 else ""


def _parse(
    shard: Shard, key: str, members: Sequence[tar_index.Member], data: bytes, origin: int, counted: int, rule: SizeRule
) -> Sample:
    """`data` begins at byte `origin` of the shard, which members' offsets call byte `counted`."""

    def content_of(member: tar_index.Member) -> bytes:
        start = member.offset - counted
        return data[start : start + member.length]

    by_extension = {member.extension: member for member in members}
    if len(by_extension) < len(members):
        raise SampleError("duplicate", "two members have the same name")
    if linked := [member.extension for member in members if member.link]:
        remedy = "pack with tar --dereference --hard-dereference"
        raise SampleError("link", f"its .{linked[0]} is a link, which has no content here; {remedy}")
    known = VIDEO_EXTENSIONS if rule.modality == "video" else IMAGE_EXTENSIONS
    media = next((member for member in members if member.extension in known), None)
    if media is None:
        names = ", ".join(member.extension or "one without an extension" for member in members)
        raise SampleError("no_media", f"no {rule.modality} among its members ({names}){_hint(members, known)}")
    content = content_of(media)
    contents = {member.extension: content_of(member) for member in members if member.extension in captions.EXTENSIONS}
    try:
        texts = captions.read_texts(contents, lines=shard.caption_lines, packed=shard.modality is not None)
    except SampleError as error:
        hint = _hint(members, captions.EXTENSIONS) if error.kind == "no_caption" else ""
        raise SampleError(error.kind, f"{error}{hint}") from error
    size = probe(content, media.extension)
    if size.kind != rule.modality:
        raise SampleError("wrong_kind", f"its .{media.extension} holds {size.kind} data, not {rule.modality}")
    check_area(size.height, size.width, rule.max_image_px)
    check_duration(size.duration_s, rule.max_video_s)
    frames = rule.frames_of(size)
    grid = rule.grid(size.height, size.width, frames)
    downscaled = rule.shrinks(size.height, size.width, grid)
    offset = origin + media.offset - counted
    *said, ignored, several_lines = texts
    return Sample(
        shard, key, offset, media.length, media.extension, *said, grid, frames, downscaled, ignored, several_lines
    )
