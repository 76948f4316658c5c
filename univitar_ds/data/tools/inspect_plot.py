"""Draws the result of `data inspect` as an image: sizes of the items, fill of the packs, and the items of one pack.

All three use the same colour scale: the colour of an item shows its number of tokens.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from univitar_ds.atomic_write import replacing
from univitar_ds.data.batch import PackedBatch
from univitar_ds.data.tools.inspect import Inspection, Stream
from univitar_ds.geometry import PATCH, TUBELET, cumulative
from univitar_ds.image_ops import resize_rgb

_DPI = 110
_WIDTH_IN = 15.0
_MARGIN_IN = 0.7
_PLOTS_IN = 2.5
_GAP_IN = 0.85
"""Space between the plots and the pack below them, for the labels of the plots and the heading of the pack."""
_REST_IN = 0.4
_HEAD_IN = 0.8
_MOST_PACK_IN = 14.0
_LABEL_PT = 7.5
_LABEL_IN = 2.7 * _LABEL_PT / 72
"""Height of two lines of text below each item."""
_CHARACTER_IN = 0.56 * _LABEL_PT / 72
_BETWEEN_IN = 0.08
_BINS = 40
_ROWS = 200
"""Pixels of the column of a pack; no more than on the screen, so that no line between items is lost."""
_EMPTY = "#d62728"
_COLOURS = colormaps["viridis"]
_SOFTWARE = "univitar_ds data inspect"


class Box(NamedTuple):
    """Upper left corner and size of an item in the image of a pack, in inches."""

    left: float
    top: float
    width: float
    height: float


@dataclass(frozen=True)
class Gallery:
    """Boxes of the items of a pack, arranged in rows at the same scale. Sizes are in inches."""

    boxes: list[Box]
    height: float
    scale: float
    """Inches per pixel of the model's input."""


def draw(inspection: Inspection, path: Path) -> None:
    """Write the image as PNG. Its folder must exist."""
    galleries = [gallery(stream.shown) for stream in inspection.streams]
    heights = [_PLOTS_IN + _GAP_IN + page.height + _REST_IN for page in galleries]
    total = _HEAD_IN + sum(heights)
    figure = Figure(figsize=(_WIDTH_IN, total), dpi=_DPI, facecolor="white")
    figure.text(
        _MARGIN_IN / _WIDTH_IN,
        1 - 0.3 / total,
        f"{inspection.run}: the input of the model",
        fontsize=15,
        weight="bold",
        va="top",
        parse_math=False,
    )
    top = _HEAD_IN
    for stream, page, height in zip(inspection.streams, galleries, heights, strict=True):
        _draw_stream(figure, total, top, stream, page)
        top += height
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # captions may be in any script
        if path.exists() and not path.is_file():  # /dev/stdout, a pipe
            figure.savefig(path, format="png")
            return
        with replacing(path) as partial:
            figure.savefig(partial, format="png", metadata={"Software": _SOFTWARE})


def is_drawn(path: Path) -> bool:
    """Whether `draw` wrote this file."""
    with path.open("rb") as file:
        return b"tEXtSoftware\0" + _SOFTWARE.encode() in file.read(1024)


def _draw_stream(figure: Figure, total: float, top: float, stream: Stream, page: Gallery) -> None:
    inner = _WIDTH_IN - 2 * _MARGIN_IN

    def axes(left: float, down: float, width: float, height: float) -> Axes:
        box = (left / _WIDTH_IN, 1 - (down + height) / total, width / _WIDTH_IN, height / total)
        return figure.add_axes(box)

    scale = Normalize(0, max(stream.tokens, default=1))
    plots = top + 0.55
    figure.text(_MARGIN_IN / _WIDTH_IN, 1 - top / total, _headline(stream), fontsize=11, va="top", parse_math=False)
    _sizes(axes(_MARGIN_IN, plots, 0.42 * inner, _PLOTS_IN - 0.4), stream, scale)
    _fills(axes(_MARGIN_IN + 0.5 * inner, plots, 0.5 * inner, _PLOTS_IN - 0.4), stream, scale)
    _pack(axes(_MARGIN_IN, top + _PLOTS_IN + _GAP_IN, inner, page.height), stream.shown, page, scale)


