"""Draws a page of held-out examples: the encoder's input, its output tokens as colours, and the nearest captions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from univitar_ds.atomic_write import replacing
from univitar_ds.data.batch import PackedBatch
from univitar_ds.evaluation.embed import Embeddings
from univitar_ds.evaluation.sheets.nearest import Nearest, nearest_captions
from univitar_ds.model.contrastive import ContrastiveModel
from univitar_ds.model.encoder import raster_order
from univitar_ds.viz.cards import ITEMS, Line, draw_page, item_card
from univitar_ds.viz.sheet import component_colours

ROWS, PER_PACK = 10, 5
"""Maximum number of items on the page, and from one pack."""


@dataclass(frozen=True)
class Kept:
    """An item of the sheet as it entered the encoder: `pixels` (frames, h*14, w*14, 3) uint8, `grid` (t, h, w).

    `row` is its row in the embeddings of all packs; a key may occur twice in a shard.
    """

    row: int
    pixels: Tensor
    grid: tuple[int, int, int]


def keep_some(packs: Iterable[PackedBatch], kept: list[Kept]) -> Iterator[PackedBatch]:
    """Yields the packs and appends up to `ROWS` of their items to `kept`, with distinct captions.

    Items without a caption are compared by label.
    """
    seen: set[int | str | None] = set()
    before = 0
    for pack in packs:
        taken = 0
        for row, (pixels, grid) in enumerate(zip(pack.images(), pack.grid_thw.tolist(), strict=True)):
            caption = int(pack.caption_ids[row]) if pack.captions[row] else pack.labels[row]
            if len(kept) < ROWS and taken < PER_PACK and caption not in seen:
                kept.append(Kept(before + row, pixels.clone(), tuple(grid)))
                seen.add(caption)
                taken += 1
        before += len(pack)
        yield pack


def draw_sheet(
    model: ContrastiveModel, kept: list[Kept], embeddings: Embeddings, path: Path, *, title: str = "", data: str = ""
) -> None:
    """Writes a PNG to `path` with one card per item of `kept`.

    A card shows the item's frames, the first three principal components of its tokens as colours (one basis for the
    page), its caption, and the nearest captions among `embeddings`, each marked as the item's own or not.

    Args: title: run and checkpoint, for the title of the page; data: names of the sources.
    """
    colours, shares = component_colours([token_features(model, item) for item in kept])
    rows = [item.row for item in kept]
    nearest = [nearest_captions(embeddings, row) for row in rows]
    cards = [
        item_card(item.pixels, tokens.view(*item.grid, 3), _texts(embeddings, row, found))
        for item, tokens, row, found in zip(kept, colours, rows, nearest, strict=True)
    ]
    plural = "" if len(cards) == 1 else "s"
    heading = ": ".join(filter(None, (title, f"{len(cards)} held-out {embeddings.modality}{plural}")))
    page = draw_page(heading, _legend(embeddings, len(cards), nearest, data), cards, shares)
    with replacing(path) as partial:
        page.save(partial, format="PNG")


def _legend(embeddings: Embeddings, shown: int, nearest: list[Nearest | None], data: str) -> list[Line]:
    """Returns the lines that say which items a page shows, and what the texts beside them mean."""
    modality, captioned = embeddings.modality, [found for found in nearest if found is not None]
    source = f" of {data}" if data else ""
    lines = [
        Line(f"From {len(embeddings)} {modality}s{source}: {shown} with different captions.", lines=2),
        Line(f"Each card: {ITEMS[modality]}. Bold: the caption.", lines=2),
    ]
    if captioned:
        right = sum(found.rank == 1 for found in captioned)
        lines += [
            Line(
                f"Below it: the {len(captioned[0].best)} nearest of {captioned[0].count} different captions, with the "
                f"cosine similarity of the embeddings of {modality} and caption (1: same direction, 0: unrelated).",
                lines=2,
            ),
            Line(f"the item's own caption: the nearest one for {right} of {len(captioned)} items here", right=True),
            Line("a caption of other items only", right=False),
        ]
    return lines


def _texts(embeddings: Embeddings, row: int, nearest: Nearest | None) -> list[Line]:
    """Returns the caption of an item and the nearest captions, or its label."""
    if nearest is None:
        label = embeddings.labels[row]
        return [Line("no caption" if label is None else f"label: {label}", lines=3, bold=True)]
    lines = [Line(embeddings.captions[row], lines=2, bold=True)]
    lines += [
        Line(embeddings.captions[found], 2, right=right, value=f"{cosine:.3f}") for found, right, cosine in nearest.best
    ]
    if nearest.place is not None:
        lines.append(Line(f"own caption: {nearest.place}", 2, faint=True))
    return lines


def token_features(model: ContrastiveModel, item: Kept) -> Tensor:
    """Returns the tokens of one item in raster order of its grid: (t*h*w, D) float32 on the host."""
    device = next(model.parameters()).device
    with torch.no_grad():
        pixels = item.pixels.flatten().to(device)
        tokens = model.vision(pixels, [item.grid], frames=[len(item.pixels)]).float().cpu()
    return raster_order(tokens, item.grid, model.vision.config.spatial_merge_size).flatten(0, 2)
