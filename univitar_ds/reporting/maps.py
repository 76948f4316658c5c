"""Maps of a model's features on images and videos: principal components as colours, and similarity to a caption."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from univitar_ds.config.schema import RunConfig
from univitar_ds.errors import CheckpointError, shortened
from univitar_ds.evaluation.configured import last_stage
from univitar_ds.formats.run import with_size_rule
from univitar_ds.inference.model import UniViTARModel
from univitar_ds.preprocessing import Preprocessor
from univitar_ds.reporting.map_items import MapItem, with_tokens
from univitar_ds.reporting.record import RunRecord
from univitar_ds.viz.sheet import component_colours, spread_frames, to_size

SIZES, FACTORS = 3, (1 / 4, 4, 1 / 16)
"""Number of sizes of an image, and tokens of those beside the native one as multiples of its tokens, in the order in
which they are tried. The run's size rule may limit them."""
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


def maps_of(run: RunRecord, items: Sequence[MapItem]) -> Iterator[ItemMaps]:
    """Yields the maps of each item, with the model in the last checkpoint of a run and its last size rules.

    For an image: the first three principal components of its features at native size and at up to two others, with one
    basis for the colours; and the similarity of its patches to its text at native size. For a video: the same for some
    frames at native size.

    Args: items: their texts are left out if the model has no text tower.
    Raises: CheckpointError if the run has no complete checkpoint.
    """
    model = UniViTARModel.from_pretrained(run.folder)
    of_videos = _with_rule_of_videos(model, run.config)
    for one in items:
        caption = None if model.joint is None else one.caption
        image = isinstance(one.item, Image.Image)
        maps = _image_maps(model, one.item, caption) if image else _video_maps(of_videos, one.item, caption)
        yield ItemMaps(f"{run.name}: {one.name}", maps)


def _with_rule_of_videos(model: UniViTARModel, config: RunConfig) -> UniViTARModel:
    """Returns the model with the size rule for videos of the last stage that has one. A stored model has one rule, that
    for images."""
    stage = last_stage(config, "video")
    if stage is None:
        return model
    try:
        encoder = with_size_rule(model.preprocessor.config, stage, "video")
    except CheckpointError:  # the format cannot express the rule
        return model
    return UniViTARModel(model.module, Preprocessor(encoder), model.joint).eval()


def _grid(model: UniViTARModel, image: Image.Image) -> tuple[int, int]:
    """Returns the tokens along height and width of an image, by the size rule of the model."""
    _, height, width = model.preprocessor.grid([image])
    return height, width


def _sizes(model: UniViTARModel, image: Image.Image) -> dict[tuple[int, int], Image.Image]:
    """Returns an image at SIZES sizes or fewer, by their grids, which differ. The first is its native size."""
    native = _grid(model, image)
    found = {native: image}
    for factor in FACTORS:
        if len(found) < SIZES:
            other = with_tokens(image, factor * native[0] * native[1])
            found.setdefault(_grid(model, other), other)
    return found


def _image_maps(model: UniViTARModel, image: Image.Image, caption: str | None) -> list[Map]:
    sizes = _sizes(model, image)
    native = next(iter(sizes))
    features = {}
    for grid in sorted(sizes):
        (found,) = model.intermediates([sizes[grid]], [-1])[0]  # (1, D, h, w)
        features[grid] = found[0]
    colours, _ = component_colours([_rows(one) for one in features.values()])
    original = _shrunk(image, _WIDTH)
    shown = [Map({ORIGINAL: original}, f"{image.height} x {image.width} px")]
    for grid, colour in zip(features, colours, strict=True):
        text = _tokens(grid) + (", native size" if grid == native else "")
        shown.append(Map({COMPONENTS: _drawn(colour, grid, original)}, text))
    if caption is not None:
        similar, text = _similarity(model, features[native], original, caption)
        shown.append(Map({SIMILARITY: similar}, f"{_tokens(native)}, {text}"))
    return shown


def _video_maps(model: UniViTARModel, frames: Sequence[Image.Image], caption: str | None) -> list[Map]:
    (found,) = model.intermediates([list(frames)], [-1])[0]  # (t, D, h, w)
    colours, _ = component_colours([_rows(one) for one in found])
    per_token = len(frames) // len(found)
    shown = []
    for index in spread_frames(len(found), SHOWN_FRAMES):
        frame, grid = _shrunk(frames[index * per_token], _FRAME_WIDTH), tuple(found.shape[2:])
        images = {ORIGINAL: frame, COMPONENTS: _drawn(colours[index], grid, frame)}
        texts = [f"frame {index * per_token + 1} of {len(frames)}", _tokens(grid)]
        if caption is not None:
            images[SIMILARITY], text = _similarity(model, found[index], frame, caption)
            texts.append(text)
        shown.append(Map(images, ", ".join(texts)))
    return shown


def _tokens(grid: Sequence[int]) -> str:
    return f"{grid[0]} x {grid[1]} tokens"


def _drawn(colours: Tensor, grid: tuple[int, int], original: Image.Image) -> Image.Image:
    """Returns colours (h*w, 3) uint8 of a grid (h, w) as an image of the size of the original."""
    cells = Image.fromarray(colours.view(*grid, 3).numpy())
    return cells.resize(original.size, Image.Resampling.NEAREST)


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
