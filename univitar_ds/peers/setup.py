"""Computes a peer's features of units of files or samples, as `inference.workers` does for the project's models.

Items are decoded at their original size, in confined processes; the peer's image processor resizes them. A peer reads
only images: the features of a video are the mean over its frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from univitar_ds.config.data import DataConfig
from univitar_ds.data.media.augment import square_crop
from univitar_ds.data.media.frame_sampling import UNIFORM, Sampling
from univitar_ds.data.media.types import MediaSize
from univitar_ds.data.shards.samples import SizeRule
from univitar_ds.errors import SampleError
from univitar_ds.geometry import MODALITIES, PATCH, Modality, Resolution, cumulative, token_count
from univitar_ds.inference.reading import FRAMES, Grid, Kind, Pixels, Rows, rows_of_units
from univitar_ds.inference.sources import Unit
from univitar_ds.inference.workers import device_of
from univitar_ds.model.placement import feature_dtype
from univitar_ds.peers.model import PeerModel
from univitar_ds.peers.sizes import PatchSizes

_PACK_CELLS = (16 << 20) // PATCH**2
"""Maximum number of cells of PATCH x PATCH pixels that are decoded at a time, unless one item has more."""
_MOST_RATIO = 100
"""Maximum ratio of the sides of an item: some image processors make the shorter side a given number of pixels."""


@dataclass(frozen=True)
class PeerReading:
    """How items are read for a peer: limits, workers and storage in `data`, and the frames of a video."""

    data: DataConfig
    frames: int = FRAMES
    sampling: Sampling = UNIFORM
    token_budget: int = _PACK_CELLS
    """Maximum of a pack, in cells of PATCH x PATCH pixels: the number of tokens is known only after resizing."""
    remote: bool = False
    resolution: PatchSizes | None = None
    """Sizes at which images enter the model; None: as its image processor makes them."""
    only: Modality | None = None
    """The modality whose samples are read; None: both."""
    crop: tuple[int, int] | None = None
    """Number of a square crop, and number of crops, see `square_crop`; None: the whole item."""

    def rules(self) -> dict[Modality, SizeRule]:
        """Returns the rule of each modality that is read, which keeps the size of the items."""
        data, most = self.data, 2 * self.data.max_image_px // PATCH**2
        limits = data.max_image_px, self.sampling, data.max_video_s, data.max_sample_mb, False
        return {
            modality: _OriginalSize(
                modality, Resolution(1, most), self.frames if modality == "video" else 1, most, *limits
            )
            for modality in MODALITIES
            if self.only in (None, modality)
        }


@dataclass(frozen=True)
class _OriginalSize(SizeRule):
    """Keeps the size of items. A grid has the number of frames, and the cells of PATCH x PATCH pixels that cover a
    frame."""

    original = True

    def frames_of(self, size: MediaSize) -> int:
        return self.frames if size.kind == "video" else 1  # also an odd number: there are no tubelets

    def grid(self, height: int, width: int, frames: int) -> tuple[int, int, int]:
        grid = frames, -(-height // PATCH), -(-width // PATCH)
        if max(height, width) > _MOST_RATIO * min(height, width):
            raise SampleError("too_large", f"{width} x {height} px have a ratio of sides above {_MOST_RATIO}")
        if token_count(grid) > self.most_tokens:
            raise SampleError(
                "too_large",
                f"{frames} frames of {width} x {height} px exceed the limit of memory for an item; give fewer --frames",
            )
        return grid

    def shrinks(self, height: int, width: int, grid: tuple[int, int, int]) -> bool:
        return False


@dataclass(frozen=True)
class PeerSetup:
    """Settings with which a process computes a peer's features.

    `folder`: the model's local folder; `peer`: its `model_type`; `dtype`: None: as `feature_dtype`; `tokens_at_once`:
    maximum number of tokens of a batch; `reading`: how items are read.
    """

    folder: str
    peer: str
    dtype: torch.dtype | None
    tokens_at_once: int
    reading: PeerReading
    kind: Kind = "pooled"

    def load(self, rank: int) -> PeerModel:
        """Opens the model on the GPU `rank`, or on the CPU. Raises: CheckpointError as `PeerModel`."""
        device = device_of(rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        return PeerModel(Path(self.folder), self.peer, self.dtype or feature_dtype(device), device)

    def read(self, rank: int, units: Iterator[Unit], finished: Callable[[int], None]) -> Iterator[Rows]:
        """Yields the features of the units, see `inference.workers.AnySetup`."""
        model = self.load(rank)
        patches = self.kind == "tokens"

        def features(pack: Pixels) -> tuple[Sequence[Tensor], Sequence[Grid]]:
            images, threads = [self._cropped(one) for one in _frames_of(pack)], self.reading.data.workers
            chosen = {"sizes": self._sizes(pack), "patches": patches}
            found, grids = model.encoded(images, self.tokens_at_once, threads, **chosen)
            begins = cumulative(pack.frames)
            items = [torch.cat(found[begin:end]) for begin, end in pairwise(begins)]
            read = [(frames, *grids[begin]) for frames, begin in zip(pack.frames, begins, strict=False)]
            return items if patches else [one.mean(dim=0, keepdim=True) for one in items], read

        yield from rows_of_units(features, model.token_width if patches else model.width, units, self.reading, finished)

    def _cropped(self, image: np.ndarray) -> np.ndarray:
        if self.reading.crop is None:
            return image
        crop = square_crop(*image.shape[:2], *self.reading.crop)
        return image[crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]

    def _sizes(self, pack: Pixels) -> list[tuple[int, int]] | None:
        """Returns the rows and columns of patches of each frame; None: as the image processor makes them."""
        rule = self.reading.resolution
        if rule is None:
            return None
        items = zip(pack.sizes, pack.frames, strict=True)
        return [grid for size, frames in items for grid in [rule.grid(*size, frames)] * frames]


def _frames_of(pack: Pixels) -> Iterator[np.ndarray]:
    """Yields all frames of a pack, each (H, W, 3) uint8."""
    start = 0
    for frames, (height, width) in zip(pack.frames, pack.sizes, strict=True):
        end = start + 3 * frames * height * width
        yield from pack.pixels[start:end].reshape(frames, height, width, 3)
        start = end
