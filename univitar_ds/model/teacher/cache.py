"""Features of a teacher on disk, a file per item, found by the item's pixels."""

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
from univitar_ds.geometry import token_count
from univitar_ds.model.weights import save_tensors

logger = logging.getLogger(__name__)


class FeatureCache:
    """Features by content: the name of a file is the hash of the pixels, that of its folder the hash of the teacher.

    So ranks, runs and stages may share one folder, and a change in a pixel or a weight leads to a miss instead of wrong
    features. The cache is optional: a file that cannot be read is computed again, and a disk that cannot be written is
    reported once and no longer used.
    """

    def __init__(self, folder: Path, model: nn.Module, *settings: object) -> None:
        """`settings`: everything but the weights that determines the features."""
        self.folder = folder / _fingerprint(model, settings)
        self.writes = True

    def read(self, video: Tensor, grid: Sequence[int]) -> tuple[Tensor, Tensor] | None:
        """Features of the item on the host, patches (t * h * w, Dt) and pooled (Dt,); None if they are not there.

        `video`: (frames, rows, columns, 3) uint8 on the host.
        """
        try:
            found = load_file(self._path(video, grid))
            patches, pooled = found["patches"], found["pooled"]
        except (OSError, SafetensorError, KeyError):
            return None
        return (patches, pooled) if patches.shape == (token_count(grid), len(pooled)) else None

    def write(self, video: Tensor, grid: Sequence[int], patches: Tensor, pooled: Tensor) -> None:
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
