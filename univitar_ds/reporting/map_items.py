"""Reads the images and videos that maps are drawn of: files that the user names, or held-out items of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from univitar_ds.config.data import DataConfig
from univitar_ds.data.batch import PackedBatch
from univitar_ds.data.media.image_decode import decode_image
from univitar_ds.data.media.probe import probe
from univitar_ds.data.media.types import DecodeLimits
from univitar_ds.data.writing.packed_sources import with_packed_sources
from univitar_ds.errors import DataError, SampleError, UserError, shortened
from univitar_ds.evaluation.configured import last_stage, packs_of
from univitar_ds.formats.run import find_checkpoint
from univitar_ds.geometry import MODALITIES, PATCH
from univitar_ds.inference.model import Item
from univitar_ds.regular_files import read_bytes
from univitar_ds.reporting.record import RunRecord

FRAMES, FRAME_TOKENS = 16, 1024
"""Number of frames read from a video file if the run has no stage with videos, and approximate maximum of the tokens of
a frame."""
MOST_FILES = 12
"""Maximum number of files of a page."""
HELD_OUT = {"image": 2, "video": 1}
"""Number of held-out items by modality."""
_LOOKED_AT = 64
"""Number of items of a modality among which different captions or labels are looked for."""
_KEY_LETTERS = 100
"""Maximum length of the key of an item in a title."""
_MAX_MB: int = DataConfig.model_fields["max_sample_mb"].default
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
    Raises: UserError for too many files, a file that cannot be decoded as image or video, an empty caption, a caption
        for a run without a text tower, or no held-out items; CheckpointError if a run has no complete checkpoint;
        ConfigError or DataError if the sources cannot be read.
    """
    without_text = next((run.name for run in runs if run.config.objective.classifies), None)
    if caption is not None and without_text is not None:
        raise UserError(f"--caption needs a text tower, and {without_text} has none; leave it out")
    if caption is not None and not caption.strip():
        raise UserError("--caption is empty; give a text, or leave it out")
    if len(files) > MOST_FILES:
        raise UserError(f"{len(files)} files are too many for maps (limit {MOST_FILES}); give fewer")
    for run in runs:
        find_checkpoint(run.folder)
    if files:
        stage = last_stage(runs[0].config, "video")
        frames = FRAMES if stage is None else stage.video_frames
        names = [file.name for file in files]
        return [
            MapItem(name if names.count(name) == 1 else str(file), _read(file, frames), caption)
            for name, file in zip(names, files, strict=True)
        ]
    try:
        items = list(_held_out(runs[0]))
    except DataError as error:
        raise DataError(f"held-out data of {runs[0].name}: {error}; or name files: --images FILE") from error
    if not items:
        raise UserError(
            f"evaluation.sources of {runs[0].name} have no image and no video with a caption or label that can be "
            "read; name files: --images FILE"
        )
    return [MapItem(one.name, one.item, caption or one.caption) for one in items]


def _held_out(run: RunRecord) -> Iterator[MapItem]:
    """Yields the first items of each modality, as the last stage reads them."""
    if not run.config.evaluation.sources:
        raise UserError(f"evaluation.sources of {run.name} is empty; name files: --images FILE")
    config = with_packed_sources(run.config, training=False)
    data = config.data.model_copy(update={"workers": 0})  # a few items do not need processes
    config = config.model_copy(update={"data": data})
    for modality in MODALITIES:
        stage = last_stage(config, modality)
        if stage is None:
            continue
        with closing(packs_of(config, run.folder, stage, modality)) as packs:
            yield from _differing((one for pack in packs for one in _items(pack)), HELD_OUT[modality])


def _differing(items: Iterator[tuple[str | None, MapItem]], most: int) -> list[MapItem]:
    """Returns the first `most` items with different texts, followed by others if too few texts differ.

    Args: items: with their captions or labels; at most _LOOKED_AT are read, since a data set may have one label.
    """
    found: list[MapItem] = []
    others: list[MapItem] = []
    seen: set[str | None] = set()
    for text, item in islice(items, _LOOKED_AT):
        if text not in seen:
            seen.add(text)
            found.append(item)
        elif len(others) < most:
            others.append(item)
        if len(found) == most:
            break
    return [*found, *others][:most]


def _items(pack: PackedBatch) -> Iterator[tuple[str | None, MapItem]]:
    """Yields each item of a pack, after its caption or label."""
    for key, caption, label, pixels in zip(pack.keys, pack.captions, pack.labels, pack.images(), strict=True):
        frames = [Image.fromarray(frame) for frame in pixels.numpy()]
        item = frames if pack.modality == "video" else frames[0]
        yield caption or label, MapItem(shortened(key, _KEY_LETTERS), item, caption or None)


def _read(file: Path, frames: int) -> Item:
    """Returns an image, or `frames` frames of a video.

    Raises: UserError if the file cannot be decoded or is too large.
    """
    try:
        if (length := file.stat().st_size) > _MAX_MB << 20:
            raise SampleError("too_large", f"the file has {length} bytes (limit {_MAX_MB << 20})")
        content = read_bytes(file)
        size = probe(content, file.suffix.lower().lstrip("."))
        if size.kind == "image":
            return Image.fromarray(decode_image(content, max_px=_MAX_PX))
        from univitar_ds.data.media.video_decode import decode_video

        decoded = decode_video(content, frames=frames, limits=DecodeLimits(_MAX_PX, _TIMEOUT_S), fit=_fitting)
        return [Image.fromarray(frame) for frame in decoded]
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{file} cannot be drawn: {why}; name an image or a video on this machine") from error
    except SampleError as error:
        raise UserError(f"{file} cannot be drawn: {error}; name an image or a video") from error


def _fitting(frame: np.ndarray) -> np.ndarray:
    """Resizes a frame (h, w, 3) with more than FRAME_TOKENS patches to about as many."""
    if frame.shape[0] * frame.shape[1] <= FRAME_TOKENS * PATCH**2:
        return frame
    return np.asarray(with_tokens(Image.fromarray(frame), FRAME_TOKENS))


def with_tokens(image: Image.Image, tokens: float) -> Image.Image:
    """Resizes an image so that it has about `tokens` patches, with sides that are multiples of a patch."""
    scale = (tokens * PATCH**2 / (image.width * image.height)) ** 0.5
    sides = (max(PATCH, round(side * scale / PATCH) * PATCH) for side in image.size)
    return image.resize(tuple(sides), Image.Resampling.BICUBIC)
