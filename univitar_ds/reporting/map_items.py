"""Reads the images and videos that maps are drawn of: files that the user names, or held-out items of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from univitar_ds.config.data import DataConfig
from univitar_ds.data.batch import PackedBatch
from univitar_ds.data.media.image_decode import decode_image
from univitar_ds.data.media.probe import probe
from univitar_ds.data.media.types import DecodeLimits
from univitar_ds.data.writing.packed_sources import with_packed_sources
from univitar_ds.errors import SampleError, UserError
from univitar_ds.evaluation.configured import last_stage, packs_of
from univitar_ds.geometry import MODALITIES, PATCH
from univitar_ds.inference.model import Item
from univitar_ds.regular_files import read_bytes
from univitar_ds.reporting.record import RunRecord

FRAMES, FRAME_TOKENS = 16, 64
"""Number of frames read from a video file, and approximate tokens of each."""
MOST_FILES = 12
"""Maximum number of files of a page."""
HELD_OUT = {"image": 2, "video": 1}
"""Number of held-out items by modality."""
_MAX_PX: int = DataConfig.model_fields["max_image_px"].default
_TIMEOUT_S: float = DataConfig.model_fields["decode_timeout_s"].default


@dataclass(frozen=True)
class MapItem:
    """An image, or a video as its frames; and the text whose similarity to its patches is drawn, None for no text."""

    name: str
    item: Item
    caption: str | None


def read_items(runs: Sequence[RunRecord], files: Sequence[Path], caption: str | None) -> list[MapItem]:
    """Returns the items for maps of the runs: those in `files`, or if it is empty, held-out items of the first run.

    A held-out item has its own caption, unless `caption` is given.
    Raises: UserError for too many files, a file that cannot be decoded as image or video, a caption for a run without a
        text tower, or no held-out items; ConfigError or DataError if the sources cannot be read.
    """
    without_text = next((run.name for run in runs if run.config.objective.classifies), None)
    if caption is not None and without_text is not None:
        raise UserError(f"--caption needs a text tower, and {without_text} has none; leave it out")
    if len(files) > MOST_FILES:
        raise UserError(f"{len(files)} files are too many for maps (limit {MOST_FILES}); give fewer")
    if files:
        return [MapItem(file.name, _read(file), caption) for file in files]
    items = list(_held_out(runs[0]))
    if not items:
        raise UserError(f"{runs[0].name} has no held-out items to draw maps of; name files: --images FILE")
    own = caption is None and without_text is None
    return [MapItem(one.name, one.item, one.caption if own else caption) for one in items]


def _held_out(run: RunRecord) -> Iterator[MapItem]:
    """Yields the first items with different captions or labels of each modality, as the last stage reads them."""
    if not run.config.evaluation.sources:
        raise UserError(f"evaluation.sources of {run.name} is empty; name files: --images FILE")
    config = with_packed_sources(run.config, training=False)
    data = config.data.model_copy(update={"workers": 0})  # a few items do not need processes
    config = config.model_copy(update={"data": data})
    for modality in MODALITIES:
        stage = last_stage(config, modality)
        if stage is None:
            continue
        seen: set[str | None] = set()
        with closing(packs_of(config, run.folder, stage, modality)) as packs:
            for text, item in (one for pack in packs for one in _items(pack)):
                if text not in seen:
                    seen.add(text)
                    yield item
                if len(seen) == HELD_OUT[modality]:
                    break


def _items(pack: PackedBatch) -> Iterator[tuple[str | None, MapItem]]:
    """Yields each item of a pack, after its caption or label."""
    for key, caption, label, pixels in zip(pack.keys, pack.captions, pack.labels, pack.images(), strict=True):
        frames = [Image.fromarray(frame) for frame in pixels.numpy()]
        item = frames if pack.modality == "video" else frames[0]
        yield caption or label, MapItem(key, item, caption or None)


def _read(file: Path) -> Item:
    """Returns an image, or the frames of a video. Raises: UserError if the file cannot be decoded."""
    try:
        content = read_bytes(file)
        size = probe(content, file.suffix.lower().lstrip("."))
        if size.kind == "image":
            return Image.fromarray(decode_image(content, max_px=_MAX_PX))
        from univitar_ds.data.media.video_decode import decode_video

        frames = decode_video(content, frames=FRAMES, limits=DecodeLimits(_MAX_PX, _TIMEOUT_S), fit=_fitting)
        return [Image.fromarray(frame) for frame in frames]
    except OSError as error:
        raise UserError(f"{file} cannot be drawn: {error.strerror or error}; name an image or a video") from error
    except SampleError as error:
        raise UserError(f"{file} cannot be drawn: {error}; name an image or a video") from error


def _fitting(frame: np.ndarray) -> np.ndarray:
    """Resizes a frame (h, w, 3) so that it has about FRAME_TOKENS patches."""
    return np.asarray(with_tokens(Image.fromarray(frame), FRAME_TOKENS))


def with_tokens(image: Image.Image, tokens: int) -> Image.Image:
    """Resizes an image so that it has about `tokens` patches, with sides that are multiples of a patch."""
    scale = (tokens * PATCH**2 / (image.width * image.height)) ** 0.5
    sides = (max(PATCH, round(side * scale / PATCH) * PATCH) for side in image.size)
    return image.resize(tuple(sides), Image.Resampling.BICUBIC)
