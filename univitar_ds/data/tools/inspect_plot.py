"""Draws the result of `data inspect` as an image: sizes of the items, fill of the packs, and the items of one pack.

All three use the same colour scale: the colour of an item shows its number of tokens. The settings of matplotlib on the
machine have no effect.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps, style
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager, get_font
from matplotlib.patches import Rectangle
from PIL import Image

from univitar_ds.atomic_write import replacing
from univitar_ds.data.batch import PackedBatch
from univitar_ds.data.tools.inspect import Inspection, Stream
from univitar_ds.geometry import PATCH, TUBELET, cumulative
from univitar_ds.image_ops import resize_rgb
from univitar_ds.viz.fonts import fallbacks, missing, text_width, wrap

_DPI = 110
_WIDTH_IN = 15.0
_MARGIN_IN = 0.7
_PLOTS_IN = 2.9
_GAP_IN = 1.2
"""Space between the plots and the pack below them, for the labels of the plots and the heading of the pack."""
_REST_IN = 0.4
_HEAD_IN = 1.1
_MOST_PACK_IN = 14.0
_TEXT_PT, _LABEL_PT = 10.0, 8.0
_LABEL_LINES = 3
_LABEL_IN = (1.25 * _LABEL_LINES + 0.6) * _LABEL_PT / 72
"""Height of the text below each item: a line with its size and two of its caption."""
_LABEL_PX = math.ceil(_LABEL_PT * _DPI / 72)
_BETWEEN_IN = 0.12
_BINS = 40
_ROWS = 200
"""Pixels of the column of a pack; no more than on the screen, so that no line between items is lost."""
_BOLD = {"weight": "bold", "family": "DejaVu Sans"}
"""Other fonts may lack a bold face, and matplotlib would warn about every text."""
_WHOLE = {"integer": True, "min_n_ticks": 1}
"""Integer ticks for axes of counts. With the default of two ticks, short axes would have ticks at fractions."""
_EMPTY, _EMPTY_EDGE = "white", "#555555"
_COLOURS = colormaps["viridis"]
SOFTWARE = "univitar_ds data inspect"
"""The program that a PNG names as its own."""


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
    """Writes the image as PNG. Its folder must exist."""
    captions = [caption for stream in inspection.streams if stream.shown for caption in stream.shown.captions]
    with style.context(["default", {"font.family": _families(captions)}]):
        figure = _page(inspection, missing(captions))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing")  # the heading reports them
            if path.exists() and not path.is_file():  # /dev/stdout, a pipe
                figure.savefig(path, format="png")
                return
            with replacing(path) as partial:
                figure.savefig(partial, format="png", metadata={"Software": SOFTWARE})


def _families(captions: Sequence[str]) -> list[str]:
    """Returns DejaVu Sans and the families of the system's fonts that the captions need in addition."""
    families = ["DejaVu Sans"]
    for file in fallbacks(captions):
        try:
            families.append(get_font(str(file)).family_name)
            fontManager.addfont(str(file))
        except (OSError, RuntimeError, ValueError):  # a font that only Pillow reads
            families = families[:1] + [name for name in families[1:] if name in fontManager.get_font_names()]
    return families


def _page(inspection: Inspection, absent: Sequence[str]) -> Figure:
    galleries = [gallery(stream.shown) for stream in inspection.streams]
    heights = [_PLOTS_IN + _GAP_IN + page.height + _REST_IN for page in galleries]
    total = _HEAD_IN + sum(heights)
    figure = Figure(figsize=(_WIDTH_IN, total), dpi=_DPI, facecolor="white")
    left = _MARGIN_IN / _WIDTH_IN
    title = _lines(f"Run {inspection.run}: packs as its training would read them", 16, 1, bold=True)
    figure.text(left, 1 - 0.3 / total, title, fontsize=16, va="top", parse_math=False, **_BOLD)
    size = f"{inspection.shards} shard{'s' * (inspection.shards != 1)}, {inspection.bytes / 1e6:.1f} MB"
    text = (
        f"{size}. Colours are the number of tokens of an item, in all plots; a token is a patch of {PATCH} x {PATCH} px"
    )
    text += f", in videos of {TUBELET} frames."
    if absent:
        count = f"{len(absent)} character{'s' * (len(absent) != 1)}"
        text += f" Captions have {count} for which this machine has no font; install one, such as fonts-noto-cjk."
    figure.text(left, 1 - 0.68 / total, _lines(text, _TEXT_PT, 2), fontsize=_TEXT_PT, va="top", parse_math=False)
    top = _HEAD_IN
    for stream, page, height in zip(inspection.streams, galleries, heights, strict=True):
        _draw_stream(figure, total, top, stream, page)
        top += height
    return figure


