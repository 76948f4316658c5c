"""Forward passes of frozen vision models: image models frame by frame, an encoder of this project as it was trained.

Shape legend: B frames of one batch, Dt width of the teacher. Features of an item are in raster order (t, h, w).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from univitar_ds.errors import CheckpointError
from univitar_ds.geometry import PATCH, token_count
from univitar_ds.model.encoder import UniViTAR

Grid = Sequence[int]
Features = tuple[Tensor, Tensor]
"""Of one item: patches (t * h * w, Dt) and pooled (Dt,)."""
ImageModel = Callable[[nn.Module, Tensor], Features]
"""A transformers model and B normalised frames (B, 3, rows, columns) to (B, h * w, Dt) and (B, Dt)."""


class Tower(Protocol):
    """The interface of a teacher's model."""

    model: nn.Module

    def supports(self, grid: Grid) -> bool:
        """Whether the model supports an item of this grid."""

    def num_forwards(self, grids: Sequence[Grid]) -> int:
        """The number of forward passes for these items."""

    def idle(self) -> None:
        """Runs the model once and discards the result, while other ranks need this rank's share of the weights."""

    def __call__(self, videos: Sequence[Tensor], grids: Sequence[Grid]) -> list[Features]:
        """Features of supported items, each (frames, h * 14, w * 14, 3) uint8 on the model's device."""


class FrameTower:
    """An image model. It runs on each frame of a video; each token's features are the mean over its frames.

    With patches of 14 pixels it sees the student's pixels, with patches of p the frames resized (bilinear, antialiased)
    to h * p x w * p, so that its grid is the student's. Its position table is interpolated, by transformers, to the
    size of the frames. Items of equal height and width run as one batch.
    """

    def __init__(
        self, model: nn.Module, run: ImageModel, patch: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.model, self.run, self.patch = model, run, patch
        self.device = next(model.parameters()).device
        self.mean, self.std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (mean, std))

    def supports(self, grid: Grid) -> bool:
        return True

    def num_forwards(self, grids: Sequence[Grid]) -> int:
        return len({(h, w) for _, h, w in grids})

    def idle(self) -> None:
        self([torch.zeros(1, PATCH, PATCH, 3, dtype=torch.uint8, device=self.device)], [(1, 1, 1)])

    def __call__(self, videos: Sequence[Tensor], grids: Sequence[Grid]) -> list[Features]:
        alike: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, (_, h, w) in enumerate(grids):
            alike[h, w].append(index)
        found: dict[int, Features] = {}
        for (h, w), members in alike.items():
            patches, pooled = self.run(self.model, self._frames([videos[index] for index in members], h, w))
            if patches.shape[1] != h * w:
                raise CheckpointError(
                    f"the teacher made {patches.shape[1]} features of {h} x {w} patches; it is another kind of model "
                    "than its config.json says, fetch it again"
                )
            counts = [len(videos[index]) for index in members]
            parts = zip(members, patches.split(counts), pooled.split(counts), strict=True)
            found |= {index: _over_time(grids[index][0], *both) for index, *both in parts}
        return [found[index] for index in range(len(grids))]

    def _frames(self, videos: Sequence[Tensor], h: int, w: int) -> Tensor:
        """(B, 3, h * patch, w * patch) float32, normalised."""
        frames = torch.cat(list(videos)).permute(0, 3, 1, 2).float()
        if self.patch != PATCH:
            frames = F.interpolate(frames, (h * self.patch, w * self.patch), mode="bilinear", antialias=True)
        return (frames / 255 - self.mean) / self.std


def _over_time(steps: int, patches: Tensor, pooled: Tensor) -> Features:
    """Means of what the frames of an item showed, in the model's precision: (frames, h * w, Dt), (frames, Dt).

    A still image has one frame, so views are returned.
    """
    if len(patches) == 1:
        return patches[0], pooled[0]
    tubelets = patches.float().unflatten(0, (steps, -1)).mean(1)
    return tubelets.flatten(0, 1).to(patches.dtype), pooled.float().mean(0).to(pooled.dtype)


class PackTower:
    """An encoder of this project, run on whole packs. It pools by the mean, since it is exported without a pool.

    Items whose height or width is not divisible by its `spatial_merge_size` are not supported.
    """

    def __init__(self, model: UniViTAR) -> None:
        self.model = model
        self.merge = model.config.spatial_merge_size
        self.device = next(model.parameters()).device

    def supports(self, grid: Grid) -> bool:
        return not (grid[1] % self.merge or grid[2] % self.merge)

    def num_forwards(self, grids: Sequence[Grid]) -> int:
        return 1 if grids else 0

    def idle(self) -> None:
        side = self.merge * PATCH
        self([torch.zeros(1, side, side, 3, dtype=torch.uint8, device=self.device)], [(1, self.merge, self.merge)])

    def __call__(self, videos: Sequence[Tensor], grids: Sequence[Grid]) -> list[Features]:
        if not videos:
            return []
        pixels = torch.cat([video.flatten() for video in videos])
        tokens = self.model(pixels, grids, frames=[len(video) for video in videos])
        parts = tokens.split([token_count(grid) for grid in grids])
        rasters = [to_raster(part, grid, self.merge) for part, grid in zip(parts, grids, strict=True)]
        pooled = torch.stack([raster.float().mean(0) for raster in rasters]).to(tokens.dtype)
        return list(zip(rasters, pooled.unbind(), strict=True))


def from_raster(rows: Tensor, grid: Grid, merge: int) -> Tensor:
    """Rows of one item from order (t, h, w) to that of `kernels.reference.patchify`: (t * h * w, D), the same shape."""
    t, h, w = grid
    cells = rows.view(t, h // merge, merge, w // merge, merge, rows.shape[-1])
    return cells.transpose(2, 3).reshape(rows.shape)


def to_raster(rows: Tensor, grid: Grid, merge: int) -> Tensor:
    """The inverse of `from_raster`."""
    t, h, w = grid
    cells = rows.view(t, h // merge, w // merge, merge, merge, rows.shape[-1])
    return cells.transpose(2, 3).reshape(rows.shape)


def run_with_prefix(model: nn.Module, frames: Tensor) -> Features:
    """DINOv2 and DINOv3: a class token, which is the pooled feature, and registers precede the patches."""
    out = model(pixel_values=frames)
    first = 1 + getattr(model.config, "num_register_tokens", 0)
    return out.last_hidden_state[:, first:], out.pooler_output


def run_siglip(model: nn.Module, frames: Tensor) -> Features:
    """SigLIP: no class token; pooled by its attention head, or by the mean if it has none."""
    return _pooled(model(pixel_values=frames, interpolate_pos_encoding=True))


def run_siglip2(model: nn.Module, frames: Tensor) -> Features:
    """SigLIP 2 for any size (NaFlex): takes patches, each ordered (row, column, channel)."""
    patch = model.config.patch_size
    h, w = frames.shape[2] // patch, frames.shape[3] // patch
    cells = frames.view(len(frames), 3, h, patch, w, patch).permute(0, 2, 4, 3, 5, 1)
    shapes = torch.tensor([[h, w]] * len(frames))  # on the host: transformers reads them one by one
    return _pooled(model(pixel_values=cells.flatten(3).flatten(1, 2), pixel_attention_mask=None, spatial_shapes=shapes))


def _pooled(out: object) -> Features:
    states = out.last_hidden_state
    pooled = states.float().mean(1).to(states.dtype) if out.pooler_output is None else out.pooler_output
    return states, pooled
