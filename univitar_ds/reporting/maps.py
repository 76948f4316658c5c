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

from univitar_ds.config.data import DataConfig
from univitar_ds.data.media.image_decode import decode_image
from univitar_ds.data.media.probe import probe
from univitar_ds.data.media.types import DecodeLimits
from univitar_ds.errors import SampleError, UserError
from univitar_ds.geometry import PATCH
from univitar_ds.inference.model import Item, UniViTARModel
from univitar_ds.model.contrastive import ContrastiveModel
from univitar_ds.regular_files import read_bytes
from univitar_ds.viz.sheet import component_colours, spread_frames, to_size

TOKENS = (64, 256, 1024)
"""Approximate tokens of an image at the three resolutions. The run's size rule may limit them."""
FRAMES, SHOWN_FRAMES = 16, 4
"""Frames of a video that the model gets, and that are drawn."""
MOST_FILES = 12
"""Maximum number of files of a page."""
_HEIGHT, _WIDTH = 224, 448
"""Maximum size of a map in pixels."""
_MAX_PX: int = DataConfig.model_fields["max_image_px"].default
_TIMEOUT_S: float = DataConfig.model_fields["decode_timeout_s"].default


@dataclass(frozen=True)
class Map:
    """An RGB image, and the text that is shown below it."""

    image: Image.Image
    text: str


@dataclass(frozen=True)
class FileMaps:
    """The maps of one file with one model."""

    title: str
    maps: list[Map]


def maps_of(folder: Path, name: str, files: Sequence[Path], caption: str | None = None) -> Iterator[FileMaps]:
    """Yields the maps of each file, with the model in the last checkpoint of a run.

    For an image: the first three principal components of its features at three resolutions, with one basis for the
    colours; and the similarity of its patches to `caption`, if given. For a video: the same for some frames, at one
    resolution.

    Args: folder, name: of the run.
    Raises: UserError for too many files, a file that cannot be decoded as image or video, or a caption if the model has
        no text tower; CheckpointError if the run has no complete checkpoint.
    """
    if len(files) > MOST_FILES:
        raise UserError(f"{len(files)} files are too many for maps (limit {MOST_FILES}); give fewer")
    model = UniViTARModel.from_pretrained(folder)
    if caption is not None and not isinstance(model.module, ContrastiveModel):
        raise UserError(f"--caption needs a text tower, and {name} has none; leave it out")
    for file in files:
        item = _read(file)
        draw = _image_maps if isinstance(item, Image.Image) else _video_maps
        yield FileMaps(f"{name}: {file.name}", draw(model, item, caption))


def _read(file: Path) -> Item:
    """Returns an image, or the frames of a video. Raises: UserError if the file cannot be decoded."""
    try:
        content = read_bytes(file)
        size = probe(content, file.suffix.lower().lstrip("."))
        if size.kind == "image":
            return Image.fromarray(decode_image(content, max_px=_MAX_PX))
        from univitar_ds.data.media.video_decode import decode_video

        frames = decode_video(content, frames=FRAMES, limits=DecodeLimits(_MAX_PX, _TIMEOUT_S), fit=_fitting)
        return [Image.fromarray(frame) for frame in frames]
    except (OSError, SampleError) as error:
        raise UserError(f"{file} cannot be drawn: {error}; name an image or a video") from error


def _fitting(frame: np.ndarray) -> np.ndarray:
    """Resizes a frame (h, w, 3) so that it has about TOKENS[0] patches."""
    return np.asarray(_with_tokens(Image.fromarray(frame), TOKENS[0]))


def _with_tokens(image: Image.Image, tokens: int) -> Image.Image:
    """Resizes an image so that it has about `tokens` patches, with sides that are multiples of a patch."""
    scale = (tokens * PATCH**2 / (image.width * image.height)) ** 0.5
    sides = (max(PATCH, round(side * scale / PATCH) * PATCH) for side in image.size)
    return image.resize(tuple(sides), Image.Resampling.BICUBIC)


def _image_maps(model: UniViTARModel, image: Image.Image, caption: str | None) -> list[Map]:
    features = {}
    for tokens in TOKENS:
        (found,) = model.intermediates([_with_tokens(image, tokens)], [-1])[0]  # (1, D, h, w)
        features.setdefault(tuple(found.shape[2:]), found[0])
    colours, _ = component_colours([_rows(one) for one in features.values()])
    shown = [Map(_shrunk(image), f"{image.height} x {image.width} px")]
    shown += [
        Map(to_size(colour.view(*grid, 3), _HEIGHT, _WIDTH), f"{grid[0]} x {grid[1]} tokens")
        for grid, colour in zip(features, colours, strict=True)
    ]
    if caption is not None:
        finest = max(features, key=lambda grid: grid[0] * grid[1])
        shown.append(_similarity(model, features[finest], image, caption))
    return shown


def _video_maps(model: UniViTARModel, frames: Sequence[Image.Image], caption: str | None) -> list[Map]:
    (found,) = model.intermediates([list(frames)], [-1])[0]  # (t, D, h, w)
    colours, _ = component_colours([_rows(one) for one in found])
    chosen = spread_frames(len(found), SHOWN_FRAMES)
    per_token = len(frames) // len(found)
    shown = []
    for index in chosen:
        frame = frames[index * per_token]
        shown.append(Map(_shrunk(frame), f"frame {index * per_token + 1} of {len(frames)}"))
        colour = colours[index].view(*found.shape[2:], 3)
        shown.append(Map(to_size(colour, _HEIGHT, _WIDTH), f"{found.shape[2]} x {found.shape[3]} tokens"))
        if caption is not None:
            shown.append(_similarity(model, found[index], frame, caption))
    return shown


def _rows(features: Tensor) -> Tensor:
    """Reshapes features (D, h, w) to (h*w, D), in float32 on the CPU."""
    return features.flatten(1).T.float().cpu()


def _shrunk(image: Image.Image) -> Image.Image:
    return to_size(np.asarray(image.convert("RGB")), _HEIGHT, _WIDTH)


@torch.no_grad()
def _similarity(model: UniViTARModel, features: Tensor, image: Image.Image, caption: str) -> Map:
    """Draws the cosine similarity of each patch to a caption over the image. Each patch is pooled and projected as if
    it were an item.

    Args: features: (D, h, w) of the image.
    """
    module = model.module
    tokens = features.flatten(1).T.contiguous()
    patches = module.vision_proj(module.pool(tokens, [1] * len(tokens)))
    cosines = F.normalize(patches.float(), dim=-1) @ model.encode_text([caption])[0]
    low, high = cosines.min().item(), cosines.max().item()
    shares = ((cosines - low) / max(high - low, 1e-6)).view(features.shape[1:]).cpu().numpy()
    from matplotlib import colormaps

    shown = _shrunk(image)
    heat = Image.fromarray((colormaps["viridis"](shares)[..., :3] * 255).astype(np.uint8))
    heat = heat.resize(shown.size, Image.Resampling.BICUBIC)
    return Map(Image.blend(shown, heat, 0.6), f"“{caption}”: cosine {low:+.2f} (dark) to {high:+.2f} (bright)")
