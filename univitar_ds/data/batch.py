"""The batch that the trainer receives: one pack of one modality and the cursor of its lane."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from univitar_ds.data.sampler.cursor import LaneCursor
from univitar_ds.geometry import PATCH, Modality, item_bytes


@dataclass
class PackedBatch:
    """The micro-batch of one lane at one step. `N` is 0 if every item of the pack failed to decode.

    Shapes: N items, S text positions, B bytes. `pixels` has the items in order; item i takes
    `frames[i] * h*14 * w*14 * 3` bytes with (t, h, w) = `grid_thw[i]`, in the order frames, rows, columns, RGB.
    """

    pixels: torch.Tensor
    """(B,) uint8, never overwritten while the batch exists."""
    frames: torch.Tensor
    """(N,) int64, number of frames of each item in `pixels`: 1 for an image."""
    grid_thw: torch.Tensor
    """(N, 3) int64, numbers of tokens along time, height and width."""
    token_ids: torch.Tensor
    """(N, S) int64, token ids of the captions, padded."""
    text_lengths: torch.Tensor
    """(N,) int64, number of tokens of each caption without padding."""
    caption_ids: torch.Tensor
    """(N,) int64, equal for equal captions."""
    captions: list[str]
    """The caption of each item; empty if the item has none."""
    labels: list[str | None]
    sets: list[str | None]
    """The data set of each label; None if the sample does not name a data set."""
    keys: list[str]
    """"{shard}/{key}" of every item, equal in all runs over the same sources."""
    modality: Modality
    lane: int
    index: int
    """Index of the pack in its lane."""
    cursor: LaneCursor | None = None
    """The lane's position after this pack; None for packs of an evaluation."""
    bad: dict[str, int] = field(default_factory=dict)
    """Unreadable samples since the lane's previous pack, by kind (`bad_samples.KINDS`)."""
    downscaled: int = 0
    """Number of items that the stage's limits resized to fewer tokens than their original size has."""
    ignored: dict[str, int] = field(default_factory=dict)
    """Readable samples with ignored content, by kind (`captions.IGNORED`)."""
    filtered: dict[str, int] = field(default_factory=dict)
    """Samples that conditions of sources left out since the lane's previous pack, by rule."""
    other_captions: list[tuple[str, ...]] = field(default_factory=list)
    """Further correct captions of each item, in an evaluation of a source with one caption per line; may be empty."""

    @property
    def tokens(self) -> int:
        """Number of tokens of all items."""
        return int(self.grid_thw.prod(dim=1).sum())

    def __len__(self) -> int:
        return len(self.keys)

    def images(self) -> Iterator[torch.Tensor]:
        """Yields a view of each item's pixels: (frames, h*14, w*14, 3) uint8."""
        start = 0
        for frames, grid in zip(self.frames.tolist(), self.grid_thw.tolist(), strict=True):
            size = item_bytes(grid, frames)
            yield self.pixels[start : start + size].view(frames, grid[1] * PATCH, grid[2] * PATCH, 3)
            start += size


def rows(values: Sequence[Sequence[int]] | Sequence[int], width: int | None = None) -> torch.Tensor:
    """Returns `values` as an int64 tensor of shape (N,), or (N, width) if `width` is given; N may be 0."""
    array = np.array(values, dtype=np.int64)
    return torch.from_numpy(array.reshape(len(values)) if width is None else array.reshape(len(values), width))
