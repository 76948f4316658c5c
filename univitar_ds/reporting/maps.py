"""Maps of a model's features on images and videos: principal components as colours, and similarity to a caption."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from univitar_ds.errors import shortened
from univitar_ds.inference.model import UniViTARModel
from univitar_ds.reporting.map_items import MapItem, with_tokens
from univitar_ds.viz.sheet import component_colours, spread_frames, to_size

TOKENS = (64, 256, 1024)
"""Approximate tokens of an image at the three resolutions. The run's size rule may limit them."""
SHOWN_FRAMES = 4
"""Number of frames of a video that are drawn."""
_HEIGHT, _WIDTH, _FRAME_WIDTH = 224, 448, 224
"""Maximum height of a map in pixels, and width of a map of an image and of a frame."""
ORIGINAL, COMPONENTS, SIMILARITY = "original", "principal components", "similarity"
"""What the images of a map show."""
_CAPTION_LETTERS = 200
"""Maximum length of a caption below a map."""


@dataclass(frozen=True)
class Map:
    """RGB images that are shown one below the other, by what they show, and the text below them."""

    images: dict[str, Image.Image]
    text: str


@dataclass(frozen=True)
class ItemMaps:
    """The maps of one item with one model."""

    title: str
    maps: list[Map]


def maps_of(folder: Path, name: str, items: Sequence[MapItem]) -> Iterator[ItemMaps]:
    """Yields the maps of each item, with the model in the last checkpoint of a run.

    For an image: the first three principal components of its features at three resolutions, with one basis for the
    colours; and the similarity of its patches to its text. For a video: the same for some frames, at one resolution.

    Args: folder, name: of the run; items: their texts are left out if the model has no text tower.
    Raises: CheckpointError if the run has no complete checkpoint.
    """
    model = UniViTARModel.from_pretrained(folder)
    for one in items:
        draw = _image_maps if isinstance(one.item, Image.Image) else _video_maps
        caption = None if model.joint is None else one.caption
        yield ItemMaps(f"{name}: {one.name}", draw(model, one.item, caption))


def _image_maps(model: UniViTARModel, image: Image.Image, caption: str | None) -> list[Map]:
    features = {}
    for tokens in TOKENS:
        (found,) = model.intermediates([with_tokens(image, tokens)], [-1])[0]  # (1, D, h, w)
        features.setdefault(tuple(found.shape[2:]), found[0])
    colours, _ = component_colours([_rows(one) for one in features.values()])
    shown = [Map({ORIGINAL: _shrunk(image, _WIDTH)}, f"{image.height} x {image.width} px")]
    shown += [
        Map({COMPONENTS: to_size(colour.view(*grid, 3), _HEIGHT, _WIDTH)}, _tokens(grid))
        for grid, colour in zip(features, colours, strict=True)
    ]
    if caption is not None:
        finest = max(features, key=lambda grid: grid[0] * grid[1])
        similar, text = _similarity(model, features[finest], _shrunk(image, _WIDTH), caption)
        shown.append(Map({SIMILARITY: similar}, text))
    return shown


def _video_maps(model: UniViTARModel, frames: Sequence[Image.Image], caption: str | None) -> list[Map]:
    (found,) = model.intermediates([list(frames)], [-1])[0]  # (t, D, h, w)
    colours, _ = component_colours([_rows(one) for one in found])
    per_token = len(frames) // len(found)
    shown = []
    for index in spread_frames(len(found), SHOWN_FRAMES):
        frame, grid = _shrunk(frames[index * per_token], _FRAME_WIDTH), tuple(found.shape[2:])
        images = {ORIGINAL: frame, COMPONENTS: to_size(colours[index].view(*grid, 3), _HEIGHT, _FRAME_WIDTH)}
        texts = [f"frame {index * per_token + 1} of {len(frames)}", _tokens(grid)]
        if caption is not None:
            images[SIMILARITY], text = _similarity(model, found[index], frame, caption)
            texts.append(text)
        shown.append(Map(images, ", ".join(texts)))
    return shown


def _tokens(grid: Sequence[int]) -> str:
    return f"{grid[0]} x {grid[1]} tokens"


def _rows(features: Tensor) -> Tensor:
    """Reshapes features (D, h, w) to (h*w, D), in float32 on the CPU."""
    return features.flatten(1).T.float().cpu()


def _shrunk(image: Image.Image, width: int) -> Image.Image:
    return to_size(np.asarray(image.convert("RGB")), _HEIGHT, width)


@torch.no_grad()
def _similarity(model: UniViTARModel, features: Tensor, shown: Image.Image, caption: str) -> tuple[Image.Image, str]:
    """Draws the cosine similarity of each patch to a caption over the image, with a text about the colours. Each patch
    is pooled and projected as if it were an item.

    Args: features: (D, h, w) of the image; shown: the image at the size of the map.
    """
    module = model.module
    tokens = features.flatten(1).T.contiguous()
    patches = module.vision_proj(module.pool(tokens, [1] * len(tokens)))
    cosines = F.normalize(patches.float(), dim=-1) @ model.encode_text([caption])[0]
    low, high = cosines.min().item(), cosines.max().item()
    shares = ((cosines - low) / max(high - low, 1e-6)).view(features.shape[1:]).cpu().numpy()
    from matplotlib import colormaps

    heat = Image.fromarray((colormaps["viridis"](shares)[..., :3] * 255).astype(np.uint8))
    heat = heat.resize(shown.size, Image.Resampling.BICUBIC)
    text = f"“{shortened(caption, _CAPTION_LETTERS)}”: cosine {low:+.2f} (dark) to {high:+.2f} (bright)"
    return Image.blend(shown, heat, 0.6), text
