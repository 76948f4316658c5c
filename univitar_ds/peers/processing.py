"""Preprocessing of peers, the models of transformers that are measured for comparison: image processors and tokenizers.

Image processors run on Pillow (transformers' backend "pil"), so that features do not depend on whether torchvision is
installed. DINOv3's exists only for torchvision: `Dinov3Images` computes the same in torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from univitar_ds.config.encoder import read_object
from univitar_ds.errors import CheckpointError, first_line, shortened
from univitar_ds.model.libraries import working_imports
from univitar_ds.model.towers import quiet
from univitar_ds.peers.families import FAMILIES, IMAGES_FILE, PROCESSOR_FILE
from univitar_ds.regular_files import is_regular

Images = Callable[[Image.Image, int | None], Mapping[str, Tensor]]
"""A function from an RGB image to the model's inputs by name, each (1, ...). The second argument is None, or the number
of patches of an image that keeps its size."""
Texts = Callable[[Sequence[str]], Mapping[str, Tensor]]
"""A function from n texts to the model's inputs by name, each (n, length)."""
_INPUTS = ("input_ids", "attention_mask")


def image_processor(folder: Path, kind: str) -> Images:
    """Returns the image processor of a model's folder. Args: kind: `model_type` in its config.json.

    Raises: CheckpointError if there is none, or it cannot be used.
    """
    path, values = image_settings(folder)
    if kind == "dinov3_vit":
        return Dinov3Images(values, str(path))
    with working_imports("transformers"):
        from transformers import AutoImageProcessor
    try:
        with quiet():
            processor = AutoImageProcessor.from_pretrained(
                folder, backend="pil", local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # for invalid values, transformers raises errors of any type
        raise CheckpointError(f"{path} cannot be used: {first_line(error)}; fetch it again") from error

    def images(image: Image.Image, patches: int | None) -> Mapping[str, Tensor]:
        kept: dict[str, Any] = {} if patches is None else {"do_resize": False}
        if patches is not None and getattr(processor, "do_center_crop", None):
            kept["do_center_crop"] = False
        if patches is not None and hasattr(processor, "max_num_patches"):
            kept["max_num_patches"] = patches
        return processor(images=image, return_tensors="pt", **kept)

    return images


def image_settings(folder: Path) -> tuple[Path, Mapping[str, Any]]:
    """Returns the file with the settings of the image processor, and the settings. Looks for files in the order in
    which transformers does.

    Raises: CheckpointError if there is no such file, or it cannot be read.
    """
    path = folder / PROCESSOR_FILE
    if is_regular(path) and isinstance(nested := read_object(path).get("image_processor"), dict):
        return path, nested
    path = folder / IMAGES_FILE
    if not is_regular(path):
        raise CheckpointError(
            f"{folder} has no {IMAGES_FILE} with the preprocessing of images, and no {PROCESSOR_FILE} with an "
            "image_processor; copy one of them from the model's page"
        )
    return path, read_object(path)


class Dinov3Images:
    """DINOv3's image processor: scales values to 0..1, resizes (bilinear, antialiased), and then normalises.

    Its result has one entry, `pixel_values`: (1, 3, height, width) float32.
    """

    _REQUIRED = ("do_resize", "do_rescale", "do_normalize")

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        """Args: values: content of preprocessor_config.json; where: its path, for messages.

        Raises: CheckpointError for settings that this class does not support."""
        size = values.get("size", {"height": 224, "width": 224})
        try:
            self._size = int(size["height"]), int(size["width"])
            self._mean, self._std = (
                torch.tensor(values.get(name, default), dtype=torch.float32).view(3, 1, 1)
                for name, default in (("image_mean", (0.485, 0.456, 0.406)), ("image_std", (0.229, 0.224, 0.225)))
            )
            self._factor = float(values.get("rescale_factor", 1 / 255))
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise CheckpointError(f"{where} has no usable size, mean or std ({error}); fetch it again") from error
        other = [name for name in self._REQUIRED if values.get(name, True) is not True]
        other += ["do_center_crop"] * bool(values.get("do_center_crop"))
        other += ["resample"] * (values.get("resample", 2) != Image.Resampling.BILINEAR)
        if other or not all(0 < side <= 4096 for side in self._size):
            size = f"a size of {shortened(' x '.join(map(str, self._size)))} px; sides of 1 to 4096 are supported"
            fault = f"another {' and '.join(other)} than DINOv3's releases, which is not supported" if other else size
            raise CheckpointError(f"{where} has {fault}; use the release's file")

    def __call__(self, image: Image.Image, patches: int | None = None) -> Mapping[str, Tensor]:
        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
        values = (pixels.permute(2, 0, 1).float() * self._factor)[None]
        if patches is None:
            values = F.interpolate(values, self._size, mode="bilinear", align_corners=False, antialias=True)
        return {"pixel_values": (values - self._mean) / self._std}


def text_processor(folder: Path, config: Any, *, full_length: bool) -> Texts:
    """Returns the tokenizer of a model's folder. Args: config: of the text tower; full_length: see `Family`.

    Raises: CheckpointError if there is none, or it cannot be used.
    """
    with working_imports("transformers"):
        from transformers import AutoTokenizer
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        length = min(config.max_position_embeddings, tokenizer.model_max_length)
    except Exception as error:  # as for the image processor
        raise CheckpointError(
            f"the tokenizer in {folder} cannot be used: {first_line(error)}; put the tokenizer.json of the model there"
        ) from error

    def texts(sentences: Sequence[str]) -> Mapping[str, Tensor]:
        padding = "max_length" if full_length else True
        out = tokenizer(list(sentences), padding=padding, truncation=True, max_length=length, return_tensors="pt")
        if int(out["input_ids"].max()) >= config.vocab_size:
            raise CheckpointError(
                f"the tokenizer in {folder} has more tokens than the model ({config.vocab_size}), so it is of another "
                "model; put the tokenizer.json of this model there"
            )
        return {name: out[name] for name in _INPUTS if name in out}

    return texts


def vision_config(folder: Path, kind: str) -> Any:
    """Returns the configuration of a model's vision tower, with the defaults of transformers.

    Args: kind: a key of `FAMILIES`. Raises: CheckpointError if it cannot be used."""
    with working_imports("transformers"):
        from transformers import AutoConfig
    try:
        with quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config = config.vision_config if FAMILIES[kind].texts else config
        if config.patch_size < 1 or config.patch_size != int(config.patch_size):
            raise ValueError(f"patch_size {config.patch_size}")
        return config
    except Exception as error:  # for invalid values, transformers raises errors of any type
        raise CheckpointError(f"config.json of {folder} cannot be used: {first_line(error)}; fetch it again") from error
