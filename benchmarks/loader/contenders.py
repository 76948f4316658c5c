"""Four loaders of the same images at the same sizes. Each loader yields the number of samples of every batch.

`bench_loader.py` runs each loader in a separate process. All loaders resize to the grid of `Resolution` for the size of
the image, keep uint8, discard their batches, and never end.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from univitar_ds.geometry import PATCH, Resolution

BUFFER_SIZE = 192
"""Number of samples in the shuffle and packing buffers of webdataset and energon."""


@dataclass(frozen=True)
class Task:
    """The shards to read (a folder written by `data pack`, or its s3:// address), and the settings of a loader.

    `endpoint` is the address of the S3 store. `budget` is the number of tokens of a pack."""

    shards: str
    endpoint: str | None
    workers: int
    min_tokens: int
    max_tokens: int
    divisor_px: int
    budget: int
    mean_tokens: int
    lanes: int = 4
    """Number of this rank's lanes, of 4 lanes in all."""
    augment: Mapping[str, Any] = field(default_factory=dict)
    """`stages.N.augment` of ours."""

    @property
    def resolution(self) -> Resolution:
        return Resolution(self.min_tokens, self.max_tokens, self.divisor_px)

    @property
    def tars(self) -> list[str]:
        return sorted(str(path) for path in Path(self.shards).glob("train-image-*.tar"))

    @property
    def batch(self) -> int:
        """Number of samples in a padded batch with about as many tokens as a pack."""
        return max(1, self.budget // self.mean_tokens)


def ours(task: Task) -> Generator[int]:
    """Runs the training loader with all features: shuffle buffer, packing, cursor, checksums, workers, shared slots."""
    from univitar_ds.config.data import DataConfig, S3Config, SourceConfig
    from univitar_ds.config.stage import StageConfig
    from univitar_ds.data.loader import LaneSet, PackLoader

    sources = [SourceConfig(path=task.shards)]
    sizes = {"min_tokens": task.min_tokens, "max_tokens": task.max_tokens, "divisor_px": task.divisor_px}
    loader = PackLoader(
        DataConfig(sources=sources, workers=task.workers, s3=S3Config(endpoint_url=task.endpoint)),
        StageConfig(
            name="native", samples=10**9, image=sizes, token_budget=task.budget, lr=1e-3, augment=dict(task.augment)
        ),
        LaneSet(range(task.lanes), 4, 0),
        modality_of=lambda step: "image",
        tokenizer=None,
        context_length=64,
        cost=(1e9, 1e5),
    )
    with loader:
        for step in loader:
            while step:
                yield len(step.pop())


def bare(task: Task) -> Generator[int]:
    """Reads, decodes and resizes image after image in one process. The addresses are read beforehand."""
    from univitar_ds.data.media.image_decode import decode_near
    from univitar_ds.data.media.jpeg_header import is_jpeg, read_header
    from univitar_ds.data.media.probe import probe
    from univitar_ds.data.media.resize import fit_image
    from univitar_ds.data.shards import tar_index

    addresses = []
    for path in task.tars:
        with open(path, "rb") as stream:
            for group in tar_index.groups(stream, path, Path(path).stat().st_size):
                media = next(member for member in group.members if member.extension != "json")
                addresses.append((path, media.offset, media.length, media.extension))
    files = {path: open(path, "rb", buffering=0) for path in task.tars}  # noqa: SIM115
    while True:
        for path, offset, length, extension in addresses:
            files[path].seek(offset)
            data = files[path].read(length)
            size = read_header(data).display_size if is_jpeg(data) else probe(data, extension)
            height, width = size if isinstance(size, tuple) else (size.height, size.width)
            grid = task.resolution.grid(height, width)
            target = (grid[1] * PATCH, grid[2] * PATCH)
            pixels, extent = decode_near(data, max_px=10**8, target=target)
            fit_image(pixels, grid, extent=extent)
            yield 1


def webdataset(task: Task) -> Generator[int]:
    """Runs webdataset with torch's DataLoader and Pillow, with batches padded to their largest image."""
    import webdataset as wds
    from torch.utils.data import DataLoader

    dataset = (
        wds.WebDataset(task.tars, shardshuffle=100, resampled=False, empty_check=False)
        .repeat()
        .shuffle(BUFFER_SIZE)
        .map(_Decode(task.resolution))
        .batched(task.batch, collation_fn=_padded)
    )
    # 2 batches per worker are prefetched.
    loader = DataLoader(dataset, batch_size=None, num_workers=task.workers, prefetch_factor=2)
    for batch in loader:
        yield len(batch["captions"])


def energon(task: Task) -> Generator[int]:
    """Runs megatron-energon with sequence packing: sizes from headers, best fit over a buffer, Pillow."""
    from megatron.energon import WorkerConfig, get_loader, get_train_dataset
    from torch.multiprocessing import set_sharing_strategy

    from benchmarks.loader.energon_task import PackingTask, prepare

    set_sharing_strategy("file_system")
    dataset = get_train_dataset(
        prepare(task),
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=task.workers),
        batch_size=1,
        packing_buffer_size=BUFFER_SIZE,
        shuffle_buffer_size=BUFFER_SIZE,
        max_samples_per_sequence=100,
        task_encoder=PackingTask(task.resolution, task.budget),
    )
    for pack in get_loader(dataset):
        yield len(pack.captions)


CONTENDERS: Mapping[str, Callable[[Task], Generator[int]]] = {
    "ours": ours,
    "bare": bare,
    "webdataset": webdataset,
    "energon": energon,
}


def pillow(data: bytes, resolution: Resolution) -> np.ndarray:
    """Decodes and resizes an image with Pillow, like most loaders. Returns (h * 14, w * 14, 3) uint8."""
    from PIL import Image

    with Image.open(io.BytesIO(data)) as opened:
        image = opened.convert("RGB")
    _, h, w = resolution.grid(image.height, image.width)
    return np.asarray(image.resize((w * PATCH, h * PATCH), Image.Resampling.BICUBIC))


class _Decode:
    """Converts a raw sample of webdataset to pixels and a caption."""

    def __init__(self, resolution: Resolution) -> None:
        self._resolution = resolution

    def __call__(self, sample: Mapping[str, Any]) -> dict[str, Any]:
        media = next(name for name in sample if not name.startswith("__") and name != "json")
        captions = json.loads(sample["json"])["captions"]
        return {"pixels": pillow(sample[media], self._resolution), "caption": random.choice(captions)}


def _padded(samples: list[Mapping[str, Any]]) -> dict[str, Any]:
    import torch

    height, width = (max(sample["pixels"].shape[axis] for sample in samples) for axis in (0, 1))
    pixels = torch.zeros(len(samples), height, width, 3, dtype=torch.uint8)
    for row, sample in zip(pixels, samples, strict=True):
        h, w, _ = sample["pixels"].shape
        row[:h, :w] = torch.from_numpy(sample["pixels"].copy())
    return {"pixels": pixels, "captions": [sample["caption"] for sample in samples]}
