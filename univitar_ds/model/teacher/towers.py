"""Forward passes of frozen vision models: image models by frame, an encoder of this project by pack.

Shapes: B frames of a batch, Dt width of the teacher. Features of an item are in raster order (t, h, w).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from univitar_ds.errors import CheckpointError
from univitar_ds.geometry import PATCH, token_count
from univitar_ds.model.encoder import UniViTAR
from univitar_ds.model.packed import can_pack
from univitar_ds.model.teacher.packing import Packing, cells_of, run_packed

Grid = Sequence[int]
Features = tuple[Tensor, Tensor]
"""Features of one item: patches (t * h * w, Dt) and pooled (Dt,)."""
ImageModel = Callable[[nn.Module, Tensor], Features]
"""Runs a transformers model on normalised frames (B, 3, rows, columns); returns (B, h * w, Dt) and (B, Dt)."""


class Tower(Protocol):
    """Interface of a teacher's model."""

    model: nn.Module

    def supports(self, grid: Grid) -> bool:
        """Returns whether the model supports an item with this grid."""

    def num_forwards(self, grids: Sequence[Grid]) -> int:
        """Returns the number of forward passes for items with these grids."""

    def idle(self) -> None:
        """Runs the model once and discards the result, since other ranks need this rank's share of the weights."""

    def __call__(self, videos: Sequence[Tensor], grids: Sequence[Grid]) -> list[Features]:
        """Returns the features of supported items, each (frames, h * 14, w * 14, 3) uint8 on the model's device."""


class FrameTower:
    """An image model that runs on each frame of a video. Features of a token are the mean over the token's frames.

    With `packing` all frames of a pack run in one pass if `packed.can_pack` returns True. Otherwise items with equal
    height and width run as one batch.

    A model with patches of 14 pixels gets the student's pixels. For patches of p pixels, frames are resized (bilinear,
    antialiased) to h * p x w * p, so that the grids are equal. transformers interpolates the position table to the size
    of the frames.
    """

    def __init__(
        self,
        model: nn.Module,
        run: ImageModel,
        patch: int,
        mean: Sequence[float],
        std: Sequence[float],
        packing: Packing | None = None,
    ) -> None:
        self.model, self.run, self.patch = model, run, patch
        parameter = next(model.parameters())
        self.device = parameter.device
        self.packing = packing if packing and can_pack(model.config, self.device, parameter.dtype) else None
        self.mean, self.std = (torch.tensor(v, device=self.device).view(3, 1, 1) for v in (mean, std))

    def supports(self, grid: Grid) -> bool:
        return True

    def num_forwards(self, grids: Sequence[Grid]) -> int:
        sizes = len({(h, w) for _, h, w in grids})
        return sizes if self.packing is None else min(sizes, 1)

    def idle(self) -> None:
        self([torch.zeros(1, PATCH, PATCH, 3, dtype=torch.uint8, device=self.device)], [(1, 1, 1)])

    def __call__(self, videos: Sequence[Tensor], grids: Sequence[Grid]) -> list[Features]:
        by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, (_, h, w) in enumerate(grids):
            by_size[h, w].append(index)
        features: dict[int, Features] = {}
        batches = (self._frames([videos[i] for i in members], *size) for size, members in by_size.items())
        for ((h, w), members), (patches, pooled) in zip(by_size.items(), self._run(batches), strict=True):
            if patches.shape[1] != h * w:
                raise CheckpointError(
                    f"the teacher made {patches.shape[1]} features of {h} x {w} patches; it is another kind of model "
                    "than its config.json says, fetch it again"
                )
            counts = [len(videos[index]) for index in members]
            parts = zip(members, patches.split(counts), pooled.split(counts), strict=True)
            features |= {index: _over_time(grids[index][0], *both) for index, *both in parts}
        return [features[index] for index in range(len(grids))]

    def _run(self, batches: Iterable[Tensor]) -> Iterable[Features]:
        """Returns the features of batches of frames of one size."""
        if self.packing is None:
            return (self.run(self.model, frames) for frames in batches)
        frames = list(batches)
        return run_packed(self.model, self.packing, frames) if frames else []

    def _frames(self, videos: Sequence[Tensor], h: int, w: int) -> Tensor:
        """Returns the normalised frames of all videos: (B, 3, h * patch, w * patch) float32."""
        frames = torch.cat(list(videos)).permute(0, 3, 1, 2).float()
        if self.patch != PATCH:
            frames = F.interpolate(frames, (h * self.patch, w * self.patch), mode="bilinear", antialias=True)
        return (frames / 255 - self.mean) / self.std


def _over_time(steps: int, patches: Tensor, pooled: Tensor) -> Features:
    """Averages the features of an item's frames over the frames of each token, in float32.

    Args: steps: t of the grid; patches: (frames, h * w, Dt); pooled: (frames, Dt).
    Returns: (t * h * w, Dt) and (Dt,) in the model's precision; views for an image, which has one frame.
    """
    if len(patches) == 1:
        return patches[0], pooled[0]
    tubelets = patches.float().unflatten(0, (steps, -1)).mean(1)
    return tubelets.flatten(0, 1).to(patches.dtype), pooled.float().mean(0).to(pooled.dtype)


class PackTower:
    """An encoder of this project that runs on whole packs. Pooled features are means, as exports have no pooling.

    Items whose height or width in patches is not divisible by the encoder's `spatial_merge_size` are not supported.
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
    """Reorders rows (t * h * w, D) of one item from raster order to the order of `kernels.reference.patchify`."""
    t, h, w = grid
    cells = rows.view(t, h // merge, merge, w // merge, merge, rows.shape[-1])
    return cells.transpose(2, 3).reshape(rows.shape)


def to_raster(rows: Tensor, grid: Grid, merge: int) -> Tensor:
    """Reorders rows to raster order, as the inverse of `from_raster`."""
    t, h, w = grid
    cells = rows.view(t, h // merge, w // merge, merge, merge, rows.shape[-1])
    return cells.transpose(2, 3).reshape(rows.shape)


def run_with_prefix(model: nn.Module, frames: Tensor) -> Features:
    """Runs DINOv2 or DINOv3: a class token, which is the pooled feature, and registers precede the patches."""
    out = model(pixel_values=frames)
    first = 1 + getattr(model.config, "num_register_tokens", 0)
    return out.last_hidden_state[:, first:], out.pooler_output


def run_siglip(model: nn.Module, frames: Tensor) -> Features:
    """Runs SigLIP, which has no class token. Pools with the attention head, or by the mean without one."""
    return _pooled(model(pixel_values=frames, interpolate_pos_encoding=True))


def run_siglip2(model: nn.Module, frames: Tensor) -> Features:
    """Runs SigLIP 2 for any size (NaFlex) on patches."""
    cells, shapes = cells_of(model, frames)
    return _pooled(model(pixel_values=cells, pixel_attention_mask=None, spatial_shapes=shapes))


def _pooled(out: object) -> Features:
    states = out.last_hidden_state
    pooled = states.float().mean(1).to(states.dtype) if out.pooler_output is None else out.pooler_output
    return states, pooled
