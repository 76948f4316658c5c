"""Draws a sheet of one pack of a training step: the items, and the encoder's tokens as colours."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from univitar_ds.data.batch import PackedBatch
from univitar_ds.geometry import token_count
from univitar_ds.model.encoder import raster_order
from univitar_ds.viz.sheet import component_colours, spread_frames, to_size, wrapped

WIDTH, GAP, LINE, FONT_PX = 1120, 10, 18, 14
"""Width of the sheet, margin, line height and font size, in pixels."""
IMAGE = (150, 260)
"""Height and maximum width of an image on the sheet, in pixels."""
FRAME = (104, 174)
"""Height and maximum width of a frame of a video on the sheet, in pixels."""
SHOWN_FRAMES, CAPTION_LINES, MIN_CAPTION_PX = 3, 3, 170
PAPER, INK, FAINT, BLANK = (242, 242, 242), (30, 30, 30), (120, 120, 120), 255


def draw_pack(batch: PackedBatch, items: int, tokens: Tensor, kept: Tensor, merge: int) -> Image.Image:
    """Draws the first `items` items of a pack: pixels, tokens as colours (one basis for all items) and captions.

    Args: tokens: (Tk, D) float32, tokens that were not dropped; kept: (Tk,) int64, indices of `tokens` among all tokens
        of these items; merge: the encoder's `spatial_merge_size`, which determines the order of tokens.
    """
    grids = batch.grid_thw.tolist()[:items]
    lengths = [token_count(grid) for grid in grids]
    colours = torch.full((sum(lengths), 3), BLANK, dtype=torch.uint8)
    colours[kept] = component_colours([tokens])[0]
    font = ImageFont.load_default(FONT_PX)
    cards = [
        _card(frames, raster_order(part, grid, merge), caption, font)
        for frames, part, grid, caption in zip(
            batch.images(), colours.split(lengths), grids, batch.captions, strict=False
        )
    ]
    return _flow(cards)


def _card(frames: Tensor, colours: Tensor, caption: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """Draws one item: an image beside its token colours, or frames of a video above them, and the caption below."""
    t, h, w, _ = colours.shape
    if len(frames) == 1:
        rows = [[to_size(frames[0], *IMAGE, smooth=True), to_size(colours[0], *IMAGE, smooth=False)]]
    else:
        chosen = spread_frames(len(frames), SHOWN_FRAMES)
        rows = [
            [to_size(frames[frame], *FRAME, smooth=True) for frame in chosen],
            [to_size(colours[frame * t // len(frames)], *FRAME, smooth=False) for frame in chosen],
        ]
    across = sum(part.width for part in rows[0]) + 2 * (len(rows[0]) - 1)
    down = sum(row[0].height + 2 for row in rows) - 2
    width = max(across, MIN_CAPTION_PX)
    lines = wrapped(caption, width, CAPTION_LINES, font)
    card = Image.new("RGB", (width, down + LINE * (len(lines) + 1) + 4), PAPER)
    top = 0
    for row in rows:
        left = 0
        for part in row:
            card.paste(part, (left, top))
            left += part.width + 2
        top += row[0].height + 2
    pen = ImageDraw.Draw(card)
    for number, line in enumerate(lines):
        pen.text((0, top + 2 + LINE * number), line, fill=INK, font=font)
    size = f"{h} x {w} tokens" if len(frames) == 1 else f"{t} x {h} x {w} tokens"
    pen.text((0, top + 2 + LINE * len(lines)), size, fill=FAINT, font=font)
    return card


def _flow(cards: Sequence[Image.Image]) -> Image.Image:
    """Arranges the cards in rows from left to right, like words."""
    rows: list[list[Image.Image]] = [[]]
    for card in cards:
        if rows[-1] and sum(other.width + 2 * GAP for other in rows[-1]) + card.width > WIDTH:
            rows.append([])
        rows[-1].append(card)
    width = max(sum(card.width + 2 * GAP for card in row) for row in rows)
    sheet = Image.new("RGB", (width, sum(max(card.height for card in row) + 2 * GAP for row in rows)), PAPER)
    top = GAP
    for row in rows:
        left = GAP
        for card in row:
            sheet.paste(card, (left, top))
            left += card.width + 2 * GAP
        top += max(card.height for card in row) + 2 * GAP
    return sheet
