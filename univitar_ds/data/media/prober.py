"""Addresses of media files in shards, and functions that read their sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from univitar_ds.data.media.types import MediaSize
from univitar_ds.data.storage.base import Storage
from univitar_ds.data.storage.parallel import at_once
from univitar_ds.errors import SampleError


class MediaAddress(NamedTuple):
    """The bytes of a media file in a shard, and the extension of its name."""

    storage: Storage
    path: str
    offset: int
    length: int
    extension: str


Prober = Callable[[Sequence[MediaAddress]], "list[MediaSize | SampleError]"]
"""Reads the sizes of media files from their headers, in the same order. For a file whose header cannot be read, it
returns a SampleError instead of raising it. Raises: DataError for a shard that cannot be read."""


def probe_each(media: Sequence[MediaAddress]) -> list[MediaSize | SampleError]:
    """A `Prober` that reads headers in this process. Use it in decoding processes, or for trusted files."""
    return list(at_once(probe_at, media, [one.storage for one in media]))


def probe_at(media: MediaAddress) -> MediaSize | SampleError:
    """Returns the size of one file, or a SampleError. Raises: DataError if its shard cannot be read."""
    from univitar_ds.data.media.probe import probe  # imports Pillow, which trainers do not need

    try:
        return probe(media.storage.read_range(media.path, media.offset, media.length), media.extension)
    except SampleError as error:
        return error
    except MemoryError:
        return SampleError("too_large", "its header takes more memory than data.max_image_px allows; replace the file")
