"""Reads the sizes of media files from their headers, in a process that a header may crash."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from univitar_ds.data.decoding.decode_job import Failure
from univitar_ds.data.media.prober import MediaAddress, probe_at
from univitar_ds.data.storage.address import storage_for
from univitar_ds.data.storage.base import StorageSettings
from univitar_ds.data.storage.parallel import at_once
from univitar_ds.errors import SampleError


class ProbeItem(NamedTuple):
    """Location of one sample's media, and the extension of its name."""

    path: str
    offset: int
    length: int
    extension: str


@dataclass(frozen=True)
class ProbeJob:
    """Files whose sizes are to be read. `max_image_px` limits memory as in decoding."""

    kind: ClassVar = "probe"
    slow_item_s: ClassVar = 0.0
    bytes: ClassVar = 0  # no pixels are written
    items: Sequence[ProbeItem]
    max_image_px: int

    @property
    def name(self) -> str:
        """A name for messages of the trainer."""
        first = self.items[0]
        return f"the headers of {len(self.items)} files, the first at byte {first.offset} of {first.path}"

    @property
    def bytes_held(self) -> int:
        """Maximum bytes of files in memory at a time. Remote files are read concurrently."""
        lengths = [item.length for item in self.items]
        return sum(lengths) if any("://" in item.path for item in self.items) else max(lengths)

    def to_json(self) -> dict[str, Any]:
        return {"max_image_px": self.max_image_px, "items": [tuple(item) for item in self.items]}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> ProbeJob:
        return cls([ProbeItem(*item) for item in document["items"]], document["max_image_px"])


def probe_items(
    job: ProbeJob, settings: StorageSettings, after_item: Callable[[], None]
) -> tuple[list[Failure], list[tuple[Any, ...] | None]]:
    """Returns the failed files, and for each file the fields of its `MediaSize`, or None if it failed.

    Raises: DataError if a shard cannot be read.
    """

    failures: list[Failure] = []
    sizes: list[tuple[Any, ...] | None] = []
    media = [MediaAddress(storage_for(item.path, settings), *item) for item in job.items]
    for index, found in enumerate(at_once(probe_at, media, [one.storage for one in media])):
        if isinstance(found, SampleError):
            failures.append((index, found.kind, str(found)))
            sizes.append(None)
        else:
            sizes.append(tuple(vars(found).values()))
        after_item()
    return failures, sizes