def _draw_stream(figure: Figure, total: float, top: float, stream: Stream, page: Gallery) -> None:
    inner = _WIDTH_IN - 2 * _MARGIN_IN

    def axes(left: float, down: float, width: float, height: float) -> Axes:
        box = (left / _WIDTH_IN, 1 - (down + height) / total, width / _WIDTH_IN, height / total)
        return figure.add_axes(box)

    scale = Normalize(0, max(stream.tokens, default=1))
    plots, high = top + 0.75, _PLOTS_IN - 0.75
    for line, (text, weight) in enumerate(_headline(stream)):
        down = 1 - (top + 0.22 * line) / total
        text = _lines(text, 11, 1 + line, bold=line == 0)
        figure.text(_MARGIN_IN / _WIDTH_IN, down, text, fontsize=11, va="top", parse_math=False, **weight)
    _sizes(axes(_MARGIN_IN, plots, 0.4 * inner, high), stream, scale)
    _fills(axes(_MARGIN_IN + 0.46 * inner, plots, 0.47 * inner, high), stream, scale)
    bar = figure.colorbar(
        ScalarMappable(scale, _COLOURS),
        cax=axes(_MARGIN_IN + 0.95 * inner, plots, 0.15, high),
        label="tokens of an item",
    )
    bar.ax.tick_params(labelsize=9)
    bar.ax.yaxis.get_major_locator().set_params(**_WHOLE)
    _pack(axes(_MARGIN_IN, top + _PLOTS_IN + _GAP_IN, inner, page.height), stream.shown, page, scale)


def _lines(text: str, points: float, lines: int, *, bold: bool = False) -> str:
    """Wraps a text to the width of the page."""
    width = round(_DPI * (_WIDTH_IN - 2 * _MARGIN_IN))
    return "\n".join(wrap(text, width, lines, math.ceil(points * _DPI / 72), bold=bold))


def _headline(stream: Stream) -> list[tuple[str, dict[str, str]]]:
    """Returns the lines above the plots of a stream, each with its font."""
    figures = stream.to_json()
    fill, items = figures["fill_pct"]["mean"], figures["items_per_pack"]["mean"]
    left_out = stream.bad + Counter({"by where": stream.filtered.total()})  # the rules are too long for a line
    bad = ", ".join(f"{count} {kind}" for kind, count in sorted(left_out.items())) or "none"
    return [
        (f"Stage {stream.stage.name}, {stream.modality}s: the first {len(stream.packs)} packs", _BOLD),
        (
            f"{stream.stage.token_budget} tokens a pack, {fill:.2f} % full, {items:.1f} items a pack; a sample waited "
            f"for at most {stream.longest_wait} packs; {stream.downscaled} items were made smaller; samples left out: "
            f"{bad}",
            {},
        ),
    ]


def _sizes(axes: Axes, stream: Stream, scale: Normalize) -> None:
    """Draws the histogram of tokens."""
    tokens = stream.tokens
    low, high = min(tokens, default=0) - 0.5, max(tokens, default=0) + 0.5
    _, edges, bars = axes.hist(tokens, bins=min(_BINS, round(high - low)), range=(low, high), rwidth=0.94)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(**_WHOLE)
    for edge, bar in zip((edges[:-1] + edges[1:]) / 2, bars, strict=True):
        bar.set_facecolor(_COLOURS(scale(edge)))
    if tokens:
        mean = sum(tokens) / len(tokens)
        line = axes.axvline(mean, color="black", linestyle="--", linewidth=1, label=f"mean, {mean:.1f} tokens")
        axes.legend(handles=[line], loc="upper left", fontsize=9)
        axes.margins(y=0.2)
    axes.set(title=f"Sizes of {len(tokens)} items", xlabel="tokens of an item", ylabel="number of items")
    _plain(axes)


def _fills(axes: Axes, stream: Stream, scale: Normalize) -> None:
    """Draws each pack as a column of its items, the largest at the bottom; the unused budget is hatched."""
    budget = stream.stage.token_budget
    columns = np.stack([_column(pack, budget, scale) for pack in stream.packs], axis=1)
    count = len(stream.packs)
    axes.imshow(columns, aspect="auto", origin="lower", extent=(0.5, count + 0.5, 0, 100), interpolation="nearest")
    fills = [min(100.0, 100 * fill) for fill in stream.fills]
    empty = axes.bar(
        range(1, count + 1),
        [100 - fill for fill in fills],
        bottom=fills,
        width=1.0,
        color=_EMPTY,
        edgecolor=_EMPTY_EDGE,
        hatch="////",
        linewidth=0,
        label="unused tokens",
    )
    for edge in range(1, count):
        axes.axvline(edge + 0.5, color="white", linewidth=min(1.5, 100 / count))
    axes.set(
        title="Fill of each pack; a stripe is an item",
        xlabel="number of the pack",
        ylabel="% of the token budget",
        xlim=(0.5, count + 0.5),
        ylim=(0, 100),
    )
    axes.legend(handles=[empty], loc="lower right", bbox_to_anchor=(1.0, 1.0), fontsize=9, frameon=False)
    axes.xaxis.get_major_locator().set_params(**_WHOLE)
    _plain(axes)


