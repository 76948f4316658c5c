"""The task encoder of megatron-energon for `contenders.energon`. Importing this module needs megatron-energon."""

from __future__ import annotations

import io
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.energon import Cooker, DefaultTaskEncoder, Sample, basic_sample_keys, stateless
from megatron.energon.flavors.webdataset import BaseWebdatasetFactory
from PIL import Image

from benchmarks.loader.contenders import Task, pillow
from univitar_ds.geometry import Resolution, token_count

_DATASET = "__module__: megatron.energon\n__class__: CrudeWebdataset\nsubflavors: {}\n"


@dataclass
class CaptionedImage(Sample):
    """An encoded image, with the number of tokens after resizing."""

    data: bytes
    caption: str
    tokens: int


@dataclass
class Pack(Sample):
    """The pixels of several images one after another, without padding."""

    pixels: torch.Tensor
    captions: list[str]


def prepare(task: Task) -> Path:
    """Writes energon's index of the shards unless it exists. Returns the folder of the shards."""
    folder = Path(task.shards)
    if not (folder / ".nv-meta" / "dataset.yaml").exists():
        names = [Path(path).name for path in task.tars]
        BaseWebdatasetFactory.prepare_dataset(folder, names, split_parts_ratio=[("train", 1.0)], workers=2)
        (folder / ".nv-meta" / "dataset.yaml").write_text(_DATASET, encoding="utf-8")
    return folder


@stateless
def _cook(raw: dict[str, Any]) -> CaptionedImage:
    media = next(name for name in raw if not name.startswith("__") and name != "json")
    caption = random.choice(json.loads(raw["json"])["captions"])
    return CaptionedImage(**basic_sample_keys(raw), data=raw[media], caption=caption, tokens=0)


class PackingTask(DefaultTaskEncoder):
    """Packs images by the sizes in their headers, then decodes the packed images."""

    decoder = None
    cookers = (Cooker(_cook),)

    def __init__(self, resolution: Resolution, budget: int) -> None:
        super().__init__()
        self._resolution, self._budget = resolution, budget

    @stateless
    def preencode_sample(self, sample: CaptionedImage) -> CaptionedImage:
        with Image.open(io.BytesIO(sample.data)) as image:
            sample.tokens = token_count(self._resolution.grid(image.height, image.width))
        return sample

    def select_samples_to_pack(self, samples: list[CaptionedImage]) -> list[list[CaptionedImage]]:
        """Packs samples by best fit, the largest first."""
        packs: list[list[CaptionedImage]] = []
        room: list[int] = []
        for sample in sorted(samples, key=lambda one: -one.tokens):
            fitting = [index for index, left in enumerate(room) if left >= sample.tokens]
            if fitting:
                best = min(fitting, key=room.__getitem__)
                packs[best].append(sample)
                room[best] -= sample.tokens
            else:
                packs.append([sample])
                room.append(self._budget - sample.tokens)
        return packs

    @stateless
    def pack_selected_samples(self, samples: list[CaptionedImage]) -> Pack:
        pixels = [pillow(sample.data, self._resolution).reshape(-1) for sample in samples]
        return Pack.derive_from(
            samples[0],
            pixels=torch.from_numpy(np.concatenate(pixels)),
            captions=[sample.caption for sample in samples],
        )

    def batch(self, samples: list[Pack]) -> Pack:
        return samples[0]
