"""A sheet of held-out examples: the encoder's input, its tokens as colours, and the nearest captions."""

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
from univitar_ds.viz.sheet import component_colours, raster_order, spread_frames, to_size

ROWS, PER_PACK = 10, 5
HEIGHT, MOST_WIDTH, MARGIN = 150, 260, 8
SHOWN_FRAMES, SHOWN_CAPTIONS = 3, 3
TEXT_WIDTH = 380
RIGHT, WRONG, INK = (24, 120, 48), (170, 40, 40), (30, 30, 30)


@dataclass(frozen=True)
class Kept:
    """One item as it entered the encoder: `pixels` (frames, h*14, w*14, 3) uint8."""

    key: str
    pixels: Tensor
    grid: tuple[int, int, int]


def keep_some(packs: Iterable[PackedBatch], kept: list[Kept]) -> Iterator[PackedBatch]:
    """Yields the packs and puts a few of their items into `kept`, no two with the same caption or, without one,
    the same label."""
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


def draw_sheet(model: ContrastiveModel, kept: list[Kept], found: Embeddings, path: Path) -> None:
    """Writes a PNG with one row per item: its frames, the first three principal components of its tokens as
    colours (one basis for the sheet), and the nearest captions of the data set, the right one in green."""
    colours = component_colours([token_features(model, item) for item in kept])
    rows = []
    for item, tokens in zip(kept, colours, strict=True):
        t, h, w = item.grid
        middle = tokens.view(t, h, w, 3)[t // 2]
        chosen = spread_frames(len(item.pixels), SHOWN_FRAMES)
        strips = [to_size(item.pixels[frame], HEIGHT, MOST_WIDTH, smooth=True) for frame in chosen]
        strips.append(to_size(middle, HEIGHT, MOST_WIDTH, smooth=False))
        row = found.keys.index(item.key)
        rows.append((strips, nearest_captions(found, row), found.labels[row]))
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
    """Tokens of one item in raster order of the grid, (t*h*w, D) float32 on the host."""
    device = next(model.parameters()).device
    with torch.no_grad():
        pixels = item.pixels.flatten().to(device)
        tokens = model.vision(pixels, [item.grid], frames=[len(item.pixels)]).float().cpu()
    return raster_order(tokens, item.grid, model.vision.config.spatial_merge_size).flatten(0, 2)


def nearest_captions(found: Embeddings, row: int) -> list[tuple[str, bool, float]]:
    """The captions nearest to an item among the distinct ones: (caption, whether it is its own, cosine).

    None for an item without a caption.
    """
    if not found.captions[row]:
        return []
    first = {found.caption_ids[index]: index for index in reversed(found.captioned)}
    places = sorted(first.values())
    scores = found.text[places] @ found.vision[row]
    best = scores.topk(min(SHOWN_CAPTIONS, len(places)))
    return [
        (found.captions[places[place]], found.caption_ids[places[place]] == found.caption_ids[row], score)
        for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
    ]


def _write(pen: ImageDraw.ImageDraw, left: int, top: int, captions: list[tuple[str, bool, float]]) -> None:
    for line, (caption, right, score) in enumerate(captions):
        y = top + 8 + 32 * line
        pen.text((left, y), f"{score:+.2f}", fill=INK)
        pen.text((left + 44, y), textwrap.shorten(caption, 56, placeholder=" ..."), fill=RIGHT if right else WRONG)