def _headline(stream: Stream) -> str:
    figures = stream.to_json()
    fill, items = figures["fill_pct"]["mean"], figures["items_per_pack"]["mean"]
    bad = ", ".join(f"{count} {kind}" for kind, count in sorted(stream.bad.items())) or "nothing"
    return (
        f"{stream.name}: {len(stream.packs)} packs of {stream.stage.token_budget} tokens, {fill:.2f} % full, "
        f"{items:.1f} items each; longest wait {stream.longest_wait} packs; made smaller: {stream.downscaled}; "
        f"left out: {bad}"
    )


def _sizes(axes: Axes, stream: Stream, scale: Normalize) -> None:
    """Draw the histogram of tokens."""
    tokens = stream.tokens
    _, edges, bars = axes.hist(tokens, bins=min(_BINS, len(set(tokens)) or 1), rwidth=0.94)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
    for edge, bar in zip((edges[:-1] + edges[1:]) / 2, bars, strict=True):
        bar.set_facecolor(_COLOURS(scale(edge)))
    axes.set(title="How large the items are", xlabel="tokens of an item", ylabel="items")
    _plain(axes)


def _fills(axes: Axes, stream: Stream, scale: Normalize) -> None:
    """Draw each pack as a column of its items, the largest at the bottom; the unused budget is red."""
    budget = stream.stage.token_budget
    columns = np.stack([_column(pack, budget, scale) for pack in stream.packs], axis=1)
    count = len(stream.packs)
    axes.imshow(columns, aspect="auto", origin="lower", extent=(0.5, count + 0.5, 0, 100), interpolation="nearest")
    for edge in range(1, count):
        axes.axvline(edge + 0.5, color="white", linewidth=min(1.5, 100 / count))
    axes.set(
        title="How full the packs are (a column is a pack, its stripes are items, red is empty)",
        xlabel="pack",
        ylabel="% of the token budget",
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    _plain(axes)


def _column(pack: Sequence[int], budget: int, scale: Normalize) -> np.ndarray:
    """Colours of the column of a pack from the bottom: (rows, 3), between 0 and 1."""
    empty = tuple(int(_EMPTY[index : index + 2], 16) / 255 for index in (1, 3, 5))
    column = np.tile(np.array(empty), (_ROWS, 1))
    bounds = [round(_ROWS * tokens / budget) for tokens in cumulative(sorted(pack, reverse=True))]
    for tokens, start, end in zip(sorted(pack, reverse=True), bounds[:-1], bounds[1:], strict=True):
        column[start:end] = _COLOURS(scale(tokens))[:3]
        if end - start > 3:
            column[end - 1] = 1.0  # a line between items
    return column


def _pack(axes: Axes, batch: PackedBatch | None, page: Gallery, scale: Normalize) -> None:
    """Draw the items at the same scale."""
    axes.set(xlim=(0, _WIDTH_IN - 2 * _MARGIN_IN), ylim=(page.height, 0))
    axes.axis("off")
    if batch is None:
        axes.set_title("No item could be decoded.", loc="left")
        return
    videos = " A video has one frame per tubelet." if batch.modality == "video" else ""
    axes.set_title(
        f"One pack: {len(batch)} items, {batch.tokens} tokens, at the size of the model's input; "
        f"the area of an item is proportional to its number of tokens.{videos}",
        loc="left",
        fontsize=10,
    )
    for index, (box, strip) in enumerate(zip(page.boxes, strips(batch), strict=True)):
        t, h, w = batch.grid_thw[index].tolist()
        sides = [max(1, round(side * _DPI)) for side in (box.height, box.width)]
        if sides[0] < strip.shape[0]:
            strip = resize_rgb(Image.fromarray(strip), *sides)
        right, bottom = box.left + box.width, box.top + box.height
        axes.imshow(strip, extent=(box.left, right, bottom, box.top), aspect="auto", interpolation="antialiased")
        size = f"{t} x {h} x {w}" if batch.modality == "video" else f"{h} x {w}"
        for line, words in enumerate((f"{size} = {t * h * w}", " ".join(batch.captions[index].split()))):
            axes.text(
                box.left,
                bottom + 0.03 + line * 1.25 * _LABEL_PT / 72,
                _fitting(words, box.width),
                fontsize=_LABEL_PT,
                va="top",
                weight="bold" if line == 0 else "normal",
                parse_math=False,
            )
        corner = (box.left, box.top)
        axes.add_patch(
            Rectangle(corner, box.width, box.height, fill=False, edgecolor=_COLOURS(scale(t * h * w)), linewidth=2)
        )
    axes.set(xlim=(0, _WIDTH_IN - 2 * _MARGIN_IN), ylim=(page.height, 0))


def strips(batch: PackedBatch) -> list[np.ndarray]:
    """Each item as one image (H, W, 3) uint8; for a video, the first frames of its tubelets side by side."""
    pixels = batch.pixels.numpy()
    frames, grids = batch.frames.tolist(), batch.grid_thw.tolist()
    sizes = [count * h * w * PATCH * PATCH * 3 for count, (_, h, w) in zip(frames, grids, strict=True)]
    images = []
    for start, size, count, (_, h, w) in zip(cumulative(sizes), sizes, frames, grids, strict=False):
        item = pixels[start : start + size].reshape(count, h * PATCH, w * PATCH, 3)
        images.append(np.concatenate(list(item[::TUBELET]), axis=1))
    return images


def gallery(batch: PackedBatch | None) -> Gallery:
    """Arrange the items in rows, at a scale at which they fit on the page. Boxes are in the order of the pack."""
    if batch is None:
        return Gallery([], 0.3, 0.0)
    sizes = [(h * PATCH, t * w * PATCH) for t, h, w in batch.grid_thw.tolist()]
    inner = _WIDTH_IN - 2 * _MARGIN_IN
    area = sum(height * width for height, width in sizes)
    # Without space between items, their height is a quarter of the page's width. A pixel is at most one screen pixel.
    scale = min(math.sqrt(inner * inner / 4 / area), 1 / _DPI, inner / max(width for _, width in sizes))
    while (page := _rows(sizes, scale, inner)).height > _MOST_PACK_IN:
        scale *= 0.9
    return page


def _rows(sizes: Sequence[tuple[int, int]], scale: float, inner: float) -> Gallery:
    """Place the items by decreasing height, each in the first row with enough space."""
    rows: list[tuple[float, list[int]]] = []  # height, members
    ends: list[float] = []
    lefts = {}
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index][0]):
        height, width = (scale * side for side in sizes[index])
        number = next((number for number, end in enumerate(ends) if end + width <= inner * (1 + 1e-9)), len(rows))
        if number == len(rows):
            rows.append((height, []))
            ends.append(0.0)
        rows[number][1].append(index)
        lefts[index] = ends[number]
        ends[number] += width + _BETWEEN_IN
    boxes, top = {}, 0.0
    for height, members in rows:
        for index in members:
            boxes[index] = Box(lefts[index], top, scale * sizes[index][1], scale * sizes[index][0])
        top += height + _LABEL_IN
    return Gallery([boxes[index] for index in range(len(sizes))], top, scale)


def _fitting(words: str, width: float) -> str:
    """The text, cut to `width` inches; "" if only a few letters fit."""
    most = int(width / _CHARACTER_IN)
    if len(words) <= most:
        return words
    return words[: most - 2] + ".." if most > 5 else ""


def _plain(axes: Axes) -> None:
    axes.title.set_fontsize(10)
    axes.tick_params(labelsize=8)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
