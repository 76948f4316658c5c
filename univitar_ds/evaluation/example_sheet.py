"""Draws a sheet of held-out examples: the encoder's input, its output tokens as colours, and the nearest captions."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from univitar_ds.atomic_write import replacing
from univitar_ds.data.batch import PackedBatch
from univitar_ds.evaluation.embed import Embeddings
from univitar_ds.model.contrastive import ContrastiveModel
from univitar_ds.model.encoder import raster_order
from univitar_ds.viz.sheet import component_colours, spread_frames, to_size

ROWS, PER_PACK = 10, 5
"""Maximum number of items on the sheet, and from one pack."""
HEIGHT, MAX_WIDTH, MARGIN = 150, 260, 8
"""Height and maximum width of an image, and the margin around it, in pixels."""
SHOWN_FRAMES, SHOWN_CAPTIONS = 3, 3
TEXT_WIDTH = 380
RIGHT, WRONG, INK = (24, 120, 48), (170, 40, 40), (30, 30, 30)


@dataclass(frozen=True)
class Kept:
    """An item of the sheet as it entered the encoder: `pixels` (frames, h*14, w*14, 3) uint8, `grid` (t, h, w)."""

    key: str
    pixels: Tensor
    grid: tuple[int, int, int]


def keep_some(packs: Iterable[PackedBatch], kept: list[Kept]) -> Iterator[PackedBatch]:
    """Yields the packs and appends up to `ROWS` of their items to `kept`, with distinct captions.

    Items without a caption are compared by label.
    """
    seen: set[int | str | None] = set()
    for pack in packs:
        taken = 0
        for row, (pixels, grid) in enumerate(zip(pack.images(), pack.grid_thw.tolist(), strict=True)):
            caption = int(pack.caption_ids[row]) if pack.captions[row] else pack.labels[row]
            if len(kept) < ROWS and taken < PER_PACK and caption not in seen:
                kept.append(Kept(pack.keys[row], pixels.clone(), tuple(grid)))
                seen.add(caption)
                taken += 1
        yield pack


def draw_sheet(model: ContrastiveModel, kept: list[Kept], embeddings: Embeddings, path: Path) -> None:
    """Writes a PNG to `path` with one row per item of `kept`.

    A row shows the item's frames, the first three principal components of its tokens as colours (one basis for the
    sheet), and the nearest captions among `embeddings`, the item's own caption in green.
    """
    colours = component_colours([token_features(model, item) for item in kept])
    rows = []
    for item, tokens in zip(kept, colours, strict=True):
        t, h, w = item.grid
        middle = tokens.view(t, h, w, 3)[t // 2]
        chosen = spread_frames(len(item.pixels), SHOWN_FRAMES)
        strips = [to_size(item.pixels[frame], HEIGHT, MAX_WIDTH, smooth=True) for frame in chosen]
        strips.append(to_size(middle, HEIGHT, MAX_WIDTH, smooth=False))
        row = embeddings.keys.index(item.key)
        rows.append((strips, nearest_captions(embeddings, row), embeddings.labels[row]))
    across = max(sum(strip.width + MARGIN for strip in strips) for strips, *_ in rows)
    sheet = Image.new("RGB", (across + MARGIN + TEXT_WIDTH, len(rows) * (HEIGHT + MARGIN) + MARGIN), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (strips, captions, label) in enumerate(rows):
        left, top = MARGIN, MARGIN + number * (HEIGHT + MARGIN)
        for strip in strips:
            sheet.paste(strip, (left, top))
            left += strip.width + MARGIN
        if captions:
            _write(pen, across + MARGIN, top, captions)
        elif label:
            pen.text((across + MARGIN, top + 8), textwrap.shorten(f"label: {label}", 64, placeholder=" ..."), fill=INK)
    with replacing(path) as partial:
        sheet.save(partial, format="PNG")


def token_features(model: ContrastiveModel, item: Kept) -> Tensor:
    """Returns the tokens of one item in raster order of its grid: (t*h*w, D) float32 on the host."""
    device = next(model.parameters()).device
    with torch.no_grad():
        pixels = item.pixels.flatten().to(device)
        tokens = model.vision(pixels, [item.grid], frames=[len(item.pixels)]).float().cpu()
    return raster_order(tokens, item.grid, model.vision.config.spatial_merge_size).flatten(0, 2)


def nearest_captions(embeddings: Embeddings, row: int) -> list[tuple[str, bool, float]]:
    """Returns the distinct captions nearest to item `row`: (caption, whether it is the item's own, cosine).

    The list is empty for an item without a caption.
    """
    if not embeddings.captions[row]:
        return []
    first = {embeddings.caption_ids[index]: index for index in reversed(embeddings.captioned)}
    candidates = sorted(first.values())
    scores = embeddings.text[candidates] @ embeddings.vision[row]
    best = scores.topk(min(SHOWN_CAPTIONS, len(candidates)))
    own = embeddings.caption_ids[row]
    return [
        (embeddings.captions[candidates[index]], embeddings.caption_ids[candidates[index]] == own, score)
        for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _write(pen: ImageDraw.ImageDraw, left: int, top: int, captions: list[tuple[str, bool, float]]) -> None:
    for line, (caption, right, score) in enumerate(captions):
        y = top + 8 + 32 * line
        pen.text((left, y), f"{score:+.2f}", fill=INK)
        pen.text((left + 44, y), textwrap.shorten(caption, 56, placeholder=" ..."), fill=RIGHT if right else WRONG)
