"""Draws a page of captions of held-out items, each with the images or videos that are nearest to it."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from PIL import Image

from univitar_ds.atomic_write import replacing
from univitar_ds.data.batch import PackedBatch
from univitar_ds.evaluation.embed import Embeddings
from univitar_ds.evaluation.sheets.nearest import Nearest, nearest_items
from univitar_ds.viz.cards import Hit, Line, draw_page, hits_card, thumbnail

MOST_ITEMS = 10_000
"""Maximum number of items with a thumbnail, which takes 3 KiB for an image and 9 KiB for a video. Only these items can
be found."""
_QUALITY = 90
"""JPEG quality of thumbnails."""


def keep_thumbnails(packs: Iterable[PackedBatch], kept: list[bytes]) -> Iterator[PackedBatch]:
    """Yields the packs and appends a JPEG of each of the first `MOST_ITEMS` items to `kept`, and b"" for one without
    a caption."""
    for pack in packs:
        for pixels, caption in zip(pack.images(), pack.captions, strict=True):
            if len(kept) == MOST_ITEMS:
                break
            kept.append(_jpeg(thumbnail(pixels)) if caption else b"")
        yield pack


def _jpeg(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, format="JPEG", quality=_QUALITY)
    return file.getvalue()


def _image(jpeg: bytes) -> Image.Image:
    return Image.open(io.BytesIO(jpeg))


def draw_text_sheet(
    embeddings: Embeddings, queries: Sequence[int], thumbnails: Sequence[bytes], path: Path, *, title: str, data: str
) -> None:
    """Writes a PNG to `path` with one card per caption, unless there is no caption.

    A card shows a caption and the items nearest to it among those with a thumbnail, each marked as correct or not.

    Args: queries: rows of the items whose captions are shown; thumbnails: of the first items of `embeddings`, as
        `keep_thumbnails` has kept them; title: run and checkpoint; data: names of the sources.
    """
    candidates = [row for row, jpeg in enumerate(thumbnails) if jpeg]
    found = {row: nearest for row in queries if (nearest := nearest_items(embeddings, row, candidates)) is not None}
    if not found:
        return
    cards = []
    for row, near in found.items():
        hits = [Hit(_image(thumbnails[item]), right, f"{cosine:.3f}") for item, right, cosine in near.best]
        cards.append(hits_card(hits, _texts(embeddings, row, near)))
    plural = "" if len(cards) == 1 else "s"
    heading = f"{title}: {embeddings.modality}s found for {len(cards)} held-out caption{plural}"
    page = draw_page(heading, _legend(embeddings, list(found.values()), data), cards)
    with replacing(path) as partial:
        page.save(partial, format="PNG")


def _legend(embeddings: Embeddings, found: list[Nearest], data: str) -> list[Line]:
    """Returns the lines that say what a card shows."""
    modality, nearest = embeddings.modality, found[0]
    all_of = "the first " if nearest.count < len(embeddings.captioned) else ""
    first = sum(near.rank == 1 for near in found)
    source = f" of {data}" if data else ""
    frames = " The frames of a video are below each other." if modality == "video" else ""
    return [
        Line(
            f"Each card: a caption, and the {len(nearest.best)} nearest of {all_of}{nearest.count} captioned "
            f"{modality}s{source}.",
            lines=3,
        ),
        Line(
            f"Below each {modality}: the cosine similarity of the embeddings of caption and {modality} (1: same "
            f"direction, 0: unrelated).{frames}",
            lines=2,
        ),
        Line(f"the {modality} has this caption; the nearest one does for {first} of {len(found)} captions", right=True),
        Line(f"the {modality} has other captions only", right=False),
        Line(f"Where no {modality} shown has the caption, a line names the nearest one that has it.", lines=2),
    ]


def _texts(embeddings: Embeddings, row: int, near: Nearest) -> list[Line]:
    """Returns the caption, and where its own item is if that is not shown."""
    lines = [Line(embeddings.captions[row], lines=4, bold=True)]
    if near.place is not None:
        lines.append(Line(f"own {embeddings.modality}: {near.place}", 2, faint=True))
    return lines
