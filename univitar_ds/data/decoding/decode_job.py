"""Decodes the pixels of a pack from the addresses of its items, in the trainer or in a decoding process."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from univitar_ds.data.media.augment import Augmentation
from univitar_ds.data.media.frame_sampling import Sampling
from univitar_ds.data.media.types import DecodeLimits
from univitar_ds.data.storage.address import storage_for
from univitar_ds.data.storage.base import LOCAL, StorageSettings
from univitar_ds.data.storage.local import OpenFiles
from univitar_ds.errors import DataError, SampleError
from univitar_ds.geometry import PATCH, Modality, item_bytes

if TYPE_CHECKING:  # decoding processes do not import the code that reads shards
    from univitar_ds.data.shards.samples import Sample

Failure = tuple[int, str, str]
"""(index of the item in the pack, kind, message)."""
_Decode = Callable[["DecodeItem", bytes, np.ndarray], None]
"""Decodes a file into flat pixels of the item's size. Raises: SampleError."""
_BUSY_FACTOR = 4
"""Maximum ratio of wall time to CPU time on a busy machine. `data.decode_timeout_s` is CPU time."""


class DecodeItem(NamedTuple):
    """Location of one item's media, and its decoded form: `frames` frames (1 for an image) on a grid.

    `crc32` is the checksum of the bytes if known. `draw` seeds the jitter of a video's frames. `size` is (height,
    width, seconds) from metadata, which decoding compares with the file; None if it was read from the media header.
    `augmentation` is applied to all frames; None changes nothing.
    """

    path: str
    offset: int
    length: int
    grid: tuple[int, int, int]
    frames: int
    crc32: int | None = None
    draw: int = 0
    size: tuple[int, int, float] | None = None
    augmentation: Augmentation | None = None
    original: tuple[int, int] | None = None
    """(height, width) of frames that are not resized; None: they are resized to the grid."""

    @classmethod
    def from_sample(cls, sample: Sample, *, original: bool = False) -> DecodeItem:
        """Returns the item of a sample. Its `size` is None if the sample was probed.

        Args: original: whether the frames keep their size.
        """
        return cls(
            sample.shard.path,
            sample.media_offset,
            sample.media_length,
            sample.grid,
            sample.frames,
            sample.crc32,
            sample.draw,
            None if sample.probed else (sample.size.height, sample.size.width, sample.size.duration_s),
            sample.augmentation,
            (sample.size.height, sample.size.width) if original else None,
        )

    @classmethod
    def from_json(cls, document: Sequence[Any]) -> DecodeItem:
        """Returns the item in a decoded JSON list of its fields."""
        path, offset, length, grid, frames, crc32, draw, size, change, original = document
        augmentation = None if change is None else Augmentation.from_json(change)
        size, original = (None if one is None else tuple(one) for one in (size, original))
        return cls(path, offset, length, tuple(grid), frames, crc32, draw, size, augmentation, original)

    @property
    def bytes(self) -> int:
        """Number of bytes of the decoded pixels."""
        if self.original is not None:
            return 3 * self.frames * math.prod(self.original)
        return item_bytes(self.grid, self.frames)