def _column(pack: Sequence[int], budget: int, scale: Normalize) -> np.ndarray:
    """Returns the colours of the column of a pack from the bottom: (rows, 3), between 0 and 1."""
    column = np.ones((_ROWS, 3))
    bounds = [round(_ROWS * tokens / budget) for tokens in cumulative(sorted(pack, reverse=True))]
    for tokens, start, end in zip(sorted(pack, reverse=True), bounds[:-1], bounds[1:], strict=True):
        column[start:end] = _COLOURS(scale(tokens))[:3]
        if end - start > 3:
            column[end - 1] = 1.0  # a line between items
    return column


def _pack(axes: Axes, batch: PackedBatch | None, page: Gallery, scale: Normalize) -> None:
    """Draws the items at the same scale."""
    axes.set(xlim=(0, _WIDTH_IN - 2 * _MARGIN_IN), ylim=(page.height, 0))
    axes.axis("off")
    if batch is None:
        axes.set_title("No item could be decoded.", loc="left")
        return
    video = batch.modality == "video"
    sizes = "time x height x width" if video else "height x width"
    shown = f" Of a video, the first of each {TUBELET} frames is shown." if video else ""
    axes.set_title(
        f"The first pack: {len(batch)} {batch.modality}s, {batch.tokens} tokens, all at the same scale, as the model "
        f"gets them.{shown}\nBelow each: {sizes} = tokens, and the caption. Its area is proportional to its tokens.",
        loc="left",
        fontsize=_TEXT_PT,
    )
    for index, (box, strip) in enumerate(zip(page.boxes, strips(batch), strict=True)):
        t, h, w = batch.grid_thw[index].tolist()
        sides = [max(1, round(side * _DPI)) for side in (box.height, box.width)]
        if sides[0] < strip.shape[0]:
            strip = resize_rgb(Image.fromarray(strip), *sides)
        right, bottom = box.left + box.width, box.top + box.height
        axes.imshow(strip, extent=(box.left, right, bottom, box.top), aspect="auto", interpolation="antialiased")
        between = [box.left + box.width * part / t for part in range(1, t)]
        axes.vlines(between, box.top, bottom, colors="white", linewidth=1.0)
        for line, words in enumerate(_label((t, h, w), batch, index, box.width)):
            axes.text(
                box.left,
                bottom + 0.04 + line * 1.25 * _LABEL_PT / 72,
                words,
                fontsize=_LABEL_PT,
                va="top",
                parse_math=False,
                **(_BOLD if line == 0 else {}),
            )
        corner = (box.left, box.top)
        axes.add_patch(
            Rectangle(corner, box.width, box.height, fill=False, edgecolor=_COLOURS(scale(t * h * w)), linewidth=2)
        )
    axes.set(xlim=(0, _WIDTH_IN - 2 * _MARGIN_IN), ylim=(page.height, 0))


def _label(grid: tuple[int, int, int], batch: PackedBatch, index: int, width: float) -> list[str]:
    """Returns the lines below an item that is `width` inches wide: its size, and its caption where there is space."""
    t, h, w = grid
    size = f"{t} x {h} x {w}" if batch.modality == "video" else f"{h} x {w}"
    most = math.floor(width * _DPI)
    sizes = (f"{size} = {t * h * w} tokens", f"{size} = {t * h * w}", str(t * h * w))
    first = next((text for text in sizes if text_width(text, _LABEL_PX, bold=True) <= most), "")
    text = batch.captions[index] or (f"label: {batch.labels[index]}" if batch.labels[index] else "")
    return [first, *(wrap(text, most, _LABEL_LINES - 1, _LABEL_PX) if most > 3 * _LABEL_PX else [])]


def strips(batch: PackedBatch) -> list[np.ndarray]:
    """Returns each item as one image (H, W, 3) uint8; for a video, the first frames of its tubelets side by side."""
    pixels = batch.pixels.numpy()
    frames, grids = batch.frames.tolist(), batch.grid_thw.tolist()
    sizes = [count * h * w * PATCH * PATCH * 3 for count, (_, h, w) in zip(frames, grids, strict=True)]
    images = []
    for start, size, count, (_, h, w) in zip(cumulative(sizes), sizes, frames, grids, strict=False):
        item = pixels[start : start + size].reshape(count, h * PATCH, w * PATCH, 3)
        images.append(np.concatenate(list(item[::TUBELET]), axis=1))
    return images


def gallery(batch: PackedBatch | None) -> Gallery:
    """Arranges the items in rows, at a scale at which they fit on the page. Boxes are in the order of the pack."""
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
    """Places the items by decreasing height, each in the first row with enough space."""
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


def _plain(axes: Axes) -> None:
    axes.title.set_fontsize(_TEXT_PT + 1)
    axes.tick_params(labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
