"""Draws a page of one pack of a training step: the items, and the encoder's tokens as colours."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from univitar_ds.data.batch import PackedBatch
from univitar_ds.geometry import token_count
from univitar_ds.model.encoder import raster_order
from univitar_ds.viz.cards import BLANK, ITEMS, Line, draw_page, item_card
from univitar_ds.viz.sheet import component_colours

CAPTION_LINES = 6


def draw_pack(
    batch: PackedBatch, items: int, tokens: Tensor, kept: Tensor, merge: int, *, title: str = ""
) -> Image.Image:
    """Draws the first `items` items of a pack: pixels, tokens as colours (one basis for all items) and captions.

    Args: tokens: (Tk, D) float32, tokens that were not dropped; kept: (Tk,) int64, indices of `tokens` among all tokens
        of these items; merge: the encoder's `spatial_merge_size`, which determines the order of tokens; title: run and
        step, for the title of the page.
    """
    grids = batch.grid_thw.tolist()[:items]
    lengths = [token_count(grid) for grid in grids]
    colours = torch.full((sum(lengths), 3), BLANK, dtype=torch.uint8)
    (colours[kept],), shares = component_colours([tokens])
    cards = [
        item_card(frames, raster_order(part, grid, merge), _texts(batch, row))
        for row, (frames, part, grid) in enumerate(zip(batch.images(), colours.split(lengths), grids, strict=False))
    ]
    details = [
        Line(
            f"Pack {batch.index} of lane {batch.lane}. Each card: {ITEMS[batch.modality]}. Bold: the caption in this "
            "step; grey: the key of the sample.",
            lines=2,
        )
    ]
    if hidden := sum(lengths) - len(kept):
        details.append(Line(f"White squares: tokens that patch dropout removed ({hidden} of {sum(lengths)}).", lines=2))
    heading = f"{len(cards)} of {len(batch)} {batch.modality}s of a pack"
    return draw_page(": ".join(filter(None, (title, heading))), details, cards, shares)


def _texts(batch: PackedBatch, row: int) -> list[Line]:
    """Returns the caption of an item, or its label, and its key."""
    caption, label = batch.captions[row], batch.labels[row]
    if caption:
        first = Line(caption, lines=CAPTION_LINES, bold=True, wraps=True)
    else:
        first = Line("no caption" if label is None else f"label: {label}", lines=2, bold=True)
    return [first, Line(batch.keys[row], lines=3, faint=True, wraps=True)]