@dataclass(frozen=True)
class DecodeJob:
    """A pack to decode."""

    kind: ClassVar = "decode"
    modality: Modality
    sampling: Sampling
    limits: DecodeLimits
    items: Sequence[DecodeItem]
    name: str = ""
    """Name of the pack in messages of the trainer; not sent to decoding processes."""
    whole_files: bool = False
    """Whether each item is a whole file, not a part of a shard. A file that cannot be read is then a failed item."""

    @property
    def max_image_px(self) -> int:
        return self.limits.max_image_px

    @property
    def slow_item_s(self) -> float:
        """Additional seconds that an item of this job may take on a busy machine."""
        return _BUSY_FACTOR * self.limits.timeout_s if self.modality == "video" else 0.0

    @property
    def bytes(self) -> int:
        """Number of bytes of all decoded pixels if no item fails."""
        return sum(item.bytes for item in self.items)

    def to_json(self) -> dict[str, Any]:
        return {
            "modality": self.modality,
            "sampling": tuple(vars(self.sampling).values()),  # `astuple` makes deep copies and is ten times slower
            "limits": tuple(vars(self.limits).values()),
            "items": self.items,
            "whole_files": self.whole_files,
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> DecodeJob:
        items = [DecodeItem.from_json(item) for item in document["items"]]
        sampling = Sampling(*document["sampling"])
        limits = DecodeLimits(*document["limits"])
        return cls(document["modality"], sampling, limits, items, whole_files=document["whole_files"])


def decode_pack(
    job: DecodeJob,
    buffer: np.ndarray,
    settings: StorageSettings = LOCAL,
    after_item: Callable[[], None] = lambda: None,
) -> list[Failure]:
    """Decodes the items into `buffer` (uint8, at least `job.bytes`), in order and without gaps for failed items.

    Args:
        settings: settings of the storage of the shards.
        after_item: called after each item.
    Returns: the items that could not be decoded.
    Raises: DataError if a shard cannot be read.
    """
    decode = _image_decoder(job.limits) if job.modality == "image" else _video_decoder(job.limits, job.sampling)
    failures: list[Failure] = []
    start = 0
    with OpenFiles() as files:
        for index, item in enumerate(job.items):
            end = start + item.bytes
            try:
                data = storage_for(item.path, settings, files).read_range(item.path, item.offset, item.length)
                check_crc32(data, item.crc32)
                decode(item, data, buffer[start:end])
            except SampleError as error:
                failures.append((index, error.kind, str(error)))
            except DataError as error:
                if not job.whole_files:
                    raise
                failures.append((index, "unreadable", str(error)))
            except MemoryError:
                detail = f"decoding takes more memory than data.max_image_px = {job.limits.max_image_px} allows"
                failures.append((index, "too_large", f"{detail}; raise it or store a smaller file"))
            else:
                start = end
            after_item()
    return failures


def check_crc32(data: bytes, packed: int | None) -> None:
    """Raises SampleError if the CRC-32 of `data` is not `packed`, that of the packed file. None: not checked."""
    if packed is not None and (found := zlib.crc32(data)) != packed:
        detail = f"its bytes have the CRC-32 {found:08x}, but had {packed:08x} when they were packed"
        raise SampleError("checksum", f"{detail}; restore the shard")


# The decoders are imported in functions, because a trainer makes jobs but does not decode. See `worker.PRELOADED`.
def _image_decoder(limits: DecodeLimits) -> _Decode:
    from univitar_ds.data.media.image_decode import decode_near
    from univitar_ds.data.media.resize import fit_image

    def decode(item: DecodeItem, data: bytes, room: np.ndarray) -> None:
        if item.original is not None:
            pixels, _ = decode_near(data, max_px=limits.max_image_px, target=None, size=item.original)
            room[:] = pixels.reshape(-1)
            return
        target = height, width = item.grid[1] * PATCH, item.grid[2] * PATCH
        augmentation = item.augmentation
        crop = None if augmentation is None else augmentation.crop
        if crop is not None:
            target = crop.whole(height, width)
        size = None if item.size is None else item.size[:2]
        pixels, extent = decode_near(data, max_px=limits.max_image_px, target=target, size=size)
        if crop is not None:
            pixels, extent = crop.cut(pixels, extent)
        out = room.reshape(height, width, 3)
        fit_image(pixels, item.grid, out, extent)
        if augmentation is not None:
            augmentation.finish(out[None])

    return decode


def _video_decoder(limits: DecodeLimits, sampling: Sampling) -> _Decode:
    from univitar_ds.data.media.resize import fit_image
    from univitar_ds.data.media.types import check_size
    from univitar_ds.data.media.video_decode import decode_video

    def decode(item: DecodeItem, data: bytes, room: np.ndarray) -> None:
        about = {"frames": item.frames, "limits": limits, "sampling": sampling, "draw": item.draw, "size": item.size}
        if item.original is not None:
            frames = decode_video(data, **about)
            check_size(item.original, frames.shape[1:3])
            room[:] = frames.reshape(-1)
            return
        augmentation = item.augmentation or Augmentation()
        crop = augmentation.crop
        out = room.reshape(item.frames, item.grid[1] * PATCH, item.grid[2] * PATCH, 3)
        out[:] = decode_video(
            data, **about, fit=lambda frame: fit_image(frame if crop is None else crop.cut(frame)[0], item.grid)
        )
        augmentation.finish(out)

    return decode
