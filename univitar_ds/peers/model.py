"""A peer on its device: features of images and texts, computed by the forward pass of transformers.

`families.FAMILIES` determines the class, so no code of the folder runs, and only tensors are read from files of weights
(safetensors, or a pickle with `weights_only`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from univitar_ds.errors import CheckpointError, UserError, first_line
from univitar_ds.formats.weight_files import some
from univitar_ds.image_ops import resize_rgb
from univitar_ds.model.libraries import working_imports
from univitar_ds.model.towers import quiet
from univitar_ds.peers.families import FAMILIES
from univitar_ds.peers.limits import check_files
from univitar_ds.peers.processing import Texts, image_processor, text_processor

TEXTS_AT_ONCE = 256
"""Number of texts that are embedded at a time."""


class PeerModel:
    """A model of transformers with its image processor and, if it has a text tower, its tokenizer."""

    def __init__(self, folder: Path, kind: str, dtype: torch.dtype | None, device: torch.device) -> None:
        """Opens the model in evaluation mode. Args: kind: a key of `FAMILIES`; dtype: None: as stored.

        Raises: CheckpointError if weights or image processor cannot be used; InstallationError without transformers.
        """
        self.folder, self.family, self.device = folder, FAMILIES[kind], device
        check_files(folder)
        self._images = image_processor(folder, kind)
        self.module = _loaded(folder, self.family.loader, dtype).eval().requires_grad_(False).to(device)

    @property
    def width(self) -> int:
        """Width of the features: that of the joint space if there is a text tower."""
        config = self.module.config
        if not self.family.texts:
            return config.hidden_size
        joint = getattr(config, "projection_dim", None)
        return config.vision_config.hidden_size if joint is None else joint

    @cached_property
    def _texts(self) -> Texts:
        return text_processor(self.folder, self.module.config.text_config, full_length=self.family.full_length)

    @property
    def token_width(self) -> int:
        """Width of the features of a patch."""
        return self._vision.hidden_size

    @property
    def _vision(self) -> Any:
        """The configuration of the vision tower."""
        return getattr(self.module.config, "vision_config", self.module.config)

    def images(self, images: Sequence[np.ndarray], tokens_at_once: int, threads: int = 1) -> Tensor:
        """Returns features (N, D) float32 on the host: `get_image_features`, or the pooled output without a text tower.

        Args: images: (H, W, 3) uint8 each; tokens_at_once: maximum number of tokens of a batch, unless one image has
            more; threads: number of threads that prepare images.
        Raises: CheckpointError if the image processor does not fit the model; UserError if the GPU has too little
            memory.
        """
        return torch.cat(self.encoded(images, tokens_at_once, threads)[0])

    @torch.no_grad()
    def encoded(
        self,
        images: Sequence[np.ndarray],
        tokens_at_once: int,
        threads: int = 1,
        *,
        sizes: Sequence[tuple[int, int]] | None = None,
        patches: bool = False,
    ) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """Returns the features of each image, (1, D) as `images`, and the rows and columns of its patches.

        Args: sizes: rows and columns of patches to which images are resized (bicubic), instead of by the image
            processor; patches: returns the last hidden state of the patches of each image, (rows * columns, width) row
            by row, without class and register tokens.
        Raises: as `images`.
        """
        with self._running(tokens_at_once), ThreadPoolExecutor(threads) as pool:
            ready = list(pool.map(self._prepared, images, [None] * len(images) if sizes is None else sizes))
            grids = [self._grid(one) for one in ready]
            by_shape: dict[tuple[torch.Size, ...], list[int]] = defaultdict(list)
            for index, one in enumerate(ready):
                by_shape[tuple(values.shape for values in one.values())].append(index)
            rows: dict[int, Tensor] = {}
            for members in by_shape.values():
                count = max(1, tokens_at_once // self._tokens(ready[members[0]]["pixel_values"]))
                for start in range(0, len(members), count):
                    part = members[start : start + count]
                    inputs = _batch([ready[index] for index in part])
                    if patches:
                        rows |= zip(part, self._patches(inputs, [grids[index] for index in part]), strict=True)
                    else:
                        rows |= zip(part, self._features(inputs).split(1), strict=True)
            return [rows[index] for index in range(len(ready))], grids

    def _prepared(self, image: np.ndarray, size: tuple[int, int] | None) -> Mapping[str, Tensor]:
        """Returns the inputs of an image. Args: size: rows and columns of patches; None: by the image processor."""
        if size is None:
            return self._images(Image.fromarray(image), None)
        height, width = (side * self._vision.patch_size for side in size)
        if image.shape[:2] != (height, width):
            image = resize_rgb(Image.fromarray(image), height, width)
        return self._images(Image.fromarray(image), size[0] * size[1])

    def _grid(self, inputs: Mapping[str, Tensor]) -> tuple[int, int]:
        """Returns the rows and columns of patches of an image."""
        if "spatial_shapes" in inputs:
            rows, columns = inputs["spatial_shapes"][0].tolist()
            return rows, columns
        height, width = inputs["pixel_values"].shape[-2:]
        return height // self._vision.patch_size, width // self._vision.patch_size

    def _patches(self, inputs: Mapping[str, Tensor], grids: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Returns the last hidden state of the patches of each image. Args: grids: rows and columns of each."""
        tower = self.module.vision_model if self.family.texts else self.module
        hidden = tower(**self._placed(inputs), return_dict=True).last_hidden_state
        before = (1 + getattr(self._vision, "num_register_tokens", 0)) if self.family.class_token else 0
        return [
            one[before : before + rows * columns].float().cpu()
            for one, (rows, columns) in zip(hidden, grids, strict=True)
        ]

    @torch.no_grad()
    def texts(self, sentences: Sequence[str]) -> Tensor:
        """Returns `get_text_features` of sentences, (N, E) float32 on the host. Raises: as `images`."""
        rows = [torch.empty(0, self.width)]
        for start in range(0, len(sentences), TEXTS_AT_ONCE):
            with self._running(TEXTS_AT_ONCE):
                inputs = self._texts(sentences[start : start + TEXTS_AT_ONCE])
                out = self.module.get_text_features(**self._placed(inputs), return_dict=True)
                rows.append(out.pooler_output.float().cpu())
        return torch.cat(rows)

    def _features(self, inputs: Mapping[str, Tensor]) -> Tensor:
        run = self.module.get_image_features if self.family.texts else self.module
        return run(**self._placed(inputs), return_dict=True).pooler_output.float().cpu()

    def _placed(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the inputs on the device, with floating-point values in the model's precision."""
        dtype = self.module.dtype
        return {
            name: value.to(self.device, dtype if value.is_floating_point() else None) for name, value in inputs.items()
        }

    def _tokens(self, pixel_values: Tensor) -> int:
        """Returns the tokens of an image: of patches (1, L, C), or of pixels (1, 3, H, W)."""
        if pixel_values.ndim == 3:
            return pixel_values.shape[1]
        return max(1, pixel_values.shape[2] * pixel_values.shape[3] // self._vision.patch_size**2)

    @contextmanager
    def _running(self, at_once: int) -> Iterator[None]:
        """Raises: UserError or CheckpointError in place of errors of the model's forward pass in the body."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise UserError(f"the GPU has too little memory for {at_once} tokens; lower --token-budget") from error
        except UserError:
            raise
        except Exception as error:  # impossible values make the library raise anything, also MemoryError
            raise CheckpointError(
                f"the model in {self.folder} cannot run on the output of its preprocessor_config.json and tokenizer: "
                f"{first_line(error)}; fetch config.json and these files of the same model"
            ) from error


def _batch(inputs: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([one[name] for one in inputs]) for name in inputs[0]}


def _loaded(folder: Path, loader: str, dtype: torch.dtype | None) -> nn.Module:
    with working_imports("transformers"):
        import transformers

        kind: Any = getattr(transformers, loader)  # transformers imports the class now
    try:
        with quiet():
            model, info = kind.from_pretrained(
                folder,
                local_files_only=True,
                attn_implementation="sdpa",  # a configuration may name a kernel, whose code would run
                dtype="auto" if dtype is None else dtype,  # .to() would also round rotary frequencies
                output_loading_info=True,
            )
    except Exception as error:  # hostile files make the library raise anything
        raise CheckpointError(f"the model in {folder} cannot be loaded: {first_line(error)}; fetch it again") from error
    if info["missing_keys"]:
        raise CheckpointError(
            f"the model in {folder} lacks weights: {some(sorted(info['missing_keys']))}; fetch it again"
        )
    return model
