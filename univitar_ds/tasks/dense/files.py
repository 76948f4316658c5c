"""Images with label maps: finds the pairs of a split and reads them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from univitar_ds.data.media.image_decode import decode_image
from univitar_ds.data.media.memory_limits import check_memory
from univitar_ds.data.media.probe import open_image
from univitar_ds.data.media.types import IMAGE_EXTENSIONS, check_area, reason
from univitar_ds.data.storage.base import S3
from univitar_ds.errors import ConfigError, DataError, SampleError
from univitar_ds.regular_files import read_bytes, read_utf8

ANNOTATIONS = "annotations"
_VOC_IMAGES, _VOC_MASKS, _VOC_LISTS = "JPEGImages", "SegmentationClass", "ImageSets/Segmentation"
"""The folders of Pascal VOC."""
MASK_MODES = ("L", "P", "1", "I", "I;16")
"""Modes of Pillow whose values are labels."""
MOST_LABELS = 1 << 15
"""Labels must be below this number, since they are stored as int16."""
Read = TypeVar("Read")
_AHEAD = 2
"""Images that each thread decodes ahead."""


@dataclass(frozen=True)
class MaskOptions:
    """Options of `eval dense` about label maps.

    `masks`: folder of the label maps, each under the path of its image, with `suffix` in place of `image_suffix`; None:
    ADE20K's layout. `train_masks`: the same for the training split; None: `masks`. `image_suffix`: end of the names of
    images; None: their extension. `ignore`: values that are not labels.
    """

    masks: str | None = None
    train_masks: str | None = None
    suffix: str = ".png"
    image_suffix: str | None = None
    ignore: Sequence[int] = (255,)


class Pair(NamedTuple):
    """Paths of an image and of its label map."""

    image: Path
    mask: Path


class SegmentedImage(NamedTuple):
    """An upright image (H, W, 3) uint8, and the label of each pixel, (H, W) int16; -1 for pixels without one."""

    pixels: np.ndarray
    labels: np.ndarray


def split_pairs(data: str, split: str, masks: str | None, names: MaskOptions) -> tuple[list[Pair], int]:
    """Returns the images of a split with their label maps, sorted, and the number of images without a label map.

    Args: data: a folder in the layout of ADE20K (images/SPLIT, annotations/SPLIT) or of Pascal VOC (JPEGImages,
        SegmentationClass, ImageSets/Segmentation/SPLIT.txt), or, with `masks`, a folder of images, or one with a folder
        SPLIT of images; names: how label maps are named.
    Raises: ConfigError if there are no such folders or no pairs.
    """
    for place in (data, masks or ""):
        if place.startswith(S3):
            raise ConfigError(f"{place}: the dense probe reads local folders only; copy it to a disk, and name that")
    if masks is None and Path(data, _VOC_LISTS).is_dir():
        pairs = _voc_pairs(Path(data), split)
        where = f"{data}, split {split},", Path(data, _VOC_MASKS)
    else:
        images, labels = _folders(data, split, masks)
        found = sorted(path for path in _files(images) if _is_image(path, names.image_suffix))
        pairs = [Pair(path, labels / _mask_name(path.relative_to(images), names)) for path in found]
        where = f"{images}", labels
    there = [pair for pair in pairs if pair.mask.is_file() and pair.mask != pair.image]
    if not there:
        example = f", for example {pairs[0].mask} for {pairs[0].image}" if pairs else ""
        raise ConfigError(
            f"none of the {len(pairs)} images in {where[0]} has a label map in {where[1]}{example}; give --masks and "
            "--mask-suffix"
        )
    return there, len(pairs) - len(there)


def _folders(data: str, split: str, masks: str | None) -> tuple[Path, Path]:
    """Returns the folders of the images and the label maps of a split. Raises: ConfigError as `split_pairs`."""
    if masks is None:
        images, labels = Path(data, "images", split), Path(data, ANNOTATIONS, split)
        if not images.is_dir() or not labels.is_dir():
            splits = sorted(path.name for path in Path(data, "images").glob("*/"))
            known = f"its images are of {', '.join(splits)}" if splits else "it has no folder images"
            raise ConfigError(
                f"{data} has no images/{split} and {ANNOTATIONS}/{split} ({known}); choose another split, or name the "
                "folder of the label maps with --masks"
            )
        return images, labels
    images = Path(data, split) if Path(data, split).is_dir() else Path(data)
    labels = Path(masks, split) if Path(masks, split).is_dir() else Path(masks)
    for folder in (images, labels):
        if not folder.is_dir():
            raise ConfigError(f"{folder} is not a folder; give folders as --data (images) and --masks (label maps)")
    return images, labels


def _voc_pairs(data: Path, split: str) -> list[Pair]:
    """Returns the images that a list of Pascal VOC names, with their label maps.

    Raises: ConfigError if there is no such list, or it names something else than files of the data."""
    path = data / _VOC_LISTS / f"{split}.txt"
    if not path.is_file():
        splits = ", ".join(sorted(one.stem for one in path.parent.glob("*.txt"))) or "none"
        raise ConfigError(f"{data} has the lists {splits} in {_VOC_LISTS}, and no {split}.txt; choose another split")
    try:
        names = read_utf8(path).removeprefix("\ufeff").split()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{path} cannot be read as UTF-8 text ({error}); fetch it again") from error
    if not names:
        raise ConfigError(f"{path} names no image; choose another split, or fetch it again")
    if strange := [name for name in names if name in ("..", ".") or "/" in name]:
        raise ConfigError(f"{path} names {strange[0][:60]!r}, which is no image of {_VOC_IMAGES}; fetch it again")
    pairs = [
        Pair(data / _VOC_IMAGES / f"{name}.jpg", data / _VOC_MASKS / f"{name}.png")
        for name in sorted(dict.fromkeys(names))
    ]
    if missing := [pair.image for pair in pairs if not pair.image.is_file()]:
        raise ConfigError(f"{path} names {len(missing)} images that are missing, such as {missing[0]}; fetch them")
    return pairs


def _is_image(path: Path, suffix: str | None) -> bool:
    return path.suffix[1:].lower() in IMAGE_EXTENSIONS and path.name.endswith(suffix or "")


def _mask_name(path: Path, names: MaskOptions) -> Path:
    return path.with_name(path.name.removesuffix(names.image_suffix or path.suffix) + names.suffix)


def _files(folder: Path) -> Iterator[Path]:
    for base, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(base, name) for name in names)


def read_pair(pair: Pair, max_px: int, ignore: Sequence[int]) -> SegmentedImage:
    """Returns an image and its labels. Args: max_px: maximum number of pixels; ignore: values that are not labels.

    Raises: SampleError for a damaged or too large file, a label map of colours, or of another size than its image.
    """
    pixels, labels = decode_image(_content(pair.image), max_px=max_px), read_labels(pair, max_px, ignore)
    if labels.shape != pixels.shape[:2]:
        (height, width), (h, w) = labels.shape, pixels.shape[:2]
        raise SampleError("wrong_size", f"its label map has {width} x {height} px, the image {w} x {h}")
    return SegmentedImage(pixels, labels)


def read_labels(pair: Pair, max_px: int, ignore: Sequence[int]) -> np.ndarray:
    """Returns the labels of an image as in `SegmentedImage`. Args, raises: as `read_pair`."""
    try:
        return _labels(_content(pair.mask), max_px, ignore)
    except SampleError as error:  # a caller names the image, so the message must name the other file
        raise SampleError(error.kind, f"its label map {pair.mask}: {error}") from error


def _content(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except OSError as error:
        raise SampleError("unreadable", f"it cannot be read: {error.strerror}") from error


def _labels(data: bytes, max_px: int, ignore: Sequence[int]) -> np.ndarray:
    """Returns the values of a label map, (H, W) int16, with -1 for ignored values."""
    with open_image(data) as image:
        check_area(image.height, image.width, max_px)
        if image.mode not in MASK_MODES:
            raise SampleError(
                "unreadable",
                f"it is a colour image (mode {image.mode}); store the class number of each pixel, as a grey "
                "or palette PNG",
            )
        check_memory(image, data, max_px)
        try:
            image.load()
        except Exception as error:  # Pillow's plugins raise many types for damaged data
            raise SampleError("corrupt", f"it cannot be decoded: {reason(error)}") from error
        values = np.array(image if image.mode != "1" else image.convert("L").point(lambda value: value > 0))
    values = values.astype(np.int32)  # uint8 has no -1
    ignored = np.isin(values, ignore)
    values[ignored] = 0
    if values.min(initial=0) < 0 or values.max(initial=0) >= MOST_LABELS:
        raise SampleError(
            "unreadable",
            f"it has values of {values.min()} to {values.max()}; allowed are class numbers of 0 to {MOST_LABELS - 1}",
        )
    values[ignored] = -1
    return values.astype(np.int16)


def read_ahead(
    pairs: Sequence[Pair], read: Callable[[Pair], Read], threads: int
) -> Iterator[tuple[Pair, Read | DataError]]:
    """Yields the result of `read` for each pair in order, read ahead by threads; the error for one that cannot be
    read."""
    with ThreadPoolExecutor(max_workers=threads) as pool:
        coming = iter(pairs)
        waiting = [(pair, pool.submit(read, pair)) for pair in islice(coming, _AHEAD * threads)]
        while waiting:
            pair, future = waiting.pop(0)
            if (following := next(coming, None)) is not None:
                waiting.append((following, pool.submit(read, following)))
            try:
                yield pair, future.result()
            except DataError as error:
                yield pair, error
