"""Pictures of a run while it trains: a few items of a pack, and what the encoder's tokens tell apart in them.

The tokens are those of the step itself. A hook on the encoder of rank 0 copies some that pass by: no forward pass is
added, no rank does anything that the others do not, and no number of the training changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from univitar_ds.config.section import Modality
from univitar_ds.data.batch import PackedBatch
from univitar_ds.geometry import token_count
from univitar_ds.sheet import component_colours, raster_order, spread_frames, to_size, wrapped

MOST_ITEMS, MOST_TOKENS = 8, 8192
WIDTH, GAP, LINE, FONT_PX = 1120, 10, 18, 14
PICTURE = (150, 260)
"""Height and most width of a picture on the sheet, in pixels."""
FRAME = (104, 174)
"""The same of a frame of a clip."""
SHOWN_FRAMES, CAPTION_LINES, LEAST_CAPTION_PX = 3, 3, 170
PAPER, INK, FAINT, BLANK = (242, 242, 242), (30, 30, 30), (120, 120, 120), 255


@dataclass
class PictureSchedule:
    """When to draw: whenever another `every` steps are full, at the next step of each modality. 0: never."""

    every: int
    start: int
    """The step after which the run goes on."""
    drawn: dict[str, int] = field(default_factory=dict)
    """By modality: the step of the last picture."""

    def due(self, step: int, modality: Modality) -> bool:
        return self.every > 0 and step // self.every > self.drawn.get(modality, self.start) // self.every


@dataclass(frozen=True)
class Glimpse:
    """Tokens of a pack's first items as they left the encoder: (Tk, D) float32 on the host."""

    items: int
    tokens: Tensor
    kept: Tensor
    """(Tk,) int64: the places of these tokens among all of the items; some are missing where patches are dropped."""


@contextmanager
def watching(vision: nn.Module, batch: PackedBatch | None) -> Iterator[list[Glimpse]]:
    """Within it, the first pack that goes through `vision`, which must be `batch`, leaves a `Glimpse` in the list.

    None, or a pack without items: the list stays empty.
    """
    glimpses: list[Glimpse] = []
    if not batch:
        yield glimpses
        return
    lengths = [token_count(grid) for grid in batch.grid_thw.tolist()]
    items = _fitting_items(lengths)

    def look(_: nn.Module, __: Any, keywords: dict[str, Any], output: Tensor) -> None:
        if glimpses:
            return
        total = sum(lengths[:items])
        kept = getattr(keywords.get("drops"), "kept", None)
        kept = torch.arange(total) if kept is None else kept[kept < total]
        glimpses.append(Glimpse(items, output[: len(kept)].detach().to("cpu", torch.float32, copy=True), kept))

    handle = vision.register_forward_hook(look, with_kwargs=True)
    try:
        yield glimpses
    finally:
        handle.remove()


def draw_pack(batch: PackedBatch, glimpse: Glimpse, merge: int) -> Image.Image:
    """A sheet of the items of a glimpse: pixels, tokens as colours (one basis for all), captions."""
    grids = batch.grid_thw.tolist()[: glimpse.items]
    lengths = [token_count(grid) for grid in grids]
    colours = torch.full((sum(lengths), 3), BLANK, dtype=torch.uint8)
    colours[glimpse.kept] = component_colours([glimpse.tokens])[0]
    font = ImageFont.load_default(FONT_PX)
    cards = [
        _card(frames, raster_order(part, grid, merge), caption, font)
        for frames, part, grid, caption in zip(
            batch.pictures(), colours.split(lengths), grids, batch.captions, strict=False
        )
    ]
    return _flow(cards)


def _fitting_items(lengths: Sequence[int]) -> int:
    """How many of the first items to show: few, and of so many tokens that looking at them costs little."""
    items = min(len(lengths), MOST_ITEMS)
    while items > 1 and sum(lengths[:items]) > MOST_TOKENS:
        items -= 1
    return items


def _card(frames: Tensor, colours: Tensor, caption: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One item: a picture beside its colours, or frames of a clip above theirs, and the caption beneath."""
    t, h, w, _ = colours.shape
    if len(frames) == 1:
        rows = [[to_size(frames[0], *PICTURE, smooth=True), to_size(colours[0], *PICTURE, smooth=False)]]
    else:
        chosen = spread_frames(len(frames), SHOWN_FRAMES)
        rows = [
            [to_size(frames[frame], *FRAME, smooth=True) for frame in chosen],
            [to_size(colours[frame * t // len(frames)], *FRAME, smooth=False) for frame in chosen],
        ]
    across = sum(part.width for part in rows[0]) + 2 * (len(rows[0]) - 1)
    down = sum(row[0].height + 2 for row in rows) - 2
    width = max(across, LEAST_CAPTION_PX)
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
    """Cards in rows, from left to right, like words."""
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
