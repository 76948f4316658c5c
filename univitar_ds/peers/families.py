"""The families of models of transformers that can be measured, recognised by config.json without transformers."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from univitar_ds.errors import CheckpointError
from univitar_ds.regular_files import open_regular

IMAGES_FILE = "preprocessor_config.json"
PROCESSOR_FILE = "processor_config.json"
"""File in which the processors of transformers 5 save the content of `IMAGES_FILE`, under `image_processor`."""


@dataclass(frozen=True)
class Family:
    """Models with the same interface. `loader`: class name in transformers; `texts`: whether they have a text tower;
    `full_length`: whether texts are padded to the full length, as in SigLIP's training, and not to the longest text;
    `any_size`: whether images of any whole number of patches are read; `class_token`: whether one is before the
    patches."""

    loader: str
    texts: bool = False
    full_length: bool = False
    any_size: bool = False
    class_token: bool = True


FAMILIES = {
    "clip": Family("CLIPModel", texts=True),
    "clip_vision_model": Family("CLIPVisionModel"),
    "siglip": Family("SiglipModel", texts=True, full_length=True, class_token=False),
    "siglip_vision_model": Family("SiglipVisionModel", class_token=False),
    "siglip2": Family("Siglip2Model", texts=True, full_length=True, any_size=True, class_token=False),
    "siglip2_vision_model": Family("Siglip2VisionModel", any_size=True, class_token=False),
    "dinov2": Family("Dinov2Model", any_size=True),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", any_size=True),
    "dinov3_vit": Family("DINOv3ViTModel", any_size=True),
}
"""Families by `model_type` of transformers. SigLIP 2 models with a fixed size have the type siglip."""
_HASHED = (".json", ".safetensors", ".bin", ".txt", ".model")
_READ = 1 << 22


def digest(folder: Path) -> str:
    """Returns a hash of the model's files: weights, configuration, image processor and tokenizer.

    Raises: CheckpointError if one cannot be read.
    """
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(os.listdir(folder)):
        if not name.endswith(_HASHED):
            continue
        try:
            with open_regular(folder / name) as file:
                state.update(f"{name}\0{os.fstat(file.fileno()).st_size}\0".encode("utf-8", "surrogateescape"))
                while part := file.read(_READ):
                    state.update(part)
        except OSError as error:
            raise CheckpointError(f"{folder / name} cannot be read ({error}); fetch the model again") from error
    return state.hexdigest()
