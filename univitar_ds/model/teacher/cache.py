"""Caches the features of a teacher on disk, one file per item."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from univitar_ds.atomic_write import replacing
from univitar_ds.errors import StorageError
from univitar_ds.formats.weight_files import save_tensors
from univitar_ds.geometry import token_count

logger = logging.getLogger(__name__)


class FeatureCache:
    """A cache of features: a file's name is a hash of the pixels, its folder's name is a hash of the teacher.

    So ranks, runs and stages may share one folder, and a changed pixel or weight is a cache miss. Features that cannot
    be read are computed again. A disk that cannot be written is reported once and not written again.
    """

    def __init__(self, folder: Path, model: nn.Module, *settings: object) -> None:
        """Args: settings: all values except the weights of `model` that determine the features."""
        self.folder = folder / _fingerprint(model, settings)
        self.writes = True

    def read(self, video: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """Returns patches (t * h * w, Dt) and pooled (Dt,) of an item, on the host; None if they are not cached.

        Args: video: (frames, rows, columns, 3) uint8 on the host; grid: (t, h, w).
        """
        try:
            tensors = load_file(self._path(video, grid))
            patches, pooled = tensors["patches"], tensors["pooled"]
        except (OSError, SafetensorError, KeyError):
            return None
        return (patches, pooled) if patches.shape == (token_count(grid), len(pooled)) else None

    def write(self, video: Tensor, grid: Sequence[int], patches: Tensor, pooled: Tensor) -> None:
        """Stores the features of an item. A warning is logged if they cannot be written."""
        if not self.writes:
            return
        path = self._path(video, grid)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, shared=True) as partial:
                save_tensors({"patches": patches.cpu().contiguous(), "pooled": pooled.cpu().contiguous()}, partial)
        except (OSError, StorageError, SafetensorError) as error:
            self.writes = False
            logger.warning(
                "objective.teacher.cache %s cannot be written any more, continuing without it: %s", path, error
            )

    def _path(self, video: Tensor, grid: Sequence[int]) -> Path:
        digest = hashlib.blake2b(repr((tuple(video.shape), tuple(grid))).encode(), digest_size=16)
        digest.update(video.contiguous().numpy())
        name = digest.hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"


def _fingerprint(model: nn.Module, settings: Sequence[object]) -> str:
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=8)
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
