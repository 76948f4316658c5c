"""One sample of a shard: which member is the media, what its caption and label are, how large it will be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from io import BytesIO

from univitar_ds.data import captions, tar
from univitar_ds.data.layout import Modality
from univitar_ds.data.listing import Shard
from univitar_ds.data.probe import IMAGE_EXTENSIONS, VIDEO_EXTENSIONS, probe
from univitar_ds.data.sampling import UNIFORM, Sampling
from univitar_ds.errors import SampleError
from univitar_ds.geometry import Resolution, token_count

SAMPLE_BYTES_LIMIT = 1 << 30
"""Largest sample that is read into memory; a larger one is a bad sample."""


@dataclass(frozen=True)
class SizeRule:
    """How large an item of one modality enters the encoder. `frames` is the most a clip gives, 1 for pictures.

    A sample of more than `most_tokens` is bad: where min_tokens is close to max_tokens, rounding up to whole
    `divisor_px` can go above max_tokens.
    """

    modality: Modality
    resolution: Resolution
    frames: int
    most_tokens: int
    max_image_px: int
    sampling: Sampling = UNIFORM

    def grid(self, height: int, width: int) -> tuple[int, int, int]:
        return self.resolution.grid(height, width, self.frames)


@dataclass(frozen=True)
class Sample:
    """A readable sample before decoding: addresses, texts and the size that its header promises.

    `media_offset` and `media_length` are bytes of the shard. `captions` has at least one, none empty. `frames` are
    those stored in its pixels, 1 for a picture. `shrunk`: it has more tokens at its own size than the rule allows.
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
    shrunk: bool = False

    @property
    def name(self) -> str:
        return f"{self.shard.name}/{self.key}"

    @property
    def tokens(self) -> int:
        return token_count(self.grid)


def modality_of(group: tar.Group) -> Modality | None:
    """What a sample is by its members' names: a clip with a picture beside it is a clip. None without media."""
    extensions = {member.extension for member in group.members}
    if extensions & VIDEO_EXTENSIONS:
        return "video"
    return "image" if extensions & IMAGE_EXTENSIONS else None


def belongs(group: tar.Group, shard: Shard, modality: Modality) -> bool:
    """Whether a stream of this modality owns the sample; every sample of a shard has exactly one owner.

    Where nothing says what a sample is, the shard's own modality decides, or pictures.
    """
    return (modality_of(group) or shard.modality or "image") == modality


def read_sample(shard: Shard, group: tar.Group, rule: SizeRule) -> Sample:
    """Fetch a sample by its address in the shard and check everything but its pixels.

    Raises: SampleError for a sample to leave out; DataError if the shard itself cannot be read.
    """
    if group.length > SAMPLE_BYTES_LIMIT:
        raise SampleError("too_large", f"{group.length} bytes in one sample (limit {SAMPLE_BYTES_LIMIT})")
    data = shard.storage.read_range(shard.path, group.offset, group.length)
    origin = group.offset
    members = [replace(member, offset=member.offset - origin) for member in group.members]
    return _parse(shard, group.key, members, data, origin, rule)


def read_sample_again(shard: Shard, offset: int, length: int, rule: SizeRule) -> Sample | None:
    """A sample by the address that a cursor kept. None if the address does not hold one sample any more.

    Raises: SampleError if it is not readable under this rule; another stage's may have allowed more.
    """
    data = shard.storage.read_range(shard.path, offset, length)
    group = tar.group_of_range(BytesIO(data), shard.name, length, offset)
    return None if group is None else _parse(shard, group.key, group.members, data, offset, rule)


def _parse(shard: Shard, key: str, members: Sequence[tar.Member], data: bytes, origin: int, rule: SizeRule) -> Sample:
    """Members have offsets relative to `data`, which begins at byte `origin` of the shard."""
    by_extension = {member.extension: member for member in members}
    if len(by_extension) < len(members):
        raise SampleError("duplicate", "two members have the same name")
    known = VIDEO_EXTENSIONS if rule.modality == "video" else IMAGE_EXTENSIONS
    media = next((member for member in members if member.extension in known), None)
    if media is None:
        names = ", ".join(member.extension for member in members)
        raise SampleError("no_media", f"no {rule.modality} among its members ({names})")
    content = data[media.offset : media.offset + media.length]

    texts = captions.read_texts(
        {
            member.extension: data[member.offset : member.offset + member.length]
            for member in members
            if member.extension in captions.EXTENSIONS
        }
    )
    size = probe(content, media.extension)
    if size.kind != rule.modality:
        raise SampleError("wrong_kind", f"its .{media.extension} holds {size.kind} data, not {rule.modality}")
    if size.height * size.width > rule.max_image_px:
        raise SampleError(
            "too_large",
            f"{size.height} x {size.width} px is {size.height * size.width} pixels (data.max_image_px is "
            f"{rule.max_image_px})",
        )
    grid = rule.grid(size.height, size.width)
    if token_count(grid) > rule.most_tokens:
        raise SampleError(
            "too_large",
            f"{size.height} x {size.width} px becomes {token_count(grid)} tokens, above token_budget "
            f"{rule.most_tokens}; raise token_budget or lower min_tokens",
        )
    return Sample(shard, key, origin + media.offset, media.length, media.extension, *texts, grid, rule.frames)
